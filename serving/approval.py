"""Only what the gates approved is served: the bundle's hashes, then its decisions."""

from pathlib import Path

from raresynth.bundle.contents import Bundle, open_bundle
from raresynth.errors import CheckpointError
from raresynth.lineage import sha256_file


def open_approved(folder: Path, sha256: str = "") -> Bundle:
    """Open a bundle, every file of it checked, in which everything was approved.

    Args:
        sha256: SHA-256 that its bundle.json must have; empty for any.

    Raises:
        CheckpointError: this is no bundle, a file in it was changed, it is another one, or holds unapproved models.
    """
    bundle = open_bundle(folder)
    found = sha256_file(folder / "bundle.json")
    if sha256 and found != sha256:
        raise CheckpointError(
            f"{folder} is another bundle than the one to be served: its SHA-256 is {found}, not {sha256}"
        )
    if reasons := [*_unapproved_classifier(bundle), *_unapproved_generators(bundle)]:
        raise CheckpointError(f"{folder} may not be served: {'; '.join(reasons)}; package a run's approved models")
    return bundle


def _unapproved_classifier(bundle: Bundle) -> list[str]:
    """A rejected release ships the best arm of real images; any other arm was not approved."""
    release, arm = bundle.decisions.get("release", {}), bundle.classifier.arm
    allowed = release.get("arm") if release.get("decision") == "approved" else release.get("best_real_arm")
    reasons = [] if arm == allowed == release.get("arm") else [f"its classifier {arm!r} was not released"]
    return reasons + _other_weights(bundle, "classifier", bundle.classifier.weights_sha256)


def _unapproved_generators(bundle: Bundle) -> list[str]:
    classes = bundle.decisions.get("classes", {})
    reasons = []
    for label, generator in bundle.generators.items():
        decision = classes.get(label, {}).get("decision", "never judged")
        if decision != "accepted":
            reasons.append(f"its generator of {label} was {decision}")
        reasons += _other_weights(bundle, f"generators/{label}", generator.weights_sha256)
    return reasons


def _other_weights(bundle: Bundle, place: str, weights: str) -> list[str]:
    """The graph that is served lies beside the weights that were judged; both must be accounted for."""
    if bundle.files.get(f"{place}/weights.safetensors") == weights and f"{place}/model.onnx" in bundle.files:
        return []
    return [f"{place} does not hold the weights that were judged"]
