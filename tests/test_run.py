"""The whole flow as a user starts it: `raresynth run`, killed and started again, and on the smoke preset."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from workers import workers_of

from raresynth import flow, lineage
from raresynth.config import load_params
from raresynth.gan.rng import Rng

ROOT = Path(__file__).parents[1]
MAY_DIFFER = {"run.json", ".run.lock", ".lock"}


def start(data: Path, params: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "raresynth.cli", "run", "--data", data, "--params", params, "--out", out]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def contents(store: Path) -> dict[str, str]:
    return {
        path.relative_to(store).as_posix(): lineage.sha256_file(path)
        for path in store.rglob("*")
        if path.is_file() and path.name not in MAY_DIFFER
    }


def assert_equal_files(store: Path, other: Path) -> None:
    ours, theirs = contents(store), contents(other)
    assert sorted(ours.keys() ^ theirs.keys()) == [], "files that one of them has"
    assert [name for name, digest in ours.items() if theirs[name] != digest] == []


def kill_while_training(process: subprocess.Popen[str], checkpoints: Path, stages: set[str]) -> str:
    """Wait until one of these training stages has saved its state, then kill the run as the kernel would.

    Returns:
        the stage; which of two independent ones comes first is the runner's choice.
    """
    deadline = time.monotonic() + 300
    while True:
        for stage in stages:
            if list((checkpoints / stage).glob("*/*/state/[0-9]*")):
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                return stage
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no training state of {stages} appeared below {checkpoints}"
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_in_every_training_stage_it_ends_in_the_same_bytes(tiny_run: flow.Run, tmp_path: Path) -> None:
    """As its stages leave them one by one, without a pipeline and never killed."""
    params = tmp_path / "params.yaml"
    values = tiny_run.params.model_dump(mode="json")
    values["compute"] |= {"checkpoint_every_s": 0.01, "parallel_tasks": 2}
    # Long enough that the run is still in the stage when its first state has been seen.
    values["encoder"]["steps"] = 120
    values["gan"] |= {"pretrain_kimg": 2.0, "finetune_kimg": 1.0}
    values["classifier"]["steps"] = 120
    params.write_text(yaml.safe_dump(values))
    out = tmp_path / "killed"
    left = {stage for stage, spec in flow.STAGES.items() if spec.resumes}
    assert left == {"train-encoder", "pretrain", "finetune", "train-classifier"}
    while left:
        left.remove(kill_while_training(start(tiny_run.data_dir, params, out), out / "checkpoints", left))
    finish(start(tiny_run.data_dir, params, out))
    whole = flow.Run(tiny_run.data_dir, tmp_path / "whole", load_params(params))
    for stage in flow.STAGES:
        flow.execute_all(stage, whole)
    assert_equal_files(out, whole.store)

    # Started once more, it finds all stages finished and repeats none.
    before = json.loads((out / "run.json").read_text())["stages"]
    finish(start(tiny_run.data_dir, params, out))
    assert json.loads((out / "run.json").read_text())["stages"] == before


@pytest.mark.slow
def test_balanced_images_need_no_generator(tiny_run: flow.Run, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    values = tiny_run.params.model_dump(mode="json")
    values["balance"] = {"policy": "min_share", "share": 0.0001}
    params.write_text(yaml.safe_dump(values))
    output = finish(start(tiny_run.data_dir, params, tmp_path / "out"))
    decisions = json.loads((tmp_path / "out" / "decisions.json").read_text())
    assert decisions["classes"] == {}
    assert decisions["release"]["arm"] == "real"
    assert not (tmp_path / "out" / "checkpoints" / "finetune").exists()
    assert "real" in output


@pytest.mark.slow
def test_smoke_preset_runs_the_whole_flow(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = finish(start(tiny_data, ROOT / "params" / "smoke.yaml", out))
    decisions = json.loads((out / "decisions.json").read_text())
    run = flow.Run(tiny_data, out, load_params(ROOT / "params" / "smoke.yaml"))
    assert set(decisions["classes"]) == set(flow.items(run, "label"))
    for label, entry in decisions["classes"].items():
        assert entry["decision"] in {"accepted", "rejected", "insufficient"}
        assert entry["reasons"] and label in output
    assert decisions["release"]["arm"] in run.params.classifier.arms
    for name in (
        "report.html",
        "bundle/bundle.json",
        "run.json",
        "validation/report.json",
        "validation/quarantine.csv",
    ):
        assert (out / name).is_file()
    assert list((out / "validation").rglob("*.html"))
    assert set(json.loads((out / "run.json").read_text())) >= {"run_id", "machine", "stages"}


def test_a_finished_stage_is_repeated_only_where_it_must_be(tiny_run: flow.Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(tiny_run.store, store)
    run = flow.Run(tiny_run.data_dir, store, tiny_run.params)

    def repeated(stage: str, of: flow.Run) -> bool:
        before = json.loads((store / "run.json").read_text())["stages"]
        flow.execute_all(stage, of)
        return bool(json.loads((store / "run.json").read_text())["stages"] != before)

    assert not repeated("validate", run)
    (store / "validation" / "quarantine.csv").unlink()
    assert repeated("validate", run)
    assert not repeated("train-encoder", run)  # validation came out as before
    assert not repeated("pretrain", run)
    measured = tiny_run.params.quality.model_copy(update={"real_splits": 50})
    assert not repeated("pretrain", flow.Run(run.data_dir, store, run.params.model_copy(update={"quality": measured})))
    longer = tiny_run.params.encoder.model_copy(update={"steps": tiny_run.params.encoder.steps + 1})
    other = flow.Run(run.data_dir, store, run.params.model_copy(update={"encoder": longer}))
    assert repeated("train-encoder", other)
    assert repeated("pretrain", other)  # its snapshots are judged by the encoder


@pytest.mark.slow
def test_of_a_universal_gan_that_collapsed_every_class_fails_and_the_flow_goes_on(
    tiny_run: flow.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raresynth.gan.residual.game import ResidualGame

    store = tmp_path / "store"
    shutil.copytree(tiny_run.store, store)
    shorter = tiny_run.params.gan.model_copy(update={"pretrain_kimg": 0.3})
    run = flow.Run(tiny_run.data_dir, store, tiny_run.params.model_copy(update={"gan": shorter}))

    def collapsed(self: ResidualGame, real: Tensor, labels: Tensor, rng: Rng, step: int, steps: int) -> Tensor:
        return torch.full((3,), torch.nan)

    with monkeypatch.context() as patch:
        patch.setattr(ResidualGame, "step", collapsed)
        for stage in flow.STAGES:
            flow.execute_all(stage, run)
    why = flow.read_record(store, "pretrain").reason
    assert why == "universal generator: training collapsed: d_loss is not a finite number at step 1"
    decisions = json.loads((store / "decisions.json").read_text())
    assert set(decisions["classes"]) == set(flow.items(run, "label"))
    for decision in decisions["classes"].values():
        assert decision["decision"] == "rejected" and why in decision["reasons"][0]
    assert decisions["release"]["arm"] == "real"
    assert flow.read_record(store, "synthesize-majority").reason == why
    assert why in (store / "report.html").read_text()


@pytest.mark.slow
def test_a_killed_process_of_a_stage_is_one_sentence_and_the_stage_goes_on(tiny_run: flow.Run, tmp_path: Path) -> None:
    store, params = tmp_path / "store", tmp_path / "params.yaml"
    shutil.copytree(tiny_run.store, store)
    values = tiny_run.params.model_dump(mode="json")
    values["compute"] |= {"parallel_tasks": 2}
    params.write_text(yaml.safe_dump(values))
    for label in flow.items(tiny_run, "label"):
        flow.record_path(store, "finetune", label).unlink()
    shutil.rmtree(store / "checkpoints" / "finetune")
    command = [sys.executable, "-P", "-m", "raresynth.cli", "finetune"]
    command += ["--data", str(tiny_run.data_dir), "--params", str(params), "--out", str(store)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (workers := workers_of(process.pid)):
        assert process.poll() is None
        time.sleep(0.01)
    workers[0].kill()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in output
    assert "a process of finetune was killed" in output
    subprocess.run(command, check=True, capture_output=True)
    assert_equal_files(store, tiny_run.store)


@pytest.mark.slow
def test_classes_that_are_all_synthesised_leave_nothing_to_the_majority(tiny_run: flow.Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(tiny_run.store, store)
    every = tiny_run.params.balance.model_copy(update={"policy": "min_share", "share": 0.9, "max_per_class": 20})
    run = flow.Run(tiny_run.data_dir, store, tiny_run.params.model_copy(update={"balance": every}))
    assert len(flow.items(run, "label")) == 3
    for stage in flow.STAGES:
        flow.execute_all(stage, run)
    assert flow.read_record(store, "synthesize-majority").status == "done"
    assert len(json.loads((store / "decisions.json").read_text())["classes"]) == 3


def test_a_class_that_fails_leaves_a_record_and_is_tried_again(tiny_run: flow.Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(tiny_run.store, store)
    run = flow.Run(tiny_run.data_dir, store, tiny_run.params)
    label = flow.items(run, "label")[0]
    place = store / flow.read_record(store, "synthesize", label).output
    shutil.rmtree(place)
    place.symlink_to(store / "absent" / "folder")  # it can neither be read nor written
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump(run.params.model_dump(mode="json")))
    command = [sys.executable, "-P", "-m", "raresynth.cli", "synthesize", "--label", label]
    command += ["--data", str(run.data_dir), "--params", str(params), "--out", str(store)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"synthesize {label}: it is tried again by" in done.stdout
    failed = flow.execute("synthesize", run, label)
    assert failed.status == "failed" and failed.retry and failed.files == {}
    assert failed.reason.startswith("synthesize: cannot read or write")
    assert flow.execute("measure", run, label).reason == failed.reason
    flow.execute("gate", run)
    decisions = json.loads((store / "gate" / "decisions.json").read_text())["classes"]
    assert decisions[label]["decision"] == "insufficient" and failed.reason in decisions[label]["reasons"][0]

    place.unlink()
    assert flow.execute("synthesize", run, label) == flow.read_record(tiny_run.store, "synthesize", label)
    assert flow.execute("measure", run, label) == flow.read_record(tiny_run.store, "measure", label)
