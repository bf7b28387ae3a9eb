"""From a bundle back to the raw images.

A bundle carries the records of all stages that it was made from. Each record names, by SHA-256, what the stage read
and what it left, so that nothing in the chain can be exchanged unseen; here all of it is computed again.
"""

import csv
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from raresynth import flow
from raresynth.audit.findings import Link
from raresynth.bundle.contents import DIGEST, Bundle, check_digest
from raresynth.config import ComputeConfig, Params
from raresynth.errors import CheckpointError, RaresynthError
from raresynth.lineage import code_hash, dvc_dir_md5, read_report, sha256_file, walk
from raresynth.quality.gate import decide
from raresynth.quality.reports import QualityReport

Records = Mapping[str, flow.Record]
"""Stage and item, as "finetune/melanoma" -> record."""

T = TypeVar("T")
OTHER_VERSION = "this version of raresynth has other code for it; take the one of the bundle's commit"


def audit_bundle(folder: Path, data: Path | None) -> Link:
    """Check a bundle and the whole chain behind it.

    Args:
        data: the raw images of the data version that the bundle names; None to leave them unchecked.
    """
    root = Link(f"bundle {folder}")
    bundle = _read(root, "bundle.json is what was written", lambda: _open(folder))
    if bundle is None:
        return root
    _check_files(root, folder, bundle)
    lineage = bundle.lineage
    if lineage.commit is None:
        root.unchecked("code's commit", "the code was not under git; each record names it by hash")
    elif lineage.dirty:
        root.unchecked(f"code's commit {lineage.commit}", "tracked files differed from it; each record has their hash")
    else:
        root.note("code's commit", lineage.commit)
    params = _params(root, bundle)
    records = _read(root, "records of the stages", lambda: _records(folder))
    if records is None:
        return root
    _check_models(root, bundle, records)
    _check_decisions(root, folder, bundle, records, params)
    stages = root.below(f"{len(records)} stages, each with the key and the inputs of its record")
    _check_records(stages, bundle, records)
    _check_images(stages, folder, bundle, records, params, data)
    return root


def _open(folder: Path) -> Bundle:
    check_digest(folder)
    return read_report(folder / "bundle.json", Bundle)


def _params(link: Link, bundle: Bundle) -> Params | None:
    """None where they have knobs that this version has not; the keys of the records tell whether they were changed."""
    try:
        params = Params.model_validate(bundle.lineage.params)
    except ValidationError as error:
        knobs = ", ".join(".".join(map(str, wrong["loc"])) or wrong["msg"] for wrong in error.errors())
        link.unchecked("params", f"this version of raresynth has other knobs ({knobs}); take the bundle's commit's")
        return None
    link.note("params", "")
    return params


def _records(folder: Path) -> Records:
    content = (folder / "lineage" / "records.json").read_bytes()
    records = TypeAdapter(list[flow.Record]).validate_json(content)
    unknown = {record.stage for record in records} - flow.STAGES.keys()
    if unknown:
        raise CheckpointError(f"they name stages that there are not: {', '.join(sorted(unknown))}")
    return {f"{record.stage}/{record.item}": record for record in records}


def _read(link: Link, what: str, read: Callable[[], T]) -> T | None:
    """What `read` returns, or None after noting that it cannot be read."""
    try:
        value = read()
    except (RaresynthError, OSError, ValidationError, ValueError, LookupError, csv.Error) as error:
        link.check(what, False, " ".join(str(error).split()))
        return None
    link.note(what, "")
    return value


def _check_files(link: Link, folder: Path, bundle: Bundle) -> None:
    found = {path.relative_to(folder).as_posix() for path in _files(folder)} - {"bundle.json", DIGEST}
    changed = [name for name, digest in bundle.files.items() if name in found and sha256_file(folder / name) != digest]
    for what, names in (
        ("was changed", changed),
        ("is missing", sorted(set(bundle.files) - found)),
        ("is not named in bundle.json", sorted(found - set(bundle.files))),
    ):
        for name in names:
            link.check(name, False, what)
    link.check(f"{len(bundle.files)} files have their SHA-256", not changed, f"{len(changed)} do not")


def _files(folder: Path) -> list[Path]:
    return [above / name for above, names in walk(folder) for name in names]


def _check_models(link: Link, bundle: Bundle, records: Records) -> None:
    arm = bundle.classifier.arm
    below = link.below(f"classifier {bundle.classifier.model}, arm {arm}")
    _check_weights(below, "classifier", bundle.classifier.weights_sha256, bundle, records, f"train-classifier/{arm}")
    below.check("released by the decision", bundle.decisions["release"]["arm"] == arm, "another arm was released")
    for label, generator in bundle.generators.items():
        below = link.below(f"generator {label}")
        place = f"generators/{label}"
        _check_weights(below, place, generator.weights_sha256, bundle, records, f"finetune/{label}")


def _check_weights(link: Link, place: str, digest: str, bundle: Bundle, records: Records, stage: str) -> None:
    link.check(
        "weights are those that bundle.json names",
        bundle.files.get(f"{place}/weights.safetensors") == digest,
        "they are others",
    )
    record = records.get(stage)
    left = {} if record is None else {Path(name).name: sha256 for name, sha256 in record.files.items()}
    link.check(f"weights are those that {stage} left", left.get("weights.safetensors") == digest, "they are others")


def _check_decisions(link: Link, folder: Path, bundle: Bundle, records: Records, params: Params | None) -> None:
    """The class gate is a pure function of reports and limits, so it decides again."""
    below = link.below("decisions")
    gate, told = records.get("gate/all"), folder / "lineage" / "gate.json"
    other_gate = params is None or (gate is not None and gate.code != code_hash(*flow.STAGES["gate"].code))
    if gate is not None and told.is_file():
        same = sha256_file(told) == gate.files.get(f"{gate.output}/decisions.json")
        same = same and json.loads(told.read_text(encoding="utf-8"))["classes"] == bundle.decisions["classes"]
        below.check("are those that gate left", same, "they are others")
    elif other_gate:
        below.unchecked(
            "are those that gate left", "not in the bundle: an earlier version made it, or they were removed"
        )
    else:
        below.check("are those that gate left", False, "lineage/gate.json is missing")
    for label, entry in bundle.decisions["classes"].items():
        what, measured = f"{label}: {entry['decision']}", records.get(f"measure/{label}")
        if measured is None or measured.status != "done":
            below.check(what, entry["decision"] != "accepted", "accepted without having been measured")
            continue
        figures = folder / "lineage" / "quality" / f"{label}.json"
        if not figures.is_file() or sha256_file(figures) != measured.files.get(f"{measured.output}/report.json"):
            below.check(what, False, f"its figures are not those that measure/{label} left")
            continue
        wrong = _wrong_decision(figures, entry, params)
        if wrong and other_gate:
            below.unchecked(what, OTHER_VERSION)
        else:
            below.check(what, not wrong, wrong)
    accepted = {label for label, entry in bundle.decisions["classes"].items() if entry["decision"] == "accepted"}
    below.check("its generators are the accepted ones", accepted == set(bundle.generators), "they are others")
    evaluation, record = folder / "lineage" / "evaluation.json", records.get("evaluate/all")
    left = "" if record is None else record.files.get(f"{record.output}/report.json")
    same = evaluation.is_file() and sha256_file(evaluation) == left
    if below.check("classifier's figures are those that evaluate left", same, "they are others"):
        release = json.loads(evaluation.read_text(encoding="utf-8"))["release"]
        below.check(f"release of {release['arm']}", release == bundle.decisions["release"], "evaluate said otherwise")


def _wrong_decision(figures: Path, entry: Mapping[str, Any], params: Params | None) -> str:
    if params is None:
        return "its limits cannot be read"
    try:
        report = read_report(figures, QualityReport)
    except CheckpointError as error:
        return str(error)
    (again,) = decide([report], params.gate).values()
    return "" if again.model_dump(mode="json") == entry else f"its figures say {again.decision}"


def _check_records(link: Link, bundle: Bundle, records: Records) -> None:
    """Each record's key, and that it read what the stages before it left."""
    params = bundle.lineage.params  # as they were written: knobs that came later are not in the keys of these records
    for name, record in records.items():
        key = flow.key_of(record.stage, record.item, record.inputs, record.source, params, record.weights, record.code)
        wrong = [] if key == record.key else ["its inputs, params or code are not those of its key"]
        for needed, digest in record.inputs.items():
            if needed not in records or records[needed].digest != digest:
                wrong.append(f"{needed}, which it read, left something else")
        what = f"{name}: {record.status}{', ' + record.reason if record.reason else ''}"
        link.check(what, not wrong, "; ".join(wrong))
    parents = {name: record.digest for name, record in records.items() if name in bundle.lineage.parents}
    link.check("the bundle was made from these", parents == bundle.lineage.parents, "it was made from others")


def _check_images(
    link: Link, folder: Path, bundle: Bundle, records: Records, params: Params | None, data: Path | None
) -> None:
    below = link.below("validated images")
    validation, manifest = records.get("validate/all"), records.get("build-manifest/all")
    if validation is None or manifest is None:
        below.check("records of validate and build-manifest", False, "missing")
        return
    path = folder / "lineage" / "validation.json"
    same = path.is_file() and sha256_file(path) == validation.files.get("validation/report.json")
    below.check("validation report is the one that validate left", same, "it is another")
    if same:
        report = json.loads(path.read_text(encoding="utf-8"))
        below.check(f"passed the suite {report['suite_sha256']}", report["passed"] is True, "it did not")
    rows = _read(below, "images that the models could see are listed", lambda: read_images(folder))
    raw = below.below(f"data version {bundle.lineage.data_md5}")
    raw.check("is the one that build-manifest read", manifest.source == bundle.lineage.data_md5, manifest.source)
    if rows is None:
        return
    splits = Counter(split for _, split in rows.values())
    below.note("splits", ", ".join(f"{splits[split]} {split}" for split in ("train", "val", "test")))
    if data is None:
        raw.unchecked("raw images", "name them with --data or --repo")
        return
    md5 = dvc_dir_md5(data)
    raw.check("raw images have this hash", md5 == bundle.lineage.data_md5, f"they have {md5}")
    digests = {sha256_file(path): path.relative_to(data).as_posix() for path in _files(data)}
    lost = sorted(rows.keys() - digests.keys())
    for digest in lost:
        raw.check(f"image {digest}", False, f"is not in {data}")
    others = sorted(digests[digest] for digest in digests.keys() - rows.keys())
    raw.check(f"{len(rows)} listed images are there", not lost, f"{len(lost)} are not; not listed: {', '.join(others)}")
    _repeat(below, data, params, manifest, validation)


def read_images(folder: Path) -> dict[str, tuple[str, str]]:
    """SHA-256 of each image that the models could see -> its label and split."""
    with (folder / "lineage" / "images.csv").open(encoding="utf-8", newline="") as file:
        return {row["sha256"]: (row["label"], row["split"]) for row in csv.DictReader(file)}


def _repeat(link: Link, data: Path, params: Params | None, manifest: flow.Record, validation: flow.Record) -> None:
    """Manifest and validation made again from the raw images, where the code is still the one that made them."""
    if params is None or code_hash(*flow.STAGES["validate"].code) != validation.code:
        link.unchecked("made again from the raw images", OTHER_VERSION)
        return
    # Neither shards nor weights change these files; weights named by a path may lie on another machine.
    alone = params.model_copy(
        update={
            "compute": ComputeConfig(),
            "classifier": params.classifier.model_copy(update={"weights": "scratch"}),
            "quality": params.quality.model_copy(update={"inception": "none"}),
        }
    )
    with tempfile.TemporaryDirectory() as scratch:
        again = flow.Run(data, Path(scratch), alone)
        for before in (manifest, validation):
            made = _read(link, f"{before.stage} runs again", partial(flow.execute, before.stage, again))
            if made is None:
                return
            names = before.files.keys() | made.files.keys()
            differing = sorted(name for name in names if before.files.get(name) != made.files.get(name))
            what = f"{before.stage} leaves the same {len(before.files)} files again"
            link.check(what, not differing, f"differing: {', '.join(differing)}")
