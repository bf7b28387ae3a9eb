"""The bundle: accepted generators, the approved classifier, and where they come from."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raresynth import lineage
from raresynth.bundle.contents import DIGEST, Bundle, Classifier, Generator, Lineage, write_bundle_json
from raresynth.bundle.onnx_export import export_onnx
from raresynth.bundle.predictor import Predictor
from raresynth.bundle.reference import build_reference
from raresynth.classifier import network
from raresynth.config import Params
from raresynth.dataset.images import PREPROCESSING, load_images
from raresynth.dataset.manifest import read_manifest
from raresynth.gan.latents import CHUNK, latents
from raresynth.gan.sampling import load_generator


@dataclass(frozen=True)
class Sources:
    """What the bundle is made from; folders of finished stages.

    Attributes:
        data_md5: `.dir` hash of the image folder, as it was read.
        generator_dirs: label -> checkpoint of its generator, accepted or not.
        classifier_dirs: arm -> checkpoint.
        decisions: the run's decisions.json.
        quality_dirs: label -> what measure left; `gate_dir` and `evaluation_dir` alike.
        records: of every stage so far, as JSON values.
        parents: stage and item -> SHA-256 of what it left.
    """

    data_dir: Path
    data_md5: str
    manifest: Path
    validation_dir: Path
    encoder_dir: Path
    generator_dirs: Mapping[str, Path]
    classifier_dirs: Mapping[str, Path]
    decisions: Path
    packed_dir: Path
    quality_dirs: Mapping[str, Path]
    gate_dir: Path
    evaluation_dir: Path
    records: Sequence[Mapping[str, Any]]
    parents: Mapping[str, str]


def package(sources: Sources, out_dir: Path, params: Params) -> Bundle:
    """Write the bundle as a new folder.

    Raises:
        CheckpointError: a checkpoint was changed, or an exported graph differs from its network.
    """
    decisions = json.loads(sources.decisions.read_text(encoding="utf-8"))
    accepted = [label for label, entry in decisions["classes"].items() if entry["decision"] == "accepted"]
    arm = decisions["release"]["arm"]
    with lineage.new_dir(out_dir) as folder:
        truncation = params.synthesis.truncation
        generators = {
            label: _add_generator(sources.generator_dirs[label], folder / "generators" / label, truncation)
            for label in accepted
        }
        labels, classifier = _add_classifier(sources.classifier_dirs[arm], arm, folder / "classifier")
        bundle = Bundle(
            labels=labels,
            classifier=classifier,
            generators=generators,
            no_generators="" if accepted else _why_none(decisions["classes"]),
            decisions=decisions,
            lineage=_lineage(sources, params),
            files=_hashes(folder),
        )
        write_bundle_json(folder, bundle)
        lineage.write_json(folder / "reference.json", _reference(sources, folder, classifier.resolution))
        _add_lineage(sources, folder / "lineage")
        bundle = bundle.model_copy(update={"files": _hashes(folder)})
        write_bundle_json(folder, bundle)
    return bundle


def _add_lineage(sources: Sources, folder: Path) -> None:
    """What an auditor needs once the run's folder is gone; of images only hashes, since paths may name patients."""
    lineage.write_json(folder / "records.json", list(sources.records))
    images = read_manifest(sources.manifest)[["sha256", "label", "split"]].sort_values("sha256")
    lineage.write_text(folder / "images.csv", images.to_csv(index=False, lineterminator="\n"))
    reports = {"validation": sources.validation_dir, "evaluation": sources.evaluation_dir}
    reports |= {f"quality/{label}": quality for label, quality in sources.quality_dirs.items()}
    files = {name: source / "report.json" for name, source in reports.items()}
    for name, source in (files | {"gate": sources.gate_dir / "decisions.json"}).items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)


def _add_generator(source: Path, folder: Path, truncation: float) -> Generator:
    generator, meta = load_generator(source, "cpu")
    folder.mkdir(parents=True)
    example = torch.from_numpy(latents(0, 0, CHUNK, generator.latent_dim))
    export_onnx(generator, example, "latents", ["images"], folder / "model.onnx")
    _copy_checkpoint(source, folder)
    return Generator(
        resolution=meta["architecture"]["resolution"],
        latent_dim=generator.latent_dim,
        truncation=truncation,
        weights_sha256=meta["weights_sha256"],
    )


def _add_classifier(source: Path, arm: str, folder: Path) -> tuple[list[str], Classifier]:
    classifier, meta = network.load(source)
    folder.mkdir(parents=True)
    resolution = int(meta["resolution"])
    example = torch.linspace(-1, 1, 4 * 3 * resolution**2).reshape(4, 3, resolution, resolution)
    graph = network.WithFeatureMap(classifier).eval()
    export_onnx(graph, example, "images", ["logits", "features"], folder / "model.onnx")
    _copy_checkpoint(source, folder)
    return meta["labels"], Classifier(
        arm=arm,
        model=meta["model"],
        resolution=resolution,
        preprocessing=PREPROCESSING,
        temperature=meta["temperature"],
        pooled_linear_head=meta["pooled_linear_head"],
        weights_sha256=meta["weights_sha256"],
    )


def _copy_checkpoint(source: Path, folder: Path) -> None:
    for name in ("weights.safetensors", "meta.json"):
        shutil.copyfile(source / name, folder / name)


def _reference(sources: Sources, folder: Path, resolution: int) -> dict[str, Any]:
    manifest = read_manifest(sources.manifest)
    images = load_images(manifest, sources.data_dir, resolution, sources.packed_dir)
    train, val = (np.flatnonzero(manifest["split"] == split) for split in ("train", "val"))
    labels = manifest["label"].iloc[train].tolist()
    return build_reference(Predictor(folder), images[train], labels, images[val])


def _lineage(sources: Sources, params: Params) -> Lineage:
    commit, dirty = lineage.git_state(lineage.PACKAGE_DIR)
    return Lineage(
        commit=commit,
        dirty=dirty,
        data_md5=sources.data_md5,
        manifest_sha256=lineage.sha256_file(sources.manifest),
        validation_sha256=lineage.sha256_file(sources.validation_dir / "report.json"),
        encoder_sha256=lineage.sha256_file(sources.encoder_dir / "weights.safetensors"),
        params=params.model_dump(mode="json"),
        parents=dict(sources.parents),
    )


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): lineage.sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in {"bundle.json", DIGEST}
    }


def _why_none(classes: Mapping[str, Any]) -> str:
    if not classes:
        return "no class needed synthetic images"
    reasons = [f"{label} {entry['decision']}: {'; '.join(entry['reasons'])}" for label, entry in classes.items()]
    return "no generator was accepted. " + " | ".join(reasons)
