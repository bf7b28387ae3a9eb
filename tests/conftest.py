"""Data and a finished run that several test files share."""

import json
import os

# Read when numpy and torch are loaded, here and in the processes that tests start. On networks this small a second
# thread only waits, and on a busy machine it waits long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raresynth import flow, lineage
from raresynth.config import DatasetConfig, EncoderConfig, Params
from raresynth.dataset.importers import build_manifest
from raresynth.dataset.manifest import write_manifest
from raresynth.dataset.sample import TINY_CLASS, draw_class, draw_sample, write_sample
from raresynth.quality.encoder import train_encoder

TINY_SIZES = {"nevus": 64, "keratosis": 44, "vascular": 30, TINY_CLASS: 4}
"""Images of each class of the tiny set; the last is too small to be kept."""
TINY_PARAMS = {
    "compute": {"device": "cpu", "parallel_tasks": 1},
    "encoder": {"steps": 20, "width": 8, "batch_size": 32},
    "gan": {
        "resolution": 32,
        "width": 8,
        "latent_dim": 16,
        "snapshots": 2,
        "batch_size": 16,
        "pretrain_kimg": 0.4,
        "finetune_kimg": 0.2,
        "ema_half_life_kimg": 0.1,
        "precision": "fp32",
    },
    "balance": {"policy": "fixed", "count": 32},
    "synthesis": {"min_images": 32, "typical_share": 1.0, "near_copy_distance": 0.0},
    "classifier": {
        "model": "test_resnet",
        "resolution": 32,
        "steps": 16,
        "batch_size": 16,
        "precision": "fp32",
        "arms": ["real", "real+synthetic", "synthetic"],
    },
    "release": {"bootstrap_samples": 200},
}


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clean sample data set."""
    folder = tmp_path_factory.mktemp("sample") / "data"
    write_sample(draw_sample(), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three usable classes, one that is too small, a missing file, an empty one and an exact duplicate."""
    drawn = [s for code, (label, n) in enumerate(TINY_SIZES.items(), 1) for s in draw_class(label, n, code)]
    samples = {f"skin-{number:03d}.jpg": sample for number, sample in enumerate(drawn)}
    samples["skin-001.jpg"] = replace(samples["skin-001.jpg"], jpeg=None)
    samples["skin-002.jpg"] = replace(samples["skin-002.jpg"], jpeg=b"")
    samples["skin-999.jpg"] = samples["skin-010.jpg"]
    folder = tmp_path_factory.mktemp("tiny") / "data"
    write_sample(samples, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> flow.Run:
    """A finished run of the whole flow, at settings so small that its generators learn next to nothing."""
    run = flow.Run(tiny_data, tmp_path_factory.mktemp("run") / "store", Params.model_validate(TINY_PARAMS))
    for stage in flow.STAGES:
        flow.execute_all(stage, run)
    return run


@pytest.fixture(scope="session")
def accepted_bundle(tiny_run: flow.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run's bundle, made anew as if one class had been accepted: its generator has learned too little."""
    from raresynth.bundle.package import Sources, package

    out = tmp_path_factory.mktemp("bundle") / "bundle"
    decisions = json.loads((tiny_run.store / "decisions.json").read_text())
    decisions["classes"] = {
        label: {
            **entry,
            "decision": "accepted" if label == "vascular" else "rejected",
            "reasons": ["made so by a test"],
        }
        for label, entry in decisions["classes"].items()
    }
    path = out.with_name("decisions.json")
    lineage.write_json(path, decisions)

    def folder(stage: str, item: str = flow.ALL) -> Path:
        return tiny_run.store / flow.read_record(tiny_run.store, stage, item).output

    sources = Sources(
        data_dir=tiny_run.data_dir,
        data_md5=lineage.dvc_dir_md5(tiny_run.data_dir),
        manifest=folder("validate") / "manifest.csv",
        validation_dir=folder("validate"),
        encoder_dir=folder("train-encoder"),
        generator_dirs={label: folder("finetune", label) for label in decisions["classes"]},
        classifier_dirs={decisions["release"]["arm"]: folder("train-classifier", decisions["release"]["arm"])},
        decisions=path,
        packed_dir=tiny_run.packed,
        quality_dirs={label: folder("measure", label) for label in decisions["classes"]},
        gate_dir=folder("gate"),
        evaluation_dir=folder("evaluate"),
        records=[],
        parents={},
    )
    package(sources, out, tiny_run.params)
    return out


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy squares of three colours, 60 + 24 + 12 images in pairs of a group, and a manifest of them."""
    folder = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    rows = []
    for label, n, colour in (("blue", 60, (60, 60, 200)), ("green", 24, (60, 200, 60)), ("red", 12, (200, 60, 60))):
        for i in range(n):
            pixels = rng.normal(colour, 30, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            name = f"{label}{i}"
            Image.fromarray(pixels).save(folder / f"{name}.png")
            split = ("train", "train", "train", "val", "val", "test")[i // 2 % 6]
            digest = lineage.sha256_file(folder / f"{name}.png")
            rows.append((name, f"{name}.png", label, f"{label}-{i // 2}", split, digest, 32, 32))
    columns = ["image_id", "path", "label", "group", "split", "sha256", "width", "height"]
    manifest = pd.DataFrame(rows, columns=columns)
    write_manifest(folder / "manifest.csv", manifest)
    manifest[manifest["label"] == "red"].to_csv(folder / "accepted.csv", index=False)
    manifest[:0].to_csv(folder / "none.csv", index=False)
    manifest.to_csv(folder / "drawn.csv", index=False)
    return folder


@pytest.fixture(scope="session")
def sample_manifest(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of the sample data set."""
    folder = tmp_path_factory.mktemp("sample_manifest")
    build_manifest(sample_data, folder, DatasetConfig(), 0)
    return folder / "manifest.csv"


@pytest.fixture(scope="session")
def trained_encoder(sample_data: Path, sample_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder trained on the sample data, briefly but long enough to be of use."""
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    train_encoder(
        sample_data, sample_manifest, folder, EncoderConfig(width=16, steps=150), 0, "cpu", None, symmetries="all"
    )
    return folder
