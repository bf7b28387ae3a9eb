"""FID with a weights file that the test makes; nothing is downloaded."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from raresynth.errors import CheckpointError
from raresynth.quality.inception import WeightsUnavailable, fid, find_weights, inception_features, load_inception

NAME = "pt_inception-2015-12-05-6726825d.pth"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of pytorch-fid's network: its own constructor, with the download replaced by nothing."""
    from pytorch_fid import inception as library

    torch.manual_seed(0)
    network = library._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    network.Mixed_5b = library.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = library.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = library.FIDInceptionA(288, pool_features=64)
    network.Mixed_6b = library.FIDInceptionC(768, channels_7x7=128)
    network.Mixed_6c = library.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6d = library.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6e = library.FIDInceptionC(768, channels_7x7=192)
    network.Mixed_7b = library.FIDInceptionE_1(1280)
    network.Mixed_7c = library.FIDInceptionE_2(2048)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_a_file_is_named_by_its_hash(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"any")
    assert find_weights(str(path)) == (path, hashlib.sha256(b"any").hexdigest())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.pth; set quality\.inception"):
        find_weights(str(tmp_path / "nothing.pth"))


def test_auto_refuses_a_cached_file_of_another_hash(hub):
    (hub / NAME).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="6726825d"):
        find_weights("auto")


def test_auto_without_network_says_so(hub, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(WeightsUnavailable, match="could not be fetched"):
        find_weights("auto")
    assert not (hub / NAME).exists()


class _Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_pickled_code_is_not_run(tmp_path):
    path, marker = tmp_path / "weights.pth", tmp_path / "ran"
    torch.save({"x": _Attack(marker)}, path)
    with pytest.raises(CheckpointError, match="no weights of pytorch-fid"):
        load_inception(path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert not marker.exists()


def test_a_file_that_changed_after_hashing_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"second")
    with pytest.raises(CheckpointError, match="changed"):
        load_inception(path, hashlib.sha256(b"first").hexdigest())


@pytest.mark.slow
def test_fid_equals_pytorch_fid(weights, tmp_path):
    """On the same files, by the library's own command."""
    from PIL import Image
    from pytorch_fid.fid_score import calculate_activation_statistics, calculate_frechet_distance

    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (12, 32, 32, 3)).astype(np.uint8)
    fake = rng.integers(40, 216, (10, 32, 32, 3)).astype(np.uint8)
    path, digest = find_weights(str(weights))
    network = load_inception(path, digest)
    statistics = []
    for name, images in (("real", real), ("fake", fake)):
        files = []
        for i, image in enumerate(images):
            files.append(tmp_path / f"{name}{i}.png")
            Image.fromarray(image).save(files[-1])
        statistics += calculate_activation_statistics(files, network, batch_size=4, device="cpu", num_workers=0)
    theirs = calculate_frechet_distance(*statistics)
    ours = fid(str(weights), real, fake, (np.arange(6), np.arange(6, 12)))
    assert ours.value == pytest.approx(theirs, rel=1e-3)
    assert (ours.n_real, ours.n_fake, ours.n_floor) == (12, 10, 6)
    assert ours.weights_sha256 == digest
    assert inception_features(network, real).shape == (12, 2048)
