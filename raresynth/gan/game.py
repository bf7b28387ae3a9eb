"""The adversarial game: one step of discriminator and generator. No loop, files or progress here."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from raresynth.gan.augmentation import changed, symmetric
from raresynth.gan.losses import barlow_twins, barlow_twins_full, discriminator_loss, generator_loss
from raresynth.gan.networks import Discriminator, Generator, initialise, pooled_features
from raresynth.gan.presets import GanSettings

LOSSES = ("d_loss", "barlow", "g_loss")
"""In the order in which they are computed, so that the first one not finite is where a collapse began."""


@dataclass
class Networks:
    generator: Generator
    discriminator: Discriminator
    generator_ema: Generator
    """Moving average of the generator's weights: the one that images are drawn from."""


def build(settings: GanSettings, seed: int, device: str) -> Networks:
    """Fresh networks; equal seeds give equal weights on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = Generator(settings.resolution, settings.latent_dim, settings.width, settings.generator_conv)
        discriminator = Discriminator(settings.resolution, settings.width, settings.discriminator)
        initialise(generator)
        initialise(discriminator)
    generator_ema = copy.deepcopy(generator).requires_grad_(False).eval()
    return Networks(generator.to(device), discriminator.to(device), generator_ema.to(device))


@dataclass
class Game:
    networks: Networks
    settings: GanSettings
    alpha: float
    """Weight of the Barlow Twins loss, per feature; 0 in the first stage."""

    def __post_init__(self) -> None:
        self.g_optimizer = self._adam(self.networks.generator)
        self.d_optimizer = self._adam(self.networks.discriminator)

    def _adam(self, network: torch.nn.Module) -> torch.optim.Adam:
        learned = [p for p in network.parameters() if p.requires_grad]
        return torch.optim.Adam(learned, lr=self.settings.learning_rate, betas=self.settings.betas, fused=True)

    def step(self, real: Tensor, rng: torch.Generator) -> Tensor:
        """One update of each network on a batch of real images (N, 3, R, R) in [-1, 1]; returns `LOSSES`, fp32."""
        networks, settings = self.networks, self.settings
        latent = torch.randn(len(real), settings.latent_dim, generator=rng, device=rng.device)
        with self._autocast(rng.device):
            fake = networks.generator(latent).float()

            real_logits, features = self._judge(self._symmetric(real, rng), rng)
            fake_logits, _ = self._judge(fake.detach(), rng)
            d_loss = discriminator_loss(real_logits, fake_logits, settings.label_smoothing)
            barlow = self._barlow(features, real, rng) if self.alpha > 0 else torch.zeros_like(d_loss)
        self.d_optimizer.zero_grad()
        torch.autograd.backward(d_loss + self.alpha * barlow)
        self.d_optimizer.step()

        learned = [p for p in networks.discriminator.parameters() if p.requires_grad]
        _require_grad(learned, False)
        with self._autocast(rng.device):
            g_loss = generator_loss(self._judge(fake, rng)[0])
        self.g_optimizer.zero_grad()
        torch.autograd.backward(g_loss)
        self.g_optimizer.step()
        _require_grad(learned, True)
        return torch.stack([d_loss.detach(), barlow.detach(), g_loss.detach()])

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _symmetric(self, real: Tensor, rng: torch.Generator) -> Tensor:
        return symmetric(real, self.settings.augmentation, rng)

    def _judge(self, images: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """The discriminator's logits and features of a changed, noisy view of each image."""
        with torch.autocast(rng.device.type, enabled=False):  # coordinates in bf16 would be off by whole pixels
            seen = changed(images, self.settings.augmentation, rng)
        if self.settings.noise_std > 0:
            seen = seen + self.settings.noise_std * torch.randn(seen.shape, generator=rng, device=rng.device)
        logits, features = self.networks.discriminator(seen.contiguous(memory_format=torch.channels_last))
        return logits, features

    def _barlow(self, first_view: Tensor, real: Tensor, rng: torch.Generator) -> Tensor:
        """Equation 3 between the view already judged and a second one, divided by the number of features."""
        second_view = self._judge(self._symmetric(real, rng), rng)[1]
        weight = self.settings.barlow_lambda
        with torch.autocast(rng.device.type, enabled=False):
            if self.settings.barlow == "full":
                z1, z2 = first_view.flatten(1), second_view.flatten(1)
                return barlow_twins_full(z1, z2, weight) / z1.shape[1]
            z1, z2 = pooled_features(first_view), pooled_features(second_view)
            return barlow_twins(z1, z2, weight) / z1.shape[1]

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the averaged generator: `decay` of itself, the rest of the generator; BatchNorm buffers are copied."""
        networks = self.networks
        averaged = [p.detach() for p in networks.generator_ema.parameters()]
        current = [p.detach() for p in networks.generator.parameters()]
        torch._foreach_lerp_(averaged, current, 1.0 - decay)
        for target, source in zip(networks.generator_ema.buffers(), networks.generator.buffers(), strict=True):
            target.copy_(source)


def _require_grad(parameters: list[torch.nn.Parameter], value: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(value)
