"""The series of gan_series.py, judged: KID against real images that no generator, encoder or choice has seen.

    python -m benchmarks.gan_quality --run RUN --data ../shared/ham10000 --series SERIES

For every class, and for the set as a whole, raresynth's KID minus each other preset's, on the test split's reals and
500 images a generator, none rejected. The 95 % interval takes in the reals (jackknife by lesion) and the seeds
(Student's t, degrees of freedom after Welch and Satterthwaite). "At best" is half its width if seeds did not scatter:
no number of seeds can go below it, since the reals stay as few as they are. The last table has the train images in
raresynth's place: what a perfect generator would reach.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student

from benchmarks.gan_series import PRESETS, Inputs, folder
from raresynth.dataset.images import Pixels, load_images, resized
from raresynth.dataset.manifest import read_manifest
from raresynth.gan.sampling import generate, load_generator
from raresynth.quality.distances import kernel_distance, polynomial_kernel
from raresynth.quality.encoder import Encoder
from raresynth.quality.reals import Reals, group_numbers

IMAGES = 500
SEED = 7
OURS, *OTHERS = PRESETS
WHOLE = "whole set"
MINUS = " | ".join(f"minus {preset}" for preset in OTHERS)


@dataclass(frozen=True)
class Difference:
    """Mean over seeds, with its 95 % interval, and half that interval's width by the reals alone."""

    value: float
    low: float
    high: float
    of_reals: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f}; at best ± {self.of_reals:.3f})"


def paired_difference(real: Reals, ours: list[np.ndarray], theirs: list[np.ndarray]) -> Difference:
    """KID(real, ours) - KID(real, theirs), averaged over seeds; each list holds one feature set (M, D) a seed.

    The reals' own term is in both distances and cancels.
    """
    x = np.asarray(real.features, np.float64)
    own, cross = [], np.zeros(len(x))
    for a, b in zip(ours, theirs, strict=True):
        xa, xb = (polynomial_kernel(x, np.asarray(f, np.float64)).mean(1) for f in (a, b))
        own.append(_within(a) - _within(b) - 2 * (xa - xb).mean())
        cross += -2 * (xa - xb) / len(ours)
    sizes = np.bincount(real.groups)
    without = (cross.sum() - np.bincount(real.groups, weights=cross)) / (len(x) - sizes)
    n, seeds = len(sizes), len(ours)
    of_reals = float(np.square(without - without.mean()).sum() * (n - 1) / n)
    of_seeds = float(np.var(own, ddof=1) / seeds) if seeds > 1 else float("nan")
    variance = of_reals + of_seeds
    freedom = variance**2 / (of_reals**2 / (n - 1) + of_seeds**2 / (seeds - 1)) if seeds > 1 else float("nan")
    half = float(student.ppf(0.975, freedom) * np.sqrt(variance))
    mean = float(np.mean(own))
    return Difference(mean, mean - half, mean + half, float(student.ppf(0.975, n - 1) * np.sqrt(of_reals)))


def _within(features: np.ndarray) -> float:
    kernel = polynomial_kernel(*(2 * [np.asarray(features, np.float64)]))
    n = len(kernel)
    return float((kernel.sum() - np.trace(kernel)) / (n * (n - 1)))


class Series:
    """What was trained, and the features of its images."""

    def __init__(self, inputs: Inputs, out: Path) -> None:
        self.inputs, self.out = inputs, out
        self.encoder = Encoder.load(inputs.encoder)
        self.manifest = read_manifest(inputs.manifest)
        self.fakes, self.reals = cache(self._fakes), cache(self._reals)

    def seeds(self) -> list[int]:
        """Those for which every preset is trained to the end."""
        n = 0
        while all((self.place(preset, n, label) / "time.json").exists() for preset in PRESETS for label in self.labels):
            n += 1
        return list(range(n))

    @property
    def labels(self) -> list[str]:
        counts = self.manifest["label"].value_counts()
        return sorted(counts.index[1:])

    def place(self, preset: str, seed: int, label: str) -> Path:
        return folder(self.out, preset, seed) / label

    def _reals(self, label: str, *splits: str) -> Reals:
        frame = self.manifest[self.manifest["split"].isin(splits)]
        frame = frame if label == WHOLE else frame[frame["label"] == label]
        pixels = load_images(frame, self.inputs.data_dir, self.encoder.resolution, self.inputs.packed)
        return Reals(self.encoder.features(pixels), group_numbers(frame))

    def _fakes(self, preset: str, seed: int, label: str) -> np.ndarray:
        images = self.whole(preset, seed) if label == WHOLE else self.drawn(preset, seed, label, IMAGES)
        return self.encoder.features(resized(images, self.encoder.resolution))

    def drawn(self, preset: str, seed: int, label: str, n: int) -> Pixels:
        generator, _ = load_generator(self.place(preset, seed, label), "cpu", label)
        return generate(generator, SEED, range(n))

    def whole(self, preset: str, seed: int) -> Pixels:
        """The universal GAN's images: as it draws them, or in the classes' proportions where it knows classes."""
        universal = folder(self.out, preset, seed) / "universal"
        if preset != OURS:
            return generate(load_generator(universal, "cpu")[0], SEED, range(2 * IMAGES))
        shares = self.manifest["label"][self.manifest["split"] == "train"].value_counts(normalize=True)
        drawn = [
            generate(load_generator(universal, "cpu", label)[0], SEED, range(round(2 * IMAGES * share)))
            for label, share in shares.items()
        ]
        return np.concatenate(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--series", type=Path, required=True)
    whose = "whose reals; no choice was made by those of test; those of train were drawn from"
    parser.add_argument("--split", choices=["test", "val", "train"], nargs="+", default=["test"], help=whose)
    args = parser.parse_args()
    torch.set_num_threads(1)
    series = Series(Inputs(args.run, args.data), args.series)
    seeds = series.seeds()
    print(f"{len(seeds)} seeds, {' + '.join(args.split)} split, encoder {series.encoder.sha256[:16]}\n")
    print_runs(series, seeds)
    print_distances(series, seeds, args.split)
    if "train" not in args.split:  # the train images would else be held against themselves
        print_floor(series, seeds, args.split)


def print_runs(series: Series, seeds: list[int]) -> None:
    """Parameters, time, memory and collapses of each preset, over all its trainings."""
    print("| preset | parameters G + D, M | kimg a run | CPU minutes a run, median | peak memory, MB | NaNs |")
    print("|---|---|---|---|---|---|")
    for preset in PRESETS:
        runs = [[series.place(preset, seed, label) for label in ("universal", *series.labels)] for seed in seeds]
        reports = [json.loads((place / "report.json").read_text()) for places in runs for place in places]
        times = [[json.loads((place / "time.json").read_text()) for place in places] for places in runs]
        minutes = np.median([sum(t["seconds"] for t in of_run) / 60 for of_run in times])
        nans = sum(report["status"] == "collapsed" for report in reports) + sum(len(r["rollbacks"]) for r in reports)
        size = f"{reports[0]['generator_parameters'] / 1e6:.2f} + {reports[0]['discriminator_parameters'] / 1e6:.2f}"
        print(
            f"| {preset} | {size} | {sum(r['kimg'] for r in reports) / len(seeds):.0f} "
            f"| {minutes:.0f} | {max(t['peak_memory_mb'] for of_run in times for t in of_run):,} | {nans} |"
        )
    print()


def print_distances(series: Series, seeds: list[int], splits: Sequence[str]) -> None:
    """KID of every preset, and ours minus the others'."""
    others = " | ".join(f"KID, {p}" for p in OTHERS)
    print(f"| class | reals | KID, {OURS} | {others} | {MINUS} |\n|---|---|---|{'---|' * 2 * len(OTHERS)}")
    found: dict[str, list[Difference]] = {}
    for label in (*series.labels, WHOLE):
        real = series.reals(label, *splits)
        sets = {preset: [series.fakes(preset, seed, label) for seed in seeds] for preset in PRESETS}
        kids = [np.mean([kernel_distance(real.features, f, real.groups) for f in sets[preset]]) for preset in PRESETS]
        against = found[label] = [paired_difference(real, sets[OURS], sets[preset]) for preset in OTHERS]
        cells = [*(f"{kid:.3f}" for kid in kids), *map(str, against)]
        print(f"| {label} | {len(real.features)} | {' | '.join(cells)} |", flush=True)
    for of_preset, preset in zip(zip(*found.values(), strict=True), OTHERS, strict=True):
        *ahead, whole = (difference.high < 0 for difference in of_preset)
        *these, whole_of_these = (difference.value + difference.of_reals < 0 for difference in of_preset)
        print(f"\nAgainst {preset} on our side: {sum(ahead)} of {len(ahead)} classes{', whole set' * whole}", end="")
        print(f"; of these runs alone, were there no other seeds: {sum(these)}{', whole set' * whole_of_these}")


def print_floor(series: Series, seeds: list[int], splits: Sequence[str]) -> None:
    """The same with the train images in the place of ours: what a generator could reach that draws nothing else."""
    print(f"\n| class | KID, train images | {MINUS} |\n|---|---|{'---|' * len(OTHERS)}")
    for label in (*series.labels, WHOLE):
        real, train = series.reals(label, *splits), series.reals(label, "train").features
        kid = kernel_distance(real.features, train, real.groups)
        fakes = [[series.fakes(preset, seed, label) for seed in seeds] for preset in OTHERS]
        against = [paired_difference(real, [train] * len(seeds), theirs) for theirs in fakes]
        print(f"| {label} | {kid:.3f} | {' | '.join(map(str, against))} |", flush=True)


if __name__ == "__main__":
    main()
