import json
import shutil
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
from raresynth.gan import training
from raresynth.gan.batches import Draws, Passes
from raresynth.gan.residual.game import ResidualGame
from raresynth.gan.sampling import generate, load_generator
from raresynth.gan.training import SCORED_IMAGES, SCORING_SEED, GanReport, finetune, pretrain
from raresynth.lineage import load_checkpoint, read_report, sha256_file

SMALL = {"resolution": 32, "latent_dim": 8, "width": 4, "batch_size": 8, "finetune_kimg": 0.08, "pretrain_kimg": 0.16}
COUNTS = {"nv": 30, "df": 17, "vasc": 41}
PRESETS = ("raresynth", "stgan-lite")


class TintJudge:
    """Knows that each class has a colour of its own; what it calls KID is the distance to that."""

    def kid(self, label, images):
        return float(np.square(images.mean((0, 1, 2)) / 255 - self.tint(label)).sum()) if label in COUNTS else None

    def gain(self, label, images, others):
        return self.kid(label, others) - self.kid(label, images), 0.0

    def tint(self, label):
        return 0.25 + np.eye(3)[list(COUNTS).index(label)] * 0.4


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


TINTS = TintJudge()


def run_pretrain(data: Path, out: Path, every_s: float = 1e9, seed: int = 0, judge=TINTS, **knobs) -> GanReport:
    config = GanConfig(**{**SMALL, "preset": "stgan-lite", **knobs})
    return pretrain(data, data / "manifest.csv", out, config, seed, "cpu", None, every_s, judge, symmetries="all")


def run_finetune(
    data: Path, base: Path, label: str, out: Path, every_s: float = 1e9, judge=TINTS, **knobs
) -> GanReport:
    config = GanConfig(**{**SMALL, "preset": "stgan-lite", **knobs})
    return finetune(
        data, data / "manifest.csv", base, label, out, config, 0, "cpu", None, every_s, judge, symmetries="all"
    )


@pytest.fixture(scope="module")
def bases(data, tmp_path_factory) -> dict[str, Path]:
    """Universal GANs, by preset."""
    folders = {preset: tmp_path_factory.mktemp("pretrain") for preset in PRESETS}
    for preset, folder in folders.items():
        run_pretrain(data, folder, preset=preset)
    return folders


@pytest.fixture(scope="module")
def base(bases) -> Path:
    return bases["stgan-lite"]


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
    assert all(np.isfinite(report.curves.losses["d_loss"]))
    assert sorted(p.name for p in base.iterdir()) == ["meta.json", "report.json", "weights.safetensors"]


@pytest.mark.parametrize("preset", PRESETS)
def test_equal_inputs_give_equal_bytes_and_another_seed_others(data, bases, tmp_path, preset):
    base = bases[preset]
    run_pretrain(data, tmp_path / "again", preset=preset)
    run_pretrain(data, tmp_path / "other", preset=preset, seed=1)
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
    assert all(value > 0 for value in report.curves.losses["barlow"])


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
sys.path.insert(0, sys.argv.pop())
from test_gan_training import TintJudge
from raresynth.config import GanConfig
from raresynth.gan.training import finetune, pretrain
stage, data, base, out, knobs = sys.argv[1:]
data, config = Path(data), GanConfig(**json.loads(knobs))
common = (Path(out), config, 0, "cpu", None, 1e-6, TintJudge())
if stage == "pretrain":
    pretrain(data, data / "manifest.csv", *common, symmetries="all")
else:
    finetune(data, data / "manifest.csv", Path(base), "df", *common, symmetries="all")
"""


def start(stage: str, data: Path, base: Path, out: Path, knobs: dict) -> subprocess.Popen[bytes]:
    here = Path(__file__).parent
    command = [sys.executable, "-c", CHILD, stage, str(data), str(base), str(out), json.dumps(knobs), str(here)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def kill_in_training(child: subprocess.Popen[bytes], out: Path, at_least: int) -> None:
    while child.poll() is None and saved_step(out) < at_least:
        time.sleep(0.002)
    child.kill()
    child.communicate()
    assert at_least <= saved_step(out) < 100, "the kill must fall inside training"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_killed_and_resumed_ends_in_the_same_weights_bit_for_bit(data, bases, tmp_path, stage, preset):
    base = bases[preset]
    knobs = {**SMALL, "preset": preset, "precision": "bf16", "pretrain_kimg": 0.8, "finetune_kimg": 0.8}  # 100 steps
    if preset == "raresynth":
        # Augmentation begins at once, and there are snapshots before and after the kill.
        knobs |= {"augmentation_target": 0.01, "snapshots": 4}

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
    knobs = {**SMALL, "preset": "raresynth", "pretrain_kimg": 0.8, "snapshots": 4}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for at_least in (1, 20, 21, 60, 90):
        kill_in_training(start("pretrain", data, base, killed, knobs), killed, at_least)
    run_pretrain(data, killed, **knobs)
    run_pretrain(data, whole, **knobs)
    assert (killed / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()


def test_a_state_of_another_run_is_not_continued(data, base, tmp_path):
    out = tmp_path / "out"
    kill_in_training(
        start("pretrain", data, base, out, {**SMALL, "preset": "stgan-lite", "pretrain_kimg": 0.8}), out, at_least=2
    )
    run_pretrain(data, out)
    assert (out / "weights.safetensors").read_bytes() == (base / "weights.safetensors").read_bytes()


def test_a_pass_shows_every_image_once():
    for wrap in (True, False):
        batches = Passes(10, 4, seed=0, wrap=wrap)
        shown = np.concatenate([batches.indices(step) for step in range(5)])
        assert sorted(shown[:10]) == list(range(10))
        assert list(shown[:10]) != list(range(10))


def test_wrapped_batches_are_full_and_ragged_ones_end_short():
    wrapped, ragged = Passes(41, 40, 0, wrap=True), Passes(41, 40, 0, wrap=False)
    assert [len(wrapped.indices(s)) for s in range(4)] == [40, 40, 40, 40]
    assert [len(ragged.indices(s)) for s in range(4)] == [40, 1, 40, 1]
    assert [wrapped.images_before(s) for s in range(3)] == [0, 40, 80]
    assert [ragged.images_before(s) for s in range(4)] == [0, 40, 41, 81]


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("n", [1, 3, 40, 41, 100])
def test_steps_are_the_fewest_that_show_enough_images(n, wrap):
    batches = Passes(n, 40, 0, wrap)
    for images in (1, 40, 41, 80, 82, 100, 999):
        steps = batches.steps(images)
        assert batches.images_before(steps) >= images > batches.images_before(steps - 1)
        assert len(batches.indices(steps - 1)) == batches.images_before(steps) - batches.images_before(steps - 1)


def test_a_batch_larger_than_the_class_repeats_it():
    shown = Passes(3, 8, 0, wrap=True).indices(0)
    assert sorted(shown[:3]) == sorted(shown[3:6]) == [0, 1, 2]


def test_draws_follow_their_weights_and_depend_on_the_step_alone():
    draws = Draws(np.array([1.0, 1.0, 8.0]), 50, seed=0)
    shown = np.bincount(np.concatenate([draws.indices(step) for step in range(100)]))
    assert shown / shown.sum() == pytest.approx([0.1, 0.1, 0.8], abs=0.02)
    assert np.array_equal(draws.indices(7), Draws(np.array([1.0, 1.0, 8.0]), 50, seed=0).indices(7))
    assert (draws.images_before(3), draws.steps(101)) == (150, 3)


def test_draws_are_those_of_numpy():
    weights = np.random.default_rng(1).random(1000)
    draws = Draws(weights, 64, seed=3)
    for step in range(5):
        expected = np.random.default_rng([3, step]).choice(1000, 64, p=weights / weights.sum())
        assert np.array_equal(draws.indices(step), expected)


OURS = {**SMALL, "preset": "raresynth", "pretrain_kimg": 0.8, "snapshots": 4}


def test_the_snapshot_of_least_mean_kid_is_kept(data, tmp_path):
    report = run_pretrain(data, tmp_path / "out", **OURS)
    assert [s.step for s in report.snapshots] == [50, 75, 100]  # 0 and 25 fall before the classes are known in full
    assert all(set(s.kid) == set(COUNTS) for s in report.snapshots)
    best = min(report.snapshots, key=lambda s: s.mean_kid)
    assert report.kept_step == best.step
    for label, kid in best.kid.items():
        generator, _ = load_generator(tmp_path / "out", "cpu", label)
        images = generate(generator, SCORING_SEED, range(SCORED_IMAGES))
        assert TintJudge().kid(label, images) == pytest.approx(kid, rel=1e-4)


def test_classes_without_reals_to_judge_by_keep_the_last_snapshot(data, tmp_path):
    class Blind(TintJudge):
        def kid(self, label, images):
            return None

    report = run_pretrain(data, tmp_path / "out", judge=Blind(), **OURS)
    assert report.kept_step == 100
    assert all(s.kid == {} for s in report.snapshots)


def greyed(data: Path, pattern: str, out: Path) -> Path:
    """The data, with those images grey."""
    shutil.copytree(data, out)
    for path in out.glob(pattern):
        Image.open(path).convert("L").save(path)
    manifest = pd.read_csv(out / "manifest.csv")
    manifest["sha256"] = [sha256_file(out / path) for path in manifest["path"]]
    manifest.to_csv(out / "manifest.csv", index=False)
    return out


def test_of_grey_images_a_grey_generator_is_trained_and_branched(data, tmp_path):
    grey = greyed(data, "*.png", tmp_path / "data")
    assert run_pretrain(grey, tmp_path / "base", preset="raresynth").settings["grey"]
    assert run_finetune(grey, tmp_path / "base", "df", tmp_path / "df", preset="raresynth").status == "trained"
    drawn = generate(load_generator(tmp_path / "df", "cpu")[0], 0, range(4))
    assert np.ptp(drawn, axis=-1).max() == 0
    assert drawn.std() > 1


def test_a_grey_class_gets_its_branch_of_coloured_images(data, bases, tmp_path):
    mixed = greyed(data, "df*.png", tmp_path / "data")
    report = run_finetune(mixed, bases["raresynth"], "df", tmp_path / "df", preset="raresynth")
    assert (report.status, report.settings["grey"]) == ("trained", False)


def test_a_branch_that_does_not_help_leaves_the_universal_weights(data, bases, tmp_path):
    class Content(TintJudge):
        """Every branch looks better, but never measurably."""

        def gain(self, label, images, others):
            return 0.5, 0.6

    knobs = {"preset": "raresynth", "finetune_kimg": 0.4, "snapshots": 2}
    parent, _ = load_checkpoint(bases["raresynth"])
    report = run_finetune(data, bases["raresynth"], "df", tmp_path / "same", judge=Content(), **knobs)
    same, meta = load_checkpoint(tmp_path / "same")
    assert report.kept_step == 0
    assert all(torch.equal(parent[k], same[k]) for k in parent)
    assert (meta["label"], meta["parent_sha256"]) == ("df", report.parent_sha256)

    class Keen(TintJudge):
        def kid(self, label, images):
            self.asked = getattr(self, "asked", 0) + 1
            return -self.asked  # the later the better

        def gain(self, label, images, others):
            return 0.5, 0.4

    report = run_finetune(data, bases["raresynth"], "df", tmp_path / "branch", judge=Keen(), **knobs)
    branch, _ = load_checkpoint(tmp_path / "branch")
    assert [s.step for s in report.snapshots] == [0, 25, 50]
    assert report.kept_step == 50
    assert not any(
        torch.equal(parent[f"discriminator.{k}.weight"], branch[f"discriminator.{k}.weight"]) for k in ("stem", "last")
    )
    assert not torch.equal(parent["generator.project.weight"], branch["generator.project.weight"])


class Faulty(ResidualGame):
    """Gives a NaN at one step, as long as the learning rate is what it was or, if `stubborn`, always."""

    stubborn = False

    def step(self, real, labels, rng, step, steps):
        losses = super().step(real, labels, rng, step, steps)
        if step == 60 and (self.stubborn or self.learning_rate == self.settings.learning_rate):
            losses[1] = torch.nan
        return losses


def test_a_collapse_is_rolled_back_once_with_a_lower_rate(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "ResidualGame", Faulty)
    report = run_pretrain(data, tmp_path / "out", **OURS)
    assert report.status == "trained"
    (rollback,) = report.rollbacks
    assert (rollback.step, rollback.loss, rollback.back_to_step) == (61, "penalty", 50)
    assert rollback.learning_rate == report.settings["learning_rate"] / 2
    assert all(np.isfinite(report.curves.losses["penalty"]))
    assert min(report.curves.losses["penalty"]) > 0  # taken at one step in eight, and shown at that height


def test_after_a_second_collapse_the_class_has_failed(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "ResidualGame", Faulty)
    monkeypatch.setattr(Faulty, "stubborn", True)
    report = run_pretrain(data, tmp_path / "out", **OURS)
    assert (report.status, report.collapsed_step, report.collapsed_loss) == ("collapsed", 61, "penalty")
    assert len(report.rollbacks) == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.json"]


class Broken(ResidualGame):
    """A weight is infinite after one step all of whose losses are finite."""

    at = 49
    stubborn = False

    def step(self, real, labels, rng, step, steps):
        losses = super().step(real, labels, rng, step, steps)
        if step == self.at and (self.stubborn or self.learning_rate == self.settings.learning_rate):
            with torch.no_grad():
                self.generator.project.bias[3] = torch.inf
        return losses


@pytest.mark.parametrize("step", [50, 100])  # of the first snapshot, and the last one of all
def test_weights_that_are_not_finite_are_neither_kept_nor_gone_back_to(data, tmp_path, monkeypatch, step):
    monkeypatch.setattr(training, "ResidualGame", Broken)
    monkeypatch.setattr(Broken, "at", step - 1)
    report = run_pretrain(data, tmp_path / "out", **OURS)
    (rollback,) = report.rollbacks
    assert (rollback.step, rollback.loss, rollback.back_to_step) == (step, "generator.project.bias", step - 25)
    tensors, _ = load_checkpoint(tmp_path / "out")
    assert report.status == "trained" and all(tensor.isfinite().all() for tensor in tensors.values())
    monkeypatch.setattr(Broken, "stubborn", True)
    report = run_pretrain(data, tmp_path / "failed", **OURS)
    assert (report.status, report.collapsed_step) == ("collapsed", step)
    assert report.reason == f"training collapsed: generator.project.bias is not a finite number at step {step}"


def test_a_rollback_survives_a_kill(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "ResidualGame", Faulty)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_pretrain(data, whole, **OURS)

    class Killed(Exception):
        pass

    class Interrupted(Faulty):
        def step(self, real, labels, rng, step, steps):
            if step == 70:
                raise Killed
            return super().step(real, labels, rng, step, steps)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "ResidualGame", Interrupted)
        run_pretrain(data, killed, every_s=1e-6, **OURS)
    assert saved_step(killed) == 70
    run_pretrain(data, killed, **OURS)
    for name in ("weights.safetensors", "meta.json", "report.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
