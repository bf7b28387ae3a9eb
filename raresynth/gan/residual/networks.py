"""Generator and discriminator of the preset `raresynth`: residual, without BatchNorm, small.

Both take a class signal and its strength from 0 to 1. At 0 they are the unconditional networks of the same weights
(Shahbazi et al. 2022, section 4: on few images a GAN that is class-conditional from its first step collapses).
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BASE = 4
"""Side of the generator's first and the discriminator's last feature map."""
LEAK = 0.2
"""Slope of every LeakyReLU below 0."""
GAIN = math.sqrt(2 / (1 + LEAK**2))
"""What keeps a signal's variance through LeakyReLU and a convolution (He et al. 2015)."""
MAX_FACTOR = 8
"""Deep layers have at most this many times the channels of the widest-resolution layer."""
MAPPING = 128
"""Length of the generator's style vector."""


def _channels(width: int, side: int, resolution: int) -> int:
    return width * min(resolution // side, MAX_FACTOR)


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, LEAK)


def _conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1, gain: float = GAIN) -> nn.Conv2d:
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=(kernel - 1) // 2)
    nn.init.normal_(conv.weight, 0.0, gain / math.sqrt(channels_in * kernel**2))
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def _linear(features_in: int, features_out: int, gain: float = GAIN) -> nn.Linear:
    linear = nn.Linear(features_in, features_out)
    nn.init.normal_(linear.weight, 0.0, gain / math.sqrt(features_in))
    nn.init.zeros_(linear.bias)
    return linear


class Mapping(nn.Module):
    """Latent and class -> style vector (N, MAPPING). The class signal starts at nothing; one label serves all rows."""

    def __init__(self, latent_dim: int, n_classes: int) -> None:
        super().__init__()
        self.latent = _linear(latent_dim, MAPPING)
        self.classes = nn.Embedding(n_classes, MAPPING)
        self.signal = _linear(MAPPING, MAPPING, gain=0.0)
        self.style = _linear(MAPPING, MAPPING)

    def forward(self, latent: Tensor, labels: Tensor, strength: float) -> Tensor:
        x = self.latent(latent)
        if strength > 0:
            x = x + strength * self.signal(self.classes(labels))
        return _activate(self.style(_activate(x)))


class UpBlock(nn.Module):
    """Twice the side. The second convolution starts at 0, so that a fresh block only enlarges its input.

    A pointwise convolution commutes with nearest upsampling, so those run on the small map, at a quarter of the cost.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.style = _linear(MAPPING, channels_out, gain=0.0)
        self.shortcut = _conv(channels_in, channels_out, 1, gain=1.0)
        self.reduce = _conv(channels_in, channels_out, 1)
        self.conv = _conv(channels_out, channels_out, 3, gain=0.0)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        y = self.reduce(_activate(x)) * (1 + self.style(style))[:, :, None, None]
        y = self.conv(F.interpolate(_activate(y), scale_factor=2))
        return F.interpolate(self.shortcut(x), scale_factor=2) + y  # type: ignore[no-any-return]


class SkipLayerExcitation(nn.Module):
    """A small map's content scales the channels of a large one (Liu et al. 2021, section 3.1); starts at no change."""

    def __init__(self, channels_small: int, channels_large: int) -> None:
        super().__init__()
        self.squeeze = _linear(channels_small * BASE**2, channels_large)
        self.excite = _linear(channels_large, channels_large, gain=0.0)

    def forward(self, small: Tensor, large: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(small, BASE).flatten(1)
        return large * (1 + self.excite(_activate(self.squeeze(x))).tanh())[:, :, None, None]  # type: ignore[no-any-return]


class Generator(nn.Module):
    """Latent (N, latent_dim), labels (N,) and the class signal's strength -> image (N, 3, R, R) in [-1, 1].

    Args:
        grey: draws one channel, which is red, green and blue.
    """

    def __init__(self, resolution: int, latent_dim: int, width: int, n_classes: int, grey: bool) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.mapping = Mapping(latent_dim, n_classes)
        sides = [BASE * 2**level for level in range((resolution // BASE).bit_length())]
        channels = {side: _channels(width, side, resolution) for side in sides}
        self.project = _linear(MAPPING, channels[BASE] * BASE**2)
        self.blocks = nn.ModuleList(UpBlock(channels[small], channels[large]) for small, large in pairwise(sides))
        self.sources = {resolution // 2: BASE, resolution: 2 * BASE}
        """Side of an excited map -> side of the map that excites it."""
        self.excitations = nn.ModuleDict(
            {str(large): SkipLayerExcitation(channels[small], channels[large]) for large, small in self.sources.items()}
        )
        self.to_rgb = _conv(channels[resolution], 1 if grey else 3, 3, gain=0.3)

    def forward(self, latent: Tensor, labels: Tensor, strength: float) -> Tensor:
        style = self.mapping(latent, labels, strength)
        x = self.project(style).unflatten(1, (-1, BASE, BASE))
        maps = {BASE: x}
        for block in self.blocks:
            x = block(x, style)
            side = x.shape[-1]
            if side in self.sources:
                x = self.excitations[str(side)](maps[self.sources[side]], x)
            maps[side] = x
        return self.to_rgb(_activate(x)).tanh().expand(-1, 3, -1, -1)  # type: ignore[no-any-return]


class DownBlock(nn.Module):
    """Half the side; what it adds to its pooled input is scaled so that the variance stays."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.down = _conv(channels_in, channels_out, 4, stride=2)
        self.conv = _conv(channels_out, channels_out, 3)
        self.shortcut = _conv(channels_in, channels_out, 1, gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(_activate(self.down(_activate(x))))
        return (self.shortcut(F.avg_pool2d(x, 2)) + y) * math.sqrt(0.5)  # type: ignore[no-any-return]


class Discriminator(nn.Module):
    """Image (N, 3, R, R), labels (N,) and the class signal's strength -> logit (N,) that it is real.

    A projection head (Miyato and Koyama 2018) judges the class. The discriminator also sees how much the images of a
    group differ (minibatch standard deviation, Karras et al. 2018, section 3), or the generator would show less
    variety than there is.

    Args:
        group: number of images, one after the other, whose deviation is taken; divides N.
    """

    def __init__(self, resolution: int, width: int, n_classes: int, group: int) -> None:
        super().__init__()
        self.group = group
        side = resolution // 2
        channels = _channels(width, side, resolution)
        self.stem = _conv(3, channels, 4, stride=2)
        self.blocks = nn.ModuleList()
        while side > BASE:
            side //= 2
            self.blocks.append(DownBlock(channels, _channels(width, side, resolution)))
            channels = _channels(width, side, resolution)
        self.last = _linear((channels + 1) * BASE**2, channels)
        self.real = _linear(channels, 1, gain=1.0)
        self.classes = nn.Embedding(n_classes, channels)
        nn.init.zeros_(self.classes.weight)

    def forward(self, images: Tensor, labels: Tensor, strength: float) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        x = self._with_deviation(_activate(x))
        x = _activate(self.last(x.flatten(1)))
        logit = self.real(x).squeeze(1)
        if strength > 0:
            logit = logit + strength * (self.classes(labels) * x).sum(1) / math.sqrt(x.shape[1])
        return logit  # type: ignore[no-any-return]

    def _with_deviation(self, x: Tensor) -> Tensor:
        """One channel more: the mean standard deviation over each group of images, the same at every place."""
        variance = x.float().view(-1, self.group, *x.shape[1:]).var(1, correction=0)
        deviation = (variance + 1e-8).sqrt().mean((1, 2, 3)).repeat_interleave(self.group)
        return torch.cat([x, deviation[:, None, None, None].expand(-1, 1, *x.shape[2:]).to(x.dtype)], 1)
