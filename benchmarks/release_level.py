"""How often the release gate approves an arm that is no better, and one that is, by the size of the test split.

    python -m benchmarks.release_level

Simulated predictions judged by the code of `evaluate`: both arms are right on 70 % of the images, or the one with
synthetic images on 80 %. Beside the gate stands what the bootstrap alone would approve.
"""

import argparse

import numpy as np

from raresynth.classifier.evaluation import SYNTHETIC, decide_release, paired_differences
from raresynth.classifier.statistics import Floats, Integers, bootstrap, figures, interval, swap_margins
from raresynth.config import ReleaseConfig

# Groups a class, of one image each.
SPLITS = {
    "2 of each of 7 classes": [2] * 7,
    "2, 2, 10, 30, 30, 50, 300": [2, 2, 10, 30, 30, 50, 300],
    "5, 5, 20, 60": [5, 5, 20, 60],
    "HAM10000's: 9, 12, 27, 40, 73, 88, 648": [9, 12, 27, 40, 73, 88, 648],
}
REAL = "real"
ACCURACY, BETTER = 0.7, 0.8


def predictions(targets: Integers, accuracy: float, rng: np.random.Generator) -> Floats:
    classes = int(targets.max()) + 1
    right = rng.random(len(targets)) < accuracy
    return np.asarray(np.eye(classes)[np.where(right, targets, (targets + 1) % classes)])


def approvals(sizes: list[int], accuracy: float, trials: int, samples: int) -> tuple[float, float]:
    """Share of trials approved by the bootstrap alone, and by the gate."""
    rng = np.random.default_rng(0)
    targets = np.repeat(np.arange(len(sizes)), sizes)
    groups, rule = np.arange(len(targets)).astype(str), ReleaseConfig(bootstrap_samples=samples)
    resampled = approved = 0
    for trial in range(trials):
        arms = {SYNTHETIC: predictions(targets, accuracy, rng), REAL: predictions(targets, ACCURACY, rng)}
        points = {arm: figures(targets, of) for arm, of in arms.items()}
        drawn = bootstrap(targets, arms, groups, samples, trial)
        margins = swap_margins(targets, arms[SYNTHETIC], arms[REAL], groups, samples, trial)
        differences = paired_differences(points, drawn, margins, REAL)
        approved += decide_release(differences, REAL, rule, "").decision == "approved"
        resampled += interval(drawn[SYNTHETIC].headline[rule.metric] - drawn[REAL].headline[rule.metric])[0] > 0
    return resampled / trials, approved / trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=400, help="resamples, and swaps, a trial")
    args = parser.parse_args()
    print("| test groups a class | equal arms: bootstrap | gate | better arm: bootstrap | gate |")
    print("|---|---|---|---|---|")
    for name, sizes in SPLITS.items():
        shares = [
            share for accuracy in (ACCURACY, BETTER) for share in approvals(sizes, accuracy, args.trials, args.samples)
        ]
        print(f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()
