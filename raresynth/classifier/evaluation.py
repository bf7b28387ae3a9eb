"""Choose the best real arm on val, then judge all arms once on the real test split."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from raresynth.classifier.arms import ARMS
from raresynth.classifier.network import load
from raresynth.classifier.statistics import (
    HEADLINE,
    PER_CLASS,
    Figures,
    Floats,
    Integers,
    bootstrap,
    confusion_matrices,
    figures,
    interval,
    softmax,
    swap_margins,
)
from raresynth.classifier.training import ClassifierReport, predict_logits
from raresynth.config import ClassifierConfig, ReleaseConfig
from raresynth.dataset.images import load_images
from raresynth.dataset.manifest import read_manifest
from raresynth.errors import CheckpointError, DataError
from raresynth.lineage import Report, read_report, write_report, write_text

SYNTHETIC = "real+synthetic"
"""The arm that the release gate judges."""
SAMPLES_PER_CLASS = 4
_ROC_POINTS = 101


class Estimate(Report):
    """A figure with its bootstrap 95 % interval; null where the test split leaves it undefined."""

    value: float | None
    low: float | None
    high: float | None


class RocCurve(Report):
    """One class against the rest: false and true positive rates, from (0, 0) to (1, 1)."""

    false_positive_rate: list[float]
    true_positive_rate: list[float]


class ArmResult(Report):
    """What one arm reached on the test split; empty where it was skipped."""

    arm: str
    status: Literal["trained", "skipped"]
    reason: str = ""
    weights_sha256: str | None = None
    temperature: float | None = None
    val: dict[str, float]
    """Each of statistics.HEADLINE on val."""
    test: dict[str, Estimate] = Field(default_factory=dict)
    """Each of statistics.HEADLINE on test."""
    classes: dict[str, dict[str, Estimate]] = Field(default_factory=dict)
    """For each label, each of statistics.PER_CLASS on test."""
    confusion: list[list[int]] = Field(default_factory=list)
    """Test images counted: rows are true labels, columns predicted ones."""
    roc: dict[str, RocCurve] = Field(default_factory=dict)


class ReleaseDecision(Report):
    """Whether the synthetic arm is approved, and which arm is shipped."""

    decision: Literal["approved", "rejected"]
    arm: str
    """The arm to be shipped."""
    best_real_arm: str
    """Chosen on val."""
    metric: str
    min_difference: float
    difference: Estimate | None
    """Paired difference real+synthetic minus the best real arm on test; null where there is no synthetic arm."""
    reasons: list[str]


class PredictedSample(Report):
    """A test image with what the shipped arm says of it."""

    image_id: str
    path: str
    label: str
    predicted: str
    confidence: float


class EvaluationReport(Report):
    """Every arm on the test split, and the release gate's decision."""

    labels: list[str]
    n_test: dict[str, int]
    n_groups: int
    bootstrap_samples: int
    arms: list[ArmResult]
    differences: dict[str, Estimate]
    """real+synthetic minus the best real arm, paired, for each of statistics.HEADLINE."""
    cas: Estimate | None
    """Classification accuracy score: balanced accuracy on test of the arm `synthetic`, which saw no real image, as a
    part of the best real arm's; null where that arm was not trained."""
    release: ReleaseDecision
    samples: list[PredictedSample]


def evaluate(
    data_dir: Path,
    manifest_path: Path,
    arm_dirs: Mapping[str, Path],
    out_dir: Path,
    config: ClassifierConfig,
    release: ReleaseConfig,
    seed: int,
    device: str,
    cache_dir: Path | None,
) -> EvaluationReport:
    """Judge the trained arms; writes report.json and predictions.csv.

    The choice of the best real arm reads val figures only. All arms are resampled together, by group, so that
    their differences are paired.

    Args:
        arm_dirs: checkpoint folder of each arm; a skipped arm's folder holds its report only.

    Raises:
        CheckpointError: an arm's report or weights are missing, or no real arm was trained.
        DataError: the test split is empty or an image cannot be read.
    """
    reports = {arm: read_report(folder / "report.json", ClassifierReport) for arm, folder in arm_dirs.items()}
    best_real = choose_best_real(reports, release)
    manifest = read_manifest(manifest_path)
    test = manifest[manifest["split"] == "test"].reset_index(drop=True)
    if test.empty:
        raise DataError(f"{manifest_path} has no test images; run build-manifest with a larger test share")
    labels = reports[best_real].labels
    targets = np.array([labels.index(label) for label in test["label"]], np.int64)
    pixels = torch.from_numpy(np.array(load_images(test, data_dir, config.resolution, cache_dir))).to(device)
    predictions = {
        arm: _predict(arm_dirs[arm], pixels, device) for arm, report in reports.items() if report.status == "trained"
    }
    groups = test["group"].to_numpy(str)
    resamples = bootstrap(targets, predictions, groups, release.bootstrap_samples, seed)
    points = {arm: figures(targets, probabilities) for arm, probabilities in predictions.items()}
    results = [
        _result(report, targets, predictions[arm], points[arm], resamples[arm])
        if arm in predictions
        else ArmResult(arm=arm, status="skipped", reason=report.reason, val={})
        for arm, report in reports.items()
    ]
    margins = (
        swap_margins(targets, predictions[SYNTHETIC], predictions[best_real], groups, release.bootstrap_samples, seed)
        if SYNTHETIC in predictions
        else {}
    )
    differences = paired_differences(points, resamples, margins, best_real)
    skipped = {arm: report.reason for arm, report in reports.items() if report.status == "skipped"}
    decision = decide_release(differences, best_real, release, skipped.get(SYNTHETIC, "it is not among the arms"))
    report = EvaluationReport(
        labels=labels,
        n_test={label: int((test["label"] == label).sum()) for label in labels},
        n_groups=len(np.unique(groups)),
        bootstrap_samples=release.bootstrap_samples,
        arms=results,
        differences=differences,
        cas=accuracy_score(points, resamples, best_real),
        release=decision,
        samples=_samples(test, labels, predictions[decision.arm], seed),
    )
    write_text(out_dir / "predictions.csv", _predictions_csv(test, labels, predictions))
    write_report(out_dir / "report.json", report)
    return report


def choose_best_real(reports: Mapping[str, ClassifierReport], release: ReleaseConfig) -> str:
    """The arm trained on real images only with the best val figure; of equals the first named.

    Raises:
        CheckpointError: no real arm was trained.
    """
    trained = [arm for arm, report in reports.items() if report.status == "trained" and not ARMS[arm].synthetic]
    if not trained:
        raise CheckpointError("no arm on real images was trained; run train-classifier for one first")
    return max(trained, key=lambda arm: reports[arm].val[release.metric])


def paired_differences(
    points: Mapping[str, Figures], resamples: Mapping[str, Figures], margins: Mapping[str, float], best_real: str
) -> dict[str, Estimate]:
    """real+synthetic minus the best real arm, for each headline figure, both from the same resamples.

    Each interval reaches as far as the bootstrap's, and as the margin of random swaps, whichever is farther.

    Args:
        margins: from `swap_margins`; empty where there is no synthetic arm.
    """
    ours, theirs = SYNTHETIC, best_real
    return {
        metric: _widened(
            _estimate(
                points[ours].headline[metric] - points[theirs].headline[metric],
                resamples[ours].headline[metric] - resamples[theirs].headline[metric],
            ),
            margin,
        )
        for metric, margin in margins.items()
    }


def accuracy_score(points: Mapping[str, Figures], resamples: Mapping[str, Figures], best_real: str) -> Estimate | None:
    """Balanced accuracy of the arm trained on synthetic images alone / the best real arm's, from the same resamples."""
    if "synthetic" not in points:
        return None
    ours, theirs = (
        [of[arm].headline["balanced_accuracy"] for of in (points, resamples)] for arm in ("synthetic", best_real)
    )
    undefined = [np.full_like(a, np.nan) for a in ours]
    return _estimate(*(np.divide(a, b, out=c, where=b > 0) for a, b, c in zip(ours, theirs, undefined, strict=True)))


def decide_release(
    differences: Mapping[str, Estimate], best_real: str, release: ReleaseConfig, reason_without: str
) -> ReleaseDecision:
    """The release gate: real+synthetic is approved where the difference's lower 95 % bound is above the limit.

    Args:
        differences: from `paired_differences`; empty where there is no synthetic arm.
        reason_without: why there is none, for that case.
    """
    difference = differences.get(release.metric)
    metric = release.metric.replace("_", " ")
    limit = 100 * release.min_difference
    if difference is None or difference.value is None or difference.low is None or difference.high is None:
        approved = False
        reasons = [f"real+synthetic was not trained ({reason_without}), so {best_real} is shipped."]
    else:
        approved = difference.low > release.min_difference
        measured = (
            f"On test, real+synthetic differs from {best_real} by {100 * difference.value:+.1f} points of {metric}"
            f" (95 % interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f})."
        )
        if approved:
            verdict = f"The lower bound is above {limit:+.1f}: the synthetic images help, real+synthetic is shipped."
        elif difference.high <= release.min_difference:
            verdict = f"The whole interval is at or below {limit:+.1f}: no such gain, {best_real} is shipped."
        else:
            verdict = f"The lower bound is not above {limit:+.1f}: no gain is shown, {best_real} is shipped."
        reasons = [measured, verdict]
    return ReleaseDecision(
        decision="approved" if approved else "rejected",
        arm=SYNTHETIC if approved else best_real,
        best_real_arm=best_real,
        metric=release.metric,
        min_difference=release.min_difference,
        difference=difference,
        reasons=[f"{best_real} is the best real arm on val by {metric}.", *reasons],
    )


def _predict(folder: Path, pixels: torch.Tensor, device: str) -> Floats:
    classifier, meta = load(folder, device)
    return softmax(predict_logits(classifier, pixels) / meta["temperature"])


def _estimate(value: Floats, resamples: Floats) -> Estimate:
    if np.isnan(value[0]):
        return Estimate(value=None, low=None, high=None)
    low, high = interval(resamples)
    return Estimate(value=float(value[0]), low=low, high=high)


def _widened(estimate: Estimate, margin: float) -> Estimate:
    """The estimate with an interval that reaches at least `margin` up and down."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return estimate
    # Rounded, so that a difference as large as its margin is not beyond it by the last bit.
    low, high = round(estimate.value - margin, 12), round(estimate.value + margin, 12)
    return Estimate(value=estimate.value, low=min(estimate.low, low), high=max(estimate.high, high))


def _result(
    report: ClassifierReport, targets: Integers, probabilities: Floats, points: Figures, resamples: Figures
) -> ArmResult:
    ones = np.ones((1, len(targets)))
    return ArmResult(
        arm=report.arm,
        status="trained",
        weights_sha256=report.weights_sha256,
        temperature=report.temperature,
        val=report.val,
        test={metric: _estimate(points.headline[metric], resamples.headline[metric]) for metric in HEADLINE},
        classes={
            label: {
                metric: _estimate(points.per_class[metric][:, index], resamples.per_class[metric][:, index])
                for metric in PER_CLASS
            }
            for index, label in enumerate(report.labels)
        },
        confusion=confusion_matrices(targets, probabilities, ones)[0].astype(int).tolist(),
        roc={label: _roc(targets == index, probabilities[:, index]) for index, label in enumerate(report.labels)},
    )


def _roc(positive: np.ndarray[Any, np.dtype[np.bool_]], scores: Floats) -> RocCurve:
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(positive, scores)
    keep = np.unique(np.linspace(0, len(false) - 1, _ROC_POINTS).round().astype(int))
    return RocCurve(false_positive_rate=false[keep].round(6).tolist(), true_positive_rate=true[keep].round(6).tolist())


def _samples(test: pd.DataFrame, labels: list[str], probabilities: Floats, seed: int) -> list[PredictedSample]:
    """Some test images of each class, drawn without regard to whether the prediction is right."""
    chosen = []
    for index, label in enumerate(labels):
        rows = np.flatnonzero(test["label"] == label)
        picked = np.random.default_rng([seed, index]).permutation(rows)[:SAMPLES_PER_CLASS]
        chosen += [
            PredictedSample(
                image_id=test["image_id"][row],
                path=test["path"][row],
                label=label,
                predicted=labels[int(probabilities[row].argmax())],
                confidence=float(probabilities[row].max()),
            )
            for row in picked
        ]
    return chosen


def _predictions_csv(test: pd.DataFrame, labels: list[str], predictions: Mapping[str, Floats]) -> str:
    columns = [f"p_{label}" for label in labels]
    frames = [
        pd.concat(
            [test[["image_id", "label", "group"]].assign(arm=arm), pd.DataFrame(probabilities, columns=columns)], axis=1
        )
        for arm, probabilities in predictions.items()
    ]
    return pd.concat(frames).to_csv(index=False, lineterminator="\n", float_format="%.9g")
