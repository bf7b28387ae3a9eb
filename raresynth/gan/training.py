"""Two-stage training (seed paper, section II.C): a universal GAN on all classes, then one generator a class."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from raresynth.config import GanConfig
from raresynth.dataset.images import load_images
from raresynth.dataset.manifest import read_manifest
from raresynth.errors import CheckpointError, DataError, TrainingCollapse
from raresynth.gan.batches import Batches
from raresynth.gan.game import LOSSES, Game, Networks, build
from raresynth.gan.presets import GanSettings, check_memory, resolve
from raresynth.lineage import Report, load_checkpoint
from raresynth.progress import progress
from raresynth.training_state import finish, flatten_optimizer, load_state, restore_optimizer, save_state, save_weights

CURVE_POINTS = 200
CHECK_EVERY_STEPS = 25
"""Steps between looks at the losses, which on a GPU wait for it."""
EMA_RAMP = 0.05
"""The half-life of the average is at most this part of the images shown so far (EDM's ramp-up)."""


class GanCurves(Report):
    """Mean losses over equal stretches of training; `barlow` is the loss per feature, 0 in the first stage."""

    step: list[int]
    kimg: list[float]
    d_loss: list[float]
    g_loss: list[float]
    barlow: list[float]


class GanReport(Report):
    """What a GAN training stage did."""

    status: Literal["trained", "collapsed"]
    reason: str | None = None
    """Why it collapsed, in words."""
    collapsed_step: int | None = None
    """Optimizer step, counted from 1, at which a loss was first not finite."""
    collapsed_loss: str | None = None
    label: str | None
    """None for the universal GAN."""
    preset: str
    settings: dict[str, Any]
    """Every knob as it was used."""
    seed: int
    n_images: int
    """Distinct real images it learned from."""
    steps: int
    """Optimizer steps finished."""
    kimg: float
    """Thousand real images shown."""
    generator_parameters: int
    discriminator_parameters: int
    weights_sha256: str | None
    parent_sha256: str | None
    """Weights of the universal GAN that fine-tuning started from."""
    curves: GanCurves


def pretrain(
    data_dir: Path,
    manifest_path: Path,
    out_dir: Path,
    config: GanConfig,
    seed: int,
    device: str,
    cache_dir: Path | None,
    checkpoint_every_s: float,
) -> GanReport:
    """Stage 1: an unconditional GAN on the train images of all classes.

    Leaves weights.safetensors (`generator.*`, the averaged one, and `discriminator.*`), meta.json and report.json
    in `out_dir`; after a collapse report.json alone. Started again after a kill it goes on from its last checkpoint.

    Args:
        checkpoint_every_s: seconds between checkpoints of the training state, kept in `out_dir`/state.

    Raises:
        DataError: there is no train image, or one cannot be read.
        MemoryLimitError: the full Barlow loss of fine-tuning would pass `gan.memory_limit_mb`.
    """
    settings = resolve(config)
    networks = build(settings, seed, device)
    check_memory(settings, networks.discriminator.features)
    images = _train_images(data_dir, manifest_path, None, settings.resolution, cache_dir, device)
    run = _Run("pretrain", None, settings, seed, None, settings.pretrain_kimg)
    return _train(run, Game(networks, settings, alpha=0.0), images, out_dir, checkpoint_every_s)


def finetune(
    data_dir: Path,
    manifest_path: Path,
    base_dir: Path,
    label: str,
    out_dir: Path,
    config: GanConfig,
    seed: int,
    device: str,
    cache_dir: Path | None,
    checkpoint_every_s: float,
) -> GanReport:
    """Stage 2: a generator for one class, from the universal GAN, with Freeze-D and Barlow Twins (equation 4).

    Files, resume and arguments as in `pretrain`; `base_dir` is the folder that it left.

    Raises:
        DataError: the class has no train image, or one cannot be read.
        CheckpointError: `base_dir` holds no universal GAN, or one of another architecture.
        MemoryLimitError: the full Barlow loss would pass `gan.memory_limit_mb`.
    """
    settings = resolve(config)
    networks = build(settings, seed, device)
    check_memory(settings, networks.discriminator.features)
    parent_sha256 = _load_base(networks, settings, base_dir, device)
    networks.discriminator.freeze(settings.freeze_d)
    images = _train_images(data_dir, manifest_path, label, settings.resolution, cache_dir, device)
    run = _Run("finetune", label, settings, seed, parent_sha256, settings.finetune_kimg)
    return _train(run, Game(networks, settings, alpha=settings.barlow_alpha), images, out_dir, checkpoint_every_s)


@dataclass(frozen=True)
class _Run:
    """What makes a training run what it is; a state of another run is never continued."""

    stage: str
    label: str | None
    settings: GanSettings
    seed: int
    parent_sha256: str | None
    kimg: float

    def meta(self, images: Tensor) -> dict[str, Any]:
        s = self.settings
        return {
            "stage": self.stage,
            "label": self.label,
            "architecture": _architecture(s),
            "settings": s.model_dump(mode="json"),
            "seed": self.seed,
            "parent_sha256": self.parent_sha256,
            "n_images": len(images),
        }


def _architecture(settings: GanSettings) -> dict[str, Any]:
    return settings.model_dump(include={"resolution", "latent_dim", "width", "generator_conv", "discriminator"})


def _train_images(
    data_dir: Path, manifest_path: Path, label: str | None, resolution: int, cache_dir: Path | None, device: str
) -> Tensor:
    """Train images as one uint8 tensor (n, R, R, 3) on the device."""
    manifest = read_manifest(manifest_path)
    manifest = manifest[manifest["split"] == "train"]
    if label is not None:
        manifest = manifest[manifest["label"] == label]
    if manifest.empty:
        what = "image" if label is None else f"image of class {label!r}"
        raise DataError(f"{manifest_path} has no train {what}; add images or lower validation.min_images")
    return torch.from_numpy(np.array(load_images(manifest, data_dir, resolution, cache_dir))).to(device)


def _load_base(networks: Networks, settings: GanSettings, base_dir: Path, device: str) -> str:
    """Start all networks from the universal GAN; returns its weights' SHA-256."""
    tensors, meta = load_checkpoint(base_dir, device)
    if meta.get("stage") != "pretrain" or meta["architecture"] != _architecture(settings):
        raise CheckpointError(f"{base_dir} holds no universal GAN of this architecture; run pretrain with these params")
    for name in ("generator", "generator_ema"):
        getattr(networks, name).load_state_dict(_part(tensors, "generator"))
    networks.discriminator.load_state_dict(_part(tensors, "discriminator"))
    return str(meta["weights_sha256"])


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}."): t for key, t in tensors.items() if key.startswith(f"{prefix}.")}


def _named(**networks: torch.nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{key}": t for name, network in networks.items() for key, t in network.state_dict().items()}


def _train(run: _Run, game: Game, images: Tensor, out_dir: Path, checkpoint_every_s: float) -> GanReport:
    """Train to the end, from the last checkpoint if there is one, and write the results."""
    settings = run.settings
    batches = Batches(len(images), settings.batch_size, run.seed, settings.wrap_batches)
    losses = torch.zeros(batches.steps(run.kimg * 1000), len(LOSSES), device=images.device)
    step = _restore(game, losses, out_dir, run.meta(images))
    collapse = None
    try:
        _loop(run, game, batches, images, losses, step, out_dir, checkpoint_every_s)
    except TrainingCollapse as error:
        collapse = error
    finished = len(losses) if collapse is None else collapse.step - 1
    digest = None
    if collapse is None:
        networks = game.networks
        tensors = _named(generator=networks.generator_ema, discriminator=networks.discriminator)
        digest = save_weights(out_dir, tensors, run.meta(images))
    report = GanReport(
        status="trained" if collapse is None else "collapsed",
        reason=None if collapse is None else str(collapse),
        collapsed_step=None if collapse is None else collapse.step,
        collapsed_loss=None if collapse is None else collapse.loss,
        label=run.label,
        preset=settings.preset,
        settings=settings.model_dump(mode="json"),
        seed=run.seed,
        n_images=len(images),
        steps=finished,
        kimg=batches.images_before(finished) / 1000,
        generator_parameters=_count(game.networks.generator),
        discriminator_parameters=_count(game.networks.discriminator),
        weights_sha256=digest,
        parent_sha256=run.parent_sha256,
        curves=_curves(losses[:finished].cpu().numpy(), batches),
    )
    finish(out_dir, report)
    return report


def _loop(
    run: _Run,
    game: Game,
    batches: Batches,
    images: Tensor,
    losses: Tensor,
    first: int,
    out_dir: Path,
    checkpoint_every_s: float,
) -> None:
    """Steps first .. len(losses) - 1; fills `losses`, and saves the state now and then.

    Raises:
        TrainingCollapse: a loss was not finite.
    """
    checked = first
    saved_at = time.monotonic()
    name = run.stage if run.label is None else f"{run.stage} {run.label}"
    total, done = batches.images_before(len(losses)), batches.images_before(first)
    with progress(name, total, "images", done) as advance:
        for step in range(first, len(losses)):
            indices = torch.from_numpy(batches.indices(step)).to(images.device)
            real = images[indices].permute(0, 3, 1, 2).float() / 127.5 - 1.0
            losses[step] = game.step(real, _step_rng(run.seed, step, images.device))
            shown = batches.images_before(step + 1)
            half_life = min(run.settings.ema_half_life_kimg * 1000, EMA_RAMP * shown)
            game.average(0.5 ** (len(real) / half_life))

            due = time.monotonic() - saved_at >= checkpoint_every_s
            if due or (step + 1) % CHECK_EVERY_STEPS == 0 or step + 1 == len(losses):
                _check_finite(losses[checked : step + 1], checked)
                d_loss, _, g_loss = losses[checked : step + 1].mean(0).tolist()
                advance(shown - batches.images_before(checked), f"D {d_loss:.2f}, G {g_loss:.2f}")
                checked = step + 1
            if due:
                _save_state(game, losses, step + 1, out_dir, run.meta(images))
                saved_at = time.monotonic()


def _step_rng(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Random numbers of a step, a function of seed and step alone."""
    words = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0] >> 1))


def _check_finite(losses: Tensor, first: int) -> None:
    bad = (~losses.isfinite()).nonzero().tolist()
    if bad:
        row, column = bad[0]
        raise TrainingCollapse(first + row + 1, LOSSES[column])


def _save_state(game: Game, losses: Tensor, step: int, out_dir: Path, meta: dict[str, Any]) -> None:
    tensors = {
        **_named(**vars(game.networks)),
        **flatten_optimizer("g_optimizer", game.g_optimizer),
        **flatten_optimizer("d_optimizer", game.d_optimizer),
        "losses": losses[:step],
    }
    save_state(out_dir, step, tensors, {"run": meta})


def _restore(game: Game, losses: Tensor, out_dir: Path, meta: dict[str, Any]) -> int:
    """Put back the state of this very run if there is one; returns the steps already done."""
    state = load_state(out_dir, meta, losses.device.type)
    if state is None:
        return 0
    tensors, saved = state
    for name, network in vars(game.networks).items():
        network.load_state_dict(_part(tensors, name))
    restore_optimizer("g_optimizer", game.g_optimizer, tensors)
    restore_optimizer("d_optimizer", game.d_optimizer, tensors)
    losses[: saved["step"]] = tensors["losses"]
    return int(saved["step"])


def _curves(losses: np.ndarray[Any, np.dtype[np.float32]], batches: Batches) -> GanCurves:
    width = max(1, math.ceil(len(losses) / CURVE_POINTS))
    ends = [min(first + width, len(losses)) for first in range(0, len(losses), width)]
    means = [
        losses[first : first + width].astype(np.float64).mean(0).round(6) for first in range(0, len(losses), width)
    ]
    columns = {name: [float(mean[i]) for mean in means] for i, name in enumerate(LOSSES)}
    return GanCurves(step=ends, kimg=[batches.images_before(end) / 1000 for end in ends], **columns)


def _count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
