"""`dvc repro` in a fresh clone: the sample data arrives, the flow runs, and a second call finds all up to date."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SMALL = {
    "compute": {"parallel_tasks": 1},
    "encoder": {"steps": 40, "width": 8, "batch_size": 32},
    "gan": {"width": 8, "latent_dim": 16, "pretrain_kimg": 1.0, "finetune_kimg": 0.3, "ema_half_life_kimg": 0.1},
    "balance": {"policy": "fixed", "count": 60, "classes": ["dermatofibroma", "vascular"]},
    "classifier": {"steps": 20, "batch_size": 16, "arms": ["real", "real+synthetic"]},
    "release": {"bootstrap_samples": 200},
}


@pytest.mark.slow
def test_repro_in_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    params = yaml.safe_load((clone / "params.yaml").read_text())
    for section, knobs in SMALL.items():
        params[section].update(knobs)
    (clone / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(clone)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"

    def dvc(*arguments: str) -> str:
        done = subprocess.run(
            ["dvc", *arguments], cwd=clone, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    dvc("pull")
    dvc("repro")
    decisions = json.loads((clone / "runs" / "demo" / "decisions.json").read_text())
    assert decisions["release"]["arm"] in {"real", "real+synthetic"}
    assert "up to date" in dvc("repro")
    status = subprocess.run(["git", "status", "--short"], cwd=clone, capture_output=True, text=True, check=True)
    assert {line.split()[-1] for line in status.stdout.splitlines()} <= {"params.yaml", "dvc.lock"}
