"""From a folder of images to a manifest: find out the layout, read every file once, fix the splits.

An importer turns its layout into one table: image_id, path, label, group, perhaps split, and the source's other
columns. What it cannot place it keeps: an image that the metadata does not name has an empty label, a name without
a file has an empty sha256. `validate` puts both into quarantine, so nothing is silently dropped.
"""

import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pandas as pd

from raresynth.config import CsvColumns, DatasetConfig, SplitShares
from raresynth.dataset.images import may_be_image, printable
from raresynth.dataset.manifest import COLUMNS, count_classes, write_manifest
from raresynth.dataset.probe import NO_FILE, NOTHING_SEEN, Seen, read_facts
from raresynth.dataset.splits import assign_splits
from raresynth.errors import DataError, enumerate_words
from raresynth.lineage import Report, new_dir, sha256_file, walk, write_report

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"})
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
NIH_COLUMNS = {"image": "Image Index", "label": "Finding Labels", "group": "Patient ID"}
IMAGE_COLUMNS = ("image", "image_id", "file", "path")
GROUP_COLUMNS = ("group", "patient_id", "lesion_id")
"""What an unconfigured metadata.csv may call its columns; a patient holds lesions, so it comes first."""
MAX_LABEL_BYTES = 200
"""Room for what is added to a label in the names of folders, which may have 255 bytes."""
Layout = Literal["ham10000", "isic", "folders", "csv"]


class ManifestReport(Report):
    """What `build_manifest` found."""

    layout: Layout
    seed: int
    splits_from_source: bool
    """The source names the splits itself; they were kept."""
    n_rows: int
    n_groups: int
    n_missing: int
    """Rows whose file does not exist."""
    n_unlabelled: int
    n_ignored: int
    """Files that are obviously no images, such as a README."""
    classes: dict[str, dict[str, int]]
    """Rows of each class in each split."""
    empty_classes: tuple[str, ...]
    """Classes that the source names without a single image."""
    manifest_sha256: str


@dataclass(frozen=True)
class Source:
    """The files below a data folder: paths relative to it, sorted."""

    data_dir: Path
    images: tuple[str, ...]
    others: tuple[str, ...]

    def csv_files(self) -> list[str]:
        """CSV files of the folder and of those directly in it."""
        return [name for name in self.others if name.lower().endswith(".csv") and name.count("/") <= 1]


@dataclass(frozen=True)
class Table:
    """Rows of an importer, all columns text."""

    layout: Layout
    rows: pd.DataFrame
    empty_classes: tuple[str, ...] = ()


def build_manifest(
    data_dir: Path, out_dir: Path, config: DatasetConfig, seed: int, seen: Mapping[str, Seen] = NOTHING_SEEN
) -> ManifestReport:
    """Write manifest.csv and report.json of the images below `data_dir`.

    Splits are stratified by class over the rows whose file is an image, never divide a group, and depend on the
    seed and the rows alone; where the source names the splits, those are kept.

    Args:
        seen: files that shards have read already, by path relative to `data_dir`; the others are read here.

    Raises:
        DataError: the folder is missing, its layout is unknown or broken, or an image has several labels.
    """
    if not data_dir.is_dir():
        raise DataError(f"the data folder {data_dir} does not exist; name a folder of images")
    source = find_files(data_dir)
    if not source.images:
        raise DataError(f"{data_dir} holds no image file; name the folder that holds the images")
    table = _import(source, config)
    rows = _read_files(table.rows, source, seen)
    splits_from_source = "split" in rows
    if splits_from_source:
        _check_splits(rows, data_dir)
    else:
        rows["split"] = _split(rows, config.splits, seed)
    with new_dir(out_dir) as folder:
        write_manifest(folder / "manifest.csv", rows)
        report = ManifestReport(
            layout=table.layout,
            seed=seed,
            splits_from_source=splits_from_source,
            n_rows=len(rows),
            n_groups=rows["group"].nunique(),
            n_missing=int((rows["sha256"] == "").sum()),
            n_unlabelled=int((rows["label"] == "").sum()),
            n_ignored=len(source.others),
            classes=count_classes(rows[rows["label"] != ""]),
            empty_classes=table.empty_classes,
            manifest_sha256=sha256_file(folder / "manifest.csv"),
        )
        write_report(folder / "report.json", report)
    return report


def find_files(data_dir: Path) -> Source:
    """All files below a folder, hidden ones left out; links are followed."""
    images: list[str] = []
    others: list[str] = []
    for folder, names in walk(data_dir, skip=(".", "__MACOSX")):
        above = folder.relative_to(data_dir)
        for name in names:
            if name.startswith("."):
                continue
            path = (above / name).as_posix()
            if printable(path) != path:
                raise DataError(f"{data_dir} holds {printable(path)}, whose name is not UTF-8; rename it")
            (images if may_be_image(name, at_top=folder == data_dir) else others).append(path)
    return Source(data_dir, tuple(sorted(images)), tuple(sorted(others)))


def _import(source: Source, config: DatasetConfig) -> Table:
    if config.layout != "auto":
        return IMPORTERS[config.layout](source, config)
    if config.csv is not None:
        return import_csv(source, config)
    for layout, fits in DETECTORS.items():
        if fits(source):
            return IMPORTERS[layout](source, config)
    raise DataError(
        f"{source.data_dir} has no known layout: there is no HAM10000_metadata.csv, no metadata.csv with the columns "
        f"label and {' or '.join(IMAGE_COLUMNS)}, no ISIC challenge CSV (image and a 0/1 column a class) and no two "
        "folders of images named by label; arrange it so, or name the CSV and its columns under dataset.csv in params"
    )


# HAM10000


def _ham10000_metadata(source: Source) -> str | None:
    files = (*source.others, *source.images)
    return next((name for name in files if PurePosixPath(name).stem == "HAM10000_metadata"), None)


def import_ham10000(source: Source, config: DatasetConfig) -> Table:
    """The original download: image folders and HAM10000_metadata, with or without extension; groups are lesions."""
    name = _ham10000_metadata(source)
    if name is None:
        raise DataError(f"{source.data_dir} holds no HAM10000_metadata.csv; add it, or set dataset.layout to auto")
    metadata = _read_csv(source.data_dir / name)
    rows = _standard(metadata, name, image="image_id", label="dx", group="lesion_id")
    return Table("ham10000", _locate(rows, source.images, exclude=name))


# ISIC challenge


def _one_hot_tables(source: Source) -> list[tuple[str, pd.DataFrame]]:
    tables = ((name, _read_csv(source.data_dir / name)) for name in _csvs_by_image(source))
    return [(name, table) for name, table in tables if _is_one_hot(table.drop(columns="image"))]


def _csvs_by_image(source: Source) -> list[str]:
    return [name for name in source.csv_files() if "image" in _read_csv(source.data_dir / name, rows=0)]


def _is_one_hot(table: pd.DataFrame) -> bool:
    return len(table.columns) > 1 and bool(table.isin(["0", "1", "0.0", "1.0"]).to_numpy().all())


def import_isic(source: Source, config: DatasetConfig) -> Table:
    """An ISIC challenge (2018, 2019): images and a CSV with `image` and a 0/1 column a class.

    Other CSVs with a column `image` (lesion groupings, metadata) are joined; groups are their `lesion_id`.
    """
    tables = _one_hot_tables(source)
    if not tables:
        raise DataError(
            f"{source.data_dir} holds no CSV with the column image and a 0/1 column a class; "
            "add the challenge's ground truth, or set dataset.layout to auto"
        )
    truth = pd.concat([table for _, table in tables], ignore_index=True).fillna("0")
    labels = truth.columns.drop("image").astype(str).to_numpy()
    one_hot = truth[labels].astype(float).to_numpy() == 1
    n_labels = one_hot.sum(axis=1)
    if n_labels.max(initial=0) > 1:
        row = int(n_labels.argmax())
        raise _multi_label(tables[0][0], truth["image"].iloc[row], labels[one_hot[row]])
    rows = truth[["image"]].assign(label=np.where(n_labels == 1, labels[one_hot.argmax(axis=1)], ""))
    for name in _csvs_by_image(source):
        extra = _read_csv(source.data_dir / name)
        if name not in dict(tables):
            rows = _joined(rows, extra, name)
    group = "lesion_id" if "lesion_id" in rows else None
    rows = _standard(rows, tables[0][0], image="image", label="label", group=group)
    empty = tuple(sorted(labels[~one_hot.any(axis=0)]))
    return Table("isic", _locate(rows, source.images), empty)


def _joined(rows: pd.DataFrame, extra: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows with the columns of another CSV beside them; what they have already is kept, and what is empty filled in.

    Raises:
        DataError: an image has another lesion there, so that nobody can say which images belong together.
    """
    told = extra.drop(columns="label", errors="ignore").drop_duplicates("image").set_index("image")
    told = told.reindex(rows["image"]).fillna("").reset_index(drop=True)
    if "lesion_id" in rows and "lesion_id" in told:
        differing = (rows["lesion_id"] != told["lesion_id"]) & (rows["lesion_id"] != "") & (told["lesion_id"] != "")
        if differing.any():
            row = int(differing.to_numpy().argmax())
            image, first, second = rows["image"].iloc[row], rows["lesion_id"].iloc[row], told["lesion_id"].iloc[row]
            raise DataError(
                f"{name} has {image} as an image of lesion {second}, and another CSV as one of {first}; "
                "correct one of them, or take one away"
            )
    merged = rows.copy()
    for column in told:
        merged[column] = rows[column].where(rows[column] != "", told[column]) if column in rows else told[column]
    return merged


# Folders named by label


def _label_folders(source: Source) -> list[str]:
    return sorted({path.split("/")[0] for path in source.images if "/" in path})


def _split_folders(source: Source) -> bool:
    folders = _label_folders(source)
    return bool(folders) and all(name.lower() in SPLIT_NAMES for name in folders)


def _check_split_folders(source: Source) -> None:
    """Refuse split folders beside others: taken for labels, they would mix the test images into train."""
    folders = _label_folders(source)
    splits = [name for name in folders if name.lower() in SPLIT_NAMES]
    others = [name for name in folders if name not in splits]
    if len({SPLIT_NAMES[name.lower()] for name in splits}) > 1 and others:
        raise DataError(
            f"{source.data_dir} holds the split folders {enumerate_words(splits)} and also {enumerate_words(others)}; "
            f"move {enumerate_words(others)} out, or rename the folders if they are labels"
        )


def import_folders(source: Source, config: DatasetConfig) -> Table:
    """Folders named by label, or train, val and test folders that hold such; every image is its own group."""
    _check_split_folders(source)
    depth = 1 if _split_folders(source) else 0
    parts = [path.split("/") for path in source.images]
    rows = pd.DataFrame(
        {
            "image_id": _ids(pd.Series(source.images, dtype=str)),
            "path": pd.Series(source.images, dtype=str),
            "label": pd.Series([part[depth] if len(part) > depth + 1 else "" for part in parts], dtype=str),
        }
    )
    rows["group"] = rows["image_id"]
    if depth:
        rows["split"] = [SPLIT_NAMES[part[0].lower()] if len(part) > 1 else "train" for part in parts]
    labels = {path.name for path in source.data_dir.glob("*/" * (depth + 1)) if not path.name.startswith(".")}
    _check_labels(rows, str(source.data_dir))
    return Table("folders", rows, tuple(sorted(labels - set(rows["label"]))))


# Images and a CSV


def _known_csv(source: Source) -> CsvColumns | None:
    for name in source.csv_files():
        columns = set(_read_csv(source.data_dir / name, rows=0).columns)
        if set(NIH_COLUMNS.values()) <= columns:
            return CsvColumns(file=name, label_separator="|", **NIH_COLUMNS)
        image = next((column for column in IMAGE_COLUMNS if column in columns), None)
        if name == "metadata.csv" and image and "label" in columns:
            group = next((column for column in GROUP_COLUMNS if column in columns), None)
            return CsvColumns(file=name, image=image, label="label", group=group)
    return None


def import_csv(source: Source, config: DatasetConfig) -> Table:
    """Images and a CSV whose columns params name; a column `split` is kept as the splits."""
    csv = config.csv or _known_csv(source)
    if csv is None:
        raise DataError(f"layout csv needs the CSV of {source.data_dir} and its columns under dataset.csv in params")
    metadata = _read_csv(source.data_dir / csv.file)
    rows = _standard(
        metadata, csv.file, image=csv.image, label=csv.label, group=csv.group, separator=csv.label_separator
    )
    below = PurePosixPath(csv.images_dir)
    images = [path for path in source.images if PurePosixPath(path).is_relative_to(below)]
    if not images:
        raise DataError(
            f"no images lie below {source.data_dir / csv.images_dir}; correct dataset.csv.images_dir in params"
        )
    return Table("csv", _locate(rows, images, below=csv.images_dir, exclude=csv.file))


DETECTORS: dict[Layout, Callable[[Source], bool]] = {
    "ham10000": lambda source: _ham10000_metadata(source) is not None,
    "csv": lambda source: _known_csv(source) is not None,
    "isic": lambda source: bool(_one_hot_tables(source)),
    "folders": lambda source: len(_label_folders(source)) > 1 or _split_folders(source),
}
"""In the order in which layouts are tried."""
IMPORTERS: dict[Layout, Callable[[Source, DatasetConfig], Table]] = {
    "ham10000": import_ham10000,
    "isic": import_isic,
    "csv": import_csv,
    "folders": import_folders,
}


# What importers share


def _read_csv(path: Path, rows: int | None = None) -> pd.DataFrame:
    """A file of comma-, tab- or semicolon-separated values as text, empty cells as empty text."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline()
        separator = next((mark for mark in ("\t", ",", ";") if mark in header), ",")
        with warnings.catch_warnings():
            # Without index_col=False a comma at the end of each row would shift all columns.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig", nrows=rows, index_col=False
            )
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name an existing CSV file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no CSV file in UTF-8 ({error}); save it as UTF-8") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise DataError(f"{path} is no CSV file in UTF-8 ({' '.join(str(error).split())}); correct it") from error
    except pd.errors.ParserWarning as error:
        raise DataError(f"{path} has rows of more values than its header names; correct it") from error
    return table.rename(columns=str.strip)


def _standard(
    metadata: pd.DataFrame, name: str, *, image: str, label: str, group: str | None, separator: str | None = None
) -> pd.DataFrame:
    """The source's rows with the standard columns, and its others behind them."""
    named = [image, label, *([group] if group else [])]
    absent = [column for column in named if column not in metadata]
    if absent:
        raise DataError(f"{name} has no column {absent[0]!r}, only {', '.join(metadata.columns)}; correct it or params")
    rows = pd.DataFrame({"image": metadata[image].str.strip(), "label": metadata[label].str.strip()})
    rows.insert(0, "image_id", _ids(rows["image"]))
    rows["group"] = metadata[group].str.strip() if group else ""
    rows["group"] = rows["group"].where(rows["group"] != "", rows["image_id"])
    if "split" in metadata:
        rows["split"] = _known_splits(metadata["split"], name)
    _check_labels(rows, name, separator or "|")
    others = metadata.drop(columns=[*named, *(["split"] if "split" in metadata else [])])
    return rows.join(others.rename(columns=_free_names(others)))


def _free_names(others: pd.DataFrame) -> dict[str, str]:
    """New names for columns called like the manifest's own: a source's width or path is not the manifest's."""
    taken, names = set(others), {}
    for column in (*COLUMNS, "image"):
        name = f"source_{column}"
        while name in taken:
            name = f"source_{name}"
        names[column] = name
    return names


def _known_splits(column: "pd.Series[str]", name: str) -> "pd.Series[str]":
    splits = column.str.strip().str.lower().map(SPLIT_NAMES)
    if splits.isna().any():
        unknown = column[splits.isna()].iloc[0]
        raise DataError(f"{name}: the column split holds {unknown!r}; write train, val or test, or rename the column")
    return splits


def _check_labels(rows: pd.DataFrame, name: str, separator: str = "|") -> None:
    for label in sorted(set(rows["label"])):
        if separator in label:
            image = rows.loc[rows["label"] == label, "image_id"].iloc[0]
            raise _multi_label(name, image, label.split(separator))
        odd = label.startswith(".") or "/" in label or "\\" in label or not label.isprintable()
        if odd or len(label.encode()) > MAX_LABEL_BYTES:
            raise DataError(f"{name}: the label {label!r} cannot be the name of a folder; rename it")


def _multi_label(name: str, image: str, labels: Iterable[str]) -> DataError:
    return DataError(
        f"{name} is multi-label ({image} is {' and '.join(labels)}), which is not supported yet; "
        "keep the images with one label, or name a column with one label an image"
    )


def _without_suffix(path: str) -> str:
    pure = PurePosixPath(path)
    return pure.with_suffix("").as_posix() if pure.suffix.lower() in IMAGE_SUFFIXES else pure.as_posix()


def _ids(names: "pd.Series[str]") -> "pd.Series[str]":
    """Names without extension; with it where two different files would get one id."""
    stems = names.map(_without_suffix)
    return stems.where(~stems.duplicated(keep=False) | names.duplicated(keep=False), names)


KEYS: tuple[Callable[[str], str], ...] = (
    str,
    _without_suffix,
    lambda path: PurePosixPath(path).name,
    lambda path: PurePosixPath(path).stem,
)
"""What a file may be called in metadata, of its path."""


def _folded(name: str) -> str:
    """A name without its letters' case and Unicode form, in which file systems and tables differ."""
    return unicodedata.normalize("NFC", name).casefold()


def _nearly(names: "pd.Series[str]", relative: Mapping[str, str], taken: set[str]) -> dict[str, str]:
    """The files of names that are `_folded` the same, where that leaves no doubt: one name, and one file.

    Args:
        names: those that are no file's exactly.
        relative: files by what they may be called in full.
        taken: files that another name means exactly.
    """
    if names.empty:
        return {}
    files: dict[str, set[str]] = {}
    for path, file in relative.items():
        for key in KEYS:
            files.setdefault(_folded(key(path)), set()).add(file)
    found = {}
    for name in names.unique():
        (file, *others) = files.get(_folded(name), {""})
        if file and not others and file not in taken:
            found[name] = file
    n_names = Counter(found.values())
    return {name: file for name, file in found.items() if n_names[file] == 1}


def _locate(rows: pd.DataFrame, images: Iterable[str], below: str = ".", exclude: str = "") -> pd.DataFrame:
    """Find the file of each row's `image`, and add the files that no row names, without a label."""
    files = [path for path in images if path != exclude]
    relative = {PurePosixPath(path).relative_to(below).as_posix(): path for path in files}
    lookup: dict[str, str] = {}
    # An exact path wins over a name; of equal names in two folders the first is taken, the other stays unlabelled.
    for key in KEYS:
        for path, file in relative.items():
            lookup.setdefault(key(path), file)
    names = rows.pop("image").map(lambda name: PurePosixPath(name.replace("\\", "/")).as_posix())
    exact = names.map(lookup)
    found = names.map(lookup | _nearly(names[exact.isna()], relative, set(exact.dropna())))
    folders = {str(PurePosixPath(path).parent) for path in found.dropna()}
    expected = folders.pop() if len(folders) == 1 else below
    rows.insert(1, "path", found.fillna(names.map(lambda name: PurePosixPath(expected, name).as_posix())))
    unnamed = sorted(set(files) - set(rows["path"]))
    extra = pd.DataFrame({"image_id": unnamed, "path": unnamed, "label": "", "group": unnamed}, dtype=str)
    if "split" in rows:
        extra["split"] = "train"
    return pd.concat([rows, extra], ignore_index=True).fillna("")


# Files and splits


def _read_files(rows: pd.DataFrame, source: Source, seen: Mapping[str, Seen]) -> pd.DataFrame:
    # What a CSV names outside the folder ("../x.png") is as good as missing.
    listed = set(source.images)
    paths = [path if path in listed else None for path in rows["path"]]
    unread = list(dict.fromkeys(path for path in paths if path is not None and path not in seen))
    facts = dict(zip(unread, read_facts([source.data_dir / path for path in unread]), strict=True))
    facts |= {path: file.facts for path, file in seen.items()}
    found = [NO_FILE if path is None else facts[path] for path in paths]
    rows["sha256"] = pd.Series([file.sha256 for file in found], dtype=str)
    rows["width"] = [file.width for file in found]
    rows["height"] = [file.height for file in found]
    return rows


def _check_splits(rows: pd.DataFrame, data_dir: Path) -> None:
    absent = [split for split in ("train", "val", "test") if split not in set(rows["split"])]
    if absent:
        raise DataError(
            f"{data_dir} names splits, but none is {' or '.join(absent)}; add what is absent, or leave the splits out "
            "(label folders side by side, no column split) so that all three are made"
        )


def _split(rows: pd.DataFrame, shares: SplitShares, seed: int) -> "pd.Series[str]":
    usable = rows[(rows["width"] > 0) & (rows["label"] != "")]
    splits = assign_splits(list(usable["label"]), list(usable["group"]), shares, seed)
    return pd.Series([splits.get(group, "train") for group in rows["group"]], index=rows.index, dtype=str)
