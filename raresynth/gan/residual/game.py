"""The game of the preset `raresynth`: relativistic, with zero-centred gradient penalties (R3GAN, Huang et al. 2024)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raresynth.gan.augmentation import changed, symmetric
from raresynth.gan.game import Game, held, learned
from raresynth.gan.presets import ResidualSettings
from raresynth.gan.ranks import ALONE, Ranks
from raresynth.gan.residual.losses import gradient_penalty, relativistic
from raresynth.gan.residual.networks import Discriminator, Generator
from raresynth.gan.rng import Rng

PENALTY_EVERY_STEPS = 8
"""Lazy penalty: every so many steps, weighted by as much (Karras et al. 2020, StyleGAN2)."""
DECAY_FROM = 0.3
"""Part of the training from which on the learning rate falls, exponentially, to `FINAL_RATE` of what it was."""
FINAL_RATE = 0.1
BRANCH_RATE = 0.4
"""Fine-tuning starts at this part of the rate, and falls to the same final one."""
ADAPTATION_KIMG = 20.0
"""Images shown while the augmentation strength goes from 0 to 1, at the fastest."""


class ResidualGame(Game[ResidualSettings]):
    """Conditional on the class, whose signal is annealed in; all of it when fine-tuning."""

    losses = ("d_loss", "penalty", "g_loss")
    lazy = frozenset({"penalty"})

    def __init__(
        self, settings: ResidualSettings, n_classes: int, seed: int, device: str, finetuning: bool, ranks: Ranks = ALONE
    ) -> None:
        super().__init__(settings, n_classes, seed, device, finetuning, ranks)
        self.augmentation_strength = 0.0
        """Probability with which the discriminator sees an image changed."""
        self._confidence = torch.zeros(2, device=device)
        """Sum of the sign of real minus fake logits since the last adaptation, and of how many pairs."""

    def build(self, n_classes: int) -> tuple[nn.Module, Discriminator]:
        settings = self.settings
        # Channels last: convolutions are faster so, on a CPU in bf16 as on tensor cores.
        generator = Generator(settings.resolution, settings.latent_dim, settings.width, n_classes, settings.grey)
        discriminator = Discriminator(settings.resolution, settings.width, n_classes, settings.deviation_group)
        return generator.to(memory_format=torch.channels_last), discriminator.to(memory_format=torch.channels_last)

    def step(self, real: Tensor, labels: Tensor, rng: Rng, step: int, steps: int) -> Tensor:
        settings = self.settings
        strength = self._class_strength(step / steps)
        latent = rng.normal(len(real), settings.latent_dim)
        with self.autocast(rng.device):
            fake = self.generator(latent, labels, strength).float()
        reals = symmetric(real, settings.augmentation, settings.symmetries, rng)
        seen = torch.cat([self._seen(reals, rng), self._seen(fake.detach(), rng)])
        real_logits, fake_logits = self._judge(seen, labels.repeat(2), strength)
        d_loss = relativistic(real_logits, fake_logits)
        penalty = torch.zeros_like(d_loss)
        if step % PENALTY_EVERY_STEPS == 0:
            both = labels.repeat(2)
            # The mean over both halves is half of R1 + R2, as the loss has it.
            penalty = gradient_penalty(lambda x: self.discriminator(x, both, strength), seen)
        self.update(self.d_optimizer, d_loss + settings.gradient_penalty * PENALTY_EVERY_STEPS * penalty)
        self._note_confidence(real_logits, fake_logits)

        seen = self._seen(fake, rng)  # outside of autocast, which would place its pixels with bf16's three digits
        with held(learned(self.discriminator)):
            with self.autocast(rng.device):
                logits = self.discriminator(seen, labels, strength)
            g_loss = relativistic(logits, real_logits.detach())
            self.update(self.g_optimizer, g_loss)
        return torch.stack([d_loss, penalty, g_loss]).detach()

    def rate(self, progress: float) -> float:
        """What the networks reach at a constant rate is soon no better for being trained longer."""
        if self.finetuning:
            return float(BRANCH_RATE * (FINAL_RATE / BRANCH_RATE) ** progress)
        return float(FINAL_RATE ** max(0.0, (progress - DECAY_FROM) / (1 - DECAY_FROM)))

    def is_conditional(self, step: int, steps: int) -> bool:
        return self._class_strength(step / steps) == 1.0

    def _class_strength(self, progress: float) -> float:
        """0 while unconditional, then rising to 1 (Shahbazi et al. 2022, equation 2)."""
        start, end = self.settings.annealing
        if self.finetuning or progress >= end:
            return 1.0
        return max(0.0, (progress - start) / (end - start))

    def _seen(self, images: Tensor, rng: Rng) -> Tensor:
        """What the discriminator sees: each image changed with a probability of `augmentation_strength`."""
        if self.augmentation_strength > 0:
            chosen = rng.uniform(len(images), 1, 1, 1) < self.augmentation_strength
            images = torch.where(chosen, changed(images, self.settings.augmentation, rng), images)
        return images.contiguous(memory_format=torch.channels_last)

    def _judge(self, seen: Tensor, labels: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """Logits of reals and fakes, which go through the discriminator together."""
        with self.autocast(seen.device):
            real, fake = self.discriminator(seen, labels, strength).chunk(2)
        return real, fake

    @torch.no_grad()
    def _note_confidence(self, real: Tensor, fake: Tensor) -> None:
        signs = (real - fake).sign()
        counts = torch.stack([signs.sum(), torch.full_like(signs.sum(), signs.numel())])
        self._confidence += self.ranks.total(counts)

    def adapt(self) -> None:
        """Adaptive augmentation (Karras et al. 2020, section 3.1), with r_t = E[sign(D(real) - D(fake))].

        Their E[sign(D(real))] means nothing where only differences of logits enter the loss.
        """
        total, pairs = self._confidence.tolist()
        if self.settings.augmentation_target > 0 and pairs > 0:
            direction = 1.0 if total / pairs > self.settings.augmentation_target else -1.0
            moved = self.augmentation_strength + direction * pairs / (ADAPTATION_KIMG * 1000)
            self.augmentation_strength = min(1.0, max(0.0, moved))
        self._confidence.zero_()

    def extra_state(self) -> dict[str, Tensor]:
        strength = torch.tensor(self.augmentation_strength, dtype=torch.float64)
        return {"augmentation_strength": strength, "confidence": self._confidence}

    def restore_extra(self, state: Mapping[str, Tensor]) -> None:
        self.augmentation_strength = float(state["augmentation_strength"])
        self._confidence.copy_(state["confidence"])
