"""How many synthetic images balance each class."""

from fractions import Fraction
from math import ceil

import pandas as pd

from raresynth.config import BalanceConfig
from raresynth.errors import ParamsError


def images_to_synthesize(manifest: pd.DataFrame, config: BalanceConfig) -> dict[str, int]:
    """Synthetic images for each class that the policy asks any for, by label, counted on the train split.

    With n_c real images of class c and N_max of the largest class, the policies are

    - max: N_max - n_c, as in the Lightweight-STGAN paper;
    - min_share: the fewest with which each class that has less than `share` of the train split has `share` of the
      balanced one, to which all these images belong; `share` near 1 / (number of such classes) asks for many;
    - fixed: `count`, and ratio: `ratio` n_c rounded up, for each class smaller than the largest.

    Raises:
        ParamsError: min_share, and so many classes cannot have that share each; or a class named in `classes` has no
            train images.
    """
    real = {str(label): int(n) for label, n in manifest["label"][manifest["split"] == "train"].value_counts().items()}
    largest = max(real.values(), default=0)
    limit = config.max_per_class or None
    match config.policy:
        case "max":
            wanted = {label: largest - n for label, n in real.items()}
        case "min_share":
            wanted = _fill_to_share(real, Fraction(str(config.share)), limit)
        case "fixed":
            wanted = {label: config.count for label, n in real.items() if n < largest}
        case "ratio":
            ratio = Fraction(str(config.ratio))
            wanted = {label: ceil(ratio * n) for label, n in real.items() if n < largest}
    absent = sorted(set(config.classes) - set(real))
    if absent:
        raise ParamsError(
            f"balance.classes: no train images of {', '.join(absent)}; choose from {', '.join(sorted(real))}"
        )
    asked = config.classes or wanted
    return {label: min(n, limit or n) for label, n in sorted(wanted.items()) if n > 0 and label in asked}


def _fill_to_share(real: dict[str, int], share: Fraction, limit: int | None) -> dict[str, int]:
    """Least x with n_c + x_c >= share * (sum of n + sum of x) for each class c below its share."""
    total = sum(real.values())
    below = [label for label, n in real.items() if n < share * total]
    if limit is None and len(below) * share >= 1:
        raise ParamsError(
            f"balance.share: {len(below)} classes cannot have {float(share)} of the images each; "
            f"set it below 1/{len(below)}"
        )
    wanted = dict.fromkeys(below, 0)
    # Images added to one class raise what the others need. Each round raises the counts to what the last total asks
    # for, so they never pass the least solution, and stop there.
    while True:
        target = share * (total + sum(wanted.values()))
        lacking = {label: min(max(0, ceil(target) - real[label]), limit or ceil(target)) for label in below}
        if lacking == wanted:
            return wanted
        wanted = lacking
