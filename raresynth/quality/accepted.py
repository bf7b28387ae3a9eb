"""The gate as a stage: reports in, decisions and the manifest of what may be used out."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from raresynth.config import GateConfig
from raresynth.dataset.manifest import SYNTHETIC_COLUMNS, read_synthetic
from raresynth.lineage import Report, read_report, write_report, write_text
from raresynth.quality.gate import ClassDecision, decide
from raresynth.quality.reports import FailedClass, QualityReport


class GateReport(Report):
    """Every class's decision, and how many synthetic images may be used."""

    classes: dict[str, ClassDecision]
    n_accepted: dict[str, int]
    limits: GateConfig


def gate(
    quality_dirs: Mapping[str, Path],
    failed: Mapping[str, str],
    unmeasured: Mapping[str, str],
    synthetic_dirs: Mapping[str, Path],
    balancing: Mapping[str, int],
    root: Path,
    out_dir: Path,
    config: GateConfig,
) -> GateReport:
    """Decide on every class.

    Writes decisions.json, accepted.csv, the synthetic images that may be used, and drawn.csv, those of rejected
    classes too.

    Args:
        quality_dirs: label -> folder that `measure` left.
        failed: label -> why its images could not be made; such a class is rejected.
        unmeasured: label -> why its images could not be measured, or which error stood in the way; such a class stays
            insufficient.
        synthetic_dirs: label -> folder that `synthesize` left; may hold classes that are not decided on.
        balancing: label -> how many images balance it, where more may have been drawn to judge it: the first are used.
        root: folder that the paths in accepted.csv and drawn.csv are relative to.

    Raises:
        CheckpointError: a report is missing or no report of this version.
        DataError: a synthetic manifest is missing.
    """
    reports = [read_report(folder / "report.json", QualityReport) for folder in quality_dirs.values()]
    decisions = decide([*reports, *(FailedClass(label=label, reason=why) for label, why in failed.items())], config)
    decisions |= {
        label: ClassDecision(label=label, decision="insufficient", reasons=[why]) for label, why in unmeasured.items()
    }
    accepted = [label for label, decision in decisions.items() if decision.decision == "accepted"]
    drawn = {label: _read(folder, root)[: balancing.get(label)] for label, folder in synthetic_dirs.items()}
    for name, labels in (("accepted.csv", accepted), ("drawn.csv", drawn)):
        rows = pd.concat([pd.DataFrame(columns=list(SYNTHETIC_COLUMNS)), *(drawn[label] for label in labels)])
        write_text(out_dir / name, rows.to_csv(index=False, lineterminator="\n"))
    report = GateReport(
        classes=decisions,
        n_accepted={label: len(drawn[label]) for label in accepted},
        limits=config,
    )
    write_report(out_dir / "decisions.json", report)
    return report


def _read(folder: Path, root: Path) -> pd.DataFrame:
    manifest = read_synthetic(folder / "manifest.csv", "synthesize")
    above = folder.parent.relative_to(root).as_posix()
    return manifest.assign(path=[f"{above}/{path}" for path in manifest["path"]])
