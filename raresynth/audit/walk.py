"""One audit: of a bundle, a batch of synthetic images or one image, as far back as what is at hand leads."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from raresynth.audit.bundle import audit_bundle
from raresynth.audit.findings import Link
from raresynth.audit.image import audit_image
from raresynth.audit.synthetic import Generators, audit_batch
from raresynth.bundle.contents import Bundle, check_digest
from raresynth.errors import CheckpointError, DataError, ParamsError
from raresynth.lineage import dvc_dir_md5, md5_file, read_report, walk
from raresynth.versions.repository import Repository, cloned


@dataclass(frozen=True)
class Subject:
    """What is audited, and what is at hand for it.

    Attributes:
        bundle: itself audited, or the one that `batch` or `image` may come from.
        batch: folder of synthetic images.
        image: one file.
        data: folder of raw images.
        repo: git repository whose images DVC keeps. The data version that the bundle names is fetched from it; an
            image is looked up in all of them.
    """

    bundle: Path | None = None
    batch: Path | None = None
    image: Path | None = None
    data: Path | None = None
    repo: str | None = None


def audit(subject: Subject) -> Link:
    """Audit an image, a batch or a bundle, whichever is named first.

    Raises:
        ParamsError: none is named, or a batch without its bundle.
        DataError: a folder, file or repository cannot be read.
        CheckpointError: the bundle that a batch or an image may come from is none, or was changed.
    """
    for folder in (subject.bundle, subject.batch, subject.data):
        if folder is not None and not folder.is_dir():
            raise DataError(f"the folder {folder} does not exist; name another one")
    with nullcontext() if subject.repo is None else cloned(subject.repo) as repository:
        if subject.image is not None:
            return audit_image(subject.image, _versions(subject.data, repository), subject.bundle)
        if subject.bundle is None:
            raise ParamsError("audit walks back from a bundle; name it with --bundle, or an image with --image")
        link = _audit_bundle(subject.bundle, subject.data, repository)
        if subject.batch is None:
            return link
        batch = audit_batch(subject.batch, Generators(subject.bundle))
        batch.made_from.append(link)
        return batch


def _versions(data: Path | None, repository: Repository | None) -> dict[str, dict[str, str] | DataError]:
    """Name of each data version at hand -> md5 of each of its files -> path, or why they cannot be listed.

    Raises:
        DataError: none can.
    """
    if data is not None:
        files = [above / name for above, names in walk(data) for name in names]
        return {f"{data}, {dvc_dir_md5(data)}": {md5_file(file): file.relative_to(data).as_posix() for file in files}}
    if repository is None:
        return {}
    found: dict[str, dict[str, str] | DataError] = {}
    for version in repository.versions():
        name = f"{version.path} {version.md5}, commit {version.commit[:12]} of {version.date}"
        try:
            found[name] = {md5: path for path, md5 in repository.files(version).items()}
        except DataError as error:
            found[name] = error
    errors = [files for files in found.values() if isinstance(files, DataError)]
    if errors and len(errors) == len(found):
        raise errors[0]
    return found


def _audit_bundle(folder: Path, data: Path | None, repository: Repository | None) -> Link:
    if repository is None:
        return audit_bundle(folder, data)
    try:
        check_digest(folder)
        lineage = read_report(folder / "bundle.json", Bundle).lineage
    except CheckpointError:
        return audit_bundle(folder, None)  # which says what is wrong
    version = next((version for version in repository.versions() if version.md5 == lineage.data_md5), None)
    link = audit_bundle(folder, None if version is None else repository.fetch(version))
    what = f"data version {lineage.data_md5}"
    if version is None:
        link.check(what, False, f"is in no commit of {repository.url}")
    else:
        link.note(what, f"{version.path} since commit {version.commit} of {version.date}")
    if lineage.commit is not None and repository.holds(lineage.commit):
        link.note(f"code's commit {lineage.commit}", f"is in {repository.url}")
    return link
