"""Synthetic images: image i depends on the generator, the seed and i alone, whatever the batch size or shard."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from raresynth.errors import CheckpointError
from raresynth.gan.latents import CHUNK, aligned_chunks, latents
from raresynth.gan.networks import Generator
from raresynth.gan.png import Pixels, Provenance, encode_png, to_pixels
from raresynth.lineage import Report, load_checkpoint, new_dir, sha256_file, write_report, write_text
from raresynth.progress import progress

COLUMNS = ("image_id", "path", "label", "generator", "seed", "index", "sha256", "width", "height")
"""Columns of a synthetic manifest; `path` is relative to the folder that holds the classes' folders."""


class SynthesisReport(Report):
    """What was synthesised for one class."""

    label: str
    n_images: int
    resolution: int
    seed: int
    generator: str
    """SHA-256 of the generator's weights."""
    manifest_sha256: str


def load_generator(generator_dir: Path, device: str) -> tuple[Generator, dict[str, Any]]:
    """The averaged generator of a pretrain or finetune checkpoint, ready to draw from, and the checkpoint's meta.

    Raises:
        CheckpointError: there is no such checkpoint, or it was changed.
    """
    tensors, meta = load_checkpoint(generator_dir, device)
    if "architecture" not in meta:
        raise CheckpointError(f"{generator_dir} holds no generator; name the folder that finetune left")
    shape = meta["architecture"]
    generator = Generator(shape["resolution"], shape["latent_dim"], shape["width"], shape["generator_conv"])
    prefix = "generator."
    generator.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
    return generator.requires_grad_(False).eval().to(device), meta


def generate(generator: Generator, seed: int, indices: Sequence[int]) -> Pixels:
    """Images of the given ascending indices (at least one); uint8 (len(indices), R, R, 3)."""
    return np.concatenate(list(_generated(generator, seed, indices)))


@torch.inference_mode()
def _generated(generator: Generator, seed: int, indices: Sequence[int]) -> Iterator[Pixels]:
    device = generator.project.weight.device
    for first, rows in aligned_chunks(indices):
        latent = torch.from_numpy(latents(seed, first, CHUNK, generator.latent_dim)).to(device)
        yield to_pixels(generator(latent).float().cpu().numpy()[rows])


def synthesize(generator_dir: Path, label: str, n: int, out_dir: Path, seed: int, device: str) -> SynthesisReport:
    """Draw images 0 .. n - 1 of a class as PNG files, beside manifest.csv (`COLUMNS`) and report.json.

    `out_dir` appears when everything in it is written; what was there before is replaced.

    Raises:
        CheckpointError: `generator_dir` holds no generator of this class.
    """
    generator, meta = load_generator(generator_dir, device)
    if meta["label"] != label:
        raise CheckpointError(
            f"{generator_dir} draws {meta['label'] or 'all classes'}, not {label}; name its own folder"
        )
    resolution = int(meta["architecture"]["resolution"])

    with new_dir(out_dir) as folder:
        (folder / "images").mkdir()

        def write(index: int, pixels: Pixels) -> dict[str, object]:
            png = encode_png(pixels, Provenance(meta["weights_sha256"], label, seed, index))
            name = f"images/{index:06d}.png"
            (folder / name).write_bytes(png)
            return {
                "image_id": f"synthetic-{label}-{seed}-{index:06d}",
                "path": f"{out_dir.name}/{name}",
                "label": label,
                "generator": meta["weights_sha256"],
                "seed": seed,
                "index": index,
                "sha256": hashlib.sha256(png).hexdigest(),
                "width": resolution,
                "height": resolution,
            }

        rows: list[dict[str, object]] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool, progress(f"synthesize {label}", n, "images") as advance:
            for chunk in _generated(generator, seed, range(n)):
                rows.extend(pool.map(write, range(len(rows), len(rows) + len(chunk)), chunk))
                advance(len(chunk))
        manifest = pd.DataFrame(rows, columns=list(COLUMNS))
        write_text(folder / "manifest.csv", manifest.to_csv(index=False, lineterminator="\n"))
        report = SynthesisReport(
            label=label,
            n_images=n,
            resolution=resolution,
            seed=seed,
            generator=meta["weights_sha256"],
            manifest_sha256=sha256_file(folder / "manifest.csv"),
        )
        write_report(folder / "report.json", report)
    return report
