"""The command line: one command a stage, the whole run, and what people do with its bundle."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from raresynth import flow
from raresynth.config import load_params
from raresynth.errors import INTERRUPTED, CheckpointError, DataError, ParamsError, RaresynthError, describe
from raresynth.processes import leads, rank_and_world

_SHARDED = {name for name, stage in flow.STAGES.items() if stage.each in {"shard", "part"}}
EXIT_BROKEN = 1
EXIT_USER_ERROR = 2

_HELP = {
    "probe": "read the images' files in shards, such as 1-of-4, if compute.shards asks for some",
    "build-manifest": "list the images, their labels and groups, and split them",
    "validate": "check every image and its metadata, quarantine what is bad",
    "train-encoder": "train the encoder that every measurement uses",
    "pretrain": "train the universal generator on all train images",
    "finetune": "fine-tune a generator for each class that needs images",
    "draw": "draw each class in shards, such as nevus/1-of-4, if compute.shards asks for some",
    "synthesize": "make the images that balance the train split",
    "synthesize-majority": "make images of the other classes, for the classifier that sees no real ones",
    "measure": "measure each class's synthetic images",
    "gate": "decide for each class whether its images may be used",
    "train-classifier": "train one classifier an arm, at equal steps",
    "evaluate": "score the arms on the real test split and decide on the release",
    "package": "bundle the accepted generators and the approved classifier",
    "report": "write the page that a person reads",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2: an error that the user can cure)."""
    arguments = _parser().parse_args(argv)
    try:
        _check_ranks(arguments)
        command: Callable[[argparse.Namespace], None] = arguments.command
        command(arguments)
    except (RaresynthError, OSError) as error:
        who = "raresynth" if leads() else f"raresynth, rank {rank_and_world()[0]}"
        print(f"{who}: {describe(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"raresynth: {INTERRUPTED}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raresynth",
        description="Synthetic images for rare classes: made, measured, judged, and used only where they help.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="the whole flow, as the KFP pipeline, on this machine")
    run.add_argument("--data", type=Path, required=True, help="folder of images")
    run.add_argument("--params", type=Path, required=True, help="params file, such as params/smoke.yaml")
    run.add_argument("--out", type=Path, required=True, help="folder of the run; started again, it goes on")
    run.set_defaults(command=_run)

    _add_submit(commands)

    for name, stage in flow.STAGES.items():
        one = commands.add_parser(name, help=_HELP[name], description=_HELP[name])
        one.add_argument("--data", type=Path, help="folder of images (default: that of the run's last stage)")
        one.add_argument("--params", type=Path, help="params file (default: that of the run's last stage)")
        one.add_argument("--out", type=Path, required=True, help="folder of the run")
        if stage.each is not None:
            one.add_argument(f"--{stage.each}", dest="item", help=f"only this {stage.each} (default: all)")
        one.set_defaults(command=_stage, stage=name, item=None)

    tune = commands.add_parser("tune", help="search the GAN's knobs by KID within a time budget")
    tune.add_argument("--data", type=Path, help="folder of images (default: that of the run's last stage)")
    tune.add_argument("--params", type=Path, help="params file to start from (default: that of the run's last stage)")
    tune.add_argument("--out", type=Path, required=True, help="folder of the run; started again, the search goes on")
    tune.add_argument("--minutes", type=float, required=True, help="time budget; at least one trial is run")
    tune.set_defaults(command=_tune)

    export = commands.add_parser("export-dataset", help="write the balanced set as folders by label, with hashes")
    export.add_argument("--out", type=Path, required=True, help="folder of the run")
    export.add_argument("--to", type=Path, required=True, help="new folder for the balanced set")
    export.set_defaults(command=_export_dataset)

    predict = commands.add_parser("predict", help="classify a folder of images with a bundle")
    predict.add_argument("--bundle", type=Path, required=True)
    predict.add_argument("--images", type=Path, required=True, help="folder, searched with its subfolders")
    predict.add_argument("--out", type=Path, required=True, help="CSV file to write")
    predict.set_defaults(command=_predict)

    generate = commands.add_parser("generate", help="synthesise images of one class with a bundle")
    generate.add_argument("--bundle", type=Path, required=True)
    generate.add_argument("--label", required=True)
    generate.add_argument("--n", type=int, required=True, help="number of images")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--truncation", type=float, help="spread of the latents (default: as the gate judged it)")
    generate.add_argument("--out", type=Path, required=True, help="new folder for the images and their manifest")
    generate.set_defaults(command=_generate)

    audit = commands.add_parser("audit", help="walk from a bundle, a batch or an image back to the raw images")
    audit.add_argument("--bundle", type=Path, help="the bundle that is audited, or that made the batch or image")
    audit.add_argument("--batch", type=Path, help="folder of synthetic images that is audited with its bundle")
    audit.add_argument("--image", type=Path, help="say what is known of this file instead")
    source = audit.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, help="folder of the raw images")
    source.add_argument("--repo", help="git repository, URL or folder, whose images DVC keeps")
    audit.add_argument("--json", action="store_true", help="print JSON")
    audit.set_defaults(command=_audit)
    _add_version_commands(commands)
    return parser


def _add_submit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    submit = commands.add_parser("submit", help="upload a compiled pipeline to Kubeflow and start a run of it")
    submit.add_argument("package", metavar="PACKAGE", help="compiled pipeline, a YAML file")
    # At least one, and yet optional: Python 3.11 reads "none or more" as none where an option follows PACKAGE.
    values = submit.add_argument(
        "arguments", metavar="NAME=VALUE", nargs="+", default=[], help="arguments of the run, if it takes any"
    )
    values.required = False
    submit.add_argument("--host", help="URL of the Pipelines API (default: $KF_PIPELINES_ENDPOINT)")
    submit.add_argument("--plain-http", action="store_true", help="allow an http:// host beyond this machine")
    submit.add_argument("--namespace", help="your namespace, where the installation keeps users apart")
    submit.add_argument("--experiment", help="made where there is none (default: the pipeline's name)")
    submit.add_argument("--run", help="name of the run (default: the pipeline's name and the time)")
    submit.add_argument(
        "--service-account",
        default="raresynth-runner",
        help="Kubernetes service account of the run (default: raresynth-runner, which k8s/pipeline makes)",
    )
    submit.add_argument("--no-cache", dest="cache", action="store_false", help="run every task anew")
    submit.add_argument("--wait", action="store_true", help="follow the run; exit code 1 where it does not succeed")
    submit.set_defaults(command=_submit)


def _add_version_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    fetch = commands.add_parser("fetch-data", help="fetch a data version that DVC keeps, every byte checked")
    fetch.add_argument("--repo", required=True, help="git repository, URL or folder")
    fetch.add_argument("--rev", required=True, help="branch, tag or commit")
    fetch.add_argument("--path", default="data", help="folder in the repository (default: data)")
    fetch.add_argument("--to", type=Path, required=True, help="folder for data versions; this one is named by its hash")
    fetch.set_defaults(command=_fetch_data)

    publish = commands.add_parser("publish-data", help="add approved synthetic images as a new data version")
    publish.add_argument("--bundle", type=Path, required=True, help="the bundle that made and approves them")
    publish.add_argument("--batch", type=Path, nargs="+", required=True, help="folders of synthetic images")
    publish.add_argument("--repo", required=True, help="git repository, URL or folder, whose images DVC keeps")
    publish.add_argument("--branch", default="main", help="branch that gets the commit (default: main)")
    publish.add_argument("--path", default="synthetic", help="folder in the repository (default: synthetic)")
    publish.set_defaults(command=_publish_data)


def _check_ranks(arguments: argparse.Namespace) -> None:
    if rank_and_world()[1] > 1 and getattr(arguments, "stage", None) != "pretrain":
        raise ParamsError("torchrun starts several processes, and only pretrain shares its work; start this without it")


def _run(arguments: argparse.Namespace) -> None:
    _open_run(arguments.data, arguments.params, arguments.out)  # so that what cannot be used is refused at once
    _hand_over("pipelines.run", arguments.data, arguments.params, arguments.out)


def _submit(arguments: argparse.Namespace) -> None:
    asked = {name: value for name, value in vars(arguments).items() if name != "command"}
    _hand_over("pipelines.submit", json.dumps(asked))


def _hand_over(module: str, *arguments: object) -> NoReturn:
    """Let a module that uses kfp take this process over; the library does not know kfp."""
    # -P, lest a folder such as docker/ in the working directory is taken for the package of that name.
    command = [sys.executable, "-P", "-m", module, *map(str, arguments)]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606


def _stage(arguments: argparse.Namespace) -> None:
    run, params = _open_run(arguments.data, arguments.params, arguments.out)
    known = flow.items(run, flow.STAGES[arguments.stage].each)
    if arguments.item is not None and arguments.item not in known:
        choice = f"choose from {', '.join(known)}" if known else "it has nothing to do"
        raise ParamsError(f"{arguments.stage} has no {arguments.item!r} in this run; {choice}")
    with flow.alone_in(run.store):
        flow.note_start(run, params)
        if arguments.item is not None:
            records = [flow.execute(arguments.stage, run, arguments.item)]
        else:
            records = flow.execute_all(arguments.stage, run)
    for record in records if leads() else []:
        name = record.stage if record.item == flow.ALL else f"{record.stage} {record.item}"
        print(f"{name}: {record.status}{', ' + record.reason if record.reason else ''} -> {run.store / record.output}")
        if record.retry:
            print(f"{name}: it is tried again by `raresynth run`, this command, or `dvc repro --force`")
    if arguments.stage == "validate":
        from raresynth.report.summary import images_used

        print("\n".join(images_used(run.store)))
    if arguments.stage == "report":
        from raresynth.report.summary import summarize

        print(f"\n{summarize(run.store)}")
    if not known:
        shards = run.params.compute.shards
        why = (
            "compute.shards is 1" if shards == 1 and arguments.stage in _SHARDED else "no class needs synthetic images"
        )
        print(f"{arguments.stage}: nothing to do, {why}")


def _open_run(data: Path | None, params: Path | None, store: Path) -> tuple[flow.Run, Path]:
    """The run in folder `store` and its params file; data and params left out are those it had last.

    Raises:
        RaresynthError: a folder or file cannot be used, or the run would overwrite what is not its own.
    """
    log = store / "run.json"
    try:
        known = json.loads(log.read_text(encoding="utf-8")) if log.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"{log} is damaged ({error}); delete it, and name --data and --params again") from error
    noted = store.resolve()  # the paths are relative to the folder itself, not to a link to it
    data = data or (noted / known["data"] if "data" in known else None)
    params = params or (noted / known["params"] if "params" in known else None)
    if data is None or params is None:
        raise ParamsError(f"{store} holds no run yet; name its images with --data and its params with --params")
    if not data.is_dir():
        raise DataError(f"the data folder {data} does not exist; name the folder that holds the images")
    _check_place(store, data)
    return flow.Run(data, store, load_params(params)), params


def _check_place(store: Path, data: Path) -> None:
    out, images = store.resolve(), data.resolve()
    if out.is_relative_to(images) or images.is_relative_to(out):
        raise ParamsError(f"--out {store} and --data {data} lie one in the other; choose an --out outside the images")
    if store.is_dir() and any(store.iterdir()) and not (store / "run.json").exists():
        raise ParamsError(f"{store} is not empty and holds no run, whose files would be mixed up; choose a new --out")


def _tune(arguments: argparse.Namespace) -> None:
    from raresynth.tuning import tune

    if not 0 < arguments.minutes < math.inf:
        raise ParamsError(f"--minutes {arguments.minutes:g} is no time budget; give a number above 0")
    run, params = _open_run(arguments.data, arguments.params, arguments.out)
    with flow.alone_in(run.store):
        flow.note_start(run, params)
        report = tune(run, arguments.minutes * 60)
    best = report.trials[0]
    knobs = ", ".join(f"{name} {value:.3g}" for name, value in best.knobs.items())
    reached = "all collapsed" if best.score is None else f"mean KID {best.score:.4f}"
    print(f"{len(report.trials)} trials, the best: {knobs} ({reached}) -> {run.store / 'tuning' / 'params.yaml'}")


def _export_dataset(arguments: argparse.Namespace) -> None:
    from raresynth.dataset.export import export_dataset

    run, _ = _open_run(None, None, arguments.out)
    manifest = run.store / flow.STAGES["validate"].place / "manifest.csv"
    accepted = run.store / flow.STAGES["gate"].place / "accepted.csv"
    with flow.alone_in(run.store):
        flow.check_together(run, flow.records_behind("gate", run.store))
        export_dataset(run.data_dir, manifest, accepted, run.store, arguments.to)
    print(f"balanced set -> {arguments.to}")


def _predict(arguments: argparse.Namespace) -> None:
    from raresynth.bundle.predictor import predict_folder

    n, failed = predict_folder(arguments.bundle, arguments.images, arguments.out)
    print(f"{n} images, {failed} of them not decodable -> {arguments.out}")


def _generate(arguments: argparse.Namespace) -> None:
    from raresynth.bundle.sampler import generate_folder

    a = arguments
    generate_folder(a.bundle, a.label, a.n, a.seed, a.truncation, a.out)
    print(f"{a.n} synthetic images of {a.label} -> {a.out}")


def _fetch_data(arguments: argparse.Namespace) -> None:
    from raresynth.versions.fetch import fetch_data

    report = fetch_data(arguments.repo, arguments.rev, arguments.path, arguments.to)
    size = f"{report.n_files} files, {report.n_bytes} bytes"
    print(f"{report.path} {report.md5} of commit {report.commit}, {size} -> {report.folder}")


def _publish_data(arguments: argparse.Namespace) -> None:
    from raresynth.versions.publish import publish_data

    a = arguments
    report = publish_data(a.bundle, a.batch, a.repo, a.branch, a.path)
    for entry in report.sets:
        print(f"{entry.n_images} synthetic images of {entry.label} -> {report.path}/{entry.folder}")
    what = "published" if report.n_new else "all of it was published before, no new commit"
    print(f"{report.path} {report.md5} of commit {report.commit} on {report.branch}: {what}")


def _audit(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from raresynth.audit.walk import Subject, audit

    a = arguments
    link = audit(Subject(a.bundle, a.batch, a.image, a.data, a.repo))
    if arguments.json:
        print(json.dumps(link.as_json(), indent=2))
    else:
        # A file or a pipe has no width at which lines would have to be broken.
        Console(width=None if sys.stdout.isatty() else 1000).print(link.as_tree())
    broken = link.broken()
    for name, check in broken:
        print(f"raresynth: broken: {name}: {check.what}: {check.detail}", file=sys.stderr)
    if broken:
        raise SystemExit(EXIT_BROKEN)


if __name__ == "__main__":
    sys.exit(main())
