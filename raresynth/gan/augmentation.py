"""Augmentations as batched, differentiable tensor maths.

Whatever the policy, the discriminator sees real and generated images through it alike (as DiffAugment does),
so a rotation or a tint never becomes part of what the generator learns to draw.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Policy:
    """Ranges of the random draws, one draw an image."""

    quarter_turns: bool
    """Turn by 0, 90, 180 or 270 degrees: exact, and right for images without an up."""
    rotation: float
    """Largest rotation either way, degrees."""
    translation: float
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
    "dermoscopy": Policy(True, 0.0, 0.125, 0.05, 0.05, 0.05, 0.005),
}

_GREY = (0.299, 0.587, 0.114)


def augment(images: Tensor, policy: str, rng: torch.Generator) -> Tensor:
    """A random view of each image; `images` (N, 3, R, R) in [-1, 1], changed colours may leave that range slightly.

    Args:
        policy: a name in `POLICIES`, or "none".
        rng: generator on the images' device.
    """
    if policy == "none":
        return images
    chosen = POLICIES[policy]
    return _colour(_geometry(images, chosen, rng), chosen, rng)


def _uniform(n: int, limit: float, rng: torch.Generator) -> Tensor:
    return (torch.rand(n, generator=rng, device=rng.device) * 2.0 - 1.0) * limit


def _geometry(images: Tensor, policy: Policy, rng: torch.Generator) -> Tensor:
    """Flip, turn and shift in one bilinear resampling; what leaves the frame is mirrored in."""
    n, side = len(images), images.shape[-1]
    flip = _uniform(n, 1.0, rng).sign()
    angle = _uniform(n, math.radians(policy.rotation), rng)
    if policy.quarter_turns:
        angle = angle + torch.randint(4, (n,), generator=rng, device=rng.device) * (math.pi / 2)
    shift = (_uniform(2 * n, policy.translation * side, rng).round() * (2.0 / side)).view(2, n)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([cos * flip, -sin, shift[0], sin * flip, cos, shift[1]], 1).view(n, 2, 3)
    grid = F.affine_grid(matrix, [n, 3, side, side], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _colour(images: Tensor, policy: Policy, rng: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue as one affine map of RGB an image."""
    n = len(images)
    brightness, contrast, saturation = (
        (1.0 + _uniform(n, limit, rng)).view(n, 1, 1)
        for limit in (policy.brightness, policy.contrast, policy.saturation)
    )
    hue = _uniform(n, 2 * math.pi * policy.hue, rng).view(n, 1, 1)
    grey = images.new_tensor(_GREY).expand(3, 3)
    identity = torch.eye(3, device=images.device)
    # Rotation about the grey axis (1, 1, 1) / sqrt(3), Rodrigues' formula.
    axis = torch.full((3, 3), 1 / 3, device=images.device)
    cross = images.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = axis + hue.cos() * (identity - axis) + hue.sin() * cross
    tint = (turn @ (saturation * identity + (1.0 - saturation) * grey)) * brightness * contrast
    # Factors apply to intensities in [0, 1]; contrast pulls towards the image's mean grey, as torchvision does.
    flat = (images.flatten(2) + 1.0) / 2.0
    mean = (images.new_tensor(_GREY) @ flat.mean(2).T).view(n, 1, 1) * brightness
    return (torch.baddbmm((1.0 - contrast) * mean, tint, flat) * 2.0 - 1.0).view_as(images)
