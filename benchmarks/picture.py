"""Real images beside each preset's, class by class: the first of each, none chosen.

    python -m benchmarks.picture --run RUN --data ../shared/ham10000 --series SERIES --out FILE [--no-reals]

SERIES comes from gan_series.py. --no-reals is for pictures that are passed on, where the images' licence forbids that.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.gan_quality import Series
from benchmarks.gan_series import PRESETS, RESOLUTION, Inputs
from raresynth.dataset.images import Pixels, load_images

TILES = 6
GAP, LEFT, TOP, FONT = 12, 64, 28, 16


def blocks(series: Series, label: str, seed: int, reals: bool) -> dict[str, Pixels]:
    """Tiles of one class, by the heading they stand under."""
    drawn = {preset: series.drawn(preset, seed, label, TILES) for preset in PRESETS}
    if not reals:
        return drawn
    frame = series.manifest[(series.manifest["split"] == "test") & (series.manifest["label"] == label)][:TILES]
    return {"real": load_images(frame, series.inputs.data_dir, RESOLUTION, series.inputs.packed)} | drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--series", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the series")
    parser.add_argument("--no-reals", action="store_true")
    args = parser.parse_args()
    series = Series(Inputs(args.run, args.data), args.series)
    table = {label: blocks(series, label, args.seed, not args.no_reals) for label in series.labels}
    headings = list(next(iter(table.values())))
    size = (LEFT + len(headings) * (TILES * RESOLUTION + GAP), TOP + len(table) * (RESOLUTION + 2))
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for row, (label, tiles) in enumerate(table.items()):
        y = TOP + row * (RESOLUTION + 2)
        pen.text((6, y + RESOLUTION // 2 - FONT // 2), label, fill="black", font_size=FONT)
        for column, heading in enumerate(headings):
            x = LEFT + column * (TILES * RESOLUTION + GAP)
            pen.text((x, 4), heading, fill="black", font_size=FONT)
            picture.paste(Image.fromarray(np.concatenate(list(tiles[heading]), axis=1)), (x, y))
    picture.save(args.out, quality=90)


if __name__ == "__main__":
    main()
