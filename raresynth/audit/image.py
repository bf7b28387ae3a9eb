"""What is known of one image file: in which data versions it is, which models could see it, or who made it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from raresynth.audit.bundle import read_images
from raresynth.audit.findings import Link
from raresynth.audit.synthetic import Generators, provenance
from raresynth.bundle.contents import open_bundle
from raresynth.errors import DataError


def audit_image(file: Path, versions: Mapping[str, Mapping[str, str] | DataError], bundle: Path | None) -> Link:
    """Look an image up. It is compared byte for byte: a copy that was saved anew is another image.

    Args:
        versions: name of each data version -> md5 of each of its files -> path, or why they cannot be listed.

    Raises:
        DataError: the file cannot be read.
        CheckpointError: `bundle` is no bundle, or was changed.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; name an image file") from error
    sha256, md5 = (hashlib.new(name, content, usedforsecurity=False).hexdigest() for name in ("sha256", "md5"))
    link = Link(f"image {file}, SHA-256 {sha256}")
    for version, paths in versions.items():
        if isinstance(paths, DataError):
            link.unchecked(f"data version {version}", str(paths))
        else:
            link.note(f"data version {version}", f"holds it as {paths[md5]}" if md5 in paths else "does not hold it")
    if bundle is not None:
        open_bundle(bundle)
        label, split = read_images(bundle).get(sha256, ("", ""))
        link.note(f"bundle {bundle}", f"{split} image of {label}" if label else "not among the images of its models")
    said = provenance(content)
    if said is None:
        link.note("provenance", "none is written in it: not made by raresynth, or saved anew since")
        return link
    origin = f"{said.label}, seed {said.seed}, index {said.index}, truncation {said.truncation:g}"
    below = link.below(f"synthetic: {origin}, by generator {said.generator}")
    if bundle is None:
        below.unchecked("made again by its generator", "name the generator's bundle with --bundle")
    else:
        Generators(bundle).check(below, "made again by its generator", said, content)
    return link
