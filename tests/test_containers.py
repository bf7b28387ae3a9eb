"""The pipelines in real containers: killed in the middle, started again, and the same as `raresynth run`.

Run by `make test-containers`, which builds the images first.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from known import GENEROUS

from pipelines.placement import USER
from raresynth import flow
from raresynth.config import ClusterConfig, choose_params

pytestmark = pytest.mark.container

ROOT = Path(__file__).parents[1]
RUN = "sample"
CLASSES = ["dermatofibroma", "vascular"]
OVERRIDES = {
    "compute": {"checkpoint_every_s": 0.01, "shards": 2},
    "encoder": {"steps": 250, "width": 16, "batch_size": 32},
    "gan": {"width": 8, "latent_dim": 16, "snapshots": 2, "batch_size": 16, "pretrain_kimg": 2.0, "finetune_kimg": 0.3},
    "balance": {"policy": "fixed", "count": 32},
    "synthesis": {"min_images": 32, "typical_share": 1.0, "near_copy_distance": 0.0},
    # What is tried here is the flow, and it is to go to its end.
    "gate": GENEROUS,
    "classifier": {
        "model": "test_resnet",
        "steps": 16,
        "batch_size": 16,
        "arms": ["real", "real+synthetic", "synthetic"],
    },
    "release": {"bootstrap_samples": 200},
}
"""Smoke, made smaller still."""


def start(pipeline: str, place: Path, inputs: dict[str, object]) -> subprocess.Popen[bytes]:
    runner = ROOT / "tests" / "docker_runner.py"
    command = [sys.executable, "-P", runner, pipeline, json.dumps(inputs), place / "store", place / "images.git"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (place / "log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def said(place: Path) -> str:
    """The end of what the last pipeline said."""
    return (place / "log").read_text()[-5000:]


def finish(pipeline: str, place: Path, inputs: dict[str, object]) -> None:
    process = start(pipeline, place, inputs)
    assert process.wait(timeout=1800) == 0, said(place)


def raresynth(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "raresynth.cli", *map(str, arguments)]
    # Settings of this machine that no container has, and that change the last digits of results.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the tasks' user can reach, with the volume and a bare clone of this repository in it."""
    folder = tmp_path_factory.mktemp("containers")
    for parent in [folder, *folder.parents][:3]:
        parent.chmod(0o755)
    (folder / "store").mkdir()
    shutil.chown(folder / "store", USER, USER)
    subprocess.run(["git", "clone", "-q", "--bare", ROOT, folder / "images.git"], check=True)
    subprocess.run(["chmod", "-R", "a+rwX", folder / "images.git"], check=True)
    return folder


@pytest.fixture(scope="module")
def inputs(place: Path) -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {
        "repository": str(place / "images.git"),
        "revision": commit.stdout.strip(),
        "preset": "smoke",
        "classes": CLASSES,
        "overrides": json.dumps(OVERRIDES),
        "name": RUN,
    }


@pytest.fixture(scope="module")
def store(place: Path, inputs: dict[str, object]) -> Path:
    """The run's folder, after its training container was killed once and the run was started again."""
    store = place / "store" / "runs" / RUN
    process = start("augmentation", place, inputs)
    deadline = time.monotonic() + 900
    while not list((store / "checkpoints" / "pretrain").glob("*/*/state/[0-9]*")):
        assert process.poll() is None and time.monotonic() < deadline, said(place)
        time.sleep(0.05)
    image = ClusterConfig().image
    running = subprocess.run(
        ["docker", "ps", "-q", "--filter", f"ancestor={image}"], capture_output=True, text=True, check=True
    )
    subprocess.run(["docker", "kill", *running.stdout.split()], check=True, capture_output=True)
    assert process.wait(timeout=300) != 0
    assert json.loads((store / "outcome.json").read_text())["state"] == "FAILED"
    assert not (store / "stages" / "pretrain.json").exists()
    finish("augmentation", place, inputs)
    return store


def test_the_run_ends_with_its_outcome(store: Path) -> None:
    assert json.loads((store / "outcome.json").read_text())["state"] == "SUCCEEDED"
    assert set(json.loads((store / "decisions.json").read_text())["classes"]) == set(CLASSES)


def test_it_is_what_raresynth_run_makes_unkilled(store: Path, place: Path, tmp_path: Path) -> None:
    (images,) = [folder for folder in (place / "store" / "data").iterdir() if folder.is_dir()]
    values = choose_params("smoke", {**OVERRIDES, "balance": {**OVERRIDES["balance"], "classes": CLASSES}})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values.model_dump(mode="json")))
    done = raresynth("run", "--data", images, "--params", tmp_path / "params.yaml", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert (store / "decisions.json").read_text() == (tmp_path / "run" / "decisions.json").read_text()
    for name in [stage for stage in flow.STAGES if stage not in {"package", "report"}]:
        for record in (tmp_path / "run" / "stages").glob(f"{name}.json") or ():
            assert (store / "stages" / record.name).read_text() == record.read_text(), name
        for record in (tmp_path / "run" / "stages" / name).rglob("*.json"):
            assert (store / record.relative_to(tmp_path / "run")).read_text() == record.read_text(), name


def test_the_bundle_is_audited_back_to_the_data_version(store: Path, place: Path) -> None:
    done = raresynth("audit", "--bundle", store / "bundle", "--repo", place / "images.git")
    assert done.returncode == 0, done.stdout + done.stderr
    bundle = json.loads((store / "bundle" / "bundle.json").read_text())
    assert set(bundle["generators"]) == set(CLASSES)
    assert bundle["lineage"]["data_md5"] in done.stdout


def test_new_images_are_made_audited_and_published(store: Path, place: Path) -> None:
    inputs = {"run": RUN, "n": 5, "seed": 3, "name": "batch", "repository": str(place / "images.git")}
    finish("synthesis", place, inputs)
    batches = place / "store" / "batches" / "batch"
    assert json.loads((batches / "outcome.json").read_text())["state"] == "SUCCEEDED"
    for label in CLASSES:
        assert len(list((batches / label).glob("*.png"))) == 5
        done = raresynth("audit", "--bundle", store / "bundle", "--batch", batches / label)
        assert done.returncode == 0, done.stdout + done.stderr
    files = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-tree", "-r", "--name-only", "main"],
        cwd=place / "images.git",
        capture_output=True,
        text=True,
        check=True,
    )
    assert any(line.startswith("synthetic") and line.endswith(".dvc") for line in files.stdout.splitlines())
