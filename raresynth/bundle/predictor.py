"""Predictions from a bundle, with onnxruntime alone."""

import csv
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from raresynth.bundle.contents import Bundle, open_bundle
from raresynth.bundle.graphs import open_graph
from raresynth.dataset.images import Pixels, decode_image, may_be_image, printable
from raresynth.errors import DataError, ParamsError
from raresynth.lineage import walk, write_text
from raresynth.progress import progress

BATCH = 64

Floats = npt.NDArray[np.float32]


class Prediction(NamedTuple):
    """Output for n images."""

    probabilities: Floats
    """(n, labels), calibrated by the bundle's temperature; rows add up to 1."""
    features: Floats
    """Last feature map, (n, channels, height, width) for a convolutional model."""


def preprocess(images: Pixels) -> Floats:
    """Uint8 images (n, R, R, 3) as the graph takes them: (n, 3, R, R), values in [-1, 1]."""
    # In the order in which the graph reads: it would else copy them once more.
    return images.transpose(0, 3, 1, 2).astype(np.float32, order="C") / np.float32(127.5) - np.float32(1.0)


class Predictor:
    """The bundle's classifier.

    Attributes:
        bundle: the content of bundle.json.
    """

    def __init__(self, folder: Path, bundle: Bundle | None = None, threads: int = 0) -> None:
        """Open a bundle.

        Args:
            bundle: the opened bundle, where it has been checked already.
            threads: CPU threads of one call; 0 for one a core.

        Raises:
            CheckpointError: this is no bundle, or a file in it was changed.
        """
        self.bundle = bundle or open_bundle(folder)
        self._session = open_graph(folder / "classifier" / "model.onnx", threads)

    def predict(self, images: Pixels) -> Prediction:
        """Predict uint8 images (n, R, R, 3), decoded by `decode_image` at the classifier's resolution."""
        return self.run(preprocess(images))

    def run(self, inputs: Floats) -> Prediction:
        """Predict images that `preprocess` made ready."""
        logits, features = self._session.run(None, {"images": inputs})
        scaled = logits / self.bundle.classifier.temperature
        exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return Prediction(exponentials / exponentials.sum(axis=1, keepdims=True), features)


def predict_folder(bundle: Path, images: Path, out: Path) -> tuple[int, int]:
    """Predict all images below a folder into a CSV file, in constant memory.

    Columns: image_id (path relative to `images`), label, p_<label> for each label, error. An image that cannot be
    decoded gets a row with its error.

    Returns:
        number of images, and of those that could not be decoded.

    Raises:
        DataError: `images` is no folder, or holds no image.
        ParamsError: `out` is a folder.
        CheckpointError: `bundle` is no bundle, or was changed.
    """
    if not images.is_dir():
        raise DataError(f"the folder {images} does not exist; name the folder that holds the images")
    if out.is_dir():
        raise ParamsError(f"{out} is a folder; name the CSV file to write with --out")
    files = (folder / name for folder, names in walk(images, skip=(".",)) for name in names if name[0] != ".")
    paths = sorted(path for path in files if may_be_image(path.name, at_top=False))
    if not paths:
        raise DataError(f"{images} holds no image file; name another folder")
    predictor = Predictor(bundle)
    text, failed = io.StringIO(), 0
    writer = csv.writer(text, lineterminator="\n")
    labels = predictor.bundle.labels
    writer.writerow(["image_id", "label", *(f"p_{label}" for label in labels), "error"])
    with progress("predict", len(paths), "images") as advance:
        for chunk, decoded in _decoded(paths, predictor.bundle.classifier.resolution):
            good = [image for image in decoded if not isinstance(image, str)]
            rows: Iterator[Floats] = iter(predictor.predict(np.stack(good)).probabilities if good else ())
            for path, image in zip(chunk, decoded, strict=True):
                name = printable(path.relative_to(images).as_posix())
                if isinstance(image, str):
                    failed += 1
                    writer.writerow([name, "", *([""] * len(labels)), image])
                else:
                    row = next(rows)
                    writer.writerow([name, labels[int(row.argmax())], *(f"{p:.6f}" for p in row), ""])
            advance(len(chunk))
    write_text(out, text.getvalue())
    return len(paths), failed


def _decoded(paths: Sequence[Path], resolution: int) -> Iterator[tuple[Sequence[Path], list[Pixels | str]]]:
    def decode(path: Path) -> Pixels | str:
        try:
            return decode_image(path, resolution)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        for first in range(0, len(paths), BATCH):
            chunk = paths[first : first + BATCH]
            yield chunk, list(pool.map(decode, chunk))
