"""Images of the page: many tiles in one file each, as data URIs."""

import base64
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from raresynth.dataset.images import Pixels, decode_image

LARGEST_TILE = 128
"""Tiles are shown at the generators' resolution, but not above this many pixels a side."""
GAP = 3
QUALITY = 90


def read_tiles(root: Path, paths: Iterable[str], resolution: int) -> list[Pixels]:
    """Images at the resolution that networks see them in, or at `LARGEST_TILE` where that is smaller.

    Raises:
        DataError: an image cannot be read.
    """
    return [decode_image(root / path, min(resolution, LARGEST_TILE)) for path in paths]


def sheet(tiles: Sequence[Pixels], columns: int) -> str:
    """Tiles (R, R, 3) row by row in one image with clear gaps, as a data URI."""
    side = len(tiles[0])
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    step = side + GAP
    canvas = Image.new("RGBA", (columns * step - GAP, rows * step - GAP))
    for index, tile in enumerate(tiles):
        canvas.paste(Image.fromarray(tile), (index % columns * step, index // columns * step))
    file = BytesIO()
    canvas.save(file, "WEBP", quality=QUALITY, method=6)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
