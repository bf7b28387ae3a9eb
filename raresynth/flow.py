"""The flow: which stage needs which, where each leaves its result, and when it need not run again.

CLI, DVC stages and KFP components all call `execute`. A stage reads earlier results and writes one new place
under the run's folder; its record in `stages/` names the SHA-256 of every file it left. A stage whose inputs,
params and code are those of its record, and whose files are still the same, is finished and not repeated.
"""

import fcntl
import json
import os
import platform
import resource
import shutil
import time
import traceback
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raresynth import lineage
from raresynth.config import Params, Symmetries
from raresynth.errors import CheckpointError, ParamsError, RaresynthError, TooFewImages, describe
from raresynth.processes import in_processes, leads, limit_threads, only_run_of, rank_and_world
from raresynth.progress import lines_only

if TYPE_CHECKING:
    from raresynth.dataset.probe import Seen
    from raresynth.gan.synthesis import Drawing
    from raresynth.quality.judge import KidJudge

ALL = "all"
"""Item of a stage that runs once."""
Each = Literal["label", "arm", "shard", "part"]


@dataclass(frozen=True)
class Run:
    """One run: images in, everything else below `store`."""

    data_dir: Path
    store: Path
    params: Params

    @property
    def packed(self) -> Path:
        """Cache of decoded pixels."""
        return self.store / "packed"


class Record(lineage.Report):
    """What a finished stage left behind."""

    stage: str
    item: str
    key: str
    """SHA-256 of all that the result depends on: see `key_of`."""
    inputs: dict[str, str]
    """Upstream `stage/item` -> SHA-256 of what it left."""
    source: str
    """`.dir` hash of the image folder, or of a shard of it, where the stage is the first to read it or names it."""
    weights: dict[str, str]
    """Params section -> SHA-256 of the weights file that it names."""
    code: str
    """SHA-256 of the library's files that the result depends on."""
    status: Literal["done", "failed", "skipped"]
    reason: str = ""
    retry: bool = False
    """Whether an error ended it, so that it is tried again when the run is started again."""
    output: str
    """Folder of the result, relative to the run's folder."""
    files: dict[str, str]
    """File, relative to the run's folder -> SHA-256."""

    @property
    def digest(self) -> str:
        """SHA-256 over all that the stage left."""
        return lineage.sha256_json([self.status, self.reason, self.files])


Needs = Mapping[str, Mapping[str, Record]]
"""Upstream stage -> item -> its record."""
Outcome = tuple[Literal["done", "failed", "skipped"], str]
DONE: Outcome = ("done", "")


@dataclass(frozen=True)
class Task:
    """What a stage's function gets: the run, the item, where to write, and the records of what it needs."""

    run: Run
    item: str
    out_dir: Path
    key: str
    needs: Needs

    def path(self, stage: str, item: str | None = None) -> Path:
        """Folder in which an upstream stage left its result."""
        records = self.needs[stage]
        return self.run.store / records[item or (self.item if self.item in records else ALL)].output

    @property
    def manifest(self) -> Path:
        """The validated manifest."""
        return self.path("validate") / "manifest.csv"

    @property
    def symmetries(self) -> Symmetries:
        """What trainings may do to the images."""
        from raresynth.dataset.symmetries import read_symmetries

        return read_symmetries(self.path("validate")).symmetries

    @property
    def device(self) -> str:
        """Where tensors live: "cpu" or "cuda"."""
        return device(self.run.params)


def device(params: Params) -> str:
    """Where tensors live: "cpu" or "cuda".

    Raises:
        ParamsError: cuda is asked for and there is none.
    """
    import torch

    if params.compute.device == "cuda" and not torch.cuda.is_available():
        raise ParamsError("compute.device is cuda but no CUDA device is visible; set compute.device to cpu or auto")
    return "cuda" if params.compute.device != "cpu" and torch.cuda.is_available() else "cpu"


def _probe(task: Task) -> Outcome:
    from raresynth.dataset.shards import probe_shard

    probe_shard(task.run.data_dir, task.item, task.out_dir, task.run.params.validation)
    return DONE


def _build_manifest(task: Task) -> Outcome:
    from raresynth.dataset.importers import build_manifest

    run = task.run
    build_manifest(run.data_dir, task.out_dir, run.params.dataset, run.params.seed, _seen(run, task.needs))
    return DONE


def _validate(task: Task) -> Outcome:
    from raresynth.dataset.expectations import validate
    from raresynth.gan.presets import check_ranks, resolve

    params = task.run.params  # whose mistakes are better found now than after hours of training
    _named_files(params, ("classifier", "quality"))
    check_ranks(resolve(params.gan), params.compute.ranks)
    manifest = task.path("build-manifest") / "manifest.csv"
    seen = _seen(task.run, task.needs)
    validate(task.run.data_dir, manifest, task.out_dir, params.validation, seen, params.dataset.symmetries)
    return DONE


def _seen(run: Run, needs: Needs) -> "dict[str, Seen]":
    """What the shards tell of the files; nothing where there are none."""
    from raresynth.dataset.shards import read_shards

    return read_shards(run.store / record.output for record in needs["probe"].values())


def _train_encoder(task: Task) -> Outcome:
    from raresynth.classifier.network import check_model
    from raresynth.quality.encoder import train_encoder

    run, device = task.run, task.device
    check_model(run.params.classifier.model)  # better now than after hours of training
    config, seed = run.params.encoder, run.params.seed
    train_encoder(
        run.data_dir, task.manifest, task.out_dir, config, seed, device, run.packed, symmetries=task.symmetries
    )
    return DONE


def _pretrain(task: Task) -> Outcome:
    from raresynth.gan.ranks import joined, launch
    from raresynth.gan.training import pretrain

    run = task.run
    n = run.params.compute.ranks
    if n > 1 and rank_and_world() == (0, 1):  # torchrun, where it started this, has said how many
        return launch(n, _pretrain, task)
    with joined(task.device) as ranks:
        report = pretrain(
            run.data_dir,
            task.manifest,
            task.out_dir,
            run.params.gan,
            run.params.seed,
            task.device,
            run.packed,
            run.params.compute.checkpoint_every_s,
            _judge(task),
            ranks,
            symmetries=task.symmetries,
        )
    return DONE if report.status == "trained" else ("failed", f"universal generator: {report.reason or report.status}")


def _finetune(task: Task) -> Outcome:
    from raresynth.gan.training import finetune

    run = task.run
    report = finetune(
        run.data_dir,
        task.manifest,
        task.path("pretrain"),
        task.item,
        task.out_dir,
        run.params.gan,
        run.params.seed,
        task.device,
        run.packed,
        run.params.compute.checkpoint_every_s,
        _judge(task),
        symmetries=task.symmetries,
    )
    return DONE if report.status == "trained" else ("failed", report.reason or report.status)


def _judge(task: Task) -> "KidJudge":
    from raresynth.quality.judge import KidJudge

    run = task.run
    return KidJudge(run.data_dir, task.manifest, task.path("train-encoder"), run.params.seed, run.packed, task.device)


def _draw(task: Task) -> Outcome:
    from raresynth.dataset.shards import label_and_shard, number_and_count
    from raresynth.gan.synthesis import draw_part

    label, shard = label_and_shard(task.item)
    drawing, n = _drawing(task, label)
    draw_part(drawing, n, *number_and_count(shard), task.out_dir)
    return DONE


def _synthesize(task: Task) -> Outcome:
    from raresynth.gan.synthesis import synthesize

    drawing, n = _drawing(task, task.item)
    report = synthesize(drawing, n, task.out_dir, [task.path("draw", part) for part in task.needs["draw"]])
    if report.n_images == n:
        return DONE
    why = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in report.rejected.items())
    return "failed", (
        f"of {report.n_drawn} images drawn only {report.n_images} of the {n} wanted could be used ({why}); "
        "train longer, or loosen synthesis.typical_share"
    )


def _drawing(task: Task, label: str) -> "tuple[Drawing, int]":
    """A class's generator with its sieve, and how many images are to be drawn."""
    from raresynth.dataset.balance import images_to_synthesize
    from raresynth.dataset.manifest import read_manifest
    from raresynth.gan.synthesis import Drawing
    from raresynth.quality.sieve import TrainSieve

    run, config = task.run, task.run.params.synthesis
    encoder = task.path("train-encoder")
    sieve = TrainSieve(run.data_dir, task.manifest, encoder, label, config, run.packed, task.device)
    drawing = Drawing(task.path("finetune", label), label, config, task.device, sieve)
    balancing = images_to_synthesize(read_manifest(task.manifest), run.params.balance)[label]
    return drawing, max(balancing, config.min_images)


def _synthesize_majority(task: Task) -> Outcome:
    from raresynth.dataset.balance import images_to_synthesize
    from raresynth.dataset.manifest import read_manifest
    from raresynth.gan.synthesis import Drawing, synthesize

    run = task.run
    if "synthetic" not in run.params.classifier.arms:
        return "skipped", "no arm of the classifier is trained on synthetic images alone"
    universal = task.needs["pretrain"][ALL]
    if universal.status == "failed":
        return "failed", universal.reason
    manifest = read_manifest(task.manifest)
    counts = manifest["label"][manifest["split"] == "train"].value_counts()
    for label in sorted(counts.index.difference(list(images_to_synthesize(manifest, run.params.balance)))):
        n = min(int(counts[label]), run.params.balance.max_per_class or int(counts[label]))
        drawing = Drawing(task.path("pretrain"), label, run.params.synthesis, task.device, None)
        synthesize(drawing, n, task.out_dir / label)
    return DONE


def _measure(task: Task) -> Outcome:
    from raresynth.quality.measure import measure

    run = task.run
    try:
        measure(
            run.data_dir,
            task.manifest,
            task.path("train-encoder"),
            task.path("synthesize"),
            task.item,
            task.out_dir,
            run.params.quality,
            run.params.gate,
            run.params.synthesis.typical_share,
            run.params.seed,
            run.packed,
        )
    except TooFewImages as error:
        return "skipped", str(error)
    return DONE


def _gate(task: Task) -> Outcome:
    from raresynth.dataset.balance import images_to_synthesize
    from raresynth.dataset.manifest import read_manifest
    from raresynth.quality.accepted import gate

    records = task.needs["measure"]

    def reasons(*, final: bool) -> dict[str, str]:
        """Why classes were not measured: for good, or such that more images, or another try, may change it."""
        return {
            label: record.reason
            for label, record in records.items()
            if record.status != "done" and (record.status == "failed" and not record.retry) == final
        }

    def done(stage: str) -> dict[str, Path]:
        return {of: task.path(stage, of) for of, record in task.needs[stage].items() if record.status == "done"}

    # Not iterdir: where every class is synthesised anyway there is no such folder.
    majority = [folder for root in done("synthesize-majority").values() for folder in sorted(root.glob("*"))]
    gate(
        done("measure"),
        reasons(final=True),
        reasons(final=False),
        done("synthesize") | {folder.name: folder for folder in majority},
        images_to_synthesize(read_manifest(task.manifest), task.run.params.balance),
        task.run.store,
        task.out_dir,
        task.run.params.gate,
    )
    return DONE


def _train_classifier(task: Task) -> Outcome:
    from raresynth.classifier.training import train_classifier

    run = task.run
    report = train_classifier(
        run.data_dir,
        task.manifest,
        task.path("gate") / ("drawn.csv" if task.item == "synthetic" else "accepted.csv"),
        run.store,
        task.item,
        task.out_dir,
        run.params.classifier,
        run.params.seed,
        task.device,
        run.packed,
        run.params.compute.checkpoint_every_s,
        symmetries=task.symmetries,
    )
    return DONE if report.status == "trained" else ("skipped", report.reason)


def _evaluate(task: Task) -> Outcome:
    from raresynth.classifier.evaluation import evaluate

    run = task.run
    arms = {arm: task.path("train-classifier", arm) for arm in task.needs["train-classifier"]}
    report = evaluate(
        run.data_dir,
        task.manifest,
        arms,
        task.out_dir,
        run.params.classifier,
        run.params.release,
        run.params.seed,
        task.device,
        run.packed,
    )
    classes = json.loads((task.path("gate") / "decisions.json").read_text(encoding="utf-8"))["classes"]
    lineage.write_json(
        run.store / "decisions.json", {"classes": classes, "release": report.release.model_dump(mode="json")}
    )
    return DONE


def _package(task: Task) -> Outcome:
    from raresynth.bundle.package import Sources, package

    run = task.run
    package(
        Sources(
            data_dir=run.data_dir,
            data_md5=task.needs["build-manifest"][ALL].source,
            manifest=task.manifest,
            validation_dir=task.path("validate"),
            encoder_dir=task.path("train-encoder"),
            generator_dirs={
                label: task.path("finetune", label)
                for label, record in task.needs["finetune"].items()
                if record.status == "done"
            },
            classifier_dirs={
                arm: task.path("train-classifier", arm)
                for arm, record in task.needs["train-classifier"].items()
                if record.status == "done"
            },
            decisions=run.store / "decisions.json",
            packed_dir=run.packed,
            quality_dirs={
                label: task.path("measure", label)
                for label, record in task.needs["measure"].items()
                if record.status == "done"
            },
            gate_dir=task.path("gate"),
            evaluation_dir=task.path("evaluate"),
            records=[record.model_dump(mode="json") for record in records_before("package", run)],
            parents={
                f"{stage}/{item}": record.digest
                for stage, records in task.needs.items()
                for item, record in records.items()
            },
        ),
        task.out_dir,
        run.params,
    )
    return DONE


def _report(task: Task) -> Outcome:
    from raresynth.report.findings import Sources
    from raresynth.report.page import render

    def folders(stage: str, *statuses: str) -> dict[str, Path]:
        records = task.needs[stage]
        return {item: task.path(stage, item) for item, record in records.items() if record.status in statuses}

    run = task.run
    sources = Sources(
        data_dir=run.data_dir,
        validation_dir=task.path("validate"),
        encoder_dir=task.path("train-encoder"),
        pretrain_dir=task.path("pretrain"),
        finetune_dirs=folders("finetune", "done", "failed"),
        synthetic_dirs=folders("synthesize", "done"),
        synthetic_root=run.store / "synthetic",
        quality_dirs=folders("measure", "done"),
        gate_dir=task.path("gate"),
        arm_dirs=folders("train-classifier", "done", "skipped"),
        evaluation_dir=task.path("evaluate"),
        decisions=run.store / "decisions.json",
        bundle_dir=task.path("package"),
    )
    render(sources, run.params, run.store / "report.html")
    return DONE


def _md5_of_shard(run: Run, shard: str, _: Needs) -> str:
    from raresynth.dataset.shards import shard_md5

    return shard_md5(run.data_dir, shard)


def _md5_of_folder(run: Run, _: str, needs: Needs) -> str:
    return lineage.dvc_dir_md5(run.data_dir, {path: seen.md5 for path, seen in _seen(run, needs).items()})


def _md5_that_was_read(_: Run, __: str, needs: Needs) -> str:
    """Other files beside the images change it too: another data version, which the bundle then names."""
    return needs["build-manifest"][ALL].source


@dataclass(frozen=True)
class Stage:
    """One stage of the flow.

    Attributes:
        call: runs it; all heavy imports happen inside.
        needs: upstream stages, all of whose items must be finished.
        sections: params sections that change its result.
        code: library parts that change its result.
        place: where its result lies below the run's folder, with {item} and {key} filled in.
        each: what it is repeated for; a part is a shard of a class.
        source: hash of the raw images that it is the first to read, or names.
        extra: further files it leaves, outside its place.
    """

    call: Callable[[Task], Outcome]
    needs: tuple[str, ...]
    sections: tuple[str, ...]
    code: tuple[str, ...]
    place: str
    each: Each | None = None
    source: Callable[[Run, str, Needs], str] | None = None
    extra: tuple[str, ...] = ()
    resumes: bool = field(default=False)


_IMAGES = ("dataset/images.py", "dataset/manifest.py", "lineage.py")
_TRAINING = (*_IMAGES, "training_state.py")
_JUDGING = tuple(f"quality/{name}.py" for name in ("copying", "distances", "encoder", "judge", "neighbours", "reals"))
_DRAWING = (*_IMAGES, "gan", *_JUDGING, "quality/sieve.py", "dataset/balance.py", "dataset/shards.py")

STAGES: dict[str, Stage] = {
    "probe": Stage(_probe, (), ("validation",), ("dataset",), "probed/{item}", each="shard", source=_md5_of_shard),
    "build-manifest": Stage(
        _build_manifest, ("probe",), ("seed", "dataset"), ("dataset",), "manifest", source=_md5_of_folder
    ),
    "validate": Stage(_validate, ("probe", "build-manifest"), ("validation", "dataset"), ("dataset",), "validation"),
    "train-encoder": Stage(
        _train_encoder,
        ("validate",),
        ("seed", "encoder"),
        (*_TRAINING, *(f"quality/{name}.py" for name in ("controls", "distances", "encoder"))),
        "checkpoints/train-encoder/{item}/{key}",
        resumes=True,
    ),
    "pretrain": Stage(
        _pretrain,
        ("validate", "train-encoder"),
        ("seed", "gan"),
        (*_TRAINING, "gan", *_JUDGING),
        "checkpoints/pretrain/{item}/{key}",
        resumes=True,
    ),
    "finetune": Stage(
        _finetune,
        ("validate", "train-encoder", "pretrain"),
        ("seed", "gan"),
        (*_TRAINING, "gan", *_JUDGING),
        "checkpoints/finetune/{item}/{key}",
        each="label",
        resumes=True,
    ),
    "draw": Stage(
        _draw,
        ("validate", "train-encoder", "finetune"),
        ("balance", "synthesis"),
        _DRAWING,
        "drawn/{item}",
        each="part",
    ),
    "synthesize": Stage(
        _synthesize,
        ("validate", "train-encoder", "finetune", "draw"),
        ("balance", "synthesis"),
        _DRAWING,
        "synthetic/{item}",
        each="label",
    ),
    "synthesize-majority": Stage(
        _synthesize_majority,
        ("validate", "pretrain"),
        ("balance", "synthesis", "classifier"),
        (*_IMAGES, "gan", "dataset/balance.py"),
        "synthetic-majority",
    ),
    "measure": Stage(
        _measure,
        ("validate", "train-encoder", "synthesize"),
        ("seed", "synthesis", "quality", "gate"),
        (*_IMAGES, "quality"),
        "quality/{item}",
        each="label",
    ),
    "gate": Stage(
        _gate,
        ("validate", "finetune", "synthesize", "synthesize-majority", "measure"),
        ("balance", "gate"),
        ("quality", "dataset/balance.py", "dataset/manifest.py", "lineage.py"),
        "gate",
    ),
    "train-classifier": Stage(
        _train_classifier,
        ("validate", "gate"),
        ("seed", "classifier"),
        (*_TRAINING, "classifier"),
        "checkpoints/train-classifier/{item}/{key}",
        each="arm",
        resumes=True,
    ),
    "evaluate": Stage(
        _evaluate,
        ("validate", "gate", "train-classifier"),
        ("seed", "classifier", "release"),
        (*_IMAGES, "classifier"),
        "evaluation",
        extra=("decisions.json",),
    ),
    "package": Stage(
        _package,
        (
            "build-manifest",
            "validate",
            "train-encoder",
            "finetune",
            "synthesize",
            "measure",
            "gate",
            "train-classifier",
            "evaluate",
        ),
        tuple(Params.model_fields),
        ("",),
        "bundle",
        source=_md5_that_was_read,
    ),
    "report": Stage(
        _report,
        (
            "validate",
            "train-encoder",
            "pretrain",
            "finetune",
            "synthesize",
            "measure",
            "gate",
            "train-classifier",
            "evaluate",
            "package",
        ),
        tuple(Params.model_fields),
        ("",),
        "report",
        extra=("report.html",),
    ),
}


def items(run: Run, each: Each | None) -> list[str]:
    """What a stage is repeated for: the classes to synthesise, the classifier's arms, shards, or once.

    Shards there are where `compute.shards` is above 1.
    """
    if each is None:
        return [ALL]
    if each == "arm":
        return list(run.params.classifier.arms)
    if each == "shard":
        return _shards(run)
    labels = _labels(run)
    return labels if each == "label" else [part for label in labels for part in _parts(run, label)]


def _shards(run: Run) -> list[str]:
    from raresynth.dataset.shards import shard_names

    return shard_names(run.params.compute.shards)


def _parts(run: Run, label: str) -> list[str]:
    from raresynth.dataset.shards import part_name

    return [part_name(label, shard) for shard in _shards(run)]


def _labels(run: Run) -> list[str]:
    from raresynth.dataset.balance import images_to_synthesize
    from raresynth.dataset.manifest import read_manifest

    manifest = read_manifest(run.store / STAGES["validate"].place / "manifest.csv")
    return [label for label, n in images_to_synthesize(manifest, run.params.balance).items() if n > 0]


def records_before(stage: str, run: Run) -> list[Record]:
    """The records of all stages that come before one, in the flow's order."""
    before = list(STAGES)[: list(STAGES).index(stage)]
    return [read_record(run.store, name, item) for name in before for item in items(run, STAGES[name].each)]


def records_behind(stage: str, store: Path) -> list[Record]:
    """The record of a stage that runs once, and of all that it was made from, whatever the params say by now."""
    found: dict[str, Record] = {}
    names = [f"{stage}/{ALL}"]
    while names:
        name = names.pop()
        if name not in found:
            upstream, _, item = name.partition("/")
            found[name] = read_record(store, upstream, item)
            names += found[name].inputs
    return list(found.values())


def record_path(store: Path, stage: str, item: str = ALL) -> Path:
    """Where the record of a finished stage lies."""
    folder = store / "stages"
    return folder / f"{stage}.json" if STAGES[stage].each is None else folder / stage / f"{item}.json"


def execute(stage: str, run: Run, item: str = ALL, given: Mapping[str, Path] | None = None) -> Record:
    """Run one stage for one item, unless its finished result is already there.

    Under torchrun, as `pretrain` may be, all ranks call this alike and the first writes the record.

    Args:
        given: records that the caller was handed, by stage: those that the run's folder must hold.

    Raises:
        RaresynthError: an input is missing or cannot be used, or is not the one that the caller was handed.
    """
    limit_threads(run.params.compute.threads)
    spec = STAGES[stage]
    needs = _upstream(spec, run, item, given or {})
    inputs = {f"{name}/{of}": record.digest for name, records in needs.items() for of, record in records.items()}
    source = spec.source(run, item, needs) if spec.source else ""
    weights = _named_files(run.params, spec.sections)
    code = lineage.code_hash(*spec.code)
    key = key_of(stage, item, inputs, source, run.params.model_dump(mode="json"), weights, code)
    path = record_path(run.store, stage, item)
    finished = _finished(path, key, run.store)
    if finished is not None:
        return finished
    place = spec.place.format(item=item, key=key[:16])
    out_dir = run.store / place
    if out_dir.exists() and not spec.resumes:
        shutil.rmtree(out_dir)
    name = stage if spec.each is None else f"{stage}/{item}"
    with _logged(run, name), lines_only(spec.each is not None and run.params.compute.parallel_tasks > 1):
        (status, reason), retry = _attempt(stage, Task(run, item, out_dir, key, needs))
    made = [] if retry else sorted(out_dir.rglob("*"))
    left = [*(p for p in made if p.is_file()), *(run.store / name for name in spec.extra)]
    record = Record(
        stage=stage,
        item=item,
        key=key,
        inputs=inputs,
        source=source,
        weights=weights,
        code=code,
        status=status,
        reason=reason,
        retry=retry,
        output=place,
        files={p.relative_to(run.store).as_posix(): lineage.sha256_file(p) for p in left},
    )
    if leads():
        lineage.write_report(path, record)
    return record


def key_of(
    stage: str,
    item: str,
    inputs: Mapping[str, str],
    source: str,
    params: Mapping[str, Any],
    weights: Mapping[str, str],
    code: str,
) -> str:
    """SHA-256 of all that a stage's result depends on; arguments as in `Record`.

    Args:
        params: as JSON, with the knobs that there were when the stage ran.
    """
    sections = {name: params[name] for name in STAGES[stage].sections if name in params}
    return lineage.sha256_json([stage, item, dict(inputs), source, sections, dict(weights), code])


def execute_all(stage: str, run: Run) -> list[Record]:
    """Run one stage for all its items, as many at once as params allow, each in a process of its own."""
    todo = items(run, STAGES[stage].each)
    record_path(run.store, stage, ALL).parent.mkdir(parents=True, exist_ok=True)  # DVC follows it where it is empty too
    workers = min(len(todo), run.params.compute.parallel_tasks)
    if workers <= 1:
        return [execute(stage, run, item) for item in todo]
    try:
        return in_processes(partial(execute, stage, run), todo, workers)
    except BrokenProcessPool:
        raise RaresynthError(
            f"a process of {stage} was killed, most likely for want of memory; lower compute.parallel_tasks, "
            "and start the same command again, which goes on from here"
        ) from None


def _named_files(params: Params, sections: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of the weights files that params name, by section.

    Raises:
        ParamsError: there is no such file.
    """
    digests = {}
    for section, knob, value, words in (
        ("classifier", "weights", params.classifier.weights, ("pretrained", "scratch")),
        ("quality", "inception", params.quality.inception, ("auto", "none")),
    ):
        if section in sections and value not in words:
            if not Path(value).is_file():
                raise ParamsError(f"{section}.{knob} names {value}, which is no file; name one or {' or '.join(words)}")
            digests[section] = lineage.sha256_file(Path(value))
    return digests


def _upstream(spec: Stage, run: Run, item: str, given: Mapping[str, Path]) -> dict[str, dict[str, Record]]:
    needs: dict[str, dict[str, Record]] = {}
    for name in spec.needs:
        wanted = _wanted(run, spec.each, item, STAGES[name].each)
        needs[name] = {of: read_record(run.store, name, of) for of in wanted}
        if name in given and any(_read_record(given[name], name) != record for record in needs[name].values()):
            raise CheckpointError(
                f"{run.store} no longer holds the result of {name} that this run was handed: another run of the same "
                "name has replaced it; start this one without cache (submit --no-cache), or under another name"
            )
    check_together(run, [record for records in needs.values() for record in records.values()])
    return needs


def check_together(run: Run, records: Collection[Record]) -> None:
    """Refuse results of which one was made from another state of the other than there is now.

    Raises:
        CheckpointError: there are such, as after a run with other params that was interrupted.
    """
    left = {f"{record.stage}/{record.item}": record.digest for record in records}
    for record in records:
        for name, digest in record.inputs.items():
            if left.get(name, digest) != digest:
                raise CheckpointError(
                    f"the result of {record.stage} in {run.store} was made from another result of {name} than the one "
                    "there is now; start the whole run again, which brings it up to date"
                )


def _wanted(run: Run, each: Each | None, item: str, upstream: Each | None) -> list[str]:
    """The items of an upstream stage that one item needs: of a class its own, of arms its own, else all."""
    from raresynth.dataset.shards import label_and_shard

    if upstream == each and each is not None:
        return [item]
    if each == "part" and upstream == "label":
        return [label_and_shard(item)[0]]
    if each == "label" and upstream == "part":
        return _parts(run, item)
    return items(run, upstream)


def read_record(store: Path, stage: str, item: str = ALL) -> Record:
    """The record of a finished stage."""
    return _read_record(record_path(store, stage, item), stage)


def _read_record(path: Path, stage: str) -> Record:
    if not path.exists():
        raise CheckpointError(f"stage {stage} has not been run in this folder ({path} is missing); run it first")
    return lineage.read_report(path, Record)


def _finished(path: Path, key: str, store: Path) -> Record | None:
    try:
        record = lineage.read_report(path, Record)
    except CheckpointError:
        return None
    if record.key != key or record.retry:
        return None
    same = all(
        (store / name).is_file() and lineage.sha256_file(store / name) == digest
        for name, digest in record.files.items()
    )
    return record if same else None


def _attempt(stage: str, task: Task) -> tuple[Outcome, bool]:
    """What became of a stage, and whether an error ended it: with a class that fails the others go on."""
    if STAGES[stage].each not in {"label", "part"}:
        return STAGES[stage].call(task), False
    failed = [record for records in task.needs.values() for record in records.values() if record.status == "failed"]
    if failed:  # a class whose generator collapsed is carried on as failed; the gate then says why
        return ("failed", failed[0].reason), failed[0].retry
    try:
        return STAGES[stage].call(task), False
    except Exception as error:
        if isinstance(error, RaresynthError | OSError):
            return ("failed", f"{stage}: {describe(error)}"), True
        traceback.print_exc()
        return ("failed", f"{stage} ended with {type(error).__name__}: {error}"), True


@contextmanager
def alone_in(store: Path) -> Iterator[None]:
    """Within the block no other process works in this run's folder; what killed ones left half-written is removed.

    Raises:
        RaresynthError: another process does.
    """
    with only_run_of(store):
        places = {Path(spec.place).parts[0] for spec in STAGES.values()} | {"stages", "packed", "tuning"}
        # Not everywhere: who writes files of his own into the folder holds no lock. And not by every rank.
        for place in sorted(places) if leads() else ():
            lineage.clear_unfinished(store / place)
        yield


@contextmanager
def _logged(run: Run, name: str) -> Iterator[None]:
    """Note a stage's time and memory in run.json, the only place for what may differ between equal runs."""
    started = time.time()
    yield
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with edit_run_json(run.store) as log:
        log.setdefault("stages", {})[name] = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(time.time() - started, 2),
            "peak_memory_mb": round(peak_kb / 1024),
        }


@contextmanager
def edit_run_json(store: Path) -> Iterator[dict[str, Any]]:
    """Read run.json, and write it back changed; processes take turns, and of several ranks the first alone writes."""
    store.mkdir(parents=True, exist_ok=True)
    path = store / "run.json"
    with (store / ".run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        log = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"run_id": str(uuid.uuid4())}
        yield log
        if leads():
            lineage.write_json(path, log)


def note_start(run: Run, params_path: Path) -> None:
    """Note in run.json which data and params this run has, and on what machine."""
    with edit_run_json(run.store) as log:
        store = run.store.resolve()  # the way back out of a folder that a link leads into
        log["data"] = os.path.relpath(run.data_dir, store)
        log["params"] = os.path.relpath(params_path, store)
        log["machine"] = {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        }
