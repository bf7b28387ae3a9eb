"""The card of what is served: what it is, what it was made from, how good it is, what it is for and what not."""

import json
from pathlib import Path
from typing import Any

from serving.models import Models

INTENDED_USE = (
    "Research, teaching, testing of software, and enlarging training sets with synthetic images of rare classes. "
    "It is no medical device: no prediction may take part in the care of a patient."
)
LIMITS = (
    "Predictions hold for images like those of the data version below; an image that is flagged as out of distribution "
    "has no meaningful prediction, and one that is not flagged may still be unlike them.",
    "Probabilities were calibrated on validation images of the same source; other cameras, people and shares of "
    "classes change them.",
    "A synthetic image shows no real case. Generators repeat the gaps and biases of the images they learned from.",
    "Images come as the generator draws them: single ones may be odd, or near a training image. Distances, coverage "
    "and nearness to train images were measured without these; the share of near copies is of all images drawn.",
    "An activation map shows which places moved the classifier, not where a disease is.",
)
NO_MAPS = "off: the classifier has no pooled linear head, from which alone they follow"


def model_card(models: Models, folder: Path) -> dict[str, Any]:
    """The card as JSON values."""
    bundle = models.bundle
    evaluation = _read(folder, "evaluation")
    arm: dict[str, Any] = next((arm for arm in evaluation["arms"] if arm["arm"] == bundle.classifier.arm), {})
    return {
        "intended_use": INTENDED_USE,
        "limits": list(LIMITS),
        "labels": bundle.labels,
        "bundle": models.version,
        "classifier": {
            **bundle.classifier.model_dump(),
            "activation_maps": "on" if models.maps else NO_MAPS,
            "test": arm.get("test"),
            "classes": arm.get("classes"),
            "n_test": evaluation.get("n_test"),
        },
        "generators": {
            label: {**generator.model_dump(), "quality": _quality(folder, label)}
            for label, generator in bundle.generators.items()
        },
        "no_generators": bundle.no_generators,
        "decisions": bundle.decisions,
        "out_of_distribution": {
            "score": "squared Mahalanobis distance of the classifier's features to the training images'",
            "threshold": models.outliers.threshold,
            "accepted_share_of_validation_images": 0.95,
        },
        "data": _data(models, folder),
    }


def _data(models: Models, folder: Path) -> dict[str, Any]:
    lineage, validation = models.bundle.lineage, _read(folder, "validation")
    return {
        "data_version": lineage.data_md5,
        "manifest_sha256": lineage.manifest_sha256,
        "code_commit": lineage.commit,
        "code_dirty": lineage.dirty,
        "validation": {key: validation.get(key) for key in ("passed", "classes", "dropped_classes", "suite_sha256")},
    }


def _quality(folder: Path, label: str) -> dict[str, Any]:
    """The figures of a generator; the names of training images stay inside."""
    report = _read(folder, f"quality/{label}")
    report.get("copying", {}).pop("nearest", None)
    return report


def _read(folder: Path, name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "lineage" / f"{name}.json").read_text(encoding="utf-8"))
    return report
