"""Synthetic images: image i depends on generator, seed, truncation and i alone, whatever the batch size or shard."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from raresynth.config import SynthesisConfig
from raresynth.dataset.manifest import SYNTHETIC_COLUMNS
from raresynth.errors import CheckpointError
from raresynth.gan.latents import CHUNK, aligned_chunks, latents
from raresynth.gan.png import Pixels, Provenance, encode_png, to_pixels
from raresynth.gan.residual.networks import Generator as ResidualGenerator
from raresynth.gan.seed_paper.networks import Generator as SeedPaperGenerator
from raresynth.lineage import Report, load_checkpoint, new_dir, sha256_file, write_report, write_text
from raresynth.progress import progress
from raresynth.training_state import part

MOST_DRAWN = 8
"""At most so many images are drawn for each one that is wanted."""

Rejection = Literal["atypical", "near_copy"]


class Sieve(Protocol):
    """Tells which images are not to be used. `quality` has one; `gan` does not import it."""

    def judge(self, images: Pixels) -> Sequence[Rejection | None]:
        """Why each image is rejected, or None."""


class SynthesisReport(Report):
    """What was synthesised for one class."""

    label: str
    n_images: int
    n_wanted: int
    n_drawn: int
    rejected: dict[Rejection, int]
    resolution: int
    seed: int
    truncation: float
    generator: str
    """SHA-256 of the generator's weights."""
    manifest_sha256: str


class OfClass(nn.Module):
    """A conditional generator held to one class: latent (N, latent_dim) -> image."""

    def __init__(self, generator: ResidualGenerator, number: int) -> None:
        super().__init__()
        self.generator, self.latent_dim = generator, generator.latent_dim
        self.number = number

    def forward(self, latent: Tensor) -> Tensor:
        label = torch.full((1,), self.number, device=latent.device)  # for all rows; leaves their number free in a graph
        return self.generator(latent, label, 1.0)  # type: ignore[no-any-return]


LatentGenerator = OfClass | SeedPaperGenerator
"""Latent (N, latent_dim) -> image (N, 3, R, R) in [-1, 1]."""


def load_generator(
    generator_dir: Path, device: str, label: str | None = None
) -> tuple[LatentGenerator, dict[str, Any]]:
    """The averaged generator of a pretrain or finetune checkpoint, ready to draw from, and the checkpoint's meta.

    Args:
        label: the class to draw; None for the one that a class's own generator draws.

    Raises:
        CheckpointError: there is no such checkpoint, it was changed, or does not draw the class.
    """
    tensors, meta = load_checkpoint(generator_dir, device)
    if "architecture" not in meta:
        raise CheckpointError(f"{generator_dir} holds no generator; name the folder that finetune left")
    if label is not None and meta["label"] not in {label, None}:
        raise CheckpointError(f"{generator_dir} draws {meta['label']}, not {label}; name its own folder")
    shape = meta["architecture"]
    size = (shape["resolution"], shape["latent_dim"], shape["width"])
    generator: LatentGenerator
    if shape["preset"] == "raresynth":
        chosen = label or meta["label"]
        if chosen not in meta["classes"]:
            raise CheckpointError(f"{generator_dir} knows {', '.join(meta['classes'])}, not {chosen}; name one of them")
        residual = ResidualGenerator(*size, len(meta["classes"]))
        residual.load_state_dict(part(tensors, "generator"))
        generator = OfClass(residual, meta["classes"].index(chosen))
    else:
        generator = SeedPaperGenerator(*size, shape["generator_conv"])
        generator.load_state_dict(part(tensors, "generator"))
    return generator.requires_grad_(False).eval().to(device), meta


def generate(generator: LatentGenerator, seed: int, indices: Sequence[int], truncation: float = 1.0) -> Pixels:
    """Images of the given ascending indices (at least one); uint8 (len(indices), R, R, 3)."""
    chunks = aligned_chunks(indices)
    return np.concatenate([_chunk(generator, seed, first, truncation)[rows] for first, rows in chunks])


@torch.inference_mode()
def _chunk(generator: LatentGenerator, seed: int, first: int, truncation: float) -> Pixels:
    device = next(generator.parameters()).device
    latent = torch.from_numpy(latents(seed, first, CHUNK, generator.latent_dim, truncation)).to(device)
    return to_pixels(generator(latent).float().cpu().numpy())


def synthesize(
    generator_dir: Path, label: str, n: int, out_dir: Path, config: SynthesisConfig, device: str, sieve: Sieve | None
) -> SynthesisReport:
    """Draw a class until `n` images have passed the sieve: PNG files beside manifest.csv and report.json.

    Image 0 is drawn first. After `MOST_DRAWN` times `n` images it is over; the report then has fewer than were wanted.
    `out_dir` appears when everything in it is written; what was there before is replaced.

    Args:
        generator_dir: what finetune left for the class, or what pretrain left: a universal generator that knows no
            classes then draws whatever it does.

    Raises:
        CheckpointError: `generator_dir` holds no generator, or that of another class.
    """
    generator, meta = load_generator(generator_dir, device, label)
    rows: list[dict[str, object]] = []
    n_drawn = 0
    rejected: Counter[Rejection] = Counter()
    since: Counter[Rejection] = Counter()

    def write(drawn: tuple[int, Pixels, Counter[Rejection]]) -> dict[str, object]:
        return _write(folder, label, meta["weights_sha256"], config, *drawn)

    with new_dir(out_dir) as folder:
        (folder / "images").mkdir()
        with ThreadPoolExecutor(os.cpu_count()) as pool, progress(f"synthesize {label}", n, "images") as advance:
            while len(rows) < n and n_drawn < MOST_DRAWN * n:
                pixels = _chunk(generator, config.seed, n_drawn, config.truncation)
                kept = []
                for image, why in zip(pixels, sieve.judge(pixels) if sieve else [None] * CHUNK, strict=True):
                    if why is not None:
                        since[why] += 1
                        rejected[why] += 1
                    else:
                        kept.append((n_drawn, image, since))
                        since = Counter()
                    n_drawn += 1
                    if len(rows) + len(kept) == n:
                        break
                rows.extend(pool.map(write, kept))
                advance(len(kept))
        manifest = pd.DataFrame(rows, columns=list(SYNTHETIC_COLUMNS))
        write_text(folder / "manifest.csv", manifest.to_csv(index=False, lineterminator="\n"))
        report = SynthesisReport(
            label=label,
            n_images=len(rows),
            n_wanted=n,
            n_drawn=n_drawn,
            rejected={why: rejected[why] for why in ("atypical", "near_copy")},
            resolution=meta["architecture"]["resolution"],
            seed=config.seed,
            truncation=config.truncation,
            generator=meta["weights_sha256"],
            manifest_sha256=sha256_file(folder / "manifest.csv"),
        )
        write_report(folder / "report.json", report)
    return report


def _write(
    folder: Path,
    label: str,
    generator: str,
    config: SynthesisConfig,
    index: int,
    pixels: Pixels,
    rejected: Mapping[Rejection, int],
) -> dict[str, object]:
    """Write one image as PNG; returns its row of the manifest."""
    png = encode_png(pixels, Provenance(generator, label, config.seed, index, config.truncation))
    name = f"images/{index:06d}.png"
    (folder / name).write_bytes(png)
    return {
        "image_id": f"synthetic-{label}-{config.seed}-{index:06d}",
        "path": f"{label}/{name}",
        "label": label,
        "generator": generator,
        "seed": config.seed,
        "index": index,
        "truncation": config.truncation,
        "sha256": hashlib.sha256(png).hexdigest(),
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "rejected_atypical": rejected["atypical"],
        "rejected_near_copy": rejected["near_copy"],
    }
