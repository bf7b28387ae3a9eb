"""Several ranks train what one process trains: real processes, joined by gloo, started by torchrun's engine."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from known import saved_step

from components import task
from raresynth import cli, flow
from raresynth.config import GanConfig, Params
from raresynth.errors import DataError, ParamsError, RaresynthError
from raresynth.gan import loop, sampling, training
from raresynth.gan.presets import check_ranks, resolve
from raresynth.gan.ranks import Ranks, joined, launch
from raresynth.gan.residual import game as residual_game
from raresynth.gan.residual.game import ResidualGame
from raresynth.gan.rng import Rng
from raresynth.gan.training import GanReport, pretrain
from raresynth.lineage import code_hash, load_checkpoint, read_report, sha256_file

KNOBS = {
    "resolution": 32,
    "latent_dim": 8,
    "width": 4,
    "batch_size": 16,
    "pretrain_kimg": 0.48,  # 30 steps
    "precision": "fp32",
    "annealing": (0.1, 0.4),
    "augmentation_target": 0.01,
    "snapshots": 3,
}
ALL = ("weights.safetensors", "meta.json", "report.json")


class Colours:
    """Calls KID how far the mean colour of a class's images is from its own."""

    def kid(self, label, images):
        own = {"blue": (60, 60, 200), "green": (60, 200, 60), "red": (200, 60, 60)}[label]
        return float(np.square((images.mean((0, 1, 2)) - own) / 255).sum())


class Job(NamedTuple):
    """A training, the same in all ranks; at step `kill_at` the last of them is killed."""

    data: Path
    out: Path
    kill_at: int | None = None


@contextmanager
def in_double(job: Job, ranks: Ranks) -> Iterator[type[ResidualGame]]:
    """In double precision rounding stays far below what one wrong draw, statistic or gradient would change.

    (In single precision Adam makes full steps of gradients that are nothing but rounding: 1e-7 grows to 1e-2.)
    """

    class Watched(ResidualGame):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            Watched.last = self

        def step(self, real, labels, rng, step, steps):
            if step == job.kill_at and ranks.rank == ranks.world - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().step(real, labels, rng, step, steps)

    latents = sampling.latents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(sampling, "latents", lambda *args: latents(*args).astype(np.float64))
        patch.setattr(loop, "CHECK_EVERY_STEPS", 10)
        patch.setattr(residual_game, "ADAPTATION_KIMG", 0.32)
        patch.setattr(training, "SCORED_IMAGES", 32)
        patch.setattr(training, "ResidualGame", Watched)
        torch.set_default_dtype(torch.float64)
        try:
            yield Watched
        finally:
            torch.set_default_dtype(torch.float32)


def trained(job: Job) -> tuple[GanReport, int]:
    """Report, and the number of ranks that end with the weights of the first, bit for bit."""
    with joined("cpu") as ranks, in_double(job, ranks) as watched:
        every_s = 1e9 if job.kill_at is None else 1e-6
        where = (job.data, job.data / "manifest.csv", job.out)
        report = pretrain(*where, GanConfig(**KNOBS), 0, "cpu", None, every_s, Colours(), ranks, symmetries="all")
        weights = digest(watched.last)
        first = ranks.by_first(lambda: weights)
        return report, int(ranks.total(torch.tensor(float(weights == first))))


def digest(game: ResidualGame) -> str:
    tensors = [t for net in game.networks.values() for t in net.state_dict().values()]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


@pytest.fixture(scope="module")
def one(squares, tmp_path_factory) -> tuple[Path, GanReport]:
    """What one process trains."""
    job = Job(squares, tmp_path_factory.mktemp("one"))
    return job.out, trained(job)[0]


@pytest.fixture(scope="module")
def two(squares, tmp_path_factory) -> tuple[Path, GanReport]:
    """What two ranks train."""
    job = Job(squares, tmp_path_factory.mktemp("two"))
    report, alike = launch(2, trained, job)
    assert alike == 2
    return job.out, report


@pytest.fixture(scope="module")
def killed(squares, tmp_path_factory) -> Path:
    """What two ranks leave of which the second is killed in the middle."""
    job = Job(squares, tmp_path_factory.mktemp("killed"), kill_at=15)
    with pytest.raises(RaresynthError, match=r"^rank 1 was ended by SIGKILL, .*start the same command again$"):
        launch(2, trained, job)
    assert saved_step(job.out) in {14, 15}  # the first may be ended while it saves
    return job.out


def assert_same_training(first: tuple[Path, GanReport], second: tuple[Path, GanReport]) -> None:
    (weights, _), (others, _) = load_checkpoint(first[0]), load_checkpoint(second[0])
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.allclose(others[name], tensor, rtol=1e-9, atol=1e-10), name
    expected, report = (
        entry[1].model_copy(update={"weights_sha256": None, "curves": None}) for entry in (first, second)
    )
    assert report == expected
    for name, curve in first[1].curves.losses.items():
        assert second[1].curves.losses[name] == pytest.approx(curve, abs=2e-6)  # they are rounded to 1e-6


@pytest.mark.slow
def test_two_ranks_train_what_one_process_does(one, two):
    assert one[1].weights_sha256 != two[1].weights_sha256  # or there would have been one rank only
    assert_same_training(one, two)
    assert [(s.step, s.augmentation_strength) for s in two[1].snapshots] == [(20, 1.0), (30, 1.0)]
    penalties = two[1].curves.losses["penalty"]
    assert min(penalties) > 0 and len(set(penalties)) == 4  # taken every 8 steps, and shown until the next


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_next_start_goes_on_to_the_same_bytes(squares, two, killed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(killed, out)
    launch(2, trained, Job(squares, out))
    for name in ALL:
        assert (out / name).read_bytes() == (two[0] / name).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(ALL)


@pytest.mark.slow
def test_one_process_goes_on_from_what_two_ranks_left(squares, one, killed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(killed, out)
    report, _ = trained(Job(squares, out))
    assert_same_training(one, (out, report))


def broken_in_rank_1(_: None) -> None:
    with joined("cpu") as ranks:
        if ranks.rank == 1:
            raise DataError("images/a.png cannot be decoded; replace or remove it")
        ranks.total(torch.ones(1))


@pytest.mark.slow
def test_what_a_user_can_cure_is_one_sentence_from_whichever_rank():
    with pytest.raises(RaresynthError, match=r"^images/a\.png cannot be decoded; replace or remove it$"):
        launch(2, broken_in_rank_1, None)


@pytest.fixture
def interrupted(tiny_run: flow.Run, tmp_path: Path) -> flow.Run:
    """The tiny run, its stage `pretrain` to be done again; one process has done 12 of its 25 steps."""

    class Ending(ResidualGame):
        def step(self, real, labels, rng, step, steps):
            if step == 12:
                raise KeyboardInterrupt
            return super().step(real, labels, rng, step, steps)

    store = tmp_path / "interrupted"
    shutil.copytree(tiny_run.store, store)
    shutil.rmtree(store / flow.read_record(store, "pretrain").output)
    compute = tiny_run.params.compute.model_copy(update={"checkpoint_every_s": 1e-6})
    run = flow.Run(tiny_run.data_dir, store, tiny_run.params.model_copy(update={"compute": compute}))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "ResidualGame", Ending)
        flow.execute("pretrain", run)
    return run


@pytest.mark.slow
def test_two_ranks_by_torchrun_or_by_params_go_on_from_what_one_process_left(tiny_run, interrupted, tmp_path):
    by_torchrun, by_params = interrupted.store, tmp_path / "by-params"
    shutil.copytree(by_torchrun, by_params)
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump(interrupted.params.model_dump(mode="json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "raresynth.cli", "pretrain", "--data", interrupted.data_dir, "--params", params]
    done = subprocess.run([*command, "--out", by_torchrun], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pretrain: done") == 1  # the first rank says so, and no other
    record = flow.read_record(by_torchrun, "pretrain")

    compute = tiny_run.params.compute.model_copy(update={"ranks": 2})
    run = flow.Run(tiny_run.data_dir, by_params, tiny_run.params.model_copy(update={"compute": compute}))
    assert flow.execute("pretrain", run) == record
    for name, sha256 in record.files.items():
        assert sha256_file(by_params / name) == sha256_file(by_torchrun / name) == sha256
    before = flow.read_record(tiny_run.store, "pretrain")
    assert (record.key, record.output, record.files.keys()) == (before.key, before.output, before.files.keys())

    # The first steps are those of one process to the bit, the others are rounded otherwise.
    expected, report = (
        read_report(store / record.output / "report.json", GanReport) for store in (tiny_run.store, by_torchrun)
    )
    for loss, curve in expected.curves.losses.items():
        assert report.curves.losses[loss][:12] == curve[:12]
        assert report.curves.losses[loss] == pytest.approx(curve, abs=0.02)
    assert report.curves != expected.curves


def as_a_task(tiny_run: flow.Run, place: Path, kimg: float, parent: int) -> "subprocess.Popen[str]":
    """`pretrain` in two ranks as kfp's local runner starts it: in a process whose output goes to kfp's own log."""
    store = place / "store"
    shutil.copytree(tiny_run.store, store)
    shutil.rmtree(store / flow.read_record(store, "pretrain").output)
    values = tiny_run.params.model_dump()
    values["compute"]["ranks"], values["gan"]["pretrain_kimg"] = 2, kimg
    params = Params.model_validate(values).model_dump_json()
    given = {name: str(flow.record_path(store, name, flow.ALL)) for name in ("validate", "train-encoder")}
    arguments = [str(tiny_run.data_dir), params, str(store), code_hash(""), str(place / "record"), given]
    command = [sys.executable, "-c", f"from components import task; task.run('pretrain', *{arguments!r})"]
    told = {task.CONSOLE: str(place / "console"), task.PARENT_PID: str(parent)}
    return subprocess.Popen(command, env=os.environ | told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_under_the_local_runner_the_ranks_report_on_the_users_console(tiny_run, tmp_path):
    console = tmp_path / "console"
    console.write_text("said before\n")
    process = as_a_task(tiny_run, tmp_path, 0.4, os.getpid())
    log, _ = process.communicate()
    first, *said = console.read_text().splitlines()
    assert process.returncode == 0 and (tmp_path / "record").is_file(), said
    assert first == "said before"
    assert any(line.startswith("pretrain: 400/400 images, ") for line in said), said
    assert "pretrain" not in log


@pytest.mark.slow
def test_ranks_that_end_with_the_local_runner_say_nothing_on_the_users_console(tiny_run, tmp_path):
    console = tmp_path / "console"
    with subprocess.Popen(["sleep", "600"]) as runner:
        process = as_a_task(tiny_run, tmp_path, 1000.0, runner.pid)
        while not console.exists() or "pretrain: " not in console.read_text():
            assert process.poll() is None, console.read_text()
            time.sleep(0.1)
        runner.kill()
    process.communicate()  # comes back when the last of its processes has ended
    assert [line for line in console.read_text().splitlines() if " images/s, " not in line] == []


@pytest.mark.parametrize(("shape", "images"), [((4, 1, 1, 1), 0), ((4,), 0), ((2, 4), 1)])
def test_the_ranks_draws_are_the_parts_of_what_one_process_draws(shape, images):
    def drawn(ranks: Ranks, *shape: int) -> list[torch.Tensor]:
        rng = Rng(torch.Generator().manual_seed(0), ranks)
        return [rng.uniform(*shape, images=images), rng.normal(shape[images], 3), rng.uniform(*shape, images=images)]

    whole = list(shape)
    whole[images] *= 3
    parts = zip(*(drawn(Ranks(rank, 3), *shape) for rank in range(3)), strict=True)
    for axis, expected, part in zip((images, 0, images), drawn(Ranks(0, 1), *whole), parts, strict=True):
        assert torch.equal(torch.cat(part, axis), expected)


@pytest.mark.parametrize(("batch", "ranks"), [(16, 4), (24, 2), (12, 2), (8, 2), (10, 3)])
def test_a_batch_that_ranks_cannot_share_is_refused(batch, ranks):
    refused = rf"^gan.batch_size is {batch}, which {ranks} ranks cannot share .* multiple of {8 * ranks}$"
    with pytest.raises(ParamsError, match=refused):
        check_ranks(resolve(GanConfig(batch_size=batch)), ranks)
    check_ranks(resolve(GanConfig(batch_size=batch)), 1)
    check_ranks(resolve(GanConfig(batch_size=8 * ranks)), ranks)


@pytest.mark.parametrize("preset", ["stgan-lite", "dcgan-base"])
def test_presets_with_statistics_of_the_whole_batch_are_refused(squares, tmp_path, preset):
    config, out, ranks = GanConfig(preset=preset), tmp_path / "out", Ranks(0, 2)
    with pytest.raises(ParamsError, match=f"^preset {preset} .* set compute.ranks to 1"):
        pretrain(
            squares, squares / "manifest.csv", out, config, 0, "cpu", None, 1.0, Colours(), ranks, symmetries="all"
        )
    assert not out.exists()


def test_only_pretrain_takes_several_ranks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for command in (["finetune", "--out", str(tmp_path)], ["tune", "--out", str(tmp_path), "--minutes", "1"]):
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith("raresynth, rank 1: ") and "only pretrain" in said and said.count("\n") == 1


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1000")
    monkeypatch.setenv("RANK", "999")
    monkeypatch.setenv("LOCAL_RANK", "999")
    with pytest.raises(ParamsError, match=r"more ranks on this machine than its GPUs"), joined("cuda"):
        pass
