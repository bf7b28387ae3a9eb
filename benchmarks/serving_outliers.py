"""What the service takes for its own kind of image: shares accepted at the bundle's threshold."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from raresynth.bundle.contents import open_bundle, read_reference
from raresynth.bundle.predictor import Predictor
from raresynth.dataset.images import Pixels, decode_image
from raresynth.lineage import sha256_file
from serving.outliers import Outliers

N_NOISE = 200
BATCH = 64
SUFFIXES = {".jpg", ".jpeg", ".png"}


def noise(resolution: int) -> dict[str, list[Pixels]]:
    """Images of no content, by kind."""
    rng = np.random.default_rng(0)
    shape = (resolution, resolution, 3)
    gaussian = [rng.normal(rng.uniform(0, 255, 3), rng.uniform(5, 60), shape) for _ in range(N_NOISE)]
    return {
        "uniform noise": [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(N_NOISE)],
        "Gaussian noise about a colour": [image.clip(0, 255).astype(np.uint8) for image in gaussian],
        "one colour": [np.full(shape, rng.integers(0, 256, 3), np.uint8) for _ in range(N_NOISE)],
    }


def accepted_shares(bundle_dir: Path, own: Path, others: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Number and accepted share of each set of images.

    Args:
        own: images of the data set that the bundle was made from; those of its test split are taken.
        others: name -> folder.
    """
    bundle = open_bundle(bundle_dir)
    predictor, outliers = Predictor(bundle_dir, bundle), Outliers(read_reference(bundle_dir))
    resolution = bundle.classifier.resolution
    sets: dict[str, Iterable[Pixels]] = {"test images": _decoded(_test_files(bundle_dir, own), resolution)}
    sets |= {name: _decoded(_files(folder), resolution) for name, folder in others.items()}
    sets |= noise(resolution)
    shares = {}
    for name, images in sets.items():
        scores = [s for chunk in _chunks(images) for s in outliers.scores(predictor.predict(chunk).features)]
        accepted = [score <= outliers.threshold for score in scores]
        shares[name] = {"n": len(scores), "accepted": float(np.mean(accepted))}
    return shares


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _test_files(bundle: Path, own: Path) -> list[Path]:
    """The bundle knows its images by their hash alone."""
    with (bundle / "lineage" / "images.csv").open(newline="") as file:
        test = {row["sha256"] for row in csv.DictReader(file) if row["split"] == "test"}
    return [path for path in _files(own) if sha256_file(path) in test]


def _decoded(paths: Sequence[Path], resolution: int) -> Iterator[Pixels]:
    return (decode_image(path, resolution) for path in paths)


def _chunks(images: Iterable[Pixels]) -> Iterator[Pixels]:
    chunk: list[Pixels] = []
    for image in images:
        chunk.append(image)
        if len(chunk) == BATCH:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk)
