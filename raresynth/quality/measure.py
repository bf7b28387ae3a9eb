"""Every figure of one class's synthetic images."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from raresynth.config import GateConfig, QualityConfig
from raresynth.dataset.images import Pixels, load_images
from raresynth.dataset.manifest import read_manifest, read_synthetic
from raresynth.errors import TooFewImages
from raresynth.lineage import read_report, write_report
from raresynth.quality import copying, inception
from raresynth.quality.controls import LEAST_EFFECT, jittered
from raresynth.quality.distances import Z_95, Estimates, frechet_distance, kernel_distance, kernel_distances
from raresynth.quality.encoder import Encoder, EncoderReport, Features
from raresynth.quality.neighbours import neighbourhood
from raresynth.quality.reals import MIN_GROUPS, MIN_REAL, Reals, at_most, group_numbers, held_out_reals
from raresynth.quality.reports import (
    Atypical,
    Copying,
    CopyingControls,
    Distance,
    Fid,
    NearestReal,
    Proportion,
    QualityReport,
)

MIN_TRAIN_GROUPS = 3
MIN_OTHER = 12
PARTS = 4
"""At most this many disjoint subsets of the fakes meet each half of the reals."""
SHOWN = 16
CONTROLLED = 100
"""Train images, at most, of which the copying check's control makes copies."""


def measure(
    data_dir: Path,
    manifest_path: Path,
    encoder_dir: Path,
    synthetic_dir: Path,
    label: str,
    out_dir: Path,
    config: QualityConfig,
    gate: GateConfig,
    typical_share: float,
    seed: int,
    cache_dir: Path | None,
) -> QualityReport:
    """Measure the synthetic images of `label` against its reals and write report.json to `out_dir`.

    The reals are the held-out (val) ones; with fewer than `config.min_held_out` groups of them, train + val, and then
    the copying check binds. The test split is never looked at.

    Args:
        synthetic_dir: folder with manifest.csv, whose paths are relative to the folder above.
        typical_share: of the sieve that the images went through.

    Raises:
        TooFewImages: the class has too few real or synthetic images to measure anything, or there is no other class
            to compare with.
        CheckpointError: the encoder or the Inception weights are missing or damaged.
    """
    manifest = read_manifest(manifest_path)
    manifest = manifest[manifest["split"] != "test"]
    fakes = _fakes(synthetic_dir / "manifest.csv", label, config.max_images, seed)
    real, binding = held_out_reals(manifest, label, config.min_held_out)
    train = _train(manifest[manifest["label"] == label], label)
    real = at_most(real, config.max_images, seed)
    encoder = Encoder.load(encoder_dir)

    def features(frame: pd.DataFrame, root: Path) -> Features:
        return encoder.features(load_images(frame, root, encoder.resolution, cache_dir))

    own, drawn = Reals(features(real, data_dir), group_numbers(real)), features(fakes, synthetic_dir.parent)
    others = {
        name: Reals(features(frame, data_dir), group_numbers(frame))
        for name, frame in _others(manifest, label, config.max_images, seed).items()
    }
    kids = {
        name: kernel_distances(own.features, drawn, other.features, own.groups, None, other.groups)
        for name, other in others.items()
    }
    other_label, untold = nearest_other(kids)
    class_doubts, class_notes = which_class(label, other_label, _margins(drawn, own, {n: others[n] for n in untold}))
    halves = compare_halves(own, drawn, others[other_label], config.real_splits, seed)
    unseen = manifest[(manifest["label"] == label) & (manifest["split"] == "val")]
    fid, fid_note = _fid(real, data_dir, fakes, synthetic_dir.parent, config, seed, cache_dir)
    report = QualityReport(
        label=label,
        n_real=len(real),
        n_fake=len(fakes),
        n_compared=halves.size,
        n_other_compared=halves.other_size,
        real_splits="train+val" if binding else "val",
        encoder_sha256=encoder.sha256,
        dimensions=encoder.dimensions,
        fd=halves.distance(other_label),
        kid=_kid(kids[other_label], kernel_floor(own, config.real_splits, seed), other_label),
        precision=halves.proportion("precision"),
        recall=halves.proportion("recall"),
        density=halves.proportion("density"),
        coverage=halves.proportion("coverage"),
        atypical=_atypical(fakes, train["group"].nunique(), typical_share),
        copying=_copying(
            fakes, synthetic_dir.parent, train, unseen, data_dir, gate.near_copy_distance, seed, cache_dir
        ),
        binding_copying=binding,
        fid=fid,
        doubts=[*class_doubts, *encoder_doubts(encoder_dir, gate.control_correlation)],
        notes=[*class_notes, *(note for note in (_binding_note(label, config) if binding else None, fid_note) if note)],
    )
    write_report(out_dir / "report.json", report)
    return report


def _fakes(path: Path, label: str, limit: int, seed: int) -> pd.DataFrame:
    frame = read_synthetic(path, "synthesize")
    if len(frame) < 2 * MIN_REAL:
        raise TooFewImages(
            f"class {label} got {len(frame)} synthetic images and measuring needs {2 * MIN_REAL}; raise "
            "synthesis.min_images"
        )
    return at_most(frame, limit, seed)


def _train(frame: pd.DataFrame, label: str) -> pd.DataFrame:
    train = frame[frame["split"] == "train"]
    if train["group"].nunique() < MIN_TRAIN_GROUPS:
        raise TooFewImages(
            f"the train images of class {label} are of {train['group'].nunique()} groups, and telling whether they are "
            f"copied needs {MIN_TRAIN_GROUPS}; add images of other groups"
        )
    return train


def _others(manifest: pd.DataFrame, label: str, limit: int, seed: int) -> dict[str, pd.DataFrame]:
    """Reals of each other class that has enough of them to compare with."""
    by_label = manifest[manifest["label"] != label].groupby("label")
    chosen = {str(name): at_most(frame, limit, seed) for name, frame in by_label}
    others = {
        name: frame
        for name, frame in chosen.items()
        if len(frame) >= MIN_OTHER and frame["group"].nunique() >= MIN_GROUPS
    }
    if not others:
        raise TooFewImages(
            f"no class but {label} has {MIN_OTHER} train and val images of {MIN_GROUPS} groups; add images of another "
            "to compare with"
        )
    return others


def _binding_note(label: str, config: QualityConfig) -> str:
    return (
        f"Class {label} has held-out images of fewer than {config.min_held_out} groups, so its figures are taken "
        "against train + val reals, which a generator that copies would please: the copying check is binding."
    )


def nearest_other(kids: Mapping[str, Estimates]) -> tuple[str, list[str]]:
    """The class of least KID to the reals of those clearly apart from them, and the nearer ones, which are not.

    A class that these reals cannot tell from their own gives no unit to measure synthetic images in.

    Args:
        kids: other class -> KID of the reals to the fakes, and to that class.
    """
    apart = [name for name in kids if kids[name].ratio() is not None]
    chosen = min(apart or kids, key=lambda name: kids[name].second)
    return chosen, sorted(name for name in kids if kids[name].second < kids[chosen].second)


def _margins(fakes: Features, real: Reals, others: Mapping[str, Reals]) -> dict[str, tuple[float, float]]:
    """Other class -> KID of the fakes to it minus that to the reals, and the difference's standard error."""
    return {
        name: kernel_distances(fakes, real.features, other.features, None, real.groups, other.groups).difference()
        for name, other in others.items()
    }


def which_class(label: str, unit: str, margins: Mapping[str, tuple[float, float]]) -> tuple[list[str], list[str]]:
    """Whether the fakes show `label` and none of the classes that its reals are not told from: doubts and notes.

    Fakes are many, so that they may lie clearly nearer to the one's reals than to the other's where these are too few
    to lie clearly apart.

    Args:
        unit: the class that distances are held against.
        margins: class -> KID of the fakes to it minus that to `label`, and the difference's standard error.
    """
    doubts, notes = [], []
    for name, (difference, error) in margins.items():
        low, high = difference - Z_95 * error, difference + Z_95 * error
        shown = f"their KID to {name} less that to {label} is {difference:+.2f} ({low:+.2f} to {high:+.2f})"
        told = f"So few reals do not tell {label} from {name}: distances are held against {unit}. "
        if low > 0:
            notes.append(f"{told}The synthetic images show {label} and not {name}: {shown}.")
        else:
            doubts.append(f"{told}Whether the synthetic images show {label} or {name} is open: {shown}.")
    return doubts, notes


def encoder_doubts(encoder_dir: Path, least: float) -> list[str]:
    """What the encoder's own controls leave open, in sentences.

    Raises:
        CheckpointError: the folder holds no encoder.
    """
    controls = read_report(encoder_dir / "report.json", EncoderReport).controls
    doubts = []
    for name, control in (controls.named if controls else {}).items():
        worse = f"as reals are made worse by {name}; train it longer."
        if not control.spearman >= least:  # nor where it is no number, as of images that are all alike
            doubts.append(f"FD on this run's encoder does not rise {worse}")
        elif control.effect < LEAST_EFFECT:
            share = f"{100 * control.effect:.1f} % of the features' own scatter"
            doubts.append(f"FD on this run's encoder rises by {share} at most {worse}")
    return doubts


@dataclass(frozen=True)
class Halves:
    """Figures of random halves of the reals against fakes, other reals and the other half.

    A statistic of random halves scatters about the full sample's as that does about the truth (the delete-half
    jackknife; Shao and Wu 1989), so the replicates' covariance is that of the mean's error. For figures that count
    neighbours it is larger, since each split's own chance is in it, which the mean is almost rid of: their intervals
    are too wide, by half and more.

    Attributes:
        size: images a side.
        other_size: images a side of FD to other reals, and of the floors that this is held against.
        replicates: name -> (K,) values, one a split.
    """

    size: int
    other_size: int
    replicates: Mapping[str, npt.NDArray[np.float64]]

    def estimates(self, first: str, second: str, zeros: tuple[float, float] = (0.0, 0.0)) -> Estimates:
        """Two figures less their zeros."""
        a, b = self.replicates[first] - zeros[0], self.replicates[second] - zeros[1]
        return Estimates(float(a.mean()), float(b.mean()), np.cov(a, b))

    def fd_zeros(self) -> tuple[float, float]:
        """What FD of the reals to the fakes, and to the other reals, would be if nothing differed.

        FD's bias grows with the scatter of either sample: half of it is that of two halves of the one, half that of two
        halves of the other. Fakes that scatter less than the reals, the common fault of GANs, have less of it, and the
        reals' own floor alone would flatter them: at half the reals' standard deviation as far as below 0.
        """
        names = (("fd real", "fd fake"), ("fd real of other size", "fd other floor"))
        fake, other = (float(np.mean([self.replicates[floor] for floor in floors])) for floors in names)
        return fake, other

    def distance(self, other_label: str) -> Distance:
        zeros = self.fd_zeros()
        values, above = self.estimates("fd", "fd other"), self.estimates("fd", "fd other", zeros)
        return _distance(values, float(self.replicates["fd real"].mean()), zeros, other_label, above)

    def proportion(self, name: str) -> Proportion:
        estimates = self.estimates(name, f"{name} real")
        low, high = estimates.interval()
        ratio = estimates.ratio_interval()
        return Proportion(
            value=estimates.first,
            low=max(low, 0.0),
            high=high if name == "density" else min(high, 1.0),
            real_real=estimates.second,
            ratio=estimates.ratio(),
            ratio_low=max(ratio[0], 0.0) if ratio else None,
            ratio_high=ratio[1] if ratio else None,
        )


def _distance(
    values: Estimates, floor: float, zeros: tuple[float, float], other_label: str, above: Estimates
) -> Distance:
    """`above` are the values less their zeros."""
    low, high = values.interval()
    ratio = above.ratio_interval() or (None, None)
    return Distance(
        value=values.first,
        low=low,
        high=high,
        floor=floor,
        zero=zeros[0],
        other_label=other_label,
        other_value=values.second,
        other_zero=zeros[1],
        ratio=above.ratio(),
        ratio_low=ratio[0],
        ratio_high=ratio[1],
    )


def _kid(kid: Estimates, floor: float, other_label: str) -> Distance:
    # KID is unbiased; the floor is shown for comparison.
    return _distance(kid, floor, (0.0, 0.0), other_label, kid)


def grouped_halves(
    groups: npt.NDArray[np.int64], rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Two disjoint sets of indices, each about half of the images; a group is never in both."""
    order = rng.permutation(int(groups.max()) + 1)
    sizes = np.cumsum(np.bincount(groups)[order])
    cut = int(np.abs(sizes - len(groups) / 2).argmin()) + 1
    in_first = np.isin(groups, order[:cut])
    return np.flatnonzero(in_first), np.flatnonzero(~in_first)


def compare_halves(real: Reals, fake: Features, other: Reals, splits: int, seed: int) -> Halves:
    """Compare random halves of the reals with as many fakes and reals of the other half, and with other reals.

    Of each group one random image takes part in a split: images of one lesion or patient are alike, so that two halves
    with several of each would lie farther apart, and be reached less, than as many independent images; held against
    that floor, fakes, which are independent, would look too good.

    The fakes' part of each comparison is a random half of them, cut into up to four subsets whose figures are averaged.
    FD is also taken between the halves of the fakes, and of the other reals: `Halves.fd_zeros`. Where other reals are
    fewer, FD to them alone, and its floors, are of fewer images.

    Args:
        fake: features (M, D).

    Raises:
        TooFewImages: the reals have fewer than 8 groups.
    """
    rng, chooser, floors = (np.random.default_rng([seed, number]) for number in (1, 4, 5))
    sides = [np.arange(n) for n in (real.groups.max() + 1, len(fake), other.groups.max() + 1)]
    pairs = [grouped_halves(sides[0], rng) for _ in range(splits)]
    halves = [(grouped_halves(sides[1], rng), grouped_halves(sides[2], rng)) for _ in range(splits)]
    size = min(len(half) for reals, (fakes, _) in zip(pairs, halves, strict=True) for half in (*reals, *fakes))
    other_size = min(size, *(len(half) for _, others in halves for half in others))
    if len(sides[0]) < MIN_GROUPS:
        raise TooFewImages(
            f"the reals are of {len(sides[0])} groups, and comparing halves of them needs {MIN_GROUPS}; "
            "add images of other groups"
        )
    rows: dict[str, list[float]] = {}
    for (first, second), (of_fake, of_other) in zip(pairs, halves, strict=True):
        chosen, others = one_of_each(real, chooser), one_of_each(other, chooser)
        a, b = chosen[rng.permutation(first)[:size]], chosen[rng.permutation(second)[:size]]
        fakes, rest_of_fakes = fake[rng.permutation(of_fake[0])], fake[floors.permutation(of_fake[1])]
        shown, rest_of_shown = others[rng.permutation(of_other[0])], others[floors.permutation(of_other[1])]
        row = _compare(a, b, " real") | _mean([_compare(a, part, "") for part in _parts(fakes, size)])
        row["fd fake"] = frechet_distance(fakes[:size], rest_of_fakes[:size])
        smaller = list(zip(_parts(a, other_size), _parts(b, other_size), strict=True))
        row["fd real of other size"] = _mean_fd(smaller)
        row["fd other"] = _mean_fd([(of_a, part) for of_a, _ in smaller for part in _parts(shown, other_size)])
        row["fd other floor"] = frechet_distance(shown[:other_size], rest_of_shown[:other_size])
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    return Halves(size, other_size, {name: np.asarray(values) for name, values in rows.items()})


def _parts(sample: Features, size: int) -> list[Features]:
    """Up to four disjoint subsets of `size`."""
    return [sample[i * size : (i + 1) * size] for i in range(min(PARTS, len(sample) // size))]


def _mean(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


def _mean_fd(pairs: list[tuple[Features, Features]]) -> float:
    return float(np.mean([frechet_distance(first, second) for first, second in pairs]))


def one_of_each(reals: Reals, rng: np.random.Generator) -> Features:
    """Features (G, D) of a random image of each group, in the order of their numbers."""
    shuffled = rng.permutation(len(reals.groups))
    return reals.features[shuffled[np.unique(reals.groups[shuffled], return_index=True)[1]]]


def _compare(real: Features, fake: Features, suffix: str) -> dict[str, float]:
    figures = {"fd": frechet_distance(real, fake), **vars(neighbourhood(real, fake))}
    return {f"{name}{suffix}": value for name, value in figures.items()}


def kernel_floor(real: Reals, splits: int, seed: int) -> float:
    """Mean KID between random halves of the reals, split by group.

    Raises:
        TooFewImages: one group is so large that it is a half by itself in every split; KID needs pairs of groups.
    """
    rng = np.random.default_rng([seed, 2])
    pairs = [grouped_halves(real.groups, rng) for _ in range(splits)]
    pairs = [(a, b) for a, b in pairs if min(len(np.unique(real.groups[half])) for half in (a, b)) > 1]
    if not pairs:
        raise TooFewImages("one group holds half of the reals or more; add images of other groups")
    x, groups = real.features, real.groups
    return float(np.mean([kernel_distance(x[a], x[b], groups[a], groups[b]) for a, b in pairs]))


def _fid(
    real: pd.DataFrame,
    data_dir: Path,
    fakes: pd.DataFrame,
    synthetic_root: Path,
    config: QualityConfig,
    seed: int,
    cache_dir: Path | None,
) -> tuple[Fid | None, str | None]:
    """FID, or a sentence that says why there is none although it was asked for."""
    if config.inception == "none":
        return None, None
    # Both sides at the synthetic images' own size, so that the fakes are not judged by pixels they do not have.
    side = int(fakes["width"].min())
    images = load_images(real, data_dir, side, cache_dir), load_images(fakes, synthetic_root, side, cache_dir)
    halves = grouped_halves(group_numbers(real), np.random.default_rng([seed, 3]))
    try:
        return inception.fid(config.inception, *images, halves), None
    except inception.WeightsUnavailable as error:
        return None, f"There is no FID, since {error}; the gate goes by FD and KID on the encoder."


def _n_drawn(fakes: pd.DataFrame) -> int:
    """Images that were drawn for these: those that the sieve took out before an image of this choice count too."""
    return len(fakes) + int(fakes[["rejected_near_copy", "rejected_atypical"]].to_numpy().sum())


def _atypical(fakes: pd.DataFrame, n_groups: int, typical_share: float) -> Atypical:
    n_atypical, n_drawn = int(fakes["rejected_atypical"].sum()), _n_drawn(fakes)
    low, high = copying.wilson_interval(n_atypical, n_drawn)
    reals_at_most = round(beyond_quantile(n_groups, typical_share), 3)
    return Atypical(share=n_atypical / n_drawn, low=low, high=high, reals_at_most=reals_at_most)


def beyond_quantile(n: int, share: float) -> float:
    """Part of a distribution that lies beyond a quantile of n of its values, at most, with 95 % confidence.

    Beyond the r-th of them it has a beta distribution (Wilks 1941); beyond the last at most 1 - 0.05^(1/n).
    """
    from scipy.stats import beta

    r = ceil(share * (n - 1)) + 1
    return float(beta.ppf(0.95, n - r + 1, r))


def _copying(
    fakes: pd.DataFrame,
    synthetic_root: Path,
    train: pd.DataFrame,
    unseen: pd.DataFrame,
    data_dir: Path,
    threshold: float,
    seed: int,
    cache_dir: Path | None,
) -> Copying:
    def pixels(frame: pd.DataFrame, root: Path) -> Pixels:
        return load_images(frame, root, copying.SIDE, cache_dir)

    own, groups = pixels(train, data_dir), group_numbers(train)
    others, other_groups = pixels(unseen, data_dir), group_numbers(unseen)
    figures = copying.check_copying(pixels(fakes, synthetic_root), own, groups, others, other_groups, threshold)
    n_near_copies = figures.n_near_copies + int(fakes["rejected_near_copy"].sum())
    n_drawn = _n_drawn(fakes)
    low, high = copying.wilson_interval(n_near_copies, n_drawn)
    shown = zip(fakes["path"][:SHOWN], figures.nearest, figures.relative, strict=False)
    return Copying(
        near_copy_share=n_near_copies / n_drawn,
        low=low,
        high=high,
        n_drawn=n_drawn,
        threshold=threshold,
        reals="val" if figures.unseen else "train",
        controls=copying_controls(own, groups, figures.reals, threshold, seed),
        authenticity=figures.authenticity,
        nearer_share=figures.nearer.value,
        nearer_low=figures.nearer.low,
        nearer_high=figures.nearer.high,
        nearest=[
            NearestReal(synthetic=path, train=str(train["path"].iloc[index]), distance=float(relative))
            for path, index, relative in shown
        ],
    )


def copying_controls(
    train: Pixels, groups: npt.NDArray[np.int64], reals: copying.Array, threshold: float, seed: int
) -> CopyingControls:
    """Whether the check finds copies, and calls nothing a copy that is none.

    Args:
        train: uint8 (N, 32, 32, 3).
        groups: group number of each train image, 0 to G - 1, G >= 3.
        reals: relative distances of images that are no copies, as `check_copying` found them.
    """
    rng = np.random.default_rng([seed, 6])
    chosen = rng.permutation(len(train))[:CONTROLLED]
    copies = copying.relative_distances(jittered(train[chosen], rng), train, groups)
    return CopyingControls(
        copies_found=float((copies < threshold).mean()),
        n_copies=len(copies),
        reals_found=float((reals < threshold).mean()),
        n_reals=len(reals),
    )
