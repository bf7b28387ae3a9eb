"""What a user can get wrong ends with one sentence that names it, exit code 2, and no traceback."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from raresynth import cli, flow
from raresynth.config import EncoderConfig

ROOT = Path(__file__).parents[1]
LONG = EncoderConfig(steps=100_000)


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
    assert "holds no image file" in sentence(done)


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


@pytest.mark.parametrize("minutes", ["-5", "0", "nan", "inf"])
def test_tune_needs_a_time_budget(tmp_path: Path, minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--out", str(tmp_path), "--minutes", minutes]) == 2
    said = capsys.readouterr().err
    assert said == f"raresynth: --minutes {minutes} is no time budget; give a number above 0\n"


def test_validate_says_what_was_dropped(tiny_run: flow.Run, tmp_path: Path, params: Path) -> None:
    params.write_text(tiny_run.params.model_dump_json())
    where = ("--data", tiny_run.data_dir, "--params", params, "--out", tmp_path / "out")
    assert run("build-manifest", *where).returncode == 0
    said = run("validate", *where).stdout
    assert re.search(r"^- images: 136 of 143 rows used, 7 in quarantine; classes dropped: \w+ \(4 usable", said, re.M)


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
    from raresynth.errors import RaresynthError
    from raresynth.processes import only_run_of

    with only_run_of(tmp_path), pytest.raises(RaresynthError, match="another run"), only_run_of(tmp_path):
        pass


def test_a_run_that_is_refused_leaves_the_others_note_as_it_is(
    tiny_run: flow.Run, tmp_path: Path, params: Path
) -> None:
    out = tmp_path / "out"
    flow.note_start(flow.Run(tiny_run.data_dir, out, tiny_run.params), params)
    noted = (out / "run.json").read_bytes()
    (tmp_path / "other").mkdir()
    for command in ("run", "build-manifest"):
        with flow.alone_in(out):
            done = run(command, "--data", tmp_path / "other", "--params", params, "--out", out)
        assert "another run is at work" in sentence(done)
        assert (out / "run.json").read_bytes() == noted


def test_out_may_be_a_link_to_another_disk(tiny_run: flow.Run, tmp_path: Path, params: Path) -> None:
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "disk" / "deep")
    assert run("build-manifest", "--data", tiny_run.data_dir, "--params", params, "--out", out).returncode == 0
    noted = (out / "run.json").read_bytes()
    for _ in range(2):
        done = run("build-manifest", "--out", out)
        assert done.returncode == 0, done.stderr
        assert [json.loads(text)["params"] for text in (noted, (out / "run.json").read_bytes())] == [
            "../../params.yaml"
        ] * 2


def test_results_that_do_not_belong_together_are_refused(tiny_run: flow.Run, tmp_path: Path) -> None:
    """A finished run started again with another seed, which is interrupted: images have changed their splits."""
    store, params = tmp_path / "store", tmp_path / "params.yaml"
    shutil.copytree(tiny_run.store, store)
    again = flow.Run(tiny_run.data_dir, store, tiny_run.params.model_copy(update={"seed": 1}))
    params.write_text(yaml.safe_dump(again.params.model_dump(mode="json")))
    flow.note_start(again, params)
    for stage in ("build-manifest", "validate"):
        flow.execute(stage, again)
    for command in (("export-dataset", "--to", tmp_path / "export"), ("report",), ("package",)):
        said = sentence(run(command[0], "--out", store, *command[1:]))
        assert "was made from another result of validate/all than the one there is now; start the whole run" in said
    assert not (tmp_path / "export").exists()


def test_params_of_the_next_run_do_not_stand_in_the_exports_way(tiny_run: flow.Run, tmp_path: Path) -> None:
    store, params = tmp_path / "store", tmp_path / "params.yaml"
    shutil.copytree(tiny_run.store, store)
    compute = tiny_run.params.compute.model_copy(update={"shards": 4})
    params.write_text(yaml.safe_dump(tiny_run.params.model_copy(update={"compute": compute}).model_dump(mode="json")))
    flow.note_start(flow.Run(tiny_run.data_dir, store, tiny_run.params), params)
    done = run("export-dataset", "--out", store, "--to", tmp_path / "export")
    assert done.returncode == 0, done.stderr


def test_what_a_killed_run_left_half_written_goes_and_nothing_else(tmp_path: Path) -> None:
    from raresynth.lineage import UNFINISHED, new_dir, write_text

    write_text(tmp_path / "stages" / "gate.json", "{}")
    (tmp_path / ".run.lock").touch()
    kept = set(tmp_path.rglob("*"))
    writing = "import os, sys, pathlib; from raresynth.lineage import new_dir\n"
    writing += "with new_dir(pathlib.Path(sys.argv[1])) as new: (new / 'a').touch(); os._exit(1)"
    subprocess.run([sys.executable, "-c", writing, tmp_path / "quality" / "df"], check=False)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / f"{UNFINISHED}x.npy").touch()
    assert len(list(tmp_path.rglob(f"{UNFINISHED}*"))) == 2
    with new_dir(tmp_path / "mine"):  # as `generate --out` into a run's folder
        before = set(tmp_path.glob(f"{UNFINISHED}mine*"))
        with cli.flow.alone_in(tmp_path):
            expected = kept | before | {tmp_path / name for name in (".lock", "packed", "quality")}
            assert set(tmp_path.rglob("*")) == expected


def test_an_impossible_balance_is_one_sentence(sample_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("balance: {classes: [nope]}\n")
    done = run("run", "--data", sample_data, "--params", path, "--out", tmp_path / "out")
    assert "no train images of nope" in sentence(done)


def test_out_must_not_touch_what_is_not_its_own(tmp_path: Path, params: Path) -> None:
    data = tmp_path / "data"
    (data / "validation" / "cat").mkdir(parents=True)
    (data / "validation" / "cat" / "0.png").write_bytes(b"mine")
    for out in (data, data / "out", tmp_path):
        done = run("build-manifest", "--data", data, "--params", params, "--out", out)
        assert "one in the other" in sentence(done)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    done = run("validate", "--data", data, "--params", params, "--out", tmp_path / "full")
    assert "is not empty and holds no run" in sentence(done)
    assert (data / "validation" / "cat" / "0.png").read_bytes() == b"mine"


@pytest.mark.parametrize("out", ["params.yaml", "params.yaml/below"])
@pytest.mark.parametrize("command", ["run", "build-manifest"])
def test_out_that_cannot_be_a_folder(tmp_path: Path, params: Path, command: str, out: str) -> None:
    (tmp_path / "data").mkdir()
    done = run(command, "--data", tmp_path / "data", "--params", params, "--out", tmp_path / out)
    assert "params.yaml" in sentence(done)


def test_a_model_or_weights_file_that_is_not_there_is_found_before_any_training(
    tiny_run: flow.Run, tmp_path: Path, params: Path
) -> None:
    for knob in ("classifier: {weights: absent.safetensors}", "quality: {inception: absent.pth}"):
        out = tmp_path / knob[:7]
        params.write_text(knob + "\n")
        assert run("build-manifest", "--data", tiny_run.data_dir, "--params", params, "--out", out).returncode == 0
        assert "absent" in sentence(run("validate", "--out", out))
    misnamed = tiny_run.params.classifier.model_copy(update={"model": "resnet1"})
    params.write_text(tiny_run.params.model_copy(update={"classifier": misnamed}).model_dump_json())
    assert run("validate", "--out", out, "--params", params).returncode == 0
    assert "resnet1" in sentence(run("train-encoder", "--out", out))


def test_a_damaged_run_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("")
    assert "run.json is damaged" in sentence(run("report", "--out", tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_with_one_sentence(tiny_run: flow.Run, tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "scratch").mkdir()
    params = tmp_path / "params.json"
    params.write_text(tiny_run.params.model_copy(update={"encoder": LONG}).model_dump_json())
    command = [sys.executable, "-P", "-m", "raresynth.cli", "run", "--data", tiny_run.data_dir]
    process = subprocess.Popen(
        [*map(str, command), "--params", str(params), "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(tmp_path / "scratch")},
    )
    while not list((tmp_path / "out").glob("checkpoints/train-encoder/*/*/state/*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    assert list((tmp_path / "scratch").glob("raresynth-*"))
    # Ctrl-C reaches all processes of a terminal, kill the one that it names.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert not list((tmp_path / "scratch").glob("raresynth-*"))
    assert "Traceback" not in output
    assert output.count("raresynth: interrupted") == 1


def test_a_log_file_holds_what_tasks_and_runner_wrote(tiny_data: Path, tmp_path: Path, params: Path) -> None:
    params.write_text("validation: {min_images: 10000}\n")
    command = ["run", "--data", tiny_data, "--params", params, "--out", tmp_path / "out"]
    with (tmp_path / "log").open("w") as log:
        subprocess.run(
            [sys.executable, "-P", "-m", "raresynth.cli", *map(str, command)], stdout=log, stderr=log, check=False
        )
    text = (tmp_path / "log").read_text()
    assert text.startswith("read files: ")
    assert text.splitlines()[-1].startswith("raresynth: 0 usable classes remain")


def commands_of(document: str) -> list[list[str]]:
    """The raresynth command lines of a document, without what the shell makes of their rest."""
    text = (ROOT / document).read_text().replace("\\\n", "")
    lines = re.findall(r"^(?:\$ )?raresynth (\S+ .*)$", text, re.MULTILINE)
    return [shlex.split(line.partition(" > ")[0], comments=True) for line in lines]


@pytest.mark.parametrize("document", ["README.md", "docs/audit.md", "docs/cluster.md"])
def test_the_documents_commands_are_known(document: str) -> None:
    commands = commands_of(document)
    assert len(commands) > 2
    for command in commands:
        assert callable(cli._parser().parse_args(command).command), command
