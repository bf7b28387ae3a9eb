"""What several tests know: images of known worth, in the shape that `synthesize` leaves, and how far a training is."""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from raresynth.dataset.images import Pixels, decode_image
from raresynth.dataset.manifest import SYNTHETIC_COLUMNS
from raresynth.dataset.sample import draw_class
from raresynth.lineage import sha256_file

SIDE = 32
GENEROUS = {
    "fd_ratio": 1e9,
    "kid_ratio": 1e9,
    "coverage_ratio": 0.0,
    "recall_ratio": 0.0,
    "control_correlation": -1.0,
    "atypical_share": 1.0,
    "near_copy_share": 1.0,
    "nearer_share": 1.0,
}
"""Limits of the gate that any figures meet."""


def write_synthetic(images: Pixels, label: str, root: Path) -> Path:
    """Images as `synthesize` leaves them."""
    folder = root / label / "images"
    folder.mkdir(parents=True)
    rows = []
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:06d}.png")
        path, digest = f"{label}/images/{index:06d}.png", sha256_file(folder / f"{index:06d}.png")
        rows.append((f"{label}-{index}", path, label, "none", 0, index, 1.0, digest, SIDE, SIDE, 0, 0))
    pd.DataFrame(rows, columns=list(SYNTHETIC_COLUMNS)).to_csv(folder.parent / "manifest.csv", index=False)
    return folder.parent


@cache
def fresh(label: str, n: int, code: int) -> Pixels:
    """New images of a class of the sample data, of lesions that are in no split."""
    return np.stack([decode_image(sample.jpeg or b"", SIDE) for sample in draw_class(label, n, code)])


def saved_step(out_dir: Path) -> int:
    """Steps done in the newest state that a training has saved; 0 without one."""
    return max((int(folder.name) for folder in (out_dir / "state").glob("[0-9]*")), default=0)
