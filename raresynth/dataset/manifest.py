"""Manifests of real and of synthetic images: one row an image, the only lists that later stages read."""

from io import StringIO
from pathlib import Path

import pandas as pd

from raresynth.errors import DataError
from raresynth.lineage import write_text

SPLITS = ("train", "val", "test")
COLUMNS = ("image_id", "path", "label", "group", "split", "sha256", "width", "height")
"""First columns of every manifest; metadata columns of the source follow them."""
SYNTHETIC_COLUMNS = (
    *("image_id", "path", "label", "generator", "seed", "index", "truncation", "sha256", "width", "height"),
    *("rejected_atypical", "rejected_near_copy"),
)
"""Columns of a synthetic manifest. `path` is relative to the folder that holds the classes' folders; the last two count
the images that were drawn and rejected between the row above and this one, whose indices are therefore missing."""
NUMBER_COLUMNS = ("width", "height")


def read_manifest(path: Path) -> pd.DataFrame:
    """Read a manifest; all but width and height is text ("007" is not 7), empty cells are NaN.

    Raises:
        DataError: the file is missing or lacks a column.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read the manifest {path}: {error.strerror}; run build-manifest first") from error
    header = pd.read_csv(StringIO(text), nrows=0).columns if text else ()
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise DataError(f"{path} is no manifest: column {missing[0]!r} is missing; run build-manifest again")
    dtypes = {column: int if column in NUMBER_COLUMNS else str for column in header}
    return pd.read_csv(StringIO(text), dtype=dtypes, keep_default_na=False, na_values=[""])


def read_synthetic(path: Path, writer: str) -> pd.DataFrame:
    """Read a synthetic manifest; text stays text, so that a class may be called "None".

    Args:
        writer: the stage that writes it, for the error's sentence.

    Raises:
        DataError: the file is missing or damaged.
    """
    text = dict.fromkeys(("image_id", "path", "label", "generator", "sha256"), str)
    try:
        return pd.read_csv(path, dtype=text, keep_default_na=False)
    except (OSError, ValueError) as error:  # the latter where it is empty, cut short, or no text
        raise DataError(f"cannot read the synthetic images' manifest {path} ({error}); run {writer} first") from error


def write_manifest(path: Path, manifest: pd.DataFrame) -> None:
    """Write a manifest as CSV, its standard columns first."""
    extra = [column for column in manifest.columns if column not in COLUMNS]
    write_text(path, manifest[[*COLUMNS, *extra]].to_csv(index=False, lineterminator="\n"))


def count_classes(manifest: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Number of images of each class in each split."""
    counts = manifest.groupby(["label", "split"]).size()
    return {
        str(label): {split: int(counts.get((label, split), 0)) for split in SPLITS}
        for label in sorted(manifest["label"].unique())
    }
