"""The page that a person reads: one HTML file that needs nothing beside it, equal to the byte for equal runs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from raresynth.classifier.evaluation import SYNTHETIC, ArmResult
from raresynth.config import Params
from raresynth.dataset.manifest import SPLITS
from raresynth.errors import enumerate_words
from raresynth.gan.training import GanReport
from raresynth.lineage import write_text
from raresynth.quality.controls import Control
from raresynth.quality.reports import QualityReport
from raresynth.report.charts import UNIT, Axis, Line, line_chart
from raresynth.report.findings import Findings, Sources, read_findings
from raresynth.report.grids import read_tiles, sheet
from raresynth.report.words import class_outcomes, counted, headline, how_turned

GALLERY_TILES = 12
GALLERY_COLUMNS = 4
QUARANTINE_EXAMPLES = 3
CALIBRATION_BINS = 10
FEW_TEST_IMAGES = 30
"""A class with fewer test images is named as one whose figures are coarse."""

KIMG = "thousand real images shown"
LOSS_NAMES = {
    "d_loss": "discriminator",
    "g_loss": "generator",
    "barlow": "Barlow Twins, per feature",
    "penalty": "gradient penalty",
}
METRICS = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "macro_auc": "macro AUC",
    "calibration_error": "calibration error",
}
CONTROL_UNITS = {
    "blur": "standard deviation in pixels",
    "noise": "standard deviation in grey levels",
    "JPEG compression": "100 − quality",
    "missing modes": "of 8 clusters",
}


@dataclass(frozen=True)
class Distribution:
    """One class's images by where they are used."""

    label: str
    splits: Mapping[str, int]
    made: int
    accepted: int


@dataclass(frozen=True)
class Pair:
    """A synthetic image above its nearest train image."""

    image: str
    distance: float
    train: str


@dataclass(frozen=True)
class Gallery:
    """One class's real and synthetic images; sheets are data URIs, None where there are no images."""

    label: str
    real: str
    synthetic: str | None
    pairs: Sequence[Pair]


@dataclass(frozen=True)
class Sample:
    """A test image and what the released classifier says of it."""

    image: str
    name: str
    label: str
    predicted: str
    confidence: float


@dataclass(frozen=True)
class Pictures:
    """Every image of the page."""

    galleries: Mapping[str, Gallery]
    samples: Sequence[Sample]


def render(sources: Sources, params: Params, out: Path) -> None:
    """Write the page.

    Raises:
        CheckpointError: a stage's report is missing or of another version.
        DataError: an image that the page shows cannot be read.
    """
    findings = read_findings(sources, params)
    write_text(out, compose(findings, draw_pictures(findings, sources.data_dir, sources.synthetic_root)))


def draw_pictures(findings: Findings, data_dir: Path, synthetic_root: Path) -> Pictures:
    """Read the images that the page shows, at the resolution that the networks saw them in."""
    galleries = {label: _gallery(findings, label, data_dir, synthetic_root) for label in findings.decisions["classes"]}
    samples = findings.evaluation.samples
    tiles = read_tiles(data_dir, [sample.path for sample in samples], findings.params.classifier.resolution)
    return Pictures(
        galleries,
        [
            Sample(sheet([tile], 1), sample.image_id, sample.label, sample.predicted, sample.confidence)
            for sample, tile in zip(samples, tiles, strict=True)
        ],
    )


def compose(findings: Findings, pictures: Pictures) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "number": number,
        "counted": counted,
        "words": enumerate_words,
        "how_turned": how_turned,
        "zip": lambda one, other: zip(one, other, strict=True),
        "place": lambda value, axis: f"{100 * axis.share(value):.2f}%",
    }
    evaluation, decisions = findings.evaluation, findings.decisions
    trained = {result.arm: result for result in evaluation.arms if result.status == "trained"}
    compared = _compared(trained, decisions["release"])
    gans = [findings.pretrain, *findings.finetune.values()]
    return environment.get_template("page.html").render(
        f=findings,
        params=findings.params,
        pictures=pictures,
        style=Markup((Path(__file__).parent / "style.css").read_text(encoding="utf-8")),  # noqa: S704
        headline=headline(decisions),
        class_outcomes=class_outcomes(decisions["classes"]),
        classes=decisions["classes"],
        release=decisions["release"],
        metrics=METRICS,
        splits=SPLITS,
        distribution=distribution(findings),
        quarantine=quarantine_examples(findings.quarantine),
        gans=gans,
        gan_charts=[chart for report in gans for chart in _gan_charts(report)],
        encoder_chart=_encoder_chart(findings),
        arm_charts=_arm_charts(findings),
        controls=_controls(findings),
        ratio_axis=_ratio_axis(findings.quality),
        metric_axis=_metric_axis(evaluation.arms, decisions["release"]["metric"]),
        difference_axis=_difference_axis(findings),
        compared=compared,
        roc_charts=[_roc_chart(result) for result in compared],
        calibration_chart=_calibration_chart(findings, compared),
        notes=list(notes(findings)),
        params_yaml=yaml.safe_dump(findings.params.model_dump(mode="json"), sort_keys=False),
    )


def percent(share: float | None, digits: int = 1) -> str:
    """A share in percent: 0.123 as "12.3 %"; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def points(difference: float | None) -> str:
    """A difference of shares in points: 0.0123 as "+1.2"."""
    return "–" if difference is None else f"{100 * difference:+.1f}".replace("-", "−")


def number(value: float | None, digits: int = 2) -> str:
    """A plain number; a dash where there is none."""
    return "–" if value is None else f"{value:z.{digits}f}".replace("-", "−")


def distribution(findings: Findings) -> list[Distribution]:
    """Every class's images, the largest class first."""
    rows = [
        Distribution(label, splits, len(findings.synthetic.get(label, ())), findings.n_accepted.get(label, 0))
        for label, splits in findings.validation.classes.items()
    ]
    return sorted(rows, key=lambda row: (-sum(row.splits.values()), row.label))


def quarantine_examples(rows: pd.DataFrame) -> dict[str, tuple[int, list[Any]]]:
    """For each reason the number of rows and the first few of them, the commonest reason first."""
    groups = {str(reason): group for reason, group in rows.groupby("reason")}
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {reason: (len(group), list(group.head(QUARANTINE_EXAMPLES).itertuples())) for reason, group in ordered}


def notes(findings: Findings) -> Iterator[str]:
    """How far the page's figures carry, in sentences."""
    evaluation = findings.evaluation
    yield (
        "The test split was used once, after every choice had been made on val. Intervals are 95 % bootstrap intervals "
        f"over {counted(evaluation.n_groups, 'group')} of test images"
        f"{' (lesions or patients)' if findings.has_groups else ''}, {evaluation.bootstrap_samples:,} resamples; "
        "that of a difference between two arms is at least as wide as what swapping their predictions at random gives."
    )
    if not findings.has_groups:
        yield (
            "The source names no lesions or patients. Where several images are of one, they may lie in train and test, "
            "and the intervals take them for independent: name the column under dataset.csv.group."
        )
    yield (
        "Every arm was trained once, from one seed. The intervals cover the choice of test images, not how much "
        "another training run would differ."
    )
    coarse = [f"{label} ({n})" for label, n in evaluation.n_test.items() if n < FEW_TEST_IMAGES]
    if coarse:
        steps = "Figures of such a class move in coarse steps, and its intervals are too narrow."
        yield f"Few test images: {enumerate_words(coarse)}. {steps}"
    yield from dict.fromkeys(note for report in findings.quality.values() for note in (*report.doubts, *report.notes))
    if findings.encoder.controls is None:
        yield "The val split is too small to show that the encoder sees what it should."
    if findings.quality:
        yield (
            "FD and KID are taken on this run's own encoder: they compare classes and runs of this data set, not with "
            "figures of other publications."
        )
    yield (
        "All figures are for images of this data set, split as above. They say nothing about images from another "
        "camera, clinic or population."
    )


def _gallery(findings: Findings, label: str, data_dir: Path, synthetic_root: Path) -> Gallery:
    manifest, resolution = findings.manifest, findings.params.gan.resolution
    paths = manifest["path"][(manifest["label"] == label) & (manifest["split"] == "train")].to_numpy()
    order = np.random.default_rng([findings.params.seed, len(paths)]).permutation(len(paths))
    real = sheet(read_tiles(data_dir, paths[np.sort(order[:GALLERY_TILES])], resolution), GALLERY_COLUMNS)
    if label not in findings.synthetic:
        return Gallery(label, real, None, ())
    nearest = findings.quality[label].copying.nearest[:GALLERY_TILES] if label in findings.quality else []
    shown = [item.synthetic for item in nearest] or findings.synthetic[label]["path"].head(GALLERY_TILES)
    synthetic = read_tiles(synthetic_root, shown, resolution)
    trains = read_tiles(data_dir, [item.train for item in nearest], resolution)
    pairs = [
        Pair(sheet([tile, train], 1), item.distance, item.train)
        for item, tile, train in zip(nearest, synthetic, trains, strict=bool(nearest))
    ]
    return Gallery(label, real, sheet(synthetic, GALLERY_COLUMNS), pairs)


def _gan_charts(report: GanReport) -> list[Markup]:
    curves = report.curves
    lines = [Line(LOSS_NAMES[name], curves.kimg, values) for name, values in curves.losses.items() if any(values)]
    name = "Universal generator" if report.label is None else f"Generator of {report.label}"
    charts = [line_chart(name, lines, KIMG, "loss")]
    if report.snapshots:
        kimg = [snapshot.kimg for snapshot in report.snapshots]
        labels = sorted({label for snapshot in report.snapshots for label in snapshot.kid})
        kids = [Line(of, kimg, [s.kid.get(of, float("nan")) for s in report.snapshots]) for of in labels]
        charts.append(line_chart(f"{name}: KID to train and val reals", kids, KIMG, "KID"))
    return charts


def _encoder_chart(findings: Findings) -> Markup:
    report = findings.encoder
    steps = [report.steps * (i + 1) / len(report.losses) for i in range(len(report.losses))]
    return line_chart("Encoder", [Line("Barlow Twins", steps, report.losses)], "steps", "loss")


def _arm_charts(findings: Findings) -> list[Markup]:
    trained = {arm: report.curves for arm, report in findings.arms.items() if report.status == "trained"}
    losses = [Line(arm, [p.step for p in curves], [p.train_loss for p in curves]) for arm, curves in trained.items()]
    scores = [
        Line(arm, [p.step for p in curves], [p.val_balanced_accuracy for p in curves])
        for arm, curves in trained.items()
    ]
    return [
        line_chart("Classifiers: training loss", losses, "steps", "loss"),
        line_chart("Classifiers: balanced accuracy on val", scores, "steps", "balanced accuracy"),
    ]


def _compared(trained: Mapping[str, ArmResult], release: Mapping[str, Any]) -> list[ArmResult]:
    """The best real arm and, where it was trained, real+synthetic."""
    return [trained[arm] for arm in (release["best_real_arm"], SYNTHETIC) if arm in trained]


def _roc_chart(result: ArmResult) -> Markup:
    lines = [Line(label, roc.false_positive_rate, roc.true_positive_rate) for label, roc in result.roc.items()]
    return line_chart(
        f"ROC on test: {result.arm}", lines, "false positive rate", "true positive rate", UNIT, UNIT, "chance"
    )


def _calibration_chart(findings: Findings, compared: Sequence[ArmResult]) -> Markup:
    lines = [_calibration(findings, result.arm) for result in compared]
    return line_chart("Calibration on test", lines, "confidence", "share correct", UNIT, UNIT, "perfect")


def _calibration(findings: Findings, arm: str) -> Line:
    """Share of correct predictions over mean confidence, in equally wide bins of confidence."""
    labels = findings.evaluation.labels
    rows = findings.predictions[findings.predictions["arm"] == arm]
    probabilities = rows[[f"p_{label}" for label in labels]].to_numpy(np.float64)
    correct = np.array(labels)[probabilities.argmax(1)] == rows["label"].to_numpy(str)
    confidence = probabilities.max(1)
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    used = np.unique(bins)
    return Line(
        arm,
        [float(confidence[bins == b].mean()) for b in used],
        [float(correct[bins == b].mean()) for b in used],
    )


def _controls(findings: Findings) -> list[tuple[str, str, Control]]:
    """Each control of the encoder with its name and the unit of its strengths."""
    controls = findings.encoder.controls
    return [(name, CONTROL_UNITS[name], control) for name, control in (controls.named if controls else {}).items()]


def _ratio_axis(quality: Mapping[str, QualityReport]) -> Axis:
    bounds = [
        bound
        for report in quality.values()
        for distance in (report.fd, report.kid)
        for bound in (distance.ratio, distance.ratio_low, distance.ratio_high)
        if bound is not None
    ]
    return Axis.over([0.0, 1.0, *(min(bound, 3.0) for bound in bounds)])


def _metric_axis(arms: Sequence[ArmResult], metric: str) -> Axis:
    estimates = [result.test[metric] for result in arms if result.test]
    return Axis.over([bound for e in estimates for bound in (e.value, e.low, e.high) if bound is not None])


def _difference_axis(findings: Findings) -> Axis:
    estimates = findings.evaluation.differences.values()
    return Axis.over([-0.02, 0.02, *(bound for e in estimates for bound in (e.low, e.high) if bound is not None)])
