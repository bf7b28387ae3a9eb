"""Hashes, checkpoints and reports: every byte that a stage leaves can be named and checked.

Nothing is half-written: files and folders are made beside their place and then renamed.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from raresynth.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE_DIR = Path(__file__).parent
UNFINISHED = ".unfinished-"
"""How the names of files and folders begin that are still being written."""


class Report(BaseModel):
    """Base of every typed report; equal inputs give equal bytes, so it holds no times."""

    model_config = ConfigDict(extra="forbid", frozen=True)


ReportT = TypeVar("ReportT", bound=Report)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_tree(folder: Path) -> str:
    """SHA-256 over the relative paths and contents of all files below `folder`."""
    return sha256_json({p.relative_to(folder).as_posix(): sha256_file(p) for p in _files(folder)})


def code_hash(*parts: str) -> str:
    """SHA-256 of the library's source files under the named parts, such as "gan" or "lineage.py"."""
    files = [file for part in parts for file in _sources(PACKAGE_DIR / part)]
    return sha256_json({f.relative_to(PACKAGE_DIR).as_posix(): sha256_file(f) for f in files})


def _sources(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in {".py", ".html", ".css"})


def _files(folder: Path) -> list[Path]:
    """All files below a folder, links followed, in the order of their relative paths."""
    files = [path for parent, names in walk(folder) for path in (parent / name for name in names) if path.is_file()]
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def walk(folder: Path, skip: tuple[str, ...] = ()) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below `folder`, itself included, with the names of its files; links are followed.

    Args:
        skip: folders whose name starts so are left out.
    """
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        # A link to a folder above would lead round and round.
        visited.add(os.path.realpath(parent))
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(skip) and os.path.realpath(f"{parent}/{name}") not in visited
        ]
        yield Path(parent), names


def dvc_dir_md5(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> str:
    """The `.dir` hash that `dvc add` gives to `folder`: md5 of the JSON list of its files' md5.

    Args:
        known: md5 of files that were read already, by path.
    """
    files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    return dvc_list_md5({name: known.get(name) or md5_file(path) for name, path in files.items()})


def dvc_list_md5(files: Mapping[str, str]) -> str:
    """The `.dir` hash of a folder whose files have these md5, by path."""
    entries = [{"md5": files[path], "relpath": path} for path in sorted(files)]
    return hashlib.md5(json.dumps(entries).encode(), usedforsecurity=False).hexdigest() + ".dir"


def md5_file(path: Path) -> str:
    """MD5 of a file's bytes, as DVC names its content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Commit checked out in `folder` and whether its tracked files differ from it; (None, None) if neither is known.

    dvc.lock does not count: it is what a run writes, not what it is made from. Outside git, as in a container image,
    the environment's RARESYNTH_REVISION names the commit, with "-dirty" behind it if files differed.
    """

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package installed in an environment inside of some other repository is none of its files.
    commit = git("rev-parse", "HEAD") if git("ls-files", "--", ".") else None
    if commit is None:
        revision = os.environ.get("RARESYNTH_REVISION", "")
        commit = revision.removesuffix("-dirty")
        return (commit, commit != revision) if commit else (None, None)
    return commit, bool(git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)dvc.lock"))


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place, then rename it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{UNFINISHED}{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes left half-written in or below a folder, in which no other one is at work."""
    for left in list(folder.rglob(f"{UNFINISHED}*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_report(path: Path, report: Report) -> None:
    """Write a typed report as JSON."""
    write_json(path, report.model_dump(mode="json"))


def read_report(path: Path, kind: type[ReportT]) -> ReportT:
    """Read a report of the given kind.

    Raises:
        CheckpointError: the file is missing, or is no such report.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; run the stage that writes it first") from error
    except (UnicodeDecodeError, ValidationError) as error:
        raise CheckpointError(f"{path} is no {kind.__name__} of this version; run its stage again") from error


@contextmanager
def new_dir(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{UNFINISHED}{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            replaced = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{UNFINISHED}{path.name}."))
            path.replace(replaced)
            temporary.replace(path)
            shutil.rmtree(replaced)
        else:
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_checkpoint(folder: Path, tensors: Mapping[str, "Tensor"], meta: Mapping[str, Any]) -> str:
    """Save weights.safetensors and meta.json as one new folder; returns the weights' SHA-256.

    `meta` must suffice to rebuild the model; `weights_sha256` is added to it.
    """
    from safetensors.torch import save_file

    with new_dir(folder) as temporary:
        weights = temporary / "weights.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, weights)
        digest = sha256_file(weights)
        write_json(temporary / "meta.json", {**meta, "weights_sha256": digest})
    return digest


def load_checkpoint(folder: Path, device: str = "cpu") -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Load a checkpoint made by `save_checkpoint`, its weights checked against their hash.

    Raises:
        CheckpointError: a file is missing or the weights are not those that were saved.
    """
    from safetensors.torch import load_file

    meta, weights = folder / "meta.json", folder / "weights.safetensors"
    try:
        values = json.loads(meta.read_text(encoding="utf-8"))
        digest = sha256_file(weights)
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"no complete checkpoint in {folder} ({error}); train it again") from error
    if digest != values["weights_sha256"]:
        raise CheckpointError(f"{weights} was changed after it was saved (SHA-256 differs); train it again")
    return load_file(weights, device=device), values
