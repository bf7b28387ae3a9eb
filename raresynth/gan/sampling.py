"""Images from a checkpoint: image i depends on generator, seed, truncation and i alone, whatever it is drawn with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raresynth.errors import CheckpointError
from raresynth.gan.latents import CHUNK, aligned_chunks, latents
from raresynth.gan.png import Pixels, to_pixels
from raresynth.gan.residual.networks import Generator as ResidualGenerator
from raresynth.gan.seed_paper.networks import Generator as SeedPaperGenerator
from raresynth.lineage import load_checkpoint
from raresynth.training_state import part


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
        grey = shape.get("grey", False)  # checkpoints that do not say so were made when all were drawn in colour
        residual = ResidualGenerator(*size, len(meta["classes"]), grey)
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
