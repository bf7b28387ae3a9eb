"""`python -m serving.publish BUNDLE FOLDER`: put an approved bundle where pods find it, as FOLDER/SHA-256."""

import shutil
import sys
from pathlib import Path

from raresynth.bundle.contents import DIGEST
from raresynth.errors import RaresynthError, describe
from raresynth.lineage import new_dir, sha256_file
from serving.approval import open_approved


def publish(bundle: Path, folder: Path) -> str:
    """Copy a bundle's own files, and nothing that lies beside them, unless they are there already; returns its SHA-256.

    Raises:
        CheckpointError: it is no bundle, was changed, or holds unapproved models; so too for what is there already.
    """
    names = [*open_approved(bundle).files, "bundle.json", DIGEST]
    sha256 = sha256_file(bundle / "bundle.json")
    target = folder / sha256
    if target.exists():
        open_approved(target, sha256)
    else:
        with new_dir(target) as unfinished:
            for name in names:
                (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle / name, unfinished / name)
            open_approved(unfinished, sha256)
    return sha256


def main(arguments: list[str]) -> int:
    """Publish, and print the SHA-256 to pin."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m serving.publish BUNDLE FOLDER\n")
        return 2
    try:
        sys.stdout.write(f"{publish(*map(Path, arguments))}\n")
    except (RaresynthError, OSError) as error:
        sys.stderr.write(f"cannot publish: {describe(error)}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
