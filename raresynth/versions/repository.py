"""A git repository whose images DVC keeps, as a clone that is thrown away afterwards.

Credentials are given as git and DVC always take them: for git a credential helper, GIT_ASKPASS, an SSH key or the URL;
for DVC's remote AWS_* or GOOGLE_APPLICATION_CREDENTIALS. An S3 endpoint is named by AWS_ENDPOINT_URL or .dvc/config.
No credential is printed or kept, and nothing is written into HOME. The tests have remotes in folders and on an S3
server; none is on Google Cloud Storage, of which they only see that DVC knows it.

A whole `dvc pull` in a clone is the fastest way to the images: 10,000 small files of a local remote took 8 s, with
`dvc get` 31 s; 1,401 of an S3 server 19 s and 42 s. `dvc get` also fails where a remote's URL is relative.
"""

import configparser
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import yaml

from raresynth.errors import DataError
from raresynth.lineage import dvc_list_md5

_CLONE = ".clone-"
_DVC = (sys.executable, "-P", "-m", "dvc")  # -P, lest a folder of the repository is taken for a package


@dataclass(frozen=True)
class Version:
    """One state of a folder that DVC owns."""

    commit: str
    """One with it."""
    date: str
    """Of the commit."""
    path: str
    """Of the folder, in the repository."""
    md5: str
    """Its `.dir` hash."""


@contextmanager
def cloned(url: str, beside: Path | None = None) -> Iterator["Repository"]:
    """A clone that is gone after the block.

    Args:
        url: git repository, a URL or a folder.
        beside: folder on whose file system the clone and its images are to lie, and which the clones of killed
            processes are removed from; None for that of temporary files.

    Raises:
        DataError: there is no such repository, or no way to it.
    """
    with (
        nullcontext() if beside is None else _swept(beside),
        # Databases of DVC, which a network volume may not take.
        tempfile.TemporaryDirectory(prefix="raresynth-") as databases,
        tempfile.TemporaryDirectory(prefix=_CLONE, dir=beside) as scratch,
    ):
        yield Repository(url, Path(scratch), Path(databases))


@contextmanager
def _swept(folder: Path) -> Iterator[None]:
    """Within the block the clones in a folder are in use. Where they were not before it, they are removed."""
    with (folder / ".lock").open("a+") as lock:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in folder.glob(f"{_CLONE}*"):
                shutil.rmtree(left, ignore_errors=True)
        # For a moment another process may have the lock alone: there is no clone of this one yet.
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


class Repository:
    """A clone of a git repository; its methods raise DataError where git or DVC fails."""

    def __init__(self, url: str, scratch: Path, databases: Path) -> None:
        """Clone it into `scratch`."""
        self.url = without_credentials(url)
        self.folder = scratch / "repository"
        self.folder.mkdir()
        self._environment = _environment(url, self.url, databases)
        # Links, so that no image is there twice; a cache of its own, so that none comes from a cache that was damaged.
        self._settings = (
            f"[core]\n    check_update = false\n[cache]\n    dir = {scratch / 'cache'}\n    type = hardlink,copy\n"
        )
        source = str(Path(url).resolve()) if Path(url).exists() else self.url
        # All .dvc files at once; of big files only those of the commit that is checked out.
        command = ("clone", "--quiet", "--no-checkout", "--filter=blob:limit=100k", "--", source, ".")
        self.git(*command, what=f"cannot clone {self.url}", cure="name a git repository, and check its credentials")

    def commit_of(self, revision: str) -> str:
        """The commit that a branch, a tag or an abbreviated commit stands for."""
        for name in (revision, f"origin/{revision}"):
            done = self.call("git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
            if done.returncode == 0:
                return done.stdout.strip()
        raise DataError(f"{self.url} has no branch, tag or commit {revision!r}; name one that it has")

    def head(self, branch: str) -> str:
        """The commit that a branch has now, in the repository itself."""
        there, here = f"refs/heads/{branch}", f"refs/remotes/origin/{branch}"
        what = f"cannot read the branch {branch} of {self.url}"
        self.git("fetch", "--quiet", "origin", f"+{there}:{here}", what=what, cure="name a branch that it has")
        return self.commit_of(here)

    def folders(self, commit: str) -> dict[str, str]:
        """Path -> `.dir` hash of every folder that a .dvc file names at a commit."""
        found = {}
        names = self.git("ls-tree", "-r", "-z", "--name-only", commit).split("\0")
        for name in (name for name in names if name.endswith(".dvc")):
            try:
                outs = yaml.safe_load(self.git("show", f"{commit}:{name}"))["outs"]
                found.update({(Path(name).parent / out["path"]).as_posix(): out.get("md5", "") for out in outs})
            except (yaml.YAMLError, LookupError, TypeError) as error:
                raise DataError(f"{name} at commit {commit[:12]} of {self.url} is no DVC file; repair it") from error
        return {path: md5 for path, md5 in found.items() if md5.endswith(".dir")}

    def version(self, revision: str, path: str) -> Version:
        """A folder as it is at a revision.

        Raises:
            DataError: there is no such revision, or DVC keeps no such folder there.
        """
        commit = self.commit_of(revision)
        folders, path = self.folders(commit), PurePosixPath(path).as_posix()
        if path not in folders:
            by_git = self.call("git", "ls-tree", commit, "--", path).stdout
            what = f"git itself, not DVC, keeps {path}" if by_git else f"DVC keeps no folder {path}"
            kept = ", ".join(sorted(folders)) or "none"
            raise DataError(f"{what} at commit {commit[:12]} of {self.url}; the folders that DVC keeps there: {kept}")
        return Version(commit, self.git("show", "--no-patch", "--format=%cI", commit).strip(), path, folders[path])

    def versions(self) -> list[Version]:
        """Every version of every folder, oldest first, each with the first commit that has it."""
        found: dict[tuple[str, str], Version] = {}
        log = self.git("log", "--all", "--full-history", "--reverse", "--format=%H %cI", "--", "*.dvc")
        for commit, date in (line.split() for line in log.splitlines()):
            for path, md5 in self.folders(commit).items():
                found.setdefault((path, md5), Version(commit, date, path, md5))
        return list(found.values())

    def fetch(self, version: Version) -> Path:
        """The folder, from the DVC remote; DVC itself does not look whether its content is the right one."""
        what = f"get {version.path} of commit {version.commit[:12]} from"
        self._asked(version, "pull", "--force", version.path, what=what)
        return self.folder / version.path

    def files(self, version: Version) -> dict[str, str]:
        """Path -> md5 of every file of a version, from the DVC remote's list alone.

        Raises:
            DataError: the remote has no such list, or another one.
        """
        what = f"list {version.path} of commit {version.commit[:12]} from"
        arguments = ("list", "--recursive", "--show-hash", "--json", ".", version.path)
        entries = json.loads(self._asked(version, *arguments, what=what))
        files = {entry["path"]: entry["md5"] for entry in entries if entry.get("md5")}
        md5 = dvc_list_md5(files)  # DVC itself does not look whether the list is the right one
        if md5 != version.md5:
            what = f"the DVC remote of {self.url} lists {md5} as the files of {version.path} {version.md5}"
            raise DataError(f"{what}: its list was changed there; put the original back from a good copy")
        return files

    def _asked(self, version: Version, *arguments: str, what: str) -> str:
        """What DVC prints at a version's commit; where that names no remote that has it, with today's DVC config."""
        try:
            self.check_out(version.commit)
            return self.dvc(*arguments, what=what)
        except DataError as error:  # the images were committed before the remote, or it moved since
            today = self.call("git", "show", "refs/remotes/origin/HEAD:.dvc/config")
            if today.returncode:
                raise
            (self.folder / ".dvc").mkdir(exist_ok=True)
            (self.folder / ".dvc" / "config").write_text(today.stdout, encoding="utf-8")
            try:
                self._set_up()
                return self.dvc(*arguments, what=what)
            except DataError:
                raise error from None

    def holds(self, commit: str) -> bool:
        """Whether the repository has this commit."""
        return self.call("git", "cat-file", "-e", f"{commit}^{{commit}}").returncode == 0

    def check_out(self, commit: str) -> None:
        """Make the working tree that of a commit; files that git does not keep stay.

        Raises:
            DataError: DVC is not at home there, or its remote cannot be reached from a clone.
        """
        self.git("checkout", "--quiet", "--force", "--detach", commit)
        if not (self.folder / ".dvc" / "config").is_file():
            raise DataError(f"{self.url} has no .dvc/config at commit {commit[:12]}; set up DVC and its remote there")
        self._set_up()

    def _set_up(self) -> None:
        (self.folder / ".dvc" / "config.local").write_text(self._settings, encoding="utf-8")
        self.remote_inside()

    def remote_inside(self) -> Path | None:
        """Folder of DVC's default remote, where that lies in the repository itself.

        Raises:
            DataError: its relative path leads out of the repository: to nowhere, from a clone.
        """
        config = configparser.ConfigParser(interpolation=None)
        config.read(self.folder / ".dvc" / "config", encoding="utf-8")
        section = f"'remote \"{config.get('core', 'remote', fallback='')}\"'"
        url = config.get(section, "url", fallback="/")
        if "://" in url or Path(url).is_absolute():
            return None
        folder = (self.folder / ".dvc" / url).resolve()
        if not folder.is_relative_to(self.folder.resolve()):
            cure = "write its whole path or URL there"
            raise DataError(f"the DVC remote {url} in .dvc/config of {self.url} is outside the repository; {cure}")
        return folder

    def git(self, *arguments: str, what: str = "", cure: str = "") -> str:
        """What git prints; `what` and `cure` begin and end the sentence where it fails."""
        what = what or f"git {arguments[0]} failed in a clone of {self.url}"
        return _printed(self.call("git", *arguments), what, cure or "check the repository")

    def dvc(self, *arguments: str, what: str) -> str:
        """What DVC prints; `what` says what it does with its remote."""
        cure = "check the remote's address and credentials, and that the content was pushed to it"
        return _printed(self.call(*_DVC, *arguments), f"cannot {what} the DVC remote of {self.url}", cure)

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the clone."""
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


def without_credentials(url: str) -> str:
    """A URL without user and password; SSH needs its user, who is no secret.

    Raises:
        DataError: it cannot be read.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # a ValueError where a password holds a slash
    except ValueError as error:
        cure = "write the special characters of its password as %XX"
        raise DataError(f"the repository's URL, not shown as it may hold a password, cannot be read; {cure}") from error
    user, _, host = parts.netloc.rpartition("@")
    name = user.partition(":")[0] + "@" if user and "ssh" in parts.scheme else ""
    return parts._replace(netloc=name + host).geturl() if user else url


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why git or DVC failed: the first line that says so, without credentials."""
    line = re.search(r"^\s*(?:fatal: |ERROR: |error: |! )(.+)$", done.stderr, re.MULTILINE)
    said = line[1] if line else (done.stderr.strip().splitlines() or ["no message"])[-1]
    return re.sub(r"://[^/\s]*@", "://", said).rstrip(":.")


def _printed(done: subprocess.CompletedProcess[str], what: str, cure: str) -> str:
    if done.returncode:
        raise DataError(f"{what} ({reason(done)}); {cure}")
    return done.stdout


def _environment(url: str, shown: str, databases: Path) -> dict[str, str]:
    """For git and DVC. Only here does a URL keep its credentials: in no argument, and in no file of the clone."""
    settings = {"USER": "raresynth"}  # DVC asks for a name, which the numeric user of a container has not
    settings |= os.environ | {"LC_ALL": "C", "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(databases)}
    if url == shown:
        return settings
    n = int(os.environ.get("GIT_CONFIG_COUNT", "0"))
    own = {"GIT_CONFIG_COUNT": n + 1, f"GIT_CONFIG_KEY_{n}": f"url.{url}.insteadOf", f"GIT_CONFIG_VALUE_{n}": shown}
    return settings | {name: str(value) for name, value in own.items()}
