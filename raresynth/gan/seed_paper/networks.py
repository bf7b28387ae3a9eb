"""Generator and discriminator: small convolutional networks (seed paper, sections II.C and III.A)."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

BASE = 4
"""Side of the generator's first feature map."""
PATCH = 8
"""Side of the patch discriminator's feature map, the size that the pooled Barlow loss looks at."""
LEAK = 0.2
"""Slope of the discriminators' LeakyReLU below 0."""
MAX_FACTOR = 8
"""Deep layers have at most this many times the channels of the widest-resolution layer."""


def _channels(width: int, side: int, resolution: int) -> int:
    return width * min(resolution // side, MAX_FACTOR)


class SeparableUp(nn.Sequential):
    """Twice the side by two depthwise-separable convolutions: pointwise, (nearest upsampling,) depthwise 3x3.

    A pointwise convolution commutes with nearest upsampling, so the first runs on the small map, at a quarter of the
    cost. BatchNorm and ReLU follow each.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 1, bias=False),
            nn.Upsample(scale_factor=2),
            *_depthwise(channels_out),
            nn.Conv2d(channels_out, channels_out, 1, bias=False),
            *_depthwise(channels_out),
        )


def _depthwise(channels: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


class DenseUp(nn.Sequential):
    """Twice the side as in DCGAN: transposed 4x4 convolution, BatchNorm, ReLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
        )


class Generator(nn.Module):
    """Latent (N, latent_dim) -> image (N, 3, R, R) in [-1, 1]."""

    def __init__(self, resolution: int, latent_dim: int, width: int, conv: Literal["depthwise", "dense"]) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        up = {"depthwise": SeparableUp, "dense": DenseUp}[conv]
        channels = _channels(width, BASE, resolution)
        self.project = nn.Linear(latent_dim, channels * BASE * BASE, bias=False)
        self.first = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        sides = [BASE * 2**level for level in range(1, (resolution // BASE).bit_length())]
        self.blocks = nn.Sequential()
        for side in sides:
            self.blocks.append(up(channels, _channels(width, side, resolution)))
            channels = _channels(width, side, resolution)
        self.to_rgb = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.project(latent).unflatten(1, (-1, BASE, BASE))
        return self.to_rgb(self.blocks(self.first(x))).tanh()  # type: ignore[no-any-return]


class Discriminator(nn.Module):
    """Image (N, 3, R, R) -> logits that it is real, and the last feature map.

    `patch`: halves the side down to 8x8 and judges each place there, logits (N, 1, 8, 8) (PatchGAN).
    `scalar`: DCGAN, halves down to 4x4 with BatchNorm and gives one logit, (N, 1, 1, 1).
    """

    def __init__(self, resolution: int, width: int, head: Literal["patch", "scalar"]) -> None:
        super().__init__()
        patch = head == "patch"
        smallest = PATCH if patch else BASE
        self.blocks = nn.Sequential()
        channels, side = 3, resolution
        while side > smallest:
            side //= 2
            out = _channels(width, side, resolution)
            norm = nn.Identity() if side == resolution // 2 else nn.BatchNorm2d(out)
            conv = nn.Conv2d(channels, out, 4, stride=2, padding=1)
            self.blocks.append(nn.Sequential(conv, norm, nn.LeakyReLU(LEAK, inplace=True)))
            channels = out
        if patch:
            conv = nn.Conv2d(channels, channels, 3, padding=1)
            self.blocks.append(nn.Sequential(conv, nn.BatchNorm2d(channels), nn.LeakyReLU(LEAK, inplace=True)))
        self.features = channels * smallest**2
        self.head = nn.Conv2d(channels, 1, 3, padding=1) if patch else nn.Conv2d(channels, 1, BASE)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.blocks(images)
        return self.head(features), features

    def freeze(self, n_blocks: int) -> None:
        """Freeze-D: the first blocks, those next to the image, no longer learn (Mo et al., 2020)."""
        for block in list(self.blocks)[:n_blocks]:
            block.requires_grad_(False).eval()


def pooled_features(features: Tensor) -> Tensor:
    """Feature map (N, C, h, w) -> (N, C * 64), average-pooled to 8x8 (seed paper, section III.A)."""
    return F.adaptive_avg_pool2d(features, PATCH).flatten(1)


def initialise(network: nn.Module) -> None:
    """Weights that keep the signal's scale: DCGAN's N(0, 0.02) where BatchNorm rescales, He's where none does."""
    normalised = any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            if normalised:
                nn.init.normal_(module.weight, 0.0, 0.02)
            else:
                nn.init.kaiming_normal_(module.weight, a=LEAK)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
