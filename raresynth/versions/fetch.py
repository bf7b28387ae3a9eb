"""A data version from wherever DVC keeps it: its commit pinned, every byte checked."""

from contextlib import suppress
from pathlib import Path

from raresynth.errors import DataError
from raresynth.lineage import Report, dvc_dir_md5, md5_file, walk, write_report
from raresynth.versions.repository import Repository, Version, cloned


class FetchReport(Report):
    """A data version that was fetched; only its commit and hash name it, for a branch moves on."""

    repository: str
    """Without credentials."""
    revision: str
    """As it was asked for."""
    commit: str
    path: str
    """Of the folder, in the repository."""
    md5: str
    """Its `.dir` hash, computed from the bytes that arrived."""
    n_files: int
    n_bytes: int
    folder: str
    """Where it lies now."""


def fetch_data(repository: str, revision: str, path: str, into: Path) -> FetchReport:
    """Fetch a folder that DVC keeps as `into`/<hash>, with the report beside it as <hash>.json.

    Several runs share that folder. Where it is there and has its hash nothing is fetched; a damaged one is replaced.

    Args:
        repository: URL or folder of the git repository.
        revision: branch, tag or commit.
        path: the folder, in the repository.

    Raises:
        DataError: there is no such repository, revision or folder, or what the DVC remote gives is not what was added.
    """
    into.mkdir(parents=True, exist_ok=True)
    with cloned(repository, beside=into) as clone:
        version = clone.version(revision, path)
        folder = into / version.md5.removesuffix(".dir")
        if not _is_whole(folder, version.md5):
            fetched = clone.fetch(version)
            _check(clone, version, fetched)
            _put(fetched, folder, version.md5, damaged=clone.folder.with_name("damaged"))
        sizes = [(above / name).stat().st_size for above, names in walk(folder) for name in names]
        report = FetchReport(
            repository=clone.url,
            revision=revision,
            commit=version.commit,
            path=version.path,
            md5=version.md5,
            n_files=len(sizes),
            n_bytes=sum(sizes),
            folder=str(folder),
        )
    write_report(folder.with_suffix(".json"), report)
    return report


def _check(clone: Repository, version: Version, folder: Path) -> None:
    md5 = dvc_dir_md5(folder)
    if md5 == version.md5:
        return
    changed = [path for path, listed in clone.files(version).items() if md5_file(folder / path) != listed]
    files = f"{', '.join(changed[:3])}{f' and {len(changed) - 3} others' if len(changed) > 3 else ''}"
    raise DataError(
        f"the DVC remote of {clone.url} gives {version.path} of commit {version.commit[:12]} with the hash {md5}, not "
        f"{version.md5}: {files} changed there; put the original back from a good copy"
    )


def _put(fetched: Path, folder: Path, md5: str, damaged: Path) -> None:
    """Rename a checked folder to its place, unless another run was faster."""
    if _is_whole(folder, md5):
        return
    with suppress(FileNotFoundError):
        folder.rename(damaged)
    try:
        fetched.rename(folder)
    except OSError:
        if not _is_whole(folder, md5):
            raise


def _is_whole(folder: Path, md5: str) -> bool:
    return folder.is_dir() and dvc_dir_md5(folder) == md5
