"""Validation: what a manifest must satisfy, what had to be put in quarantine for it, and the Data Docs to read.

The Great Expectations suite runs twice: over the manifest as found, which shows the defects, and over the cleaned
one, which must pass. Equal manifests and images leave equal bytes, the Data Docs included.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pandas as pd

from raresynth.config import Symmetries, ValidationConfig
from raresynth.dataset.manifest import count_classes, read_manifest, write_manifest
from raresynth.dataset.probe import MISSING, NOTHING_SEEN, Probe, Seen, probe_files
from raresynth.dataset.quarantine import COLUMNS, find_defects, find_small_classes
from raresynth.dataset.suite import ExpectationResult, derive_columns, run_suite
from raresynth.dataset.symmetries import FILE, find_symmetries
from raresynth.errors import DataError
from raresynth.lineage import Report, new_dir, sha256_file, write_report, write_text

MISSING_SHARE = 0.25
"""With more of its rows missing, the source is misread rather than incomplete."""
CURE_OF_MISSING = "correct the CSV's image column or dataset.csv.images_dir"


class ValidationReport(Report):
    """What `validate` found, removed and kept."""

    n_rows: int
    n_kept: int
    quarantined: dict[str, int]
    """Rows in quarantine.csv by reason."""
    dropped_classes: dict[str, str]
    """Classes that are too small, and why."""
    classes: dict[str, dict[str, int]]
    """Rows kept of each class in each split."""
    expectations: tuple[ExpectationResult, ...]
    suite_sha256: str
    manifest_sha256: str
    """Of the cleaned manifest."""
    passed: bool
    """The cleaned manifest satisfies every expectation."""


def validate(
    data_dir: Path,
    manifest_path: Path,
    out_dir: Path,
    config: ValidationConfig,
    seen: Mapping[str, Seen] = NOTHING_SEEN,
    symmetries: Literal["auto"] | Symmetries = "auto",
) -> ValidationReport:
    """Check a manifest and the files it names; write manifest.csv (cleaned), quarantine.csv, report.json, data_docs/.

    Beside them, in symmetries.json, stands which flips and turns trainings may use.

    Bad rows and the rows of classes that are too small go to quarantine.csv with a reason (see
    `quarantine.find_defects`; `class_too_small` besides).

    Args:
        seen: files that shards have decoded already, by path relative to `data_dir`; the others are decoded here.
        symmetries: those of the images; "auto" to find them in the train images.

    Raises:
        DataError: fewer than two classes remain, more than a quarter of the source's rows name no file, or the cleaned
            manifest still breaks a critical expectation, such as a group in two splits. The files are written all the
            same, to show what is wrong.
    """
    manifest = read_manifest(manifest_path).fillna("")
    probes = _probes(data_dir, manifest, config, seen)
    defects = find_defects(manifest, probes, config.near_duplicate_bits)
    near_duplicate_of = defects["detail"][defects["reason"] == "near_duplicate"]
    sound = manifest.drop(defects.index)
    dropped = find_small_classes(sound, config)
    small = sound["label"][sound["label"].isin(list(dropped))]
    too_small = pd.DataFrame({"reason": "class_too_small", "detail": small.map(dropped)}, dtype=str)
    defects = pd.concat([defects, too_small]).sort_index()
    cleaned = manifest.drop(defects.index)

    with new_dir(out_dir) as folder:
        write_manifest(folder / "manifest.csv", cleaned)
        quarantine = manifest.loc[defects.index, ["path", "label"]].join(defects)
        write_text(folder / "quarantine.csv", quarantine[list(COLUMNS)].to_csv(index=False, lineterminator="\n"))
        results, suite_sha256 = run_suite(
            {
                "found": derive_columns(manifest, probes, near_duplicate_of),
                "cleaned": derive_columns(cleaned, probes, near_duplicate_of),
            },
            config,
            folder / "data_docs",
        )
        report = ValidationReport(
            n_rows=len(manifest),
            n_kept=len(cleaned),
            quarantined={str(k): int(n) for k, n in defects["reason"].value_counts().sort_index().items()},
            dropped_classes=dropped,
            classes=count_classes(cleaned),
            expectations=results,
            suite_sha256=suite_sha256,
            manifest_sha256=sha256_file(folder / "manifest.csv"),
            passed=all(result.cleaned.success for result in results),
        )
        write_report(folder / "report.json", report)
        train = cleaned[cleaned["split"] == "train"]
        hashes = [probes[row].phash for row in train.index]
        write_report(folder / FILE, find_symmetries(hashes, list(train["group"]), symmetries))
    _stop_if_unusable(report, manifest, cleaned, out_dir)
    return report


def _probes(data_dir: Path, manifest: pd.DataFrame, config: ValidationConfig, seen: Mapping[str, Seen]) -> list[Probe]:
    there = manifest["path"][manifest["sha256"] != ""]
    undecoded = [path for path in dict.fromkeys(there) if path not in seen]
    decoded = probe_files([data_dir / path for path in undecoded], config.min_side, config.max_side)
    probes = dict(zip(undecoded, decoded, strict=True)) | {path: seen[path].probe for path in there if path in seen}
    return [
        probes[path] if sha256 else MISSING for path, sha256 in zip(manifest["path"], manifest["sha256"], strict=True)
    ]


def _stop_if_unusable(report: ValidationReport, manifest: pd.DataFrame, cleaned: pd.DataFrame, out_dir: Path) -> None:
    # Without a label and with bytes, a row is a file that no row of the source names.
    n_named = int(((manifest["label"] != "") | (manifest["sha256"] == "")).sum())
    n_missing = report.quarantined.get("missing", 0)
    missing = n_missing > n_named * MISSING_SHARE
    if len(report.classes) < 2:
        dropped = "; ".join(f"{label}: {reason}" for label, reason in report.dropped_classes.items())
        bad = ", ".join(f"{n} {reason}" for reason, n in report.quarantined.items() if reason != "class_too_small")
        raise DataError(
            f"{len(report.classes)} usable classes remain of {report.n_rows} rows, and two are needed"
            + (f" (dropped {dropped})" if dropped else "")
            + (f" (quarantined {bad})" if bad else "")
            + f"; see {out_dir / 'quarantine.csv'}, "
            + (CURE_OF_MISSING if missing else "add images")
            + " or lower validation.min_images in params"
        )
    if missing:
        raise DataError(
            f"{n_missing} of {n_named} rows name no file; see {out_dir / 'quarantine.csv'}, {CURE_OF_MISSING} in "
            "params, or take out these rows"
        )
    failed = [item for item in report.expectations if item.severity == "critical" and not item.cleaned.success]
    if failed:
        raise DataError(
            f"{failed[0].cleaned.unexpected} rows break a rule that no quarantine can mend, {failed[0].demand} "
            f"({_example(cleaned, failed[0].column)}); correct the source and run build-manifest again"
        )


def _example(rows: pd.DataFrame, column: str) -> str:
    if column == "image_id":
        image_id = rows["image_id"][rows["image_id"].duplicated()].iloc[0]
        return f"{image_id} is {' and '.join(rows['path'][rows['image_id'] == image_id])}"
    splits = rows.groupby("group")["split"].unique()
    group = splits.index[splits.map(len) > 1][0]
    return f"{group} is in {' and '.join(sorted(splits[group]))}"
