"""The class gate: its rule on written figures, and its limits calibrated on images whose worth is known."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from known import SIDE, fresh, write_synthetic

from raresynth.config import GateConfig, QualityConfig
from raresynth.dataset.images import Pixels, load_images
from raresynth.dataset.manifest import read_manifest
from raresynth.quality.controls import blurred, jittered
from raresynth.quality.encoder import Encoder
from raresynth.quality.gate import decide
from raresynth.quality.measure import measure
from raresynth.quality.reports import (
    Atypical,
    Copying,
    CopyingControls,
    Distance,
    FailedClass,
    Proportion,
    QualityReport,
)

Judge = Callable[[str, Pixels], tuple[QualityReport, str, str]]


@pytest.fixture
def judge(sample_data: Path, sample_manifest: Path, trained_encoder: Path, tmp_path: Path) -> Judge:
    """Measures and judges images as if they were synthetic ones of a class of the sample data."""

    def run(label: str, images: Pixels) -> tuple[QualityReport, str, str]:
        folder = write_synthetic(images, label, tmp_path / "synthetic")
        report = measure(
            sample_data,
            sample_manifest,
            trained_encoder,
            folder,
            label,
            tmp_path,
            QualityConfig(),
            GateConfig(),
            0.99,
            0,
            None,
        )
        decision = decide([report], GateConfig())[label]
        return report, decision.decision, "; ".join(decision.reasons)

    return run


@pytest.mark.parametrize(("label", "code"), [("dermatofibroma", 1001), ("vascular", 1002)])
def test_unseen_reals_are_accepted(judge: Judge, label: str, code: int) -> None:
    _, decision, reasons = judge(label, fresh(label, 300, code))
    assert decision == "accepted", reasons


@pytest.mark.slow
@pytest.mark.parametrize(("label", "code"), [("keratosis", 1003), ("melanoma", 1005)])
def test_unseen_reals_of_a_class_hardly_apart_from_others_are_not_rejected(judge: Judge, label: str, code: int) -> None:
    _, decision, reasons = judge(label, fresh(label, 300, code))
    assert decision != "rejected", reasons


@pytest.mark.parametrize("label", ["dermatofibroma", pytest.param("vascular", marks=pytest.mark.slow)])
def test_another_class_is_rejected(judge: Judge, label: str) -> None:
    _, decision, reasons = judge(label, fresh("nevus", 300, 1004))
    assert decision == "rejected", reasons


@pytest.mark.slow
def test_blurred_reals_are_not_accepted(judge: Judge) -> None:
    _, decision, reasons = judge("vascular", blurred(fresh("vascular", 300, 1002), 3.0))
    assert decision != "accepted", reasons


@pytest.mark.slow
def test_the_commonest_images_of_a_class_alone_are_not_accepted(judge: Judge, trained_encoder: Path) -> None:
    """A generator that leaves out what is unusual: of 1,500 unseen reals the 300 nearest to their mean."""
    images = fresh("dermatofibroma", 1500, 1001)
    features = Encoder.load(trained_encoder).features(images)
    nearest = np.argsort(np.square(features - features.mean(0)).sum(1))[:300]
    report, decision, reasons = judge("dermatofibroma", images[nearest])
    assert decision != "accepted", reasons
    assert report.recall.ratio is not None and report.recall.ratio < 0.6


def test_noise_is_rejected(judge: Judge) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, SIDE, SIDE, 3)).astype(np.uint8)
    _, decision, reasons = judge("vascular", noise)
    assert decision == "rejected", reasons


@pytest.mark.parametrize(
    ("label", "share"),
    [
        ("dermatofibroma", 0.05),
        pytest.param("dermatofibroma", 1.0, marks=pytest.mark.slow),
        pytest.param("vascular", 0.05, marks=pytest.mark.slow),
    ],
)
def test_jittered_training_copies_are_rejected(
    judge: Judge, sample_data: Path, sample_manifest: Path, label: str, share: float
) -> None:
    """Also where only one image in twenty is a copy and the rest are unseen reals."""
    rng = np.random.default_rng(0)
    manifest = read_manifest(sample_manifest)
    train = manifest[(manifest["label"] == label) & (manifest["split"] == "train")]
    n = round(400 * share)
    copied = load_images(train, sample_data, SIDE)[rng.integers(0, len(train), n)]
    images = np.concatenate([jittered(copied, rng), fresh(label, 400, 1002)[: 400 - n]])
    report, decision, reasons = judge(label, images)
    assert decision == "rejected", reasons
    assert report.copying.low > GateConfig().near_copy_share
    assert report.copying.near_copy_share == pytest.approx(share, abs=0.05)


def _distance(ratio: float | None, low: float | None, high: float | None) -> Distance:
    return Distance(
        value=1,
        low=0,
        high=2,
        floor=0,
        zero=0,
        other_label="b",
        other_value=4,
        other_zero=0,
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
    )


def _share(ratio: float, low: float, high: float) -> Proportion:
    return Proportion(value=0.9, low=0.8, high=1, real_real=0.9, ratio=ratio, ratio_low=low, ratio_high=high)


def _report(
    fd: tuple[float | None, float | None, float | None] = (0.1, 0.0, 0.2),
    near_copies: tuple[float, float, float] = (0.0, 0.0, 0.01),
    nearer: tuple[float, float, float] = (0.5, 0.4, 0.6),
    recall: tuple[float, float, float] = (1.0, 0.9, 1.1),
    controls: tuple[float, float] = (0.97, 0.0),
    atypical: tuple[float, float, float] = (0.01, 0.0, 0.02),
    reals_at_most: float = 0.05,
    reals: Literal["val", "train"] = "val",
    doubts: tuple[str, ...] = (),
) -> QualityReport:
    share = _share(1.0, 0.9, 1.1)
    value, low, high = near_copies
    return QualityReport(
        label="a",
        n_real=100,
        n_fake=500,
        n_compared=50,
        n_other_compared=50,
        real_splits="val",
        encoder_sha256="0" * 64,
        dimensions=32,
        fd=_distance(*fd),
        kid=_distance(0.1, 0.0, 0.2),
        precision=share,
        recall=_share(*recall),
        density=share,
        coverage=share,
        atypical=Atypical(share=atypical[0], low=atypical[1], high=atypical[2], reals_at_most=reals_at_most),
        copying=Copying(
            near_copy_share=value,
            low=low,
            high=high,
            n_drawn=500,
            threshold=0.65,
            reals=reals,
            controls=CopyingControls(copies_found=controls[0], n_copies=50, reals_found=controls[1], n_reals=50),
            authenticity=0.7,
            nearer_share=nearer[0],
            nearer_low=nearer[1],
            nearer_high=nearer[2],
            nearest=[],
        ),
        binding_copying=False,
        fid=None,
        doubts=list(doubts),
        notes=["A note."],
    )


@pytest.mark.parametrize(
    ("report", "decision", "words"),
    [
        (_report(), "accepted", "FD ratio 0.1 (95 % interval 0 to 0.2), limit at most 0.5: met"),
        (
            _report(fd=(0.4, 0.2, 0.6)),
            "insufficient",
            "FD ratio 0.4 (95 % interval 0.2 to 0.6), limit at most 0.5",
        ),
        (_report(fd=(0.7, 0.6, 0.8)), "rejected", "FD ratio 0.7 (95 % interval 0.6 to 0.8), limit at most 0.5: missed"),
        (_report(fd=(None, None, None)), "insufficient", "FD ratio cannot be told"),
        (_report(near_copies=(0.05, 0.03, 0.08)), "rejected", "near-copy share 0.05"),
        (
            _report(recall=(0.2, 0.1, 0.3)),
            "rejected",
            "recall ratio 0.2 (95 % interval 0.1 to 0.3), limit at least 0.4",
        ),
        (_report(controls=(0.5, 0.0)), "insufficient", "of jittered train images too only 50 % count as copies"),
        (
            _report(near_copies=(0.05, 0.03, 0.08), controls=(0.97, 0.06)),
            "insufficient",
            "of reals that it never saw 6.0 % count as copies too",
        ),
        (
            _report(near_copies=(0.05, 0.03, 0.08), controls=(0.97, 0.06), reals="train"),
            "insufficient",
            "of train images, held against one another, 6.0 % count as copies too",
        ),
        (_report(reals="train"), "accepted", "share nearer than train images are to one another 0.5"),
        (
            _report(atypical=(0.6, 0.55, 0.65)),
            "rejected",
            "atypical share 0.6 (95 % interval 0.55 to 0.65), limit at most 0.1: missed",
        ),
        (_report(atypical=(0.08, 0.05, 0.12)), "insufficient", "atypical share 0.08"),
        (
            _report(atypical=(0.15, 0.12, 0.18), reals_at_most=0.19),
            "insufficient",
            "limit at most 0.1: missed, but with so few train images up to 19 % of reals count as atypical too",
        ),
        (_report(atypical=(0.3, 0.2, 0.4), reals_at_most=0.19), "rejected", "limit at most 0.1: missed"),
        (_report(doubts=("It may be another class.",)), "insufficient", "It may be another class."),
        (
            _report(nearer=(0.9, 0.8, 1.0), doubts=("It may be another class.",)),
            "rejected",
            "share nearer than unseen reals 0.9 (95 % interval 0.8 to 1), limit at most 0.7: missed",
        ),
        (_report(nearer=(0.65, 0.55, 0.75)), "insufficient", "share nearer than unseen reals 0.65"),
        (_report(fd=(0.4, 0.2, 0.6), nearer=(0.9, 0.8, 1.0)), "rejected", "share nearer than unseen reals"),
        (FailedClass(label="a", reason="the generator collapsed at step 7"), "rejected", "collapsed at step 7"),
    ],
)
def test_rule(report: QualityReport | FailedClass, decision: str, words: str) -> None:
    found = decide([report], GateConfig())["a"]
    assert found.decision == decision
    assert any(words in reason for reason in found.reasons), found.reasons


def test_notes_are_among_the_reasons() -> None:
    assert "A note." in decide([_report()], GateConfig())["a"].reasons
