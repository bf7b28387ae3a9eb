"""What a bundle holds, and how it is opened: every file is checked against bundle.json. Knows no torch."""

import json
from pathlib import Path
from typing import Any, Literal

from raresynth.errors import CheckpointError
from raresynth.lineage import Report, read_report, sha256_file, write_report, write_text

DIGEST = "bundle.sha256"
"""File with bundle.json's SHA-256, as `sha256sum -c` reads it."""


class Classifier(Report):
    """The approved classifier."""

    arm: str
    model: str
    """Name of the timm model."""
    resolution: int
    """Side of the square input in pixels."""
    preprocessing: str
    temperature: float
    """Logits are divided by it before the softmax."""
    pooled_linear_head: bool
    """Whether class activation maps can be computed from the graph's feature map."""
    weights_sha256: str


class Generator(Report):
    """One accepted generator."""

    resolution: int
    latent_dim: int
    truncation: float
    """Standard deviation of the latents of the images that the gate judged."""
    weights_sha256: str


class Lineage(Report):
    """Where everything in the bundle comes from."""

    commit: str | None
    """Commit of the code; null outside git."""
    dirty: bool | None
    """Whether the code's tracked files differed from that commit."""
    data_md5: str
    """`.dir` hash of the image folder, as `dvc add` gives it."""
    manifest_sha256: str
    validation_sha256: str
    encoder_sha256: str
    params: dict[str, Any]
    parents: dict[str, str]
    """Stage and item -> SHA-256 of what it left."""


class Bundle(Report):
    """bundle.json."""

    format: Literal[1] = 1
    labels: list[str]
    classifier: Classifier
    generators: dict[str, Generator]
    no_generators: str
    """Why the bundle holds no generator; empty where it holds one."""
    decisions: dict[str, Any]
    """The run's decisions.json."""
    lineage: Lineage
    files: dict[str, str]
    """File, relative to the bundle -> SHA-256; all files but bundle.json and bundle.sha256."""

    def generator(self, label: str) -> Generator:
        """The accepted generator of a label.

        Raises:
            CheckpointError: there is none; the text says why, and for which labels there is one.
        """
        if label in self.generators:
            return self.generators[label]
        decision = self.decisions["classes"].get(label)
        if decision is not None:
            why = f"its class was {decision['decision']} ({'; '.join(decision['reasons'])})"
        elif label in self.labels:
            why = "its class needed no synthetic images"
        else:
            why = f"the labels are {', '.join(self.labels)}"
        accepted = ", ".join(self.generators) or "none"
        raise CheckpointError(f"the bundle has no generator for {label!r}: {why}; accepted generators: {accepted}")


def open_bundle(folder: Path) -> Bundle:
    """Read bundle.json and check every file that it names.

    Raises:
        CheckpointError: this is no bundle, or a file in it is missing or was changed.
    """
    path = folder / "bundle.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no bundle (it has no bundle.json); name the folder bundle/ of a run")
    bundle = read_report(path, Bundle)
    check_digest(folder)
    for name, digest in bundle.files.items():
        if not (folder / name).is_file() or sha256_file(folder / name) != digest:
            raise CheckpointError(f"{folder / name} is missing or was changed; run the stage package again")
    return bundle


def check_digest(folder: Path) -> None:
    """Check bundle.json against bundle.sha256.

    Raises:
        CheckpointError: one of them is missing or was changed.
    """
    path, digest = folder / "bundle.json", folder / DIGEST
    if not path.is_file() or not digest.is_file() or digest.read_bytes() != _digest(path):
        raise CheckpointError(f"{path} or {DIGEST} beside it is missing or was changed; run the stage package again")


def write_bundle_json(folder: Path, bundle: Bundle) -> None:
    """Write bundle.json and, beside it, its SHA-256."""
    write_report(folder / "bundle.json", bundle)
    write_text(folder / DIGEST, _digest(folder / "bundle.json").decode())


def _digest(path: Path) -> bytes:
    return f"{sha256_file(path)}  {path.name}\n".encode()


def read_reference(folder: Path) -> dict[str, Any]:
    """reference.json: what the classifier's inputs and outputs look like on the data it was made from."""
    reference: dict[str, Any] = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    return reference
