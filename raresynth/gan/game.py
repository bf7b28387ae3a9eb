"""What the games of all presets share: the networks, their optimizers, and the moving average."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from raresynth.gan.presets import GanSettings
from raresynth.gan.ranks import ALONE, Ranks
from raresynth.gan.rng import Rng

Settings = TypeVar("Settings", bound=GanSettings)


class Game(ABC, Generic[Settings]):
    """Discriminator against generator, a step at a time. No loop, files or progress here.

    Attributes:
        losses: names of what a step returns, in the order in which they are computed, so that the first one not
            finite is where a collapse began.
        lazy: those of them that are taken at some steps only, and are 0 at the others.
        generator_ema: moving average of the generator's weights: the one that images are drawn from.
    """

    losses: ClassVar[tuple[str, ...]]
    lazy: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, settings: Settings, n_classes: int, seed: int, device: str, finetuning: bool, ranks: Ranks = ALONE
    ) -> None:
        """Fresh networks; equal seeds give equal weights on every device and in every rank."""
        self.settings, self.finetuning, self.ranks = settings, finetuning, ranks
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            generator, discriminator = self.build(n_classes)
        self.generator, self.discriminator = generator.to(device), discriminator.to(device)
        self.generator_ema = copy.deepcopy(self.generator).requires_grad_(False).eval()
        self.start_optimizers(settings.learning_rate)

    def start_optimizers(self, learning_rate: float) -> None:
        """Fresh optimizers for what is to be learned; `schedule` starts from this rate."""
        self.learning_rate = learning_rate
        self.g_optimizer = self._adam(self.generator, learning_rate)
        self.d_optimizer = self._adam(self.discriminator, learning_rate)

    def _adam(self, network: nn.Module, learning_rate: float) -> torch.optim.Adam:
        return torch.optim.Adam(learned(network), lr=learning_rate, betas=self.settings.betas, fused=True)

    @abstractmethod
    def build(self, n_classes: int) -> tuple[Any, Any]:
        """Generator and discriminator, initialised; what a branch is not to learn is frozen."""

    @abstractmethod
    def step(self, real: Tensor, labels: Tensor, rng: Rng, step: int, steps: int) -> Tensor:
        """Update each network once.

        Args:
            real: (N, 3, R, R) in [-1, 1], this rank's part of the batch.
            labels: (N,) class numbers of the reals.
            step, steps: this step, counted from 0, of how many.

        Returns:
            `losses` on this rank's part, fp32.
        """

    def update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """One step of an optimizer down a loss; over several ranks down its mean."""
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.ranks.average_gradients(p for group in optimizer.param_groups for p in group["params"])
        optimizer.step()

    def rate(self, progress: float) -> float:
        """Factor on the learning rate when this part of the training is done."""
        return 1.0

    def schedule(self, progress: float) -> None:
        """Set the optimizers' rates for when this part of the training is done."""
        for optimizer in (self.g_optimizer, self.d_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * self.rate(progress)

    def is_conditional(self, step: int, steps: int) -> bool:
        """Whether the generator knows the classes in full after `step` of `steps`."""
        return False

    def adapt(self) -> None:
        """Adjust what follows the course of training; called every few steps, always after the same ones."""

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "generator_ema": self.generator_ema,
        }

    def extra_state(self) -> dict[str, Tensor]:
        """What a resumed training needs besides networks and optimizers."""
        return {}

    def restore_extra(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `extra_state` gave."""

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the averaged generator: `decay` of itself, the rest of the generator; buffers are copied."""
        averaged = [p.detach() for p in self.generator_ema.parameters()]
        current = [p.detach() for p in self.generator.parameters()]
        torch._foreach_lerp_(averaged, current, 1.0 - decay)
        for target, source in zip(self.generator_ema.buffers(), self.generator.buffers(), strict=True):
            target.copy_(source)


def learned(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [p for p in network.parameters() if p.requires_grad]


@contextmanager
def held(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within the block these parameters take no gradient, which saves computing it."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    yield
    for parameter in parameters:
        parameter.requires_grad_(True)
