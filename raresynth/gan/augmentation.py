"""Augmentations as batched, differentiable tensor maths.

Two kinds. Symmetries (flips, quarter turns) map real images to equally likely real images, so they are applied to
the reals alone and the generator may learn them. Changes (rotation, shift, colour) would become part of what it
draws, so the discriminator sees real and generated images through them alike, as in DiffAugment.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from raresynth.config import Symmetries
from raresynth.gan.rng import Rng


@dataclass(frozen=True)
class Policy:
    """Which symmetries there are, and the ranges of the changes; one random draw an image."""

    quarter_turns: bool
    """Turn images without an up by 0, 90, 180 or 270 degrees besides the horizontal flip."""
    rotation: float
    """Largest rotation either way, degrees."""
    shift: float
    """Largest shift either way, part of the side, in whole pixels."""
    brightness: float
    contrast: float
    saturation: float
    """These three: largest relative change either way."""
    hue: float
    """Largest turn of the colour circle either way, part of a full turn."""


POLICIES: dict[str, Policy] = {
    # Seed paper, section II.B: flip, rotation within 10 degrees, small colour changes.
    "paper": Policy(False, 10.0, 0.0, 0.1, 0.1, 0.1, 0.02),
    # Dermoscopy has no up, and colour is diagnostic, so it is changed less.
    "dermoscopy": Policy(True, 0.0, 0.0625, 0.05, 0.05, 0.05, 0.005),
}


@cache
def _colours(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights (3,) of grey, and the cross product (3, 3) with the axis of greys; sent to a device once."""
    grey = torch.tensor([0.299, 0.587, 0.114], dtype=dtype)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], dtype=dtype) / math.sqrt(3)
    return grey.to(device), cross.to(device)


def symmetric(images: Tensor, policy: str, symmetries: Symmetries, rng: Rng) -> Tensor:
    """A random one of each real image's mirror images (and quarter turns); exact.

    Args:
        images: (N, 3, R, R).
        policy: a name in `POLICIES`, or "none".
        symmetries: those that the images have; no others are made use of.
        rng: on the images' device.
    """
    if policy == "none" or symmetries == "none":
        return images
    images = _some(images, images.flip(3), rng)
    if POLICIES[policy].quarter_turns and symmetries == "all":
        # With the other flip and the transpose: all eight symmetries of the square.
        images = _some(images, images.flip(2), rng)
        images = _some(images, images.transpose(2, 3), rng)
    return images


def _some(images: Tensor, others: Tensor, rng: Rng) -> Tensor:
    return torch.where(rng.uniform(len(images), 1, 1, 1) < 0.5, images, others)


def changed(images: Tensor, policy: str, rng: Rng) -> Tensor:
    """Each image rotated, shifted and tinted at random; (N, 3, R, R) in [-1, 1], which tints may leave slightly.

    Args:
        policy: a name in `POLICIES`, or "none".
        rng: on the images' device.
    """
    if policy == "none":
        return images
    chosen = POLICIES[policy]
    return _tinted(_moved(images, chosen, rng), chosen, rng)


def _within(limit: float, share: Tensor) -> Tensor:
    """From -limit to limit, by shares from 0 to 1."""
    return (share * 2.0 - 1.0) * limit


def _moved(images: Tensor, policy: Policy, rng: Rng) -> Tensor:
    """Rotate and shift in one bilinear resampling; what leaves the frame is mirrored in."""
    n, side = len(images), images.shape[-1]
    angle = _within(math.radians(policy.rotation), rng.uniform(n))
    shift = _within(policy.shift * side, rng.uniform(2, n, images=1)).round() * (2.0 / side)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1).view(n, 2, 3)
    grid = F.affine_grid(matrix, [n, 3, side, side], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _tinted(images: Tensor, policy: Policy, rng: Rng) -> Tensor:
    """Brightness, contrast, saturation and hue as one affine map of RGB an image."""
    n = len(images)
    brightness, contrast, saturation = (
        (1.0 + _within(limit, rng.uniform(n))).view(n, 1, 1)
        for limit in (policy.brightness, policy.contrast, policy.saturation)
    )
    hue = _within(2 * math.pi * policy.hue, rng.uniform(n)).view(n, 1, 1)
    grey, cross = _colours(images.device, images.dtype)
    identity = torch.eye(3, device=images.device)
    # Rotation about the grey axis (1, 1, 1) / sqrt(3), Rodrigues' formula.
    axis = torch.full((3, 3), 1 / 3, device=images.device)
    turn = axis + hue.cos() * (identity - axis) + hue.sin() * cross
    tint = (turn @ (saturation * identity + (1.0 - saturation) * grey.expand(3, 3))) * brightness * contrast
    # Factors apply to intensities in [0, 1]; contrast pulls towards the image's mean grey, as torchvision does.
    flat = (images.flatten(2) + 1.0) / 2.0
    mean = (grey @ flat.mean(2).T).view(n, 1, 1) * brightness
    return (torch.baddbmm((1.0 - contrast) * mean, tint, flat) * 2.0 - 1.0).view_as(images)
