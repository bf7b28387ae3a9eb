"""Synthetic images from a bundle, with onnxruntime alone: same seed, same bytes."""

import csv
import hashlib
import io
from pathlib import Path

import numpy as np

from raresynth.bundle.contents import Bundle, open_bundle
from raresynth.bundle.graphs import open_graph
from raresynth.dataset.images import Pixels
from raresynth.errors import ParamsError
from raresynth.gan.latents import latents
from raresynth.gan.png import Provenance, encode_pngs, to_pixels
from raresynth.lineage import new_dir, write_text
from raresynth.progress import progress

PASS = 4
"""Images of one run of the graph. Always as many, because a batch's shape may change float rounding; on a CPU a few
take no longer each than many, and who asks for few waits for few."""


class Sampler:
    """One accepted generator of a bundle."""

    def __init__(self, folder: Path, label: str, bundle: Bundle | None = None, threads: int = 0) -> None:
        """Open a generator.

        Args:
            bundle: the opened bundle, where it has been checked already.
            threads: CPU threads of one call; 0 for one a core.

        Raises:
            CheckpointError: this is no bundle, a file in it was changed, or it has no generator for the label.
        """
        bundle = bundle or open_bundle(folder)
        self.label = label
        self.generator = bundle.generator(label)
        self._session = open_graph(folder / "generators" / label / "model.onnx", threads)

    def generate(self, seed: int, first: int, n: int, truncation: float) -> Pixels:
        """Images first .. first + n - 1; uint8 (n, R, R, 3). Image i depends on seed, truncation and i alone."""
        skipped = first % PASS
        starts = range(first - skipped, first + n, PASS)
        return np.concatenate([self._pass(seed, start, truncation) for start in starts])[skipped : skipped + n]

    def _pass(self, seed: int, first: int, truncation: float) -> Pixels:
        inputs = {"latents": latents(seed, first, PASS, self.generator.latent_dim, truncation)}
        return to_pixels(self._session.run(None, inputs)[0])

    def pngs(self, images: Pixels, seed: int, first: int, truncation: float) -> list[bytes]:
        """Images first .. first + n - 1, (n, R, R, 3), as PNG with their provenance."""
        weights, indices = self.generator.weights_sha256, range(first, first + len(images))
        return encode_pngs(images, [Provenance(weights, self.label, seed, index, truncation) for index in indices])


def generate_folder(bundle: Path, label: str, n: int, seed: int, truncation: float | None, out: Path) -> None:
    """Write images 0 .. n - 1 of a seed as PNG files beside manifest.csv; `out` appears when all is written.

    Args:
        truncation: standard deviation of the latents; None for that of the images that the gate judged.

    Raises:
        CheckpointError: `bundle` is no bundle, was changed, or has no generator for the label.
        ParamsError: `n`, `seed` or `truncation` is out of range, or `out` is already there.
    """
    if n < 1 or not 0 <= seed < 2**63:
        raise ParamsError(f"--n must be at least 1 and --seed at least 0 and under 2^63 (got {n} and {seed})")
    if truncation is not None and not 0 < truncation <= 1:
        raise ParamsError(f"--truncation must be above 0 and at most 1 (got {truncation:g})")
    if out.exists():
        raise ParamsError(f"{out} is already there; name a new folder with --out")
    sampler = Sampler(bundle, label)
    spread = sampler.generator.truncation if truncation is None else truncation
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ("image_id", "path", "label", "generator", "seed", "index", "truncation", "sha256", "width", "height")
    writer.writerow(columns)
    with new_dir(out) as folder, progress(f"generate {label}", n, "images") as advance:
        for first in range(0, n, PASS):
            images = sampler.generate(seed, first, min(PASS, n - first), spread)
            for index, png in enumerate(sampler.pngs(images, seed, first, spread), first):
                name = f"{index:06d}.png"
                (folder / name).write_bytes(png)
                identity = [f"synthetic-{label}-{seed}-{index:06d}", name, label, sampler.generator.weights_sha256]
                size = 2 * [sampler.generator.resolution]
                writer.writerow([*identity, seed, index, spread, hashlib.sha256(png).hexdigest(), *size])
                advance()
        write_text(folder / "manifest.csv", text.getvalue())
