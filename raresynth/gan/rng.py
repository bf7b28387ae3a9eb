"""Random numbers of a training step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raresynth.gan.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Rng:
    """Random numbers for the images of a batch.

    They are drawn for the whole batch, of which a rank takes those of its own images: it sees what one process would.
    """

    generator: torch.Generator
    ranks: Ranks = ALONE

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def uniform(self, *shape: int, images: int = 0) -> Tensor:
        """From 0 to 1; the axis `images` counts this rank's images."""
        return self._own(torch.rand, shape, images)

    def normal(self, *shape: int) -> Tensor:
        """Mean 0, standard deviation 1; the first axis counts this rank's images."""
        return self._own(torch.randn, shape, 0)

    def _own(self, draw: Callable[..., Tensor], shape: tuple[int, ...], images: int) -> Tensor:
        whole = list(shape)
        whole[images] *= self.ranks.world
        return self.ranks.own(draw(whole, generator=self.generator, device=self.device), images)
