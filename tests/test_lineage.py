import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raresynth import lineage
from raresynth.errors import CheckpointError, TrainingCollapse
from raresynth.training_state import (
    finish,
    flatten_optimizer,
    load_state,
    restore_optimizer,
    save_state,
    save_weights,
)


class Sample(lineage.Report):
    figure: float


def test_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    digest = lineage.save_checkpoint(tmp_path / "c", tensors, {"kind": "test"})
    loaded, meta = lineage.load_checkpoint(tmp_path / "c")
    assert meta == {"kind": "test", "weights_sha256": digest}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_changed_weight_is_found(tmp_path: Path) -> None:
    lineage.save_checkpoint(tmp_path / "c", {"a": torch.zeros(64)}, {})
    weights = tmp_path / "c" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="changed"):
        lineage.load_checkpoint(tmp_path / "c")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        lineage.load_checkpoint(tmp_path / "absent")


def test_a_folder_that_fails_halfway_leaves_the_old_one(tmp_path: Path) -> None:
    place = tmp_path / "result"
    with lineage.new_dir(place) as folder:
        (folder / "file").write_text("old")
    with pytest.raises(RuntimeError), lineage.new_dir(place) as folder:
        (folder / "file").write_text("new")
        raise RuntimeError
    assert (place / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_text_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        lineage.write_text(tmp_path / "file", "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_report_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    lineage.write_report(path, Sample(figure=0.5))
    assert lineage.read_report(path, Sample) == Sample(figure=0.5)
    path.write_text('{"other": 1}')
    with pytest.raises(CheckpointError, match="Sample"):
        lineage.read_report(path, Sample)


def test_tree_hash_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = lineage.sha256_tree(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    renamed = lineage.sha256_tree(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, renamed, lineage.sha256_tree(tmp_path)}) == 3


def test_json_hash_is_that_of_canonical_json() -> None:
    expected = hashlib.sha256(json.dumps({"a": 1, "b": [2]}, sort_keys=True, separators=(",", ":")).encode())
    assert lineage.sha256_json({"b": [2], "a": 1}) == expected.hexdigest()


def test_git_state_tells_a_dirty_tree(tmp_path: Path) -> None:
    assert lineage.git_state(tmp_path) == (None, None)
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    (tmp_path / "file").write_text("1")
    (tmp_path / "dvc.lock").write_text("1")
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    commit, dirty = lineage.git_state(tmp_path)
    assert commit is not None and len(commit) == 40 and dirty is False
    (tmp_path / "dvc.lock").write_text("2")
    assert lineage.git_state(tmp_path) == (commit, False)
    (tmp_path / "file").write_text("2")
    assert lineage.git_state(tmp_path) == (commit, True)


def test_outside_git_the_image_names_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for revision, state in (("", (None, None)), ("4f0c", ("4f0c", False)), ("4f0c-dirty", ("4f0c", True))):
        monkeypatch.setenv("RARESYNTH_REVISION", revision)
        assert lineage.git_state(tmp_path) == state
    subprocess.run(["git", "-C", tmp_path, "init", "-q"], check=True)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "file").touch()
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", "-C", tmp_path, *identity, "commit", "-qm", "first", "--allow-empty"], check=True)
    # A package in an environment that lies inside of another repository.
    assert lineage.git_state(tmp_path / "package") == ("4f0c", True)
    subprocess.run(["git", "-C", tmp_path, "add", "package"], check=True)
    subprocess.run(["git", "-C", tmp_path, *identity, "commit", "-qm", "second"], check=True)
    commit, dirty = lineage.git_state(tmp_path / "package")
    assert commit is not None and len(commit) == 40 and dirty is False  # a checkout knows better


def test_a_report_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match=r"bundle\.json is no Report of this version"):
        lineage.read_report(tmp_path / "bundle.json", lineage.Report)


def test_optimizer_state_comes_back_exactly() -> None:
    def trained(steps: int, resume_at: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(4))
        optimizer = torch.optim.Adam([weight], lr=0.1)
        for step in range(steps):
            if step == resume_at:
                state = flatten_optimizer("adam", optimizer)
                optimizer = torch.optim.Adam([weight], lr=0.1)
                restore_optimizer("adam", optimizer, state)
            optimizer.zero_grad()
            (weight**2).sum().backward()
            optimizer.step()
        return weight.detach()

    assert torch.equal(trained(6, None), trained(6, 3))


def killed_while_replacing(out_dir: Path) -> int:
    """A child that dies in the middle of saving its second state: once at every call that changes the disk."""
    import os
    import shutil

    for nth in range(1, 100):
        shutil.rmtree(out_dir, ignore_errors=True)
        save_state(out_dir, 1, {"a": torch.ones(3)}, {"run": "r"})
        if os.fork() == 0:
            count = 0

            def die(event: str, _arguments: object, nth: int = nth) -> None:
                nonlocal count
                if event in {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}:
                    count += 1
                    if count == nth:
                        os._exit(9)

            sys.addaudithook(die)
            save_state(out_dir, 2, {"a": torch.full((3,), 2.0)}, {"run": "r"})
            os._exit(0)
        if os.waitstatus_to_exitcode(os.wait()[1]) == 0:
            return nth - 1
        state = load_state(out_dir, "r", "cpu")
        assert state is not None, f"call {nth}"
        tensors, meta = state
        assert torch.equal(tensors["a"], torch.full((3,), float(meta["step"])))
    raise AssertionError("the child never got to its end")


def test_a_kill_at_any_moment_of_saving_leaves_a_state(tmp_path: Path) -> None:
    assert killed_while_replacing(tmp_path / "out") > 5
    save_state(tmp_path / "out", 3, {"a": torch.ones(3)}, {"run": "r"})
    assert [folder.name for folder in (tmp_path / "out" / "state").iterdir()] == ["000000003"]
    assert load_state(tmp_path / "out", "another", "cpu") is None
    save_weights(tmp_path / "out", {"a": torch.ones(3)}, {})
    (tmp_path / "out" / f"{lineage.UNFINISHED}finished.half").mkdir()
    finish(tmp_path / "out", Sample(figure=1.0))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["meta.json", "report.json", "weights.safetensors"]


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(TrainingCollapse(3, "cross-entropy", "lower the rate")))
    assert str(error) == "training collapsed: cross-entropy is not a finite number at step 3; lower the rate"
    assert (error.step, error.loss) == (3, "cross-entropy")


def test_linked_folders_count_for_the_data_hash(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "round").symlink_to(tmp_path / "data")
    before = lineage.dvc_dir_md5(tmp_path / "data")
    (tmp_path / "real" / "a.txt").write_text("b")
    assert lineage.dvc_dir_md5(tmp_path / "data") != before
