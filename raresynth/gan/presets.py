"""The two presets of the seed paper (its section III), as one table."""

from typing import Any, Literal

from raresynth.config import Config, GanConfig
from raresynth.errors import MemoryLimitError

PRESETS: dict[str, dict[str, Any]] = {
    "stgan-lite": {
        "generator_conv": "depthwise",
        "discriminator": "patch",
        "barlow": "pooled",
        "barlow_alpha": 0.1,
        "label_smoothing": 0.1,
        "noise_std": 0.05,
        "freeze_d": 2,
        "wrap_batches": True,
    },
    "dcgan-base": {
        "generator_conv": "dense",
        "discriminator": "scalar",
        "barlow": "full",
        "barlow_alpha": 0.1,
        "label_smoothing": 0.0,
        "noise_std": 0.0,
        "freeze_d": 0,
        "wrap_batches": False,
    },
}


class GanSettings(Config):
    """A GanConfig with every knob decided; fields as there."""

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


def resolve(config: GanConfig) -> GanSettings:
    """Fill the knobs left at null from the preset."""
    return GanSettings(**{**PRESETS[config.preset], **config.model_dump(exclude_none=True)})


def check_memory(settings: GanSettings, features: int) -> None:
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
