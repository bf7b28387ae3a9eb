"""How often images have what no lesion has: a black surround, teal skin, a burnt-out centre.

    python -m benchmarks.oddities --run RUN --data ../shared/ham10000 --series SERIES

Plain pixel counts, for what the encoder may not see. Real images are those of train and val.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.gan_quality import Series
from benchmarks.gan_series import PRESETS, RESOLUTION, Inputs
from raresynth.dataset.images import Pixels, load_images

IMAGES, RIM = 500, 4
BLACK, BURNT, TEAL = 60, 240, 15
"""Mean level of a black rim; least level of a burnt-out pixel; levels of green above red of a teal one."""


def oddities(images: Pixels) -> str:
    """Shares in percent: black rim above and below, 2 % of the pixels teal, 3 % burnt out."""
    rims = np.concatenate([images[:, :RIM], images[:, -RIM:]], axis=1).mean((1, 2, 3))
    red, green = images[..., 0].astype(int), images[..., 1].astype(int)
    teal = (green > red + TEAL).mean((1, 2))
    burnt = (images.min(3) > BURNT).mean((1, 2))
    return " / ".join(f"{100 * share.mean():.1f}" for share in (rims < BLACK, teal > 0.02, burnt > 0.03))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--series", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the series")
    args = parser.parse_args()
    series = Series(Inputs(args.run, args.data), args.series)
    print(f"| class | real | {' | '.join(PRESETS)} |\n|---|---|{'---|' * len(PRESETS)}")
    for label in series.labels:
        frame = series.manifest[(series.manifest["label"] == label) & (series.manifest["split"] != "test")]
        real = load_images(frame, args.data, RESOLUTION, series.inputs.packed)
        sets = [real, *(series.drawn(preset, args.seed, label, IMAGES) for preset in PRESETS)]
        print(f"| {label} | {' | '.join(oddities(images) for images in sets)} |")


if __name__ == "__main__":
    main()
