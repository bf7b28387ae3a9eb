"""Augmentation of a whole batch at once as tensor maths; every draw comes from one generator on the CPU."""

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional

from raresynth.config import Symmetries

MIXUP_ALPHA = 0.2
TILT = math.pi / 12
"""Strong augmentation turns images that have an up by no more than this either way, radians."""


def to_input(pixels: Tensor) -> Tensor:
    """Uint8 (N, H, W, 3) to float (N, 3, H, W) in [-1, 1], channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def ordinary(images: Tensor, symmetries: Symmetries, generator: Generator) -> Tensor:
    """The augmentation of every arm: the images' symmetries and a mild random crop.

    Args:
        images: float (N, 3, H, W) in [-1, 1].
        symmetries: which flips and quarter turns leave an image as likely.
        generator: CPU generator; equal states give equal results.
    """
    turns = torch.randint(4, (len(images),), generator=generator) * (math.pi / 2)
    angles = turns if symmetries == "all" else torch.zeros_like(turns)
    return _warp(images, angles, symmetries, smallest_crop=0.8, generator=generator)


def strong(images: Tensor, symmetries: Symmetries, generator: Generator) -> Tensor:
    """Symmetries, turns by any angle (slight ones where there is an up), larger crops, colour jitter, an erased square.

    Args and range as in `ordinary`.
    """
    shares = torch.rand(len(images), generator=generator)
    angles = shares * (2 * math.pi) if symmetries == "all" else (shares * 2 - 1) * TILT
    warped = _warp(images, angles, symmetries, smallest_crop=0.6, generator=generator)
    return _erase(_jitter_colour(warped, generator), generator)


def mix(images: Tensor, targets: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018): convex mixtures of pairs of images and of their targets.

    Args:
        images: (N, 3, H, W).
        targets: class probabilities (N, C).
    """
    # Beta(a, a) from two gamma draws; torch samples neither from a given generator, so by Johnk's method.
    u = torch.rand(64, 2, dtype=torch.float64, generator=generator).pow(1 / MIXUP_ALPHA)
    accepted = u[(u.sum(1) <= 1) & (u.sum(1) > 0)]
    share = float(accepted[0, 0] / accepted[0].sum()) if len(accepted) else 1.0
    share = max(share, 1 - share)
    partner = torch.randperm(len(images), generator=generator).to(images.device)
    return images.lerp(images[partner], 1 - share), targets.lerp(targets[partner], 1 - share)


def _uniform(n: int, low: float, high: float, like: Tensor, generator: Generator) -> Tensor:
    values = torch.rand(n, 1, 1, 1, generator=generator) * (high - low) + low
    return values.to(like.device)


def _warp(images: Tensor, angles: Tensor, symmetries: Symmetries, smallest_crop: float, generator: Generator) -> Tensor:
    """Flip, turn and crop each image by one affine resampling; what lies outside is mirrored."""
    n = len(images)
    scale = torch.rand(n, generator=generator) * (1 - smallest_crop) + smallest_crop
    flip = torch.randint(2, (n,), generator=generator) * 2.0 - 1
    flip = flip.abs() if symmetries == "none" else flip
    shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * (1 - scale)[:, None]
    cosine, sine = scale * angles.cos(), scale * angles.sin()
    rows = torch.stack([torch.stack([cosine * flip, -sine], 1), torch.stack([sine * flip, cosine], 1)], 1)
    theta = torch.cat([rows, shift[:, :, None]], 2).to(images.device)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _jitter_colour(images: Tensor, generator: Generator) -> Tensor:
    n = len(images)
    grey = images.mean(1, keepdim=True)
    images = grey.lerp(images, _uniform(n, 0.8, 1.2, images, generator))
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean.lerp(images, _uniform(n, 0.8, 1.2, images, generator))
    tint = (torch.rand(n, 3, 1, 1, generator=generator) * 0.1 - 0.05).to(images.device)
    return (images + _uniform(n, -0.2, 0.2, images, generator) + tint).clamp(-1, 1)


def _erase(images: Tensor, generator: Generator) -> Tensor:
    """Set a square of up to 40 % of the side to mid-grey in half of the images."""
    n, side = len(images), images.shape[-1]
    centre = torch.rand(n, 2, generator=generator) * side
    half = torch.rand(n, generator=generator) * 0.2 * side * (torch.rand(n, generator=generator) < 0.5)
    place = torch.arange(side) + 0.5
    inside = (place[None, None] - centre[:, :, None]).abs() < half[:, None, None]
    square = (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]
    return images.masked_fill(square.to(images.device), 0.0)
