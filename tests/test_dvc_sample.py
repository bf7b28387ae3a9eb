"""A fresh clone gets the sample data, in both its versions, from the DVC remote inside the repository."""

import configparser
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raresynth.dataset.sample import PLANTED_DEFECTS
from raresynth.lineage import dvc_dir_md5

ROOT = Path(__file__).parents[1]
REMOTE = ROOT / "sample-remote"

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the git history")


class Clone:
    def __init__(self, path: Path) -> None:
        self.path = path
        # Settings and caches of whoever runs the tests must neither help nor disturb.
        places = ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR", "DVC_SITE_CACHE_DIR")
        own = {name: str(path.parent / name.lower()) for name in places}
        self.environment = os.environ | own | {"DVC_NO_ANALYTICS": "1"}

    def run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.path, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def dvc(self, *arguments: str) -> str:
        return self.run(str(Path(sys.executable).parent / "dvc"), *arguments)

    def versions(self) -> list[str]:
        """Commits that changed data.dvc, oldest first."""
        return self.run("git", "log", "--reverse", "--format=%H", "--", "data.dvc").split()

    def md5(self, commit: str) -> str:
        return yaml.safe_load(self.run("git", "show", f"{commit}:data.dvc"))["outs"][0]["md5"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    path = tmp_path_factory.mktemp("clone") / "repository"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(path)], check=True)
    return Clone(path)


def test_the_remote_is_named_relative_to_the_repository():
    config = configparser.ConfigParser()
    config.read(ROOT / ".dvc" / "config")
    remote = config[f"'remote \"{config['core']['remote']}\"'"]
    assert (ROOT / ".dvc" / remote["url"]).resolve() == REMOTE
    assert not Path(remote["url"]).is_absolute()
    assert config["core"]["analytics"] == "false"


def test_every_file_of_the_remote_is_named_by_its_md5():
    files = [path for path in (REMOTE / "files" / "md5").rglob("*") if path.is_file()]
    for path in files:
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        assert digest == path.parent.name + path.name.removesuffix(".dir")
    assert sum(path.stat().st_size for path in files) < 5_000_000


def test_pull_fetches_the_data_that_data_dvc_names(clone):
    clone.dvc("pull")
    expected = yaml.safe_load((clone.path / "data.dvc").read_text())["outs"][0]
    assert dvc_dir_md5(clone.path / "data") == expected["md5"]
    assert clone.run("git", "status", "--porcelain") == ""
    assert clone.dvc("data", "status").startswith("No changes")


def test_diff_shows_what_cleaning_changed(clone):
    first, second = clone.versions()[:2]
    # Where DVC reads another commit it takes a committed relative URL from the root of the file system;
    # one in the local settings it takes from the clone.
    clone.dvc("remote", "modify", "--local", "sample", "url", "sample-remote")
    changes = json.loads(clone.dvc("diff", "--json", first, second))
    found = {
        kind: {entry["path"] for entry in changes[kind] if not entry["path"].endswith("data/")}
        for kind in ("added", "deleted", "modified")
    }
    expected: dict[str, set[str]] = {"added": set(), "deleted": set(), "modified": {"data/metadata.csv"}}
    for path, reason in PLANTED_DEFECTS:
        number = int(path[-8:-4])
        if reason == "missing":
            expected["added"].add(f"data/{path}")
        elif number > 1400:
            expected["deleted"].add(f"data/{path}")
        elif reason not in {"unknown_label", "conflicting_label"}:  # their defect lies in metadata.csv
            expected["modified"].add(f"data/{path}")
    assert found == expected


def test_get_reads_a_pinned_version(clone, tmp_path):
    first = clone.versions()[0]
    clone.dvc("get", ".", "data", "--rev", first, "-o", str(tmp_path / "first"))
    assert dvc_dir_md5(tmp_path / "first") == clone.md5(first)
