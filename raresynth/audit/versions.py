"""The versions of an image set that DVC keeps in a git repository."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from raresynth.errors import DataError


@dataclass(frozen=True)
class Version:
    """One state of a folder that DVC owns."""

    commit: str
    """The first one with it."""
    date: str
    path: str
    """Of the folder, in the repository."""
    md5: str
    """Its `.dir` hash."""


class Repository:
    """A clone of a git repository whose images DVC keeps."""

    def __init__(self, url: str, scratch: Path) -> None:
        """Clone it into `scratch`.

        Raises:
            DataError: there is no such repository.
        """
        self.url, self.folder = url, scratch / "repository"
        done = subprocess.run(
            ["git", "clone", "--quiet", url, str(self.folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise DataError(f"cannot clone {url} ({_last_line(done.stderr)}); name a git repository with --repo")

    def versions(self) -> list[Version]:
        """Every version of every folder that a .dvc file names, oldest first."""
        found: dict[tuple[str, str], Version] = {}
        log = self._run("git", "log", "--all", "--reverse", "--format=%H %cI", "--", "*.dvc")
        for commit, date in (line.split() for line in log.splitlines()):
            names = self._run("git", "ls-tree", "-r", "-z", "--name-only", commit).split("\0")
            for name in (name for name in names if name.endswith(".dvc")):
                for out in yaml.safe_load(self._run("git", "show", f"{commit}:{name}")).get("outs", []):
                    path = (Path(name).parent / out["path"]).as_posix()
                    if out.get("md5", "").endswith(".dir"):
                        found.setdefault((path, out["md5"]), Version(commit, date, path, out["md5"]))
        return list(found.values())

    def fetch(self, version: Version) -> Path:
        """The folder as it was, from the DVC remote.

        Raises:
            DataError: the remote does not have it.
        """
        self._run("git", "checkout", "--quiet", "--force", version.commit)
        self._run(*_DVC, "pull", "--quiet", "--force", f"{version.path}.dvc")
        return self.folder / version.path

    def files(self, version: Version) -> dict[str, str]:
        """md5 -> path of every file of a version, from the DVC remote's listing alone.

        Raises:
            DataError: the remote does not have it.
        """
        self._run("git", "checkout", "--quiet", "--force", version.commit)
        listing = json.loads(self._run(*_DVC, "list", "--recursive", "--show-hash", "--json", ".", version.path))
        return {entry["md5"]: entry["path"] for entry in listing if entry.get("md5")}

    def holds(self, commit: str) -> bool:
        """Whether the repository has this commit."""
        command = ["git", "cat-file", "-e", f"{commit}^{{commit}}"]
        return subprocess.run(command, cwd=self.folder, capture_output=True, check=False).returncode == 0

    def _run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DataError(f"{' '.join(command[-4:])} failed in a clone of {self.url}: {_last_line(done.stderr)}")
        return done.stdout


_DVC = (sys.executable, "-m", "dvc")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
