"""The gate as a stage: reports in, decisions and the manifest of what may be used out."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from raresynth.config import GateConfig
from raresynth.lineage import Report, read_report, write_report, write_text
from raresynth.quality.gate import ClassDecision, decide
from raresynth.quality.reports import FailedClass, QualityReport

COLUMNS = ("image_id", "path", "label", "generator", "seed", "index", "sha256", "width", "height")


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
    out_dir: Path,
    config: GateConfig,
) -> GateReport:
    """Decide on every class; writes decisions.json and accepted.csv, the synthetic images that may be used.

    Args:
        quality_dirs: label -> folder that `measure` left.
        failed: label -> why its images could not be made; such a class is rejected.
        unmeasured: label -> why its images could not be measured; such a class stays insufficient.
        synthetic_dirs: label -> folder that `synthesize` left.

    Raises:
        CheckpointError: a report is missing or no report of this version.
    """
    reports = [read_report(folder / "report.json", QualityReport) for folder in quality_dirs.values()]
    decisions = decide([*reports, *(FailedClass(label=label, reason=why) for label, why in failed.items())], config)
    decisions |= {
        label: ClassDecision(label=label, decision="insufficient", reasons=[why]) for label, why in unmeasured.items()
    }
    accepted = [label for label, decision in decisions.items() if decision.decision == "accepted"]
    # A class may be called "None": nothing is to be taken for an absent value.
    frames = [
        pd.read_csv(
            synthetic_dirs[label] / "manifest.csv", dtype={"label": str, "image_id": str}, keep_default_na=False
        )
        for label in accepted
    ]
    usable = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(COLUMNS))
    write_text(out_dir / "accepted.csv", usable.to_csv(index=False, lineterminator="\n"))
    report = GateReport(
        classes=decisions,
        n_accepted={label: len(frame) for label, frame in zip(accepted, frames, strict=True)},
        limits=config,
    )
    write_report(out_dir / "decisions.json", report)
    return report
