"""A small search for the GAN's knobs on one's own images, by KID (future work of the seed paper, section V)."""

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from raresynth import flow
from raresynth.config import Params
from raresynth.errors import DataError, ParamsError
from raresynth.lineage import Report, sha256_json, write_report, write_text
from raresynth.progress import progress

if TYPE_CHECKING:
    from optuna import Study, Trial

SCREENED = 0.25
"""A trial pre-trains for this part of the params' length: enough to compare knobs, at a fraction of the time."""
UPSTREAM = ("probe", "build-manifest", "validate", "train-encoder")
"""What a search needs of the flow."""
COLLAPSED = 1e6
"""What the search takes for the KID of knobs with which training collapses."""


class TrialReport(Report):
    """One choice of knobs and what it reached."""

    knobs: dict[str, float]
    kid: dict[str, float]
    """Val KID of each class's generator; empty where training collapsed."""
    score: float | None
    """Mean of `kid`, the lower the better."""


class TuningReport(Report):
    """All finished trials of a search, the best one first."""

    trials: list[TrialReport]
    pretrain_kimg: float
    """Length of the trials' pre-training."""


def tune(run: flow.Run, budget_s: float) -> TuningReport:
    """Search until the budget is spent; leaves tuning/report.json and tuning/params.yaml in the run's folder.

    Called again with the same params it goes on: finished trials count, and one that was interrupted is finished
    first. The file of params is that of the run with the best trial's knobs in it.

    Args:
        budget_s: seconds; the trial that is running when they are over is finished, and one is run in any case.

    Raises:
        ParamsError: the preset is not raresynth.
        DataError: no class needs synthetic images.
    """
    import optuna

    if run.params.gan.preset != "raresynth":
        raise ParamsError(f"tune searches knobs of gan.preset raresynth, not of {run.params.gan.preset}; set it")
    ends = time.monotonic() + budget_s
    for stage in UPSTREAM:
        flow.execute_all(stage, run)
    labels = flow.items(run, "label")
    if not labels:
        raise DataError("no class needs synthetic images, so there is nothing to tune; see the params' section balance")
    folder = run.store / "tuning"
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    images = [flow.read_record(run.store, stage).digest for stage in ("validate", "train-encoder")]
    search = sha256_json([run.params.model_dump(mode="json"), labels, images])[:16]
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "trials.log"))),
        study_name=search,
        load_if_exists=True,
    )
    _take_up(study)
    # A sampler begins with the same numbers whenever it is made, and would choose what it chose when it began.
    seed = run.params.seed + len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=4)
    trials_dir = folder / search
    with progress("tune", max(1, round(budget_s)), "seconds") as advance:
        while True:
            started = time.monotonic()
            _run_trial(run, study, labels, trials_dir)
            report = _report(run.params, study)
            if report.trials:
                _write(run.params, report, folder)
            advance(round(time.monotonic() - started), f"{len(report.trials)} trials")
            if time.monotonic() >= ends and report.trials:
                return report


def _take_up(study: "Study") -> None:
    """Trials that an earlier process was interrupted in come first; their trainings go on where they were."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)


def _run_trial(run: flow.Run, study: "Study", labels: list[str], trials_dir: Path) -> None:
    trial = study.ask()
    knobs = _suggest(trial, run.params)
    place = trials_dir / sha256_json(knobs)[:16]
    kid = _train(run, knobs, labels, place)
    trial.set_user_attr("kid", kid)
    # A collapse is an outcome too, and the worst one: the search is to keep away from it.
    study.tell(trial, sum(kid.values()) / len(kid) if kid else COLLAPSED)
    shutil.rmtree(place)


def _suggest(trial: "Trial", params: Params) -> dict[str, float]:
    return {
        "gradient_penalty": trial.suggest_float("gradient_penalty", 0.01, 3.0, log=True),
        "augmentation_target": trial.suggest_float("augmentation_target", 0.0, 0.6),
        "class_power": trial.suggest_float("class_power", 0.25, 1.0),
        "finetune_kimg": trial.suggest_float("finetune_kimg", 0.5, 2.0, log=True) * params.gan.finetune_kimg,
    }


def _train(run: flow.Run, knobs: dict[str, float], labels: list[str], place: Path) -> dict[str, float]:
    """KID of each class's generator with these knobs; none after a collapse."""
    from raresynth.dataset.symmetries import read_symmetries
    from raresynth.gan.training import finetune, pretrain
    from raresynth.quality.judge import KidJudge

    config = run.params.gan.model_copy(update={**knobs, "pretrain_kimg": SCREENED * run.params.gan.pretrain_kimg})
    validated = run.store / flow.read_record(run.store, "validate").output
    manifest, symmetries = validated / "manifest.csv", read_symmetries(validated).symmetries
    encoder = run.store / flow.read_record(run.store, "train-encoder").output
    device = flow.device(run.params)
    judge = KidJudge(run.data_dir, manifest, encoder, run.params.seed, run.packed, device)
    common = (config, run.params.seed, device, run.packed, run.params.compute.checkpoint_every_s, judge)
    universal = pretrain(run.data_dir, manifest, place / "universal", *common, symmetries=symmetries)
    if universal.status == "collapsed":
        return {}
    kid: dict[str, float] = {}
    for label in labels:
        base = place / "universal"
        report = finetune(run.data_dir, manifest, base, label, place / label, *common, symmetries=symmetries)
        kept = [s.kid[label] for s in report.snapshots if s.step == report.kept_step and label in s.kid]
        if report.status == "collapsed":
            return {}
        if kept:
            kid[label] = kept[0]
    if not kid:
        raise DataError("no class has enough held-out images for a KID, so there is nothing to tune by; add images")
    return kid


def _report(params: Params, study: "Study") -> TuningReport:
    from optuna.trial import TrialState

    done = sorted(study.get_trials(states=(TrialState.COMPLETE,)), key=lambda trial: trial.value or 0.0)
    return TuningReport(
        trials=[
            TrialReport(
                knobs=_suggest(trial, params),
                kid=trial.user_attrs["kid"],
                score=trial.value if trial.user_attrs["kid"] else None,
            )
            for trial in done
        ],
        pretrain_kimg=SCREENED * params.gan.pretrain_kimg,
    )


def _write(params: Params, report: TuningReport, folder: Path) -> None:
    """The report, and the run's params with the best trial's knobs in them."""
    best = params.model_copy(update={"gan": params.gan.model_copy(update=report.trials[0].knobs)})
    write_report(folder / "report.json", report)
    write_text(folder / "params.yaml", yaml.safe_dump(best.model_dump(mode="json"), sort_keys=False))
