"""The seed paper's game (section II.C): non-saturating GAN; branches with Freeze-D, and Barlow Twins on reals."""

import torch
from torch import Tensor, nn

from raresynth.gan.augmentation import changed, symmetric
from raresynth.gan.game import Game, held, learned
from raresynth.gan.presets import SeedPaperSettings, check_memory
from raresynth.gan.rng import Rng
from raresynth.gan.seed_paper.losses import barlow_twins, barlow_twins_full, discriminator_loss, generator_loss
from raresynth.gan.seed_paper.networks import Discriminator, Generator, initialise, pooled_features


class SeedPaperGame(Game[SeedPaperSettings]):
    """Unconditional: labels are not looked at.

    Raises:
        MemoryLimitError: the full Barlow loss of fine-tuning would pass `gan.memory_limit_mb`.
    """

    losses = ("d_loss", "barlow", "g_loss")

    def build(self, n_classes: int) -> tuple[nn.Module, Discriminator]:
        settings = self.settings
        generator = Generator(settings.resolution, settings.latent_dim, settings.width, settings.generator_conv)
        discriminator = Discriminator(settings.resolution, settings.width, settings.discriminator)
        check_memory(settings, discriminator.features)
        initialise(generator)
        initialise(discriminator)
        if self.finetuning:
            discriminator.freeze(settings.freeze_d)
        return generator, discriminator

    def step(self, real: Tensor, labels: Tensor, rng: Rng, step: int, steps: int) -> Tensor:
        settings = self.settings
        alpha = settings.barlow_alpha if self.finetuning else 0.0
        latent = rng.normal(len(real), settings.latent_dim)
        with self.autocast(rng.device):
            fake = self.generator(latent).float()

            real_logits, features = self._judge(self._symmetric(real, rng), rng)
            fake_logits, _ = self._judge(fake.detach(), rng)
            d_loss = discriminator_loss(real_logits, fake_logits, settings.label_smoothing)
            barlow = self._barlow(features, real, rng) if alpha > 0 else torch.zeros_like(d_loss)
        self.update(self.d_optimizer, d_loss + alpha * barlow)

        with held(learned(self.discriminator)):
            with self.autocast(rng.device):
                g_loss = generator_loss(self._judge(fake, rng)[0])
            self.update(self.g_optimizer, g_loss)
        return torch.stack([d_loss, barlow, g_loss]).detach()

    def _symmetric(self, real: Tensor, rng: Rng) -> Tensor:
        return symmetric(real, self.settings.augmentation, self.settings.symmetries, rng)

    def _judge(self, images: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """The discriminator's logits and features of a changed, noisy view of each image."""
        with torch.autocast(rng.device.type, enabled=False):  # coordinates in bf16 would be off by whole pixels
            seen = changed(images, self.settings.augmentation, rng)
        if self.settings.noise_std > 0:
            seen = seen + self.settings.noise_std * rng.normal(*seen.shape)
        logits, features = self.discriminator(seen.contiguous(memory_format=torch.channels_last))
        return logits, features

    def _barlow(self, first_view: Tensor, real: Tensor, rng: Rng) -> Tensor:
        """Equation 3 between the view already judged and a second one, divided by the number of features."""
        second_view = self._judge(self._symmetric(real, rng), rng)[1]
        weight = self.settings.barlow_lambda
        with torch.autocast(rng.device.type, enabled=False):
            if self.settings.barlow == "full":
                z1, z2 = first_view.flatten(1), second_view.flatten(1)
                return barlow_twins_full(z1, z2, weight) / z1.shape[1]
            z1, z2 = pooled_features(first_view), pooled_features(second_view)
            return barlow_twins(z1, z2, weight) / z1.shape[1]
