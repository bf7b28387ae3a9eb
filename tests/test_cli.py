"""What a user can get wrong ends with one sentence that names it, exit code 2, and no traceback."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raresynth import cli


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "raresynth.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("raresynth: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text("seed: 1\n")
    return path


@pytest.mark.parametrize("command", ["run", "build-manifest"])
def test_missing_data_folder(tmp_path: Path, params: Path, command: str) -> None:
    done = run(command, "--data", tmp_path / "absent", "--params", params, "--out", tmp_path / "out")
    assert "absent does not exist" in sentence(done)


@pytest.mark.parametrize("command", ["run", "build-manifest"])
def test_unknown_knob(tmp_path: Path, params: Path, command: str) -> None:
    params.write_text("gan: {depth: 3}\n")
    (tmp_path / "data").mkdir()
    done = run(command, "--data", tmp_path / "data", "--params", params, "--out", tmp_path / "out")
    assert "gan.depth" in sentence(done)


def test_an_error_inside_the_pipeline_is_one_sentence(tmp_path: Path, params: Path) -> None:
    (tmp_path / "data").mkdir()
    done = run("run", "--data", tmp_path / "data", "--params", params, "--out", tmp_path / "out")
    assert "layout" in sentence(done)


def test_a_single_class_cannot_be_balanced(tmp_path: Path, params: Path) -> None:
    rng = np.random.default_rng(0)
    for label, n in (("many", 30), ("few", 3)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(n):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{number}.png")
    done = run("run", "--data", tmp_path / "data", "--params", params, "--out", tmp_path / "out")
    assert "two are needed (dropped few: 3 usable images" in sentence(done)
    assert "few" in (tmp_path / "out" / "validation" / "quarantine.csv").read_text()


def test_a_stage_out_of_order_names_the_one_before(tmp_path: Path, params: Path) -> None:
    (tmp_path / "data").mkdir()
    done = run("validate", "--data", tmp_path / "data", "--params", params, "--out", tmp_path / "out")
    assert "stage build-manifest has not been run" in sentence(done)


def test_a_stage_without_a_run_asks_for_data(tmp_path: Path) -> None:
    assert "--data" in sentence(run("report", "--out", tmp_path / "out"))


def test_predict_needs_a_bundle(tmp_path: Path) -> None:
    done = run("predict", "--bundle", tmp_path, "--images", tmp_path, "--out", tmp_path / "p.csv")
    assert "bundle" in sentence(done) or "image" in sentence(done)
    assert not (tmp_path / "p.csv").exists()


def test_generate_refuses_a_nonsensical_number(tmp_path: Path) -> None:
    done = run("generate", "--bundle", tmp_path, "--label", "x", "--n", 0, "--out", tmp_path / "new")
    assert "--n" in sentence(done)


def test_every_stage_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in (*cli.flow.STAGES, "run", "predict", "generate", "export-dataset"):
        assert f"    {name}" in text


def test_two_runs_in_one_folder_are_refused(tmp_path: Path, params: Path) -> None:
    from pipelines.run import _only_run_of
    from raresynth.errors import RaresynthError

    with _only_run_of(tmp_path), pytest.raises(RaresynthError, match="another run"), _only_run_of(tmp_path):
        pass
