"""Every figure names what it rests on, and nothing looks at the test split."""

from pathlib import Path

import numpy as np
import pytest
from known import fresh, write_synthetic

from raresynth.config import GateConfig, QualityConfig
from raresynth.dataset.images import load_images
from raresynth.dataset.manifest import read_manifest, write_manifest
from raresynth.errors import CheckpointError, DataError, TooFewImages
from raresynth.lineage import load_checkpoint, read_report
from raresynth.quality.distances import Estimates
from raresynth.quality.measure import compare_halves, grouped_halves, measure, nearest_other
from raresynth.quality.reals import Reals
from raresynth.quality.reports import QualityReport

LABEL = "vascular"


@pytest.fixture
def synthetic(tmp_path: Path) -> Path:
    return write_synthetic(fresh(LABEL, 60, 1002), LABEL, tmp_path / "synthetic")


@pytest.fixture
def figures(sample_data, sample_manifest, trained_encoder, synthetic, tmp_path):
    """Measures the synthetic folder; knobs and inputs by name."""

    def run(manifest=sample_manifest, folder=synthetic, out="out", seed=0, **knobs):
        config = QualityConfig(**{"real_splits": 10, **knobs})
        inputs = (sample_data, manifest, trained_encoder, folder)
        return measure(*inputs, LABEL, tmp_path / out, config, GateConfig(), seed, None)

    return run


def test_figures_name_what_they_rest_on(figures, sample_manifest, trained_encoder, tmp_path):
    manifest = read_manifest(sample_manifest)
    reals = manifest[(manifest["label"] == LABEL) & (manifest["split"] != "test")]
    report = figures()
    assert (report.n_real, report.n_fake, report.dimensions) == (len(reals), 60, 32)
    assert report.encoder_sha256 == load_checkpoint(trained_encoder)[1]["weights_sha256"]
    assert report.n_compared == 30
    assert report.fd.other_label == report.kid.other_label != LABEL
    assert report.kid.low < report.kid.value < report.kid.high
    assert report.kid.other_value > report.kid.value
    assert len(report.copying.nearest) == 16
    assert report.copying.nearest[0].synthetic == f"{LABEL}/images/000000.png"
    assert report.copying.nearest[0].train in set(reals["path"])
    assert read_report(tmp_path / "out" / "report.json", QualityReport) == report


def test_few_held_out_reals_make_the_copying_check_binding(figures):
    report = figures(min_held_out=50)
    assert (report.real_splits, report.binding_copying) == ("train+val", True)
    assert any("copying check is binding" in note for note in report.notes)
    report = figures(min_held_out=12)
    assert (report.real_splits, report.binding_copying, report.notes) == ("val", False, [])


def test_equal_inputs_give_equal_bytes(figures, tmp_path):
    figures(out="one")
    figures(out="two")
    assert (tmp_path / "one" / "report.json").read_bytes() == (tmp_path / "two" / "report.json").read_bytes()


def test_the_test_split_is_not_looked_at(figures, sample_manifest, tmp_path):
    """With files of the test split that do not exist, all goes as before."""
    manifest = read_manifest(sample_manifest)
    manifest.loc[manifest["split"] == "test", "path"] = "nowhere.jpg"
    write_manifest(tmp_path / "manifest.csv", manifest)
    assert figures(manifest=tmp_path / "manifest.csv") == figures()


def test_copies_point_at_their_train_image(figures, sample_data, sample_manifest, tmp_path):
    manifest = read_manifest(sample_manifest)
    train = manifest[(manifest["label"] == LABEL) & (manifest["split"] == "train")][:30]
    report = figures(folder=write_synthetic(load_images(train, sample_data, 32), LABEL, tmp_path / "copies"))
    assert [pair.train for pair in report.copying.nearest] == list(train["path"][:16])
    assert report.copying.near_copy_share == 1
    assert report.copying.authenticity == 0


def test_without_network_fid_is_a_sentence(figures, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    report = figures(inception="auto")
    assert report.fid is None
    assert any(note.startswith("There is no FID") and "goes by FD and KID" in note for note in report.notes)


def test_errors_name_what_is_wrong(figures, sample_manifest, tmp_path):
    with pytest.raises(DataError, match="run synthesize first"):
        figures(folder=tmp_path / "nothing")
    few = write_synthetic(fresh(LABEL, 60, 1002)[:5], LABEL, tmp_path / "few")
    with pytest.raises(DataError, match="lists 5 images"):
        figures(folder=few)
    manifest = read_manifest(sample_manifest)
    write_manifest(tmp_path / "alone.csv", manifest[manifest["label"] == LABEL])
    with pytest.raises(DataError, match="no class but vascular"):
        figures(manifest=tmp_path / "alone.csv")
    with pytest.raises(CheckpointError, match="no Inception weights"):
        figures(inception=str(tmp_path / "missing.pth"))


def test_halves_share_no_group():
    groups = np.repeat(np.arange(20), np.tile([1, 2, 3, 4], 5))
    first, second = grouped_halves(groups, np.random.default_rng(0))
    assert not set(groups[first]) & set(groups[second])
    assert sorted([*first, *second]) == list(range(50))
    assert abs(len(first) - len(second)) <= 4


def test_standard_errors_of_halves_agree_with_independent_samples():
    """The scatter of FD over 60 independent samples, against what each sample says of itself."""
    rng = np.random.default_rng(0)
    found, claimed = [], []
    for trial in range(60):
        real, fake, other = rng.normal(size=(80, 8)), rng.normal(size=(300, 8)) + 0.4, rng.normal(size=(300, 8)) + 1
        halves = compare_halves(real, fake, Reals(other, np.arange(300)), np.arange(80), 40, trial)
        estimates = halves.estimates("fd", "fd other", "fd real")
        found.append((estimates.first, estimates.second))
        claimed.append(np.diag(estimates.covariance))
    ratio = np.sqrt(np.mean(claimed, 0)) / np.std(found, 0, ddof=1)
    assert np.all((ratio > 0.75) & (ratio < 1.5)), ratio
    # The excess over the floor is the squared distance of the means, without the bias of small samples.
    assert np.mean(found, 0) == pytest.approx([8 * 0.4**2, 8 * 1.0**2], rel=0.1)


def test_a_class_that_cannot_be_told_apart_is_no_unit():
    """A small class that seems nearest, but whose KID may as well be 0, is passed over and named."""

    def kid(other: float, error: float) -> Estimates:
        return Estimates(0.1, other, np.diag([0.01, error]) ** 2)

    chosen, note = nearest_other("a", {"b": kid(0.3, 0.4), "c": kid(0.9, 0.1), "d": kid(2.0, 0.1)})
    assert chosen == "c"
    assert note is not None
    assert "do not tell a from b" in note
    assert nearest_other("a", {"b": kid(0.3, 0.05), "c": kid(0.9, 0.1)}) == ("b", None)
    assert nearest_other("a", {"b": kid(0.3, 0.4), "c": kid(0.9, 1.0)}) == ("b", None)


def test_train_images_of_one_patient_leave_the_class_unmeasured(figures, sample_manifest, tmp_path):
    manifest = read_manifest(sample_manifest)
    manifest.loc[(manifest["label"] == LABEL) & (manifest["split"] == "train"), "group"] = "one patient"
    write_manifest(tmp_path / "manifest.csv", manifest)
    with pytest.raises(TooFewImages, match="are of 1 groups"):
        figures(manifest=tmp_path / "manifest.csv")
