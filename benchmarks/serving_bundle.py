"""The bundles and photographs that the service is measured with."""

import json
import shutil
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from raresynth.bundle.contents import Bundle, open_bundle, write_bundle_json
from raresynth.bundle.onnx_export import export_onnx
from raresynth.bundle.predictor import Predictor
from raresynth.bundle.reference import build_reference
from raresynth.classifier import network
from raresynth.dataset.images import decode_image
from raresynth.lineage import new_dir, sha256_file, write_json

SIZE, QUALITY = (600, 450), 95
"""Of HAM10000's photographs, as its authors published them; those at hand may be smaller, and are then enlarged."""
N_PHOTOGRAPHS, N_REFERENCE = 256, 512


def photographs(folder: Path) -> list[bytes]:
    """JPEG files of `SIZE`."""
    return [_photograph(path) for path in _spread(sorted(folder.rglob("*.jpg")), N_PHOTOGRAPHS)]


def _photograph(path: Path) -> bytes:
    buffer = BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _spread(paths: Sequence[Path], n: int) -> list[Path]:
    return [paths[i] for i in np.linspace(0, len(paths) - 1, n).round().astype(int)]


def at_resolution(bundle: Path, resolution: int, images: Path, out: Path) -> Path:
    """The bundle with its classifier exported anew for larger images, for speed alone: nobody trained it for them.

    Every other part is the original's, its decisions included, so that the service opens it as approved.
    """
    if out.exists():
        return out
    original = open_bundle(bundle)
    with new_dir(out) as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
        classifier, _ = network.load(bundle / "classifier")
        example = torch.linspace(-1, 1, 4 * 3 * resolution**2).reshape(4, 3, resolution, resolution)
        graph = network.WithFeatureMap(classifier).eval()
        export_onnx(graph, example, "images", ["logits", "features"], folder / "classifier" / "model.onnx")
        meta = json.loads((folder / "classifier" / "meta.json").read_text())
        write_json(folder / "classifier" / "meta.json", meta | {"resolution": resolution})
        changed = original.model_copy(
            update={"classifier": original.classifier.model_copy(update={"resolution": resolution})}
        )
        _rewrite(folder, changed)
        write_json(folder / "reference.json", _reference(folder, changed, images))
        _rewrite(folder, changed)
    return out


def _rewrite(folder: Path, bundle: Bundle) -> None:
    files = {name: sha256_file(folder / name) for name in bundle.files}
    write_bundle_json(folder, bundle.model_copy(update={"files": files}))


def _reference(folder: Path, bundle: Bundle, images: Path) -> dict[str, object]:
    paths = _spread(sorted(images.rglob("*.jpg")), N_REFERENCE)
    pixels = np.stack([decode_image(path, bundle.classifier.resolution) for path in paths])
    return build_reference(Predictor(folder), pixels[::2], [bundle.labels[0]] * (N_REFERENCE // 2), pixels[1::2])
