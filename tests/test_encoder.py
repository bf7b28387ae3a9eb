"""The encoder: its loss by hand, what it sees, and a training that a kill does not change."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from known import saved_step

from raresynth.config import EncoderConfig
from raresynth.dataset.images import load_images
from raresynth.dataset.manifest import read_manifest
from raresynth.errors import CheckpointError, DataError
from raresynth.lineage import read_report, save_checkpoint, sha256_file
from raresynth.quality import encoder as encoder_module
from raresynth.quality.controls import LEAST_EFFECT, check_encoder
from raresynth.quality.encoder import Encoder, EncoderReport, barlow_twins_loss, train_encoder
from raresynth.training_state import save_state


def test_loss_by_hand():
    """Two features, two images; standardised, the views' features are (1, -1) and (1, -1) or their negatives."""
    first = torch.tensor([[1.0, 5.0], [3.0, 1.0]])
    second = torch.tensor([[2.0, 4.0], [8.0, 6.0]])
    # Standardised columns: first (-1, 1), (1, -1); second (-1, 1), (-1, 1): C = [[1, 1], [-1, -1]].
    expected = (1 - 1) ** 2 + (1 + 1) ** 2 + 5e-3 * (1 + 1)
    assert barlow_twins_loss(first, second).item() == pytest.approx(expected, rel=1e-4)


def test_scale_of_train_reals(sample_data, sample_manifest, trained_encoder):
    encoder = Encoder.load(trained_encoder)
    manifest = read_manifest(sample_manifest)
    train = load_images(manifest[manifest["split"] == "train"], sample_data, encoder.resolution)
    features = encoder.features(train)
    assert features.dtype == np.float32
    assert features.shape == (len(train), encoder.dimensions) == (len(train), 32)
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-3)
    covariance = np.cov(features, rowvar=False)
    assert np.trace(covariance) / 32 == pytest.approx(1, rel=1e-2)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-2)


@pytest.mark.parametrize("n", [20, 30])
def test_controls_do_not_depend_on_which_few_images_are_held_out(trained_encoder, sample_data, sample_manifest, n):
    """Mild JPEG changes features by less than one small sample differs from the next."""
    encoder, manifest = Encoder.load(trained_encoder), read_manifest(sample_manifest)
    train, val = (manifest[manifest["split"] == split] for split in ("train", "val"))
    images = [load_images(frame, sample_data, encoder.resolution) for frame in (train, val)]
    labels = [frame["label"].to_numpy(str) for frame in (train, val)]
    for seed in range(3):
        few = np.random.default_rng(seed).permutation(len(val))[:n]
        controls = check_encoder(encoder.features, images[0], labels[0], images[1][few], labels[1][few], 2**32 + seed)
        assert controls is not None
        assert [control.spearman for control in controls.named.values()] == [1, 1, 1, 1]


def test_controls_find_an_encoder_that_is_blind(trained_encoder, sample_data, sample_manifest):
    """Thumbnails of 2 x 2 pixels: a blur moves them too, by next to nothing."""
    manifest = read_manifest(sample_manifest)
    train, val = (manifest[manifest["split"] == split] for split in ("train", "val"))
    images = [load_images(frame, sample_data, 32) for frame in (train, val)]
    labels = [frame["label"].to_numpy(str) for frame in (train, val)]

    def thumbnails(pixels):
        return pixels.reshape(len(pixels), 2, 16, 2, 16, 3).mean((2, 4)).reshape(len(pixels), -1).astype(np.float32)

    controls = check_encoder(thumbnails, images[0], labels[0], images[1], labels[1], 0)
    assert controls is not None
    assert controls.blur.effect < LEAST_EFFECT / 2


def test_controls(trained_encoder):
    """FD rises with every kind of damage, and neighbours share labels more often than by raw pixels."""
    report = read_report(trained_encoder / "report.json", EncoderReport)
    controls = report.controls
    assert controls is not None
    for control in (controls.blur, controls.noise, controls.jpeg, controls.dropped_modes):
        assert control.spearman == 1 and control.effect > 2 * LEAST_EFFECT, control
    assert controls.neighbour_accuracy > controls.pixel_neighbour_accuracy
    assert report.losses[-1] < report.losses[0] / 2
    assert report.encoder_sha256 == sha256_file(trained_encoder / "weights.safetensors")
    assert not (trained_encoder / "state").exists()


@pytest.mark.parametrize(("symmetries", "mirrored"), [("mirror", {False, True}), ("none", {False})])
def test_views_of_images_with_an_up_keep_it(symmetries, mirrored):
    down, across = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    image = torch.stack([down, across, down * 0])
    views = encoder_module.augment(image.repeat(64, 1, 1, 1), symmetries, np.random.default_rng(0))
    assert (views[:, 0, :12].mean((1, 2)) < views[:, 0, -12:].mean((1, 2))).all()
    left, right = views[:, 1, :, :12].mean((1, 2)), views[:, 1, :, -12:].mean((1, 2))
    assert set((left > right).tolist()) == mirrored


TRAIN = """
import sys
from pathlib import Path
import torch
from raresynth.config import EncoderConfig
from raresynth.quality import encoder
torch.set_num_threads(1)
encoder.CHECKPOINT_EVERY_STEPS = 5
data, manifest, out = map(Path, sys.argv[1:])
config = EncoderConfig(width=4, steps=int(40), batch_size=16)
encoder.train_encoder(data, manifest, out, config, 3, "cpu", None, symmetries="all")
"""


def test_an_interrupted_training_ends_in_the_same_bytes(squares, tmp_path, monkeypatch):
    """The same in one process: an error at the 18th view, after the checkpoint of step 5."""
    config = EncoderConfig(width=4, steps=12, batch_size=16)
    monkeypatch.setattr(encoder_module, "CHECKPOINT_EVERY_STEPS", 5)

    def train(name):
        train_encoder(squares, squares / "manifest.csv", tmp_path / name, config, 3, "cpu", None, symmetries="all")

    train("whole")
    views, original = [], encoder_module.augment

    def fail(images, symmetries, rng):
        views.append(rng)
        if len(views) == 18:
            raise InterruptedError
        return original(images, symmetries, rng)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(encoder_module, "augment", fail)
        train("stopped")
    assert 0 < saved_step(tmp_path / "stopped") < config.steps
    train("stopped")
    for name in ("weights.safetensors", "meta.json", "report.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


@pytest.mark.slow
def test_a_killed_training_ends_in_the_same_bytes(squares, tmp_path):
    def start(out):
        command = [sys.executable, "-c", TRAIN, str(squares), str(squares / "manifest.csv"), str(out)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    killed = start(tmp_path / "killed")
    while not saved_step(tmp_path / "killed") and killed.poll() is None:
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "report.json").exists()
    assert start(tmp_path / "killed").wait() == 0
    for name in ("weights.safetensors", "meta.json", "report.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_state_of_another_training_is_not_used(squares, tmp_path):
    """A changed knob starts afresh instead of going on from weights that do not fit."""
    save_state(tmp_path / "out", 1, {"model.x": torch.zeros(1)}, {"run": {"config": {}}, "losses": [1.0]})
    config = EncoderConfig(width=4, steps=2, batch_size=16)
    report = train_encoder(
        squares, squares / "manifest.csv", tmp_path / "out", config, 0, "cpu", None, symmetries="all"
    )
    assert len(report.losses) == 2


def test_errors_name_what_is_wrong(squares, tmp_path):
    lines = (squares / "manifest.csv").read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join(lines[:4]) + "\n")
    with pytest.raises(DataError, match="3 train images"):
        train_encoder(
            squares, tmp_path / "few.csv", tmp_path / "out", EncoderConfig(), 0, "cpu", None, symmetries="all"
        )
    save_checkpoint(tmp_path / "generator", {"x": torch.zeros(1)}, {"kind": "generator"})
    with pytest.raises(CheckpointError, match="holds no encoder"):
        Encoder.load(tmp_path / "generator")
