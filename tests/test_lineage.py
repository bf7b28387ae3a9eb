import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import torch

from raresynth import lineage
from raresynth.errors import CheckpointError
from raresynth.training_state import flatten_optimizer, restore_optimizer


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
