"""Approved synthetic images as a new data version, beside the real one.

DVC keeps all that was published as one folder, so that one hash names it. In it lies a folder for each set, named by
its class and its manifest's hash: sets never meet, and the same one is known again. Content is pushed before the commit
that points to it. The push of that commit is the one step that is serialised: git takes it only on top of the branch's
head, and who was slower adds the set to the new head, whose files need not be fetched for it.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from raresynth.audit.bundle import audit_bundle
from raresynth.audit.findings import Link
from raresynth.audit.synthetic import Generators, audit_batch, root_of
from raresynth.dataset.manifest import read_synthetic
from raresynth.errors import DataError, ParamsError
from raresynth.lineage import Report, sha256_file
from raresynth.versions.repository import Repository, cloned, reason

ATTEMPTS = 20
"""At most so often the branch's head may move between clone and push."""
AUTHOR = {"user.name": "raresynth", "user.email": "raresynth@localhost"}
"""Of the commit, where git knows none."""
_OF_A_SET = re.compile(r"(?P<label>.+)-[0-9a-f]{12}/(?P=label)/")


class SyntheticSet(Report):
    """The images of one batch."""

    folder: str
    """In the published folder: <label>-<start of the manifest's SHA-256>."""
    label: str
    generator: str
    """SHA-256 of its weights."""
    seed: int
    truncation: float
    n_images: int


class PublishReport(Report):
    """Where synthetic images can be fetched."""

    repository: str
    """Without credentials."""
    branch: str
    commit: str
    path: str
    """Of the folder, in the repository."""
    md5: str
    """The folder's `.dir` hash at that commit."""
    bundle: str
    """SHA-256 of the bundle.json that approves the images."""
    sets: list[SyntheticSet]
    n_new: int
    """How many of the sets were not there before."""


def publish_data(bundle: Path, batches: Sequence[Path], repository: str, branch: str, path: str) -> PublishReport:
    """Add batches of synthetic images to a folder that DVC keeps, push them, and commit that on a branch.

    What was published before is neither fetched nor changed, and no commit is made where all sets are there already.

    Args:
        bundle: the one that made the images.
        batches: folders as `generate` or `synthesize` leaves them, of a class that the bundle accepted.
        repository: URL or folder of the git repository, whose .dvc/config names the DVC remote.
        path: folder in the repository for all published sets; no other files may be in it.

    Raises:
        ParamsError: `path` cannot be such a folder.
        DataError: an audit finds bundle or batch broken, the class is not accepted, the images are not drawn as the
            gate judged them, or the repository or its remote does not take them.
        CheckpointError: `bundle` is none.
    """
    path = _place(path)
    _require_whole(bundle, audit_bundle(bundle, None))
    generators = Generators(bundle)
    sources = {_approve(batch, generators): batch for batch in batches}
    approval = sha256_file(bundle / "bundle.json")
    with cloned(repository) as clone:
        n_new = _publish(clone, branch, path, sources, approval)
        commit = clone.commit_of("HEAD")
        return PublishReport(
            repository=clone.url,
            branch=branch,
            commit=commit,
            path=path,
            md5=clone.folders(commit)[path],
            bundle=approval,
            sets=list(sources),
            n_new=n_new,
        )


def _publish(clone: Repository, branch: str, path: str, sources: Mapping[SyntheticSet, Path], bundle: str) -> int:
    """Bring the branch to have all sets; returns how many it had not. The clone is left at that commit."""
    for _ in range(ATTEMPTS):
        head = clone.head(branch)
        clone.check_out(head)
        published = _published(clone, head, path)
        new = {entry: batch for entry, batch in sources.items() if entry.folder not in published}
        if not new:
            return 0
        _add(clone, path, new)
        _commit(clone, path, list(new), bundle)
        if _push(clone, branch, head):
            return len(new)
    raise DataError(f"{branch} of {clone.url} moved on {ATTEMPTS} times meanwhile; publish again when it is quieter")


def _place(path: str) -> str:
    place = PurePosixPath(path)
    if place.is_absolute() or ".." in place.parts or not place.parts:
        raise ParamsError(f"--path {path} is no folder in the repository; name one, such as synthetic")
    return place.as_posix()


def _require_whole(folder: Path, link: Link) -> None:
    if broken := link.broken():
        name, check = broken[0]
        where = "" if name == link.name else f"{name}: "
        cure = "publish what `raresynth audit` finds whole"
        raise DataError(f"{folder} is not approved ({where}{check.what}: {check.detail}); {cure}")


def _approve(batch: Path, generators: Generators) -> SyntheticSet:
    """Audit a batch; what it holds, if that is what the gate judged."""
    _require_whole(batch, audit_batch(batch, generators))
    table = read_synthetic(batch / "manifest.csv", "generate")
    origins = table[["label", "generator", "seed", "truncation"]].drop_duplicates()
    if len(origins) != 1:
        what = "images of several classes, seeds or truncations" if len(origins) else "no image"
        raise DataError(f"{batch} holds {what}; publish a folder for each of them")
    label, generator, seed, truncation = origins.iloc[0]
    judged = generators.bundle.generators[label].truncation
    if truncation != judged:
        raise DataError(
            f"{batch} is not approved: it was drawn with truncation {truncation:g}, and the gate judged images of "
            f"truncation {judged:g}; generate it without --truncation"
        )
    return SyntheticSet(
        folder=f"{label}-{sha256_file(batch / 'manifest.csv')[:12]}",
        label=label,
        generator=generator,
        seed=int(seed),
        truncation=float(truncation),
        n_images=len(table),
    )


def _published(clone: Repository, commit: str, path: str) -> set[str]:
    """Folders of the sets that are there already."""
    folders, place = clone.folders(commit), PurePosixPath(path)
    for other in map(PurePosixPath, folders.keys() - {path}):
        if place.is_relative_to(other) or other.is_relative_to(place):
            raise ParamsError(f"--path {path} and {other} of {clone.url} lie one in the other; choose another --path")
    files = clone.files(clone.version(commit, path)) if path in folders else {}
    for file in files:
        if not _OF_A_SET.match(file):
            raise ParamsError(
                f"{path} of {clone.url} holds {file}, which is in no published set; choose another --path"
            )
    return {file.partition("/")[0] for file in files}


def _add(clone: Repository, path: str, sources: Mapping[SyntheticSet, Path]) -> None:
    """Hand the images to DVC, and push them."""
    for entry, batch in sources.items():
        _copy(batch, clone.folder / path / entry.folder)
    # To a folder that DVC keeps already a part is added; its other parts, which are not at hand, stay.
    kept = (clone.folder / f"{path}.dvc").is_file()
    clone.dvc("add", *([f"{path}/{entry.folder}" for entry in sources] if kept else [path]), what=f"add to {path} of")
    clone.dvc("push", path, what=f"push {path} to")


def _copy(batch: Path, place: Path) -> None:
    """The manifest and the images that it lists, so that the copy can be audited as the batch can."""
    if place.exists():  # from the attempt before
        return
    table = read_synthetic(batch / "manifest.csv", "generate")
    root = root_of(batch, table)
    folder = place / table["label"].iloc[0]
    for path in table["path"]:
        copy = (folder if root == batch else place) / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, copy)
    shutil.copyfile(batch / "manifest.csv", folder / "manifest.csv")


def _commit(clone: Repository, path: str, sets: Sequence[SyntheticSet], bundle: str) -> None:
    for key, default in AUTHOR.items():
        if clone.call("git", "config", key).returncode:
            clone.git("config", key, default)
    changed = [clone.folder / f"{path}.dvc", (clone.folder / path).with_name(".gitignore"), clone.remote_inside()]
    clone.git("add", "--", *(str(file) for file in changed if file is not None and file.exists()))
    n, labels = sum(entry.n_images for entry in sets), sorted({entry.label for entry in sets})
    lines = [f"Publish {n} synthetic images of {', '.join(labels)}", ""]
    for entry in sets:
        origin = f"generator {entry.generator}, seed {entry.seed}, truncation {entry.truncation:g}"
        lines.append(f"{path}/{entry.folder}: {entry.n_images} images, {origin}")
    clone.git("commit", "--quiet", "--message", "\n".join([*lines, "", f"Approved by bundle {bundle}"]))


def _push(clone: Repository, branch: str, head: str) -> bool:
    """Whether the branch took the commit; it does not where it has moved on from `head`."""
    done = clone.call("git", "push", "origin", f"HEAD:refs/heads/{branch}")
    if done.returncode and clone.head(branch) == head:
        cure = "check the credentials and whether the branch is protected"
        raise DataError(f"{clone.url} takes no commit on {branch} ({reason(done)}); {cure}")
    return done.returncode == 0
