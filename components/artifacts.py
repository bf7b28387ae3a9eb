"""Results as KFP artifacts, so that the UI shows them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from kfp import dsl

from raresynth import flow


def log_quality(run: flow.Run, label: str, metrics: dsl.Metrics) -> None:
    """Figures of one class's synthetic images, or why there are none."""
    record = flow.read_record(run.store, "measure", label)
    if record.status != "done":
        metrics.metadata["failed"] = record.reason
        return
    report = json.loads((run.store / record.output / "report.json").read_text(encoding="utf-8"))
    _log_numbers(metrics, "", report)


def log_evaluation(run: flow.Run, metrics: dsl.Metrics, classification: dsl.ClassificationMetrics) -> str:
    """Figures of the released arm on the test split; returns the arm's name."""
    record = flow.read_record(run.store, "evaluate")
    report = json.loads((run.store / record.output / "report.json").read_text(encoding="utf-8"))
    arm = next(entry for entry in report["arms"] if entry["arm"] == report["release"]["arm"])
    _log_numbers(metrics, "", arm["test"])
    classification.log_confusion_matrix(report["labels"], arm["confusion"])
    return str(arm["arm"])


def copy_page(run: flow.Run, page: dsl.HTML) -> None:
    """The report page."""
    Path(page.path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run.store / "report.html", page.path)


def write_text(artifact: dsl.Artifact, text: str) -> None:
    """Make a text file of an artifact."""
    path = Path(artifact.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _log_numbers(metrics: dsl.Metrics, prefix: str, value: Any) -> None:
    if isinstance(value, dict):
        for name, entry in value.items():
            _log_numbers(metrics, f"{prefix}.{name}" if prefix else name, entry)
    elif isinstance(value, int | float) and math.isfinite(value):
        metrics.log_metric(prefix, value)
