import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from known import saved_step
from safetensors.torch import load_file, save_file

from raresynth.classifier import augmentation
from raresynth.classifier.arms import ARMS, Pool, class_weights, draw
from raresynth.classifier.network import WithFeatureMap, create, load
from raresynth.classifier.training import train_classifier
from raresynth.config import ClassifierConfig
from raresynth.errors import CheckpointError, DataError, ParamsError
from raresynth.lineage import load_checkpoint, save_checkpoint

CONFIG = ClassifierConfig(model="test_resnet", resolution=32, steps=30, batch_size=16, learning_rate=5e-3)
POOL = Pool(np.repeat([0, 1, 2], [50, 10, 5]), np.zeros(65, bool), 3)


def train(squares: Path, out: Path, arm: str = "real", synthetic: str | None = None, **knobs):
    synthetic = synthetic or ("drawn.csv" if arm == "synthetic" else "accepted.csv")
    seed, every = knobs.pop("seed", 0), knobs.pop("every", 1e9)
    config = CONFIG.model_copy(update=knobs)
    return train_classifier(
        squares,
        squares / "manifest.csv",
        squares / synthetic,
        squares,
        arm,
        out,
        config,
        seed,
        "cpu",
        None,
        checkpoint_every_s=every,
        symmetries="all",
    )


def batches(arm: str, steps: range, pool: Pool = POOL, seed: int = 0, batch_size: int = 16) -> np.ndarray:
    return np.concatenate([draw(pool, ARMS[arm], batch_size, 0.5, seed, step) for step in steps])


class TestDraw:
    def test_plain_sampling_passes_over_every_image_once_an_epoch(self):
        stream = batches("real", range(65))
        for epoch in range(16):
            assert sorted(stream[epoch * 65 : (epoch + 1) * 65]) == list(range(65))
        assert list(stream[:65]) != list(stream[65:130])

    @pytest.mark.parametrize("arm", ["real+balanced-sampling", "real+strong-augmentation", "real+synthetic"])
    def test_balanced_sampling_draws_classes_equally_and_images_of_a_class_equally(self, arm):
        stream = batches(arm, range(30), batch_size=10)
        assert list(np.bincount(POOL.targets[stream])) == [100, 100, 100]
        assert set(np.bincount(stream)) == {2, 10, 20}

    def test_synthetic_images_take_their_share_of_their_class_only(self):
        pool = Pool(np.array([0] * 50 + [1] * 10 + [1] * 40), np.arange(100) >= 60, 2)
        stream = batches("real+synthetic", range(50), pool)
        assert (pool.targets[stream] == 1).sum() == 400
        drawn = np.bincount(stream, minlength=100)
        assert set(drawn[:50]) == {8}
        assert set(drawn[50:60]) == {20}
        assert set(drawn[60:]) == {5}

    def test_draw_depends_on_seed_and_step_alone(self):
        for arm in ARMS:
            assert (batches(arm, range(3, 5)) == batches(arm, range(3, 5))).all()
            assert (batches(arm, range(3, 5)) != batches(arm, range(4, 6))).any()
            assert (batches(arm, range(3, 5)) != batches(arm, range(3, 5), seed=1)).any()

    def test_batch_larger_than_the_pool(self):
        small = Pool(np.array([0, 1]), np.zeros(2, bool), 2)
        assert list(np.bincount(batches("real", range(1), small))) == [8, 8]


def test_class_weights_are_the_inverse_frequencies():
    assert class_weights(POOL) == pytest.approx([65 / 150, 65 / 30, 65 / 15])
    assert class_weights(Pool(np.array([0, 1]), np.zeros(2, bool), 2)) == pytest.approx([1, 1])


class TestAugmentation:
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    @pytest.mark.parametrize("augment", [augmentation.ordinary, augmentation.strong])
    def test_is_a_function_of_the_generator_and_keeps_range_and_shape(self, augment):
        first, again, other = (augment(self.images, "all", torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert first.shape == self.images.shape
        assert first.abs().max() <= 1.0

    def test_ordinary_keeps_a_flat_image_and_strong_does_not(self):
        flat = torch.full((64, 3, 32, 32), 0.3)
        assert torch.allclose(augmentation.ordinary(flat, "all", torch.Generator().manual_seed(0)), flat, atol=1e-6)
        changed = augmentation.strong(flat, "all", torch.Generator().manual_seed(0))
        erased = (changed == 0).all(1).flatten(1).any(1).float().mean()
        assert 0.2 < erased < 0.8
        assert changed.std() > 0.05

    def test_without_crop_ordinary_is_one_of_the_eight_flips_and_turns(self):
        turns = torch.arange(4) * (torch.pi / 2)
        warped = augmentation._warp(
            self.images[:4], turns, "all", smallest_crop=1.0, generator=torch.Generator().manual_seed(3)
        )
        for image, result in zip(self.images, warped, strict=False):
            symmetries = [torch.rot90(flipped, k, (1, 2)) for flipped in (image, image.flip(2)) for k in range(4)]
            assert sum(torch.allclose(result, symmetry, atol=1e-4) for symmetry in symmetries) == 1

    @pytest.mark.parametrize("augment", [augmentation.ordinary, augmentation.strong])
    @pytest.mark.parametrize(("symmetries", "mirrored"), [("mirror", {False, True}), ("none", {False})])
    def test_images_with_an_up_keep_it(self, augment, symmetries, mirrored):
        down, across = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
        image = torch.stack([down, across, down * 0])
        views = augment(image.repeat(64, 1, 1, 1), symmetries, torch.Generator().manual_seed(0))
        top, left = views[:, 0, :12].mean((1, 2)), views[:, 1, :, :12].mean((1, 2))
        assert (top < views[:, 0, -12:].mean((1, 2))).all()
        assert set((left > views[:, 1, :, -12:].mean((1, 2))).tolist()) == mirrored

    def test_mixup_is_convex_and_mixes_targets_as_it_mixes_images(self):
        flat = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
        targets = torch.eye(2)
        mixed, mixed_targets = augmentation.mix(flat, targets, torch.Generator().manual_seed(5))
        assert torch.allclose(mixed_targets.sum(1), torch.ones(2))
        assert torch.allclose(mixed[:, 0, 0, 0], mixed_targets[:, 1])


class TestNetwork:
    def test_equal_seeds_give_equal_initial_weights(self):
        first, again, other = (create("test_resnet", "scratch", 3, 32, seed).model.state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)

    def test_unknown_model_and_unfit_resolution_are_named(self):
        with pytest.raises(ParamsError, match=r"classifier\.model.*resnet-18"):
            create("resnet-18", "scratch", 3, 32, 0)
        with pytest.raises(ParamsError, match=r"classifier\.resolution.*vit_tiny"):
            create("vit_tiny_patch16_224", "scratch", 3, 32, 0)

    def test_pretrained_without_network_is_one_sentence(self, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(CheckpointError, match=r"pretrained weights of test_resnet.*use scratch") as raised:
            create("test_resnet", "pretrained", 3, 32, 0)
        assert "\n" not in str(raised.value)

    def test_weights_from_a_local_file_replace_all_but_the_last_layer(self, tmp_path):
        import timm

        donor = timm.create_model("test_resnet", num_classes=5)
        with torch.no_grad():
            donor.fc.bias.fill_(7)
        save_file(donor.state_dict(), tmp_path / "donor.safetensors")
        classifier = create("test_resnet", str(tmp_path / "donor.safetensors"), 3, 32, 0)
        assert torch.equal(classifier.model.conv1[0].weight, donor.conv1[0].weight)
        assert classifier.model.fc.weight.shape[0] == 3
        # The file's weights expect ImageNet's normalisation, so images in [-1, 1] are brought to it.
        image = torch.rand(1, 3, 32, 32)
        mean, std = (torch.tensor(donor.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        expected = classifier.model.eval()((image - mean) / std)
        assert torch.allclose(classifier.eval()(image * 2 - 1), expected, atol=1e-4)

    def test_weights_file_that_is_missing_or_of_another_model_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match="no safetensors file"):
            create("test_resnet", str(tmp_path / "none.safetensors"), 3, 32, 0)
        save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match="does not hold the weights of test_resnet"):
            create("test_resnet", str(tmp_path / "other.safetensors"), 3, 32, 0)


@pytest.fixture(scope="module")
def trained(squares, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "real"
    return out, train(squares, out)


class TestTraining:
    def test_learns_what_is_easy(self, trained):
        _, report = trained
        assert report.status == "trained"
        assert report.val["balanced_accuracy"] > 0.9
        assert report.curves[-1].step == report.steps == CONFIG.steps
        assert report.curves[-1].train_loss < report.curves[0].train_loss

    def test_checkpoint_rebuilds_the_network(self, trained, squares):
        out, report = trained
        classifier, meta = load(out)
        assert meta["labels"] == report.labels == ["blue", "green", "red"]
        assert (meta["temperature"], meta["weights_sha256"]) == (report.temperature, report.weights_sha256)
        assert sorted(path.name for path in out.iterdir()) == ["meta.json", "report.json", "weights.safetensors"]
        images = torch.rand(2, 3, 32, 32) * 2 - 1
        with torch.no_grad():
            logits, features = WithFeatureMap(classifier)(images)
            assert torch.allclose(logits, classifier(images), atol=1e-6)
            assert report.pooled_linear_head is True
            assert torch.allclose(classifier.model.fc(features.mean((2, 3))), logits, atol=1e-5)

    def test_equal_inputs_give_equal_bytes_and_another_seed_does_not(self, trained, squares, tmp_path):
        out, report = trained
        assert train(squares, tmp_path / "again") == report
        for name in ("weights.safetensors", "meta.json", "report.json"):
            assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
        assert train(squares, tmp_path / "other", seed=1).weights_sha256 != report.weights_sha256

    def test_callers_random_state_is_left_alone(self, squares, tmp_path):
        torch.manual_seed(0)
        expected = torch.rand(1)
        torch.manual_seed(0)
        train(squares, tmp_path / "out", steps=2)
        assert torch.equal(torch.rand(1), expected)

    def test_all_arms_take_equal_steps_and_count_their_images(self, squares, tmp_path):
        reports = {arm: train(squares, tmp_path / arm, arm, steps=3) for arm in ARMS}
        assert {report.steps for report in reports.values()} == {3}
        assert len({report.weights_sha256 for report in reports.values()}) == len(ARMS)
        red = {arm: (report.n_train["red"].real, report.n_train["red"].synthetic) for arm, report in reports.items()}
        assert (red.pop("real+synthetic"), red.pop("synthetic")) == ((6, 12), (0, 12))
        assert set(red.values()) == {(6, 0)}

    def test_an_arm_without_real_images_needs_synthetic_ones_of_every_class(self, squares, tmp_path):
        report = train(squares, tmp_path / "arm", "synthetic", "accepted.csv")
        assert report.status == "skipped"
        assert report.reason == "there are no synthetic images of blue, green"

    def test_without_accepted_images_the_synthetic_arm_is_skipped_with_a_reason(self, squares, tmp_path):
        report = train(squares, tmp_path / "arm", "real+synthetic", "none.csv")
        assert report.status == "skipped"
        assert "accepted" in report.reason
        assert [path.name for path in (tmp_path / "arm").iterdir()] == ["report.json"]
        with pytest.raises(CheckpointError):
            load(tmp_path / "arm")

    def test_changed_weights_and_other_kinds_are_refused(self, trained, tmp_path):
        out, _ = trained
        tensors, meta = load_checkpoint(out)
        save_checkpoint(tmp_path / "gan", tensors, {**meta, "kind": "gan"})
        with pytest.raises(CheckpointError, match="no classifier"):
            load(tmp_path / "gan")


KILLED = """
import sys, torch
from pathlib import Path
from raresynth.classifier.training import train_classifier
from raresynth.config import ClassifierConfig
squares, out, config, arm = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(int(sys.argv[5]))
train_classifier(squares, squares / "manifest.csv", squares / "accepted.csv", squares, arm, out,
                 ClassifierConfig.model_validate_json(config), 0, "cpu", None, 0.001, symmetries="all")
"""


@pytest.mark.parametrize("arm", ["real+strong-augmentation", pytest.param("real+synthetic", marks=pytest.mark.slow)])
def test_training_killed_and_started_again_ends_in_the_same_bytes(squares, tmp_path, arm):
    # Long enough that the process is alive when its first states appear.
    steps = {"steps": 60}
    whole = train(squares, tmp_path / "whole", arm, **steps)
    config = CONFIG.model_copy(update=steps).model_dump_json()
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(squares), str(out), config, arm, str(torch.get_num_threads())]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and saved_step(out) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the training ended before it was killed"
    assert not (out / "report.json").exists()
    assert train(squares, out, arm, **steps) == whole
    assert (out / "weights.safetensors").read_bytes() == (tmp_path / "whole" / "weights.safetensors").read_bytes()
    assert not list(out.glob("*state*"))


def test_a_state_is_taken_up_and_one_of_other_inputs_is_not(squares, tmp_path, monkeypatch):
    from raresynth.classifier import training

    class Stop(Exception):
        pass

    original, taken = training._step, []

    def stopping_at_five(state, *rest):
        if state.step == 5:
            raise Stop
        return original(state, *rest)

    def recording(state, *rest):
        taken.append(state.step)
        return original(state, *rest)

    monkeypatch.setattr(training, "_step", stopping_at_five)
    with pytest.raises(Stop):
        train(squares, tmp_path / "out", steps=8, every=1e-6)
    assert saved_step(tmp_path / "out") == 5
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    monkeypatch.setattr(training, "_step", recording)
    train(squares, tmp_path / "out", steps=8)
    assert taken == [5, 6, 7]
    train(squares, tmp_path / "other", steps=8, seed=1)
    assert taken[3:] == list(range(8))


def test_a_damaged_state_costs_time_only(squares, tmp_path):
    whole = train(squares, tmp_path / "whole", steps=3)
    state = tmp_path / "out" / "state" / "000000002"
    state.mkdir(parents=True)
    (state / "weights.safetensors").write_bytes(b"half")
    (state / "meta.json").write_text('{"weights_sha256": "0", "step": 2}')
    assert train(squares, tmp_path / "out", steps=3) == whole


def test_class_without_train_images_is_named(squares, tmp_path):
    manifest = pd.read_csv(squares / "manifest.csv")
    manifest[(manifest["split"] != "train") | (manifest["label"] != "red")].to_csv(tmp_path / "m.csv", index=False)
    with pytest.raises(DataError, match="no train image of 'red'"):
        common = (tmp_path / "out", CONFIG, 0, "cpu", None, 1e9)
        train_classifier(squares, tmp_path / "m.csv", None, None, "real", *common, symmetries="all")


def test_weights_are_finite_with_a_batch_that_is_smaller_than_the_classes(squares, tmp_path):
    train(squares, tmp_path / "out", "real+balanced-sampling", steps=3, batch_size=2)
    tensors = load_file(tmp_path / "out" / "weights.safetensors")
    assert all(torch.isfinite(tensor.float()).all() for tensor in tensors.values())
