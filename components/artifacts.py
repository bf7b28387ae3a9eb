"""Results as KFP artifacts, so that the UI shows them."""

import json
import math
from pathlib import Path
from typing import Any

from kfp import dsl

from raresynth import flow

ROC_POINTS = 101


def log_quality(run: flow.Run, label: str, metrics: dsl.Metrics) -> None:
    """Figures of one class's synthetic images, or why there are none."""
    record = flow.read_record(run.store, "measure", label)
    if record.status != "done":
        metrics.metadata["failed"] = record.reason
        return
    report = json.loads((run.store / record.output / "report.json").read_text(encoding="utf-8"))
    _log_numbers(metrics, "", report)


def log_evaluation(run: flow.Run, metrics: dsl.Metrics, classification: dsl.ClassificationMetrics) -> str:
    """Figures of the released arm on the test split; returns the arm's name.

    The ROC curve is that of all classes against their rests, pooled (micro average).
    """
    folder = run.store / flow.read_record(run.store, "evaluate").output
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    arm = next(entry for entry in report["arms"] if entry["arm"] == report["release"]["arm"])
    _log_numbers(metrics, "", arm["test"])
    classification.log_confusion_matrix(report["labels"], arm["confusion"])
    classification.log_roc_curve(*_pooled_roc(folder / "predictions.csv", arm["arm"], report["labels"]))
    return str(arm["arm"])


def _pooled_roc(predictions: Path, arm: str, labels: list[str]) -> tuple[list[float], list[float], list[float]]:
    """False and true positive rates and thresholds, at `ROC_POINTS` points at most."""
    import numpy as np
    import pandas as pd
    from sklearn.metrics import roc_curve

    table = pd.read_csv(predictions, dtype={"label": str, "arm": str}, keep_default_na=False)
    table = table[table["arm"] == arm]
    is_class = table["label"].to_numpy()[:, None] == np.array(labels)[None]
    curve = np.stack(roc_curve(is_class.ravel(), table[[f"p_{label}" for label in labels]].to_numpy().ravel()))
    curve[2, 0] = 1.0  # scikit-learn's first threshold is infinite, which JSON does not know
    shown = np.unique(np.linspace(0, curve.shape[1] - 1, ROC_POINTS).round().astype(int))
    false_positive, true_positive, threshold = curve[:, shown].tolist()
    return false_positive, true_positive, threshold


def copy_page(run: flow.Run, page: dsl.HTML) -> None:
    """The report page."""
    write_text(page, (run.store / "report.html").read_text(encoding="utf-8"))


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
