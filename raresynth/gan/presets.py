"""The presets as one table: what they set where a GanConfig leaves a knob at null."""

import math
from typing import Any, Literal

from raresynth.config import Config, GanConfig, Symmetries
from raresynth.errors import MemoryLimitError, ParamsError

_SEED_PAPER: dict[str, Any] = {"width": 24, "batch_size": 16, "learning_rate": 2e-4, "betas": (0.5, 0.999)}

DEVIATION_GROUP = 8
"""Images behind one minibatch standard deviation, at most."""

PRESETS: dict[str, dict[str, Any]] = {
    "raresynth": {
        "width": 16,
        "batch_size": 16,
        "learning_rate": 5e-4,
        "betas": (0.0, 0.99),
        "gradient_penalty": 0.1,
        "annealing": (0.1, 0.3),
        "augmentation_target": 0.6,
        "class_power": 0.75,
        "snapshots": 12,
    },
    # Seed paper, section III.
    "stgan-lite": _SEED_PAPER
    | {
        "generator_conv": "depthwise",
        "discriminator": "patch",
        "barlow": "pooled",
        "barlow_alpha": 0.1,
        "barlow_lambda": 5e-3,
        "label_smoothing": 0.1,
        "noise_std": 0.05,
        "freeze_d": 2,
        "wrap_batches": True,
        "memory_limit_mb": 2048,
    },
    "dcgan-base": _SEED_PAPER
    | {
        "generator_conv": "dense",
        "discriminator": "scalar",
        "barlow": "full",
        "barlow_alpha": 0.1,
        "barlow_lambda": 5e-3,
        "label_smoothing": 0.0,
        "noise_std": 0.0,
        "freeze_d": 0,
        "wrap_batches": False,
        "memory_limit_mb": 2048,
    },
}


class GanSettings(Config):
    """A GanConfig with every knob decided, as far as all presets have it; fields as there."""

    preset: str
    resolution: int
    latent_dim: int
    width: int
    batch_size: int
    learning_rate: float
    betas: tuple[float, float]
    pretrain_kimg: float
    finetune_kimg: float
    ema_half_life_kimg: float
    precision: Literal["fp32", "bf16"]
    augmentation: Literal["none", "paper", "dermoscopy"]
    symmetries: Symmetries
    """Those of the images: no knob of the GAN's, but found by `validate` or set for all trainings."""

    @property
    def architecture(self) -> dict[str, Any]:
        """What rebuilds the networks."""
        return self.model_dump(include=set(_ARCHITECTURE))


class ResidualSettings(GanSettings):
    """Of preset `raresynth`."""

    grey: bool
    """Whether all train images are, so that the generator cannot tint what it draws."""
    gradient_penalty: float
    annealing: tuple[float, float]
    augmentation_target: float
    class_power: float
    snapshots: int

    @property
    def deviation_group(self) -> int:
        """Images behind one minibatch standard deviation; divides the batch."""
        return math.gcd(self.batch_size, DEVIATION_GROUP)


class SeedPaperSettings(GanSettings):
    """Of the presets `stgan-lite` and `dcgan-base`."""

    barlow_alpha: float
    barlow_lambda: float
    generator_conv: Literal["depthwise", "dense"]
    discriminator: Literal["patch", "scalar"]
    barlow: Literal["pooled", "full"]
    label_smoothing: float
    noise_std: float
    freeze_d: int
    wrap_batches: bool
    memory_limit_mb: int


_ARCHITECTURE = ("preset", "resolution", "latent_dim", "width", "grey", "generator_conv", "discriminator")


def resolve(
    config: GanConfig, symmetries: Symmetries = "all", grey: bool = False
) -> ResidualSettings | SeedPaperSettings:
    """Fill the knobs left at null from the preset, for images with these symmetries, all grey or not.

    Raises:
        ParamsError: a knob is set that the preset does not have.
    """
    settings = ResidualSettings if config.preset == "raresynth" else SeedPaperSettings
    knobs = config.model_dump(exclude_none=True)
    if unknown := sorted(knobs.keys() - settings.model_fields.keys()):
        raise ParamsError(f"gan.{unknown[0]} is no knob of the preset {config.preset}; leave it at null")
    decided = {**PRESETS[config.preset], **knobs, "symmetries": symmetries}
    if settings is ResidualSettings:
        decided["grey"] = grey
    return settings(**decided)


def check_ranks(settings: ResidualSettings | SeedPaperSettings, ranks: int) -> None:
    """Refuse to part the batch over so many processes that they would not train what one does.

    Raises:
        ParamsError: statistics of the batch, or of a group of its images, would be those of a part.
    """
    if ranks == 1:
        return
    if isinstance(settings, SeedPaperSettings):
        raise ParamsError(
            f"preset {settings.preset} normalises over the whole batch, so that it trains in one process; "
            f"set compute.ranks to 1, or gan.preset to raresynth"
        )
    if settings.batch_size % (ranks * settings.deviation_group):
        raise ParamsError(
            f"gan.batch_size is {settings.batch_size}, which {ranks} ranks cannot share in equal parts of whole groups "
            f"of {settings.deviation_group} images; choose a multiple of {ranks * DEVIATION_GROUP}"
        )


def check_memory(settings: SeedPaperSettings, features: int) -> None:
    """Refuse a full Barlow loss whose cross-correlation matrix is too large.

    Args:
        features: length D of the flattened feature vector; the matrix holds D x D fp32 numbers.

    Raises:
        MemoryLimitError: the matrix passes `gan.memory_limit_mb`.
    """
    matrix_mb = features**2 * 4 / 2**20
    if settings.barlow == "full" and settings.barlow_alpha > 0 and matrix_mb > settings.memory_limit_mb:
        raise MemoryLimitError(
            f"the full Barlow loss needs a {features} x {features} matrix of {matrix_mb:.0f} MB, over "
            f"gan.memory_limit_mb = {settings.memory_limit_mb}: set gan.barlow to pooled, lower gan.width or raise it"
        )
