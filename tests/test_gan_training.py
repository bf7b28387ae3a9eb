import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from known import saved_step
from PIL import Image

from raresynth.config import GanConfig
from raresynth.errors import CheckpointError, DataError, MemoryLimitError
from raresynth.gan.batches import Batches
from raresynth.gan.training import GanReport, finetune, pretrain
from raresynth.lineage import load_checkpoint, read_report, sha256_file

SMALL = {"resolution": 32, "latent_dim": 8, "width": 4, "batch_size": 8, "finetune_kimg": 0.08, "pretrain_kimg": 0.16}
COUNTS = {"nv": 30, "df": 17, "vasc": 41}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Blurred noise, a tint a class; a manifest with an image of each class in val besides."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for tint, (label, count) in enumerate(COUNTS.items()):
        for i in range(count + 1):
            small = rng.integers(0, 128, (4, 4, 3)) + np.eye(3, dtype=int)[tint] * 100
            name = f"{label}{i}.png"
            Image.fromarray(small.astype(np.uint8)).resize((32, 32)).save(folder / name)
            split = "val" if i == count else "train"
            rows.append([name, name, label, name, split, sha256_file(folder / name), 32, 32])
    columns = ["image_id", "path", "label", "group", "split", "sha256", "width", "height"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "manifest.csv", index=False)
    return folder


def run_pretrain(data: Path, out: Path, every_s: float = 1e9, seed: int = 0, **knobs) -> GanReport:
    config = GanConfig(**{**SMALL, **knobs})
    return pretrain(data, data / "manifest.csv", out, config, seed, "cpu", None, every_s)


def run_finetune(data: Path, base: Path, label: str, out: Path, every_s: float = 1e9, **knobs) -> GanReport:
    config = GanConfig(**{**SMALL, **knobs})
    return finetune(data, data / "manifest.csv", base, label, out, config, 0, "cpu", None, every_s)


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pretrain")
    run_pretrain(data, out)
    return out


def test_pretrain_leaves_a_checkpoint_that_rebuilds_it_and_a_report(data, base):
    report = read_report(base / "report.json", GanReport)
    assert (report.status, report.label, report.steps, report.kimg) == ("trained", None, 20, 0.16)
    assert report.n_images == sum(COUNTS.values())  # train images only
    tensors, meta = load_checkpoint(base)
    assert report.weights_sha256 == meta["weights_sha256"] == sha256_file(base / "weights.safetensors")
    generator = {k for k in tensors if k.startswith("generator.")}
    assert generator
    assert {k for k in tensors if k not in generator} == {k for k in tensors if k.startswith("discriminator.")}
    assert meta["architecture"]["resolution"] == 32
    assert report.curves.step == list(range(1, 21))
    assert all(np.isfinite(report.curves.d_loss))
    assert sorted(p.name for p in base.iterdir()) == ["meta.json", "report.json", "weights.safetensors"]


def test_equal_inputs_give_equal_bytes_and_another_seed_others(data, base, tmp_path):
    run_pretrain(data, tmp_path / "again")
    run_pretrain(data, tmp_path / "other", seed=1)
    for name in ("weights.safetensors", "meta.json", "report.json"):
        assert (tmp_path / "again" / name).read_bytes() == (base / name).read_bytes()
    assert (tmp_path / "other" / "weights.safetensors").read_bytes() != (base / "weights.safetensors").read_bytes()


def test_finetune_starts_from_the_base_and_keeps_frozen_blocks(data, base, tmp_path):
    report = run_finetune(data, base, "df", tmp_path / "df")
    parent, _ = load_checkpoint(base)
    child, meta = load_checkpoint(tmp_path / "df")
    assert report.parent_sha256 == meta["parent_sha256"] == sha256_file(base / "weights.safetensors")
    assert (report.label, report.n_images, meta["label"]) == ("df", COUNTS["df"], "df")
    frozen = [k for k in parent if k.startswith(("discriminator.blocks.0.", "discriminator.blocks.1."))]
    assert frozen
    assert all(torch.equal(parent[k], child[k]) for k in frozen)
    assert not torch.equal(parent["discriminator.blocks.2.0.weight"], child["discriminator.blocks.2.0.weight"])
    assert not torch.equal(parent["generator.project.weight"], child["generator.project.weight"])
    assert all(value > 0 for value in report.curves.barlow)


def test_stgan_lite_stays_finite_on_a_last_batch_of_one(data, base, tmp_path):
    # 41 images in batches of 40: the second batch is filled from the next pass.
    report = run_finetune(data, base, "vasc", tmp_path / "vasc", batch_size=40, finetune_kimg=0.4)
    assert report.status == "trained"
    tensors, _ = load_checkpoint(tmp_path / "vasc")
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_stgan_lite_stays_finite_on_a_batch_of_one(data, base, tmp_path):
    assert run_finetune(data, base, "df", tmp_path / "df", batch_size=1, finetune_kimg=0.004).status == "trained"


@pytest.mark.filterwarnings("ignore:var.*degrees of freedom")
def test_dcgan_base_reports_the_step_of_its_collapse_on_a_batch_of_one_and_others_go_on(data, tmp_path):
    knobs = {"preset": "dcgan-base", "batch_size": 40}
    run_pretrain(data, tmp_path / "base", **knobs)
    report = run_finetune(data, tmp_path / "base", "vasc", tmp_path / "vasc", finetune_kimg=0.4, **knobs)
    assert (report.status, report.collapsed_step, report.collapsed_loss) == ("collapsed", 2, "barlow")
    assert report.reason == "training collapsed: barlow is not a finite number at step 2"
    assert (report.steps, report.weights_sha256) == (1, None)
    assert read_report(tmp_path / "vasc" / "report.json", GanReport) == report
    assert [p.name for p in (tmp_path / "vasc").iterdir()] == ["report.json"]
    assert run_finetune(data, tmp_path / "base", "df", tmp_path / "df", **knobs).status == "trained"


def test_full_barlow_over_the_memory_limit_is_refused_before_any_training(data, tmp_path):
    with pytest.raises(MemoryLimitError, match="memory_limit_mb"):
        run_pretrain(data, tmp_path / "base", preset="dcgan-base", width=64, memory_limit_mb=8)
    assert not (tmp_path / "base").exists()


def test_finetune_refuses_another_architecture_a_missing_base_and_an_unknown_class(data, base, tmp_path):
    with pytest.raises(CheckpointError, match="architecture"):
        run_finetune(data, base, "df", tmp_path / "out", width=8)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run_finetune(data, tmp_path / "nowhere", "df", tmp_path / "out")
    with pytest.raises(DataError, match="'scc'"):
        run_finetune(data, base, "scc", tmp_path / "out")


CHILD = """
import json, sys
from pathlib import Path
from raresynth.config import GanConfig
from raresynth.gan.training import finetune, pretrain
stage, data, base, out, knobs = sys.argv[1:]
data, config = Path(data), GanConfig(**json.loads(knobs))
common = (Path(out), config, 0, "cpu", None, 1e-6)
if stage == "pretrain":
    pretrain(data, data / "manifest.csv", *common)
else:
    finetune(data, data / "manifest.csv", Path(base), "df", *common)
"""


def start(stage: str, data: Path, base: Path, out: Path, knobs: dict) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD, stage, str(data), str(base), str(out), json.dumps(knobs)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def kill_in_training(child: subprocess.Popen[bytes], out: Path, at_least: int) -> None:
    while child.poll() is None and saved_step(out) < at_least:
        time.sleep(0.002)
    child.kill()
    child.communicate()
    assert at_least <= saved_step(out) < 100, "the kill must fall inside training"


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_killed_and_resumed_ends_in_the_same_weights_bit_for_bit(data, base, tmp_path, stage, precision):
    knobs = {**SMALL, "precision": precision, "pretrain_kimg": 0.8, "finetune_kimg": 0.8}  # 100 steps

    def run(out: Path) -> None:
        if stage == "pretrain":
            run_pretrain(data, out, **knobs)
        else:
            run_finetune(data, base, "df", out, **knobs)

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_in_training(start(stage, data, base, killed, knobs), killed, at_least=30)
    run(killed)
    run(whole)
    for name in ("weights.safetensors", "meta.json", "report.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert not (killed / "state").exists()


@pytest.mark.slow
def test_killed_again_and_again_ends_in_the_same_weights(data, base, tmp_path):
    knobs = {**SMALL, "pretrain_kimg": 0.8}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for at_least in (1, 20, 21, 60, 90):
        kill_in_training(start("pretrain", data, base, killed, knobs), killed, at_least)
    run_pretrain(data, killed, **knobs)
    run_pretrain(data, whole, **knobs)
    assert (killed / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()


def test_a_state_of_another_run_is_not_continued(data, base, tmp_path):
    out = tmp_path / "out"
    kill_in_training(start("pretrain", data, base, out, {**SMALL, "pretrain_kimg": 0.8}), out, at_least=2)
    run_pretrain(data, out)
    assert (out / "weights.safetensors").read_bytes() == (base / "weights.safetensors").read_bytes()


def test_a_pass_shows_every_image_once():
    for wrap in (True, False):
        batches = Batches(10, 4, seed=0, wrap=wrap)
        shown = np.concatenate([batches.indices(step) for step in range(5)])
        assert sorted(shown[:10]) == list(range(10))
        assert list(shown[:10]) != list(range(10))


def test_wrapped_batches_are_full_and_ragged_ones_end_short():
    wrapped, ragged = Batches(41, 40, 0, wrap=True), Batches(41, 40, 0, wrap=False)
    assert [len(wrapped.indices(s)) for s in range(4)] == [40, 40, 40, 40]
    assert [len(ragged.indices(s)) for s in range(4)] == [40, 1, 40, 1]
    assert [wrapped.images_before(s) for s in range(3)] == [0, 40, 80]
    assert [ragged.images_before(s) for s in range(4)] == [0, 40, 41, 81]


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("n", [1, 3, 40, 41, 100])
def test_steps_are_the_fewest_that_show_enough_images(n, wrap):
    batches = Batches(n, 40, 0, wrap)
    for images in (1, 40, 41, 80, 82, 100, 999):
        steps = batches.steps(images)
        assert batches.images_before(steps) >= images > batches.images_before(steps - 1)
        assert len(batches.indices(steps - 1)) == batches.images_before(steps) - batches.images_before(steps - 1)


def test_a_batch_larger_than_the_class_repeats_it():
    shown = Batches(3, 8, 0, wrap=True).indices(0)
    assert sorted(shown[:3]) == sorted(shown[3:6]) == [0, 1, 2]
