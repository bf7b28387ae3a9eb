"""Every figure names what it rests on, and nothing looks at the test split."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from known import fresh, write_synthetic

from raresynth.config import GateConfig, QualityConfig
from raresynth.dataset.images import load_images
from raresynth.dataset.manifest import read_manifest, read_synthetic, write_manifest
from raresynth.errors import CheckpointError, DataError, TooFewImages
from raresynth.lineage import load_checkpoint, read_report
from raresynth.quality.copying import wilson_interval
from raresynth.quality.distances import Estimates, kernel_distances
from raresynth.quality.measure import (
    Halves,
    beyond_quantile,
    compare_halves,
    copying_controls,
    encoder_doubts,
    grouped_halves,
    kernel_floor,
    measure,
    nearest_other,
    which_class,
)
from raresynth.quality.reals import Reals, held_out_reals
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
        return measure(*inputs, LABEL, tmp_path / out, config, GateConfig(), 0.99, seed, None)

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


def test_near_copies_that_the_sieve_took_out_count_against_the_generator(figures, synthetic):
    rows = read_synthetic(synthetic / "manifest.csv", "synthesize")
    rows["rejected_near_copy"], rows["rejected_atypical"] = [2, *[0] * 59], [*[0] * 59, 10]
    kept = figures().copying
    rows.to_csv(synthetic / "manifest.csv", index=False)
    drawn = figures().copying
    assert (kept.n_drawn, drawn.n_drawn) == (60, 72)
    assert drawn.near_copy_share == pytest.approx((60 * kept.near_copy_share + 2) / 72)
    assert drawn.low < drawn.near_copy_share < drawn.high
    atypical = figures().atypical
    assert (atypical.share, atypical.low, atypical.high) == (10 / 72, *wilson_interval(10, 72))
    assert 0 < atypical.reals_at_most < 0.1


@pytest.mark.parametrize(("n", "share"), [(14, 0.99), (28, 0.9), (200, 0.95)])
def test_what_lies_beyond_a_quantile_of_few_values_is_bounded(n, share):
    """Of uniform values, by simulation, what the sieve's quantile leaves beyond it."""
    limits = np.quantile(np.random.default_rng(0).random((4000, n)), share, axis=1, method="higher")
    assert (1 - limits <= beyond_quantile(n, share)).mean() == pytest.approx(0.95, abs=0.015)
    assert beyond_quantile(14, 0.99) == pytest.approx(1 - 0.05 ** (1 / 14))


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
    with pytest.raises(DataError, match="got 5 synthetic images"):
        figures(folder=few)
    manifest = read_manifest(sample_manifest)
    write_manifest(tmp_path / "alone.csv", manifest[manifest["label"] == LABEL])
    with pytest.raises(DataError, match="no class but vascular has 12"):
        figures(manifest=tmp_path / "alone.csv")
    with pytest.raises(CheckpointError, match="no Inception weights"):
        figures(inception=str(tmp_path / "missing.pth"))


def test_halves_share_no_group():
    groups = np.repeat(np.arange(20), np.tile([1, 2, 3, 4], 5))
    first, second = grouped_halves(groups, np.random.default_rng(0))
    assert not set(groups[first]) & set(groups[second])
    assert sorted([*first, *second]) == list(range(50))
    assert abs(len(first) - len(second)) <= 4


@pytest.mark.parametrize("others", [300, 24])
def test_standard_errors_of_halves_agree_with_independent_samples(others):
    """The scatter of FD over 60 independent samples, against what each sample says of itself."""
    rng = np.random.default_rng(0)
    found, claimed = [], []
    for trial in range(60):
        real, fake, other = rng.normal(size=(80, 8)), rng.normal(size=(300, 8)) + 0.4, rng.normal(size=(others, 8)) + 1
        halves = compare_halves(Reals(real, np.arange(80)), fake, Reals(other, np.arange(others)), 40, trial)
        estimates = halves.estimates("fd", "fd other", halves.fd_zeros())
        found.append((estimates.first, estimates.second))
        claimed.append(np.diag(estimates.covariance))
    ratio = np.sqrt(np.mean(claimed, 0)) / np.std(found, 0, ddof=1)
    assert np.all((ratio > 0.75) & (ratio < 1.5)), ratio
    # The excess is the squared distance of the means, without the bias of small samples.
    assert np.mean(found, 0) == pytest.approx([8 * 0.4**2, 8 * 1.0**2], rel=0.1)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_fakes_that_scatter_less_are_not_flattered_by_the_bias_of_small_samples(scale):
    """FD of normal distributions of one mean is D (1 - scale)^2, however many images it is taken from."""
    rng = np.random.default_rng(0)
    excess = []
    for trial in range(20):
        real, fake, other = (
            rng.normal(size=(50, 16)),
            scale * rng.normal(size=(300, 16)),
            rng.normal(size=(300, 16)) + 1,
        )
        halves = compare_halves(Reals(real, np.arange(50)), fake, Reals(other, np.arange(300)), 10, trial)
        excess.append(halves.estimates("fd", "fd other", halves.fd_zeros()).first)
    assert np.mean(excess) == pytest.approx(16 * (1 - scale) ** 2, abs=0.9)


def test_a_ratio_of_proportions_is_never_below_0():
    rng = np.random.default_rng(0)
    recall = Halves(16, 16, {"recall": rng.uniform(0, 0.2, 50), "recall real": rng.uniform(0.8, 1, 50)}).proportion(
        "recall"
    )
    assert recall.ratio_low == recall.low == 0.0
    assert recall.ratio_high is not None and recall.ratio_high > 0.1


def test_a_small_other_class_is_no_reason_to_compare_few_fakes():
    rng = np.random.default_rng(0)
    real, fake, other = rng.normal(size=(80, 8)), rng.normal(size=(300, 8)), rng.normal(size=(300, 8)) + 1
    own = Reals(real, np.arange(80))
    many, few = (compare_halves(own, fake, Reals(other[:n], np.arange(n)), 20, 0) for n in (300, 16))
    assert (many.size, many.other_size) == (few.size, 40)
    assert few.other_size == 8
    for name in ("fd", "fd real", "fd fake", "coverage", "coverage real"):
        assert few.replicates[name].std() < 1.5 * many.replicates[name].std()
    # At eight images a side FD's bias is larger than what it is to tell: with zeros at that size it is rid of it.
    assert few.replicates["fd other"].mean() > many.replicates["fd other"].mean() + 1
    excess = [halves.estimates("fd", "fd other", halves.fd_zeros()).second for halves in (many, few)]
    assert excess == pytest.approx([8.0, 8.0], rel=0.3)


def test_the_copying_check_is_shown_to_work(figures):
    controls = figures().copying.controls
    assert controls.copies_found > 0.9
    assert controls.reals_found < 0.05
    assert (controls.n_copies, controls.n_reals) == (100, 36)


def test_a_copying_check_that_sees_nothing_says_so():
    """Nearly one and the same image over and over: a copy is as near to the others as to its own."""
    rng = np.random.default_rng(0)
    dull = np.clip(rng.normal(100, 1, (40, 32, 32, 3)), 0, 255).astype(np.uint8)
    found = copying_controls(dull, np.arange(40) // 2, np.full(30, 0.4), 0.5, 0)
    assert found.copies_found < 0.5
    assert (found.reals_found, found.n_reals) == (1.0, 30)


def test_an_encoder_that_fails_its_controls_is_doubted(figures, trained_encoder, tmp_path):
    assert figures().doubts == []
    copy = tmp_path / "encoder"
    shutil.copytree(trained_encoder, copy)
    report = json.loads((copy / "report.json").read_text())
    report["controls"]["noise"]["spearman"] = 0.5
    (copy / "report.json").write_text(json.dumps(report))
    assert encoder_doubts(copy, 0.5) == []
    (doubt,) = encoder_doubts(copy, 0.8)
    assert doubt == "FD on this run's encoder does not rise as reals are made worse by noise; train it longer."
    report["controls"]["noise"] |= {"spearman": 1.0, "effect": 0.012}
    (copy / "report.json").write_text(json.dumps(report))
    (doubt,) = encoder_doubts(copy, 0.8)
    assert "rises by 1.2 % of the features' own scatter at most as reals are made worse by noise; train" in doubt


def test_more_photographs_of_the_same_lesions_do_not_flatter():
    """The very same image four times over, in the reals and in the other class, changes no figure."""
    rng = np.random.default_rng(0)
    real, fake, other = rng.normal(size=(40, 8)), rng.normal(size=(100, 8)) + 0.4, rng.normal(size=(60, 8)) + 1
    once = compare_halves(Reals(real, np.arange(40)), fake, Reals(other, np.arange(60)), 10, 0)
    others = Reals(np.repeat(other, 4, axis=0), np.repeat(np.arange(60), 4))
    often = compare_halves(Reals(np.repeat(real, 4, axis=0), np.repeat(np.arange(40), 4)), fake, others, 10, 0)
    assert once.size == often.size == 20
    for name, values in once.replicates.items():
        assert often.replicates[name] == pytest.approx(values, rel=1e-9), name
    with pytest.raises(TooFewImages, match="of 7 groups"):
        compare_halves(Reals(real, np.arange(40) % 7), fake, others, 10, 0)


def test_a_group_as_large_as_all_others_is_no_half_of_the_kernel_floor():
    real = np.random.default_rng(0).normal(size=(40, 8))
    groups = np.maximum(np.arange(40) - 20, 0)
    assert np.isfinite(kernel_floor(Reals(real, groups), 20, 0))
    with pytest.raises(TooFewImages, match="one group holds"):
        kernel_floor(Reals(real, np.arange(40) // 20), 20, 0)


def test_many_held_out_images_of_few_patients_are_too_few(sample_manifest):
    manifest = read_manifest(sample_manifest)
    held_out = (manifest["label"] == LABEL) & (manifest["split"] == "val")
    assert not held_out_reals(manifest, LABEL, 12)[1]
    manifest.loc[held_out, "group"] = [f"patient {i % 3}" for i in range(held_out.sum())]
    real, binding = held_out_reals(manifest, LABEL, 12)
    assert binding and set(real["split"]) == {"train", "val"}


def test_a_class_that_cannot_be_told_apart_is_no_unit():
    """A small class that seems nearest, but whose KID may as well be 0, is passed over and named."""

    def kid(other: float, error: float) -> Estimates:
        return Estimates(0.1, other, np.diag([0.01, error]) ** 2)

    assert nearest_other({"b": kid(0.3, 0.4), "c": kid(0.9, 0.1), "d": kid(2.0, 0.1)}) == ("c", ["b"])
    assert nearest_other({"b": kid(0.3, 0.05), "c": kid(0.9, 0.1)}) == ("b", [])
    assert nearest_other({"b": kid(0.3, 0.4), "c": kid(0.9, 1.0)}) == ("b", [])


@pytest.mark.parametrize(("of_b", "least", "most"), [(0.0, 0.4, 1.0), (0.5, 0.0, 0.05), (1.0, 0.0, 0.0)])
def test_many_fakes_tell_what_few_reals_do_not(of_b, least, most):
    """Where twelve reals do not tell a from b, fakes of a often do; those of b, or half of each, leave it open."""
    rng, certain = np.random.default_rng(1), []
    for _ in range(60):
        a, b = rng.normal(size=(12, 64)), rng.normal(size=(12, 64)) + 0.3
        fakes = rng.normal(size=(300, 64)) + np.where(np.arange(300) < 300 * of_b, 0.3, 0.0)[:, None]
        if kernel_distances(a, fakes, b).ratio() is None:
            doubts, _ = which_class("a", "c", {"b": kernel_distances(fakes, a, b).difference()})
            certain.append(not doubts)
    assert len(certain) > 20
    assert least <= np.mean(certain) <= most


def test_the_sentence_says_what_the_images_show_and_how_surely():
    assert which_class("a", "c", {"b": (0.77, 0.12)}) == (
        [],
        [
            "So few reals do not tell a from b: distances are held against c. The synthetic images show a and not b: "
            "their KID to b less that to a is +0.77 (+0.53 to +1.01)."
        ],
    )
    doubts, notes = which_class("a", "c", {"b": (0.77, 0.12), "d": (0.2, 0.4)})
    assert len(notes) == 1
    assert doubts == [
        "So few reals do not tell a from d: distances are held against c. Whether the synthetic images show a or d is "
        "open: their KID to d less that to a is +0.20 (-0.58 to +0.98)."
    ]


def test_a_class_under_two_names_leaves_open_which_the_images_show(figures, sample_manifest, tmp_path):
    manifest = read_manifest(sample_manifest)
    twin = manifest[(manifest["label"] == LABEL) & (manifest["split"] != "test")].index[::2]
    manifest.loc[twin, "label"] = "twin"
    write_manifest(tmp_path / "manifest.csv", manifest)
    report = figures(manifest=tmp_path / "manifest.csv")
    assert report.kid.other_label != "twin"
    (doubt,) = report.doubts
    assert f"Whether the synthetic images show {LABEL} or twin is open" in doubt


def test_train_images_of_one_patient_leave_the_class_unmeasured(figures, sample_manifest, tmp_path):
    manifest = read_manifest(sample_manifest)
    manifest.loc[(manifest["label"] == LABEL) & (manifest["split"] == "train"), "group"] = "one patient"
    write_manifest(tmp_path / "manifest.csv", manifest)
    with pytest.raises(TooFewImages, match="are of 1 groups"):
        figures(manifest=tmp_path / "manifest.csv")
