"""The balanced set as folders by label, for people who train elsewhere."""

import shutil
from collections import Counter
from pathlib import Path, PurePosixPath

import pandas as pd

from raresynth.dataset.manifest import COLUMNS, SPLITS, read_manifest, read_synthetic
from raresynth.errors import DataError
from raresynth.lineage import Report, new_dir, sha256_file, write_report, write_text
from raresynth.progress import progress

HASH_LIST = "SHA256SUMS"


class ExportReport(Report):
    """What `export_dataset` wrote."""

    classes: dict[str, dict[str, dict[str, int]]]
    """Real and synthetic images of each class in each split."""
    n_files: int
    hash_list_sha256: str


def export_dataset(
    data_dir: Path, manifest_path: Path, accepted_path: Path, synthetic_root: Path, out_dir: Path
) -> ExportReport:
    """Write <split>/<label>/<image>, manifest.csv, report.json and SHA256SUMS (as `sha256sum --check` reads it).

    The train split holds the real and the accepted synthetic images, val and test real ones only. Every file is
    compared with its manifest's hash while it is copied. The folder appears whole or not at all.

    Raises:
        DataError: `out_dir` holds files already, a manifest cannot be read, or an image is missing or was changed.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise DataError(f"{out_dir} already exists and is not empty; name a new folder for the export")
    files = pd.concat([_real(manifest_path, data_dir), _synthetic(accepted_path, synthetic_root)], ignore_index=True)
    files["path"] = _places(files)
    with new_dir(out_dir) as folder, progress("export", len(files), "images") as advance:
        for source, path, sha256 in zip(files["file"], files["path"], files["sha256"], strict=True):
            _copy(source, folder / path, sha256)
            advance()
        files = files.drop(columns="file").sort_values("path")
        write_text(folder / "manifest.csv", files.to_csv(index=False, lineterminator="\n"))
        lines = [f"{sha256}  {path}\n" for path, sha256 in zip(files["path"], files["sha256"], strict=True)]
        lines.append(f"{sha256_file(folder / 'manifest.csv')}  manifest.csv\n")
        write_text(folder / HASH_LIST, "".join(lines))
        counts = Counter(zip(files["split"], files["label"], files["source"], strict=True))
        report = ExportReport(
            classes={
                split: {
                    label: {source: counts[split, label, source] for source in ("real", "synthetic")}
                    for label in sorted(files["label"].unique())
                }
                for split in SPLITS
            },
            n_files=len(files),
            hash_list_sha256=sha256_file(folder / HASH_LIST),
        )
        write_report(folder / "report.json", report)
    return report


def _real(manifest_path: Path, data_dir: Path) -> pd.DataFrame:
    manifest = read_manifest(manifest_path)
    return manifest[list(COLUMNS)].assign(source="real", file=[data_dir / path for path in manifest["path"]])


def _synthetic(accepted_path: Path, synthetic_root: Path) -> pd.DataFrame:
    accepted = read_synthetic(accepted_path, "the gate")
    rows = accepted[["image_id", "label", "sha256", "width", "height"]]
    files = [synthetic_root / path for path in accepted["path"]]
    return rows.assign(group=accepted["image_id"], split="train", source="synthetic", file=files)


def _places(files: pd.DataFrame) -> list[str]:
    """Path of each file in the export; a name that occurs twice in a folder gets the file's hash."""
    names = files["source"] + "-" + files["image_id"].str.replace("/", "_")
    places = [
        PurePosixPath(split, label, name + file.suffix.lower())
        for split, label, name, file in zip(files["split"], files["label"], names, files["file"], strict=True)
    ]
    # Some file systems take A.jpg and a.jpg for one file.
    taken = Counter(place.as_posix().lower() for place in places)
    return [
        (place if taken[place.as_posix().lower()] == 1 else place.with_stem(f"{place.stem}-{sha256[:12]}")).as_posix()
        for place, sha256 in zip(places, files["sha256"], strict=True)
    ]


def _copy(source: Path, target: Path, sha256: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise DataError(f"cannot copy {source} ({error.strerror}); run the flow again") from error
    if sha256_file(target) != sha256:
        raise DataError(f"{source} was changed after its manifest was written; run the flow again")
