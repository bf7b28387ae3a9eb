"""The manifest: one row an image, the only list that later stages read."""

from io import StringIO
from pathlib import Path

import pandas as pd

from raresynth.errors import DataError
from raresynth.lineage import write_text

SPLITS = ("train", "val", "test")
COLUMNS = ("image_id", "path", "label", "group", "split", "sha256", "width", "height")
"""First columns of every manifest; metadata columns of the source follow them."""
TEXT_COLUMNS = ("image_id", "path", "label", "group", "split", "sha256")


def read_manifest(path: Path) -> pd.DataFrame:
    """Read a manifest; identifiers stay text ("007" is not 7).

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
    return pd.read_csv(StringIO(text), dtype=dict.fromkeys(TEXT_COLUMNS, str), keep_default_na=False, na_values=[""])


def write_manifest(path: Path, manifest: pd.DataFrame) -> None:
    """Write a manifest as CSV, its standard columns first."""
    extra = [column for column in manifest.columns if column not in COLUMNS]
    write_text(path, manifest[[*COLUMNS, *extra]].to_csv(index=False, lineterminator="\n"))
