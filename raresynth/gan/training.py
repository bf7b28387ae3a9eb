"""Two-stage training (seed paper, section II.C): a universal GAN on all classes, then one generator a class.

With preset `raresynth` the universal GAN ends up knowing the classes, and a class gets a short branch of its own,
which is kept where it measurably helps.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raresynth.config import GanConfig, Symmetries
from raresynth.dataset.images import Pixels, all_grey, load_images
from raresynth.dataset.manifest import read_manifest
from raresynth.errors import CheckpointError, DataError
from raresynth.gan import loop
from raresynth.gan.batches import Batches, Draws, Passes
from raresynth.gan.game import Game
from raresynth.gan.judge import Judge
from raresynth.gan.presets import ResidualSettings, SeedPaperSettings, check_ranks, resolve
from raresynth.gan.ranks import ALONE, Ranks
from raresynth.gan.residual.game import ResidualGame
from raresynth.gan.residual.networks import Generator
from raresynth.gan.sampling import OfClass, generate
from raresynth.gan.seed_paper.game import SeedPaperGame
from raresynth.lineage import Report, load_checkpoint
from raresynth.training_state import finish, part, prefixed, save_weights

CURVE_POINTS = 200
SCORED_IMAGES = 256
"""Images of a class behind a snapshot's KID, drawn from the same latents every time."""
SCORING_SEED = 2**62
"""Of those latents; synthesis is not likely to use it."""
SURE = 1.0
"""A branch is kept where its KID is lower by more than so many standard errors of the difference."""

Settings = ResidualSettings | SeedPaperSettings


class GanCurves(Report):
    """Mean losses over equal stretches of training."""

    step: list[int]
    kimg: list[float]
    losses: dict[str, list[float]]


class GanReport(Report):
    """What a GAN training stage did."""

    status: Literal["trained", "collapsed"]
    reason: str | None = None
    """Why it collapsed, in words."""
    collapsed_step: int | None = None
    """As `step` in `Rollback`."""
    collapsed_loss: str | None = None
    """As `loss` in `Rollback`."""
    rollbacks: list[loop.Rollback]
    """Collapses after which training went back, and on with a lower learning rate."""
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
    snapshots: list[loop.Snapshot]
    kept_step: int | None
    """Step whose weights were kept; 0 where fine-tuning did not measurably help, so that the universal GAN's were."""
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
    judge: Judge,
    ranks: Ranks = ALONE,
    *,
    symmetries: Symmetries,
) -> GanReport:
    """Stage 1: a GAN on the train images of all classes.

    Leaves weights.safetensors (`generator.*`, the averaged one, and `discriminator.*`), meta.json and report.json
    in `out_dir`; after a collapse report.json alone. Started again after a kill it goes on from its last checkpoint.

    Args:
        checkpoint_every_s: seconds between checkpoints of the training state, kept in `out_dir`/state.
        judge: with preset `raresynth` the weights of the snapshot with the least mean KID over the classes are kept.
        ranks: processes that all call this with the same arguments and share the work; rank 0 writes.
        symmetries: of the images, which the generators may learn besides.

    Raises:
        ParamsError: these ranks cannot share a batch.
        DataError: there is no train image, or one cannot be read.
        MemoryLimitError: the full Barlow loss of fine-tuning would pass `gan.memory_limit_mb`.
    """
    check_ranks(resolve(config), ranks.world)
    with ranks.first_ahead():  # it packs the images, which the others then find in the cache
        images = _train_images(data_dir, manifest_path, None, config.resolution, cache_dir)
    settings = resolve(config, symmetries, all_grey(images.pixels))
    game = new_game(settings, len(images.classes), seed, device, finetuning=False, ranks=ranks)
    run = _Run("pretrain", None, settings, seed, None, images, judge)
    return _train(run, game, settings.pretrain_kimg, out_dir, device, checkpoint_every_s)


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
    judge: Judge,
    *,
    symmetries: Symmetries,
) -> GanReport:
    """Stage 2: a generator for one class, from the universal GAN.

    Files, resume and arguments as in `pretrain`; `base_dir` is the folder that it left. With preset `raresynth` the
    weights of the best snapshot are kept if it measurably helps, else the universal GAN's; with the other presets
    the last ones.

    Raises:
        DataError: the class has no train image, or one cannot be read.
        CheckpointError: `base_dir` holds no universal GAN, or one of another architecture.
        MemoryLimitError: the full Barlow loss would pass `gan.memory_limit_mb`.
    """
    tensors, meta = load_checkpoint(base_dir, device)
    settings = resolve(config, symmetries, meta.get("settings", {}).get("grey", False))
    if meta.get("stage") != "pretrain" or meta["architecture"] != settings.architecture:
        raise CheckpointError(f"{base_dir} holds no universal GAN of this architecture; run pretrain with these params")
    images = _train_images(data_dir, manifest_path, label, settings.resolution, cache_dir)
    game = new_game(settings, len(images.classes), seed, device, finetuning=True)
    for name in ("generator", "generator_ema"):
        game.networks[name].load_state_dict(part(tensors, "generator"))
    game.discriminator.load_state_dict(part(tensors, "discriminator"))
    run = _Run("finetune", label, settings, seed, meta["weights_sha256"], images, judge)
    return _train(run, game, settings.finetune_kimg, out_dir, device, checkpoint_every_s)


@dataclass(frozen=True)
class _Images:
    """Train images: uint8 (n, R, R, 3), the number (n,) of each one's class, and the classes' labels."""

    pixels: Pixels
    numbers: npt.NDArray[np.int64]
    classes: list[str]


def _train_images(
    data_dir: Path, manifest_path: Path, label: str | None, resolution: int, cache_dir: Path | None
) -> _Images:
    manifest = read_manifest(manifest_path)
    manifest = manifest[manifest["split"] == "train"]
    classes = sorted(manifest["label"].unique())
    if label is not None:
        manifest = manifest[manifest["label"] == label]
    if manifest.empty:
        what = "image" if label is None else f"image of class {label!r}"
        raise DataError(f"{manifest_path} has no train {what}; add images or lower validation.min_images")
    pixels = np.array(load_images(manifest, data_dir, resolution, cache_dir))
    return _Images(pixels, np.array([classes.index(name) for name in manifest["label"]]), classes)


def new_game(
    settings: Settings, n_classes: int, seed: int, device: str, finetuning: bool, ranks: Ranks = ALONE
) -> Game[Any]:
    """The game of the settings' preset, at its beginning."""
    if isinstance(settings, ResidualSettings):
        return ResidualGame(settings, n_classes, seed, device, finetuning, ranks)
    return SeedPaperGame(settings, n_classes, seed, device, finetuning, ranks)


@dataclass(frozen=True)
class _Run:
    """What makes a training what it is."""

    stage: str
    label: str | None
    settings: Settings
    seed: int
    parent_sha256: str | None
    images: _Images
    judge: Judge

    @property
    def meta(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "label": self.label,
            "classes": self.images.classes,
            "architecture": self.settings.architecture,
            "settings": self.settings.model_dump(mode="json"),
            "seed": self.seed,
            "parent_sha256": self.parent_sha256,
            "n_images": len(self.images.pixels),
        }

    @property
    def batches(self) -> Batches:
        """Passes over the images; preset `raresynth` draws rare classes more often while it learns all of them."""
        s, n = self.settings, len(self.images.pixels)
        if isinstance(s, SeedPaperSettings):
            return Passes(n, s.batch_size, self.seed, s.wrap_batches)
        if self.label is not None:
            return Passes(n, s.batch_size, self.seed, wrap=True)
        counts = np.bincount(self.images.numbers).astype(np.float64)
        return Draws(counts[self.images.numbers] ** -s.class_power, s.batch_size, self.seed)

    @property
    def snapshot_steps(self) -> int | None:
        s = self.settings
        if isinstance(s, SeedPaperSettings):
            return None
        kimg = s.pretrain_kimg if self.label is None else s.finetune_kimg
        checks = self.batches.steps(kimg * 1000) / (s.snapshots * loop.CHECK_EVERY_STEPS)
        return max(1, round(checks)) * loop.CHECK_EVERY_STEPS

    def scored(self, generator: Generator) -> dict[str, float]:
        """KID of the images of each class that is trained and has enough reals."""
        labels = self.images.classes if self.label is None else [self.label]
        kids = {label: self.judge.kid(label, self.drawn(generator, label)) for label in labels}
        return {label: kid for label, kid in kids.items() if kid is not None}

    def drawn(self, generator: Generator, label: str) -> Pixels:
        of_class = OfClass(generator, self.images.classes.index(label))
        return generate(of_class, SCORING_SEED, range(SCORED_IMAGES))


def _train(run: _Run, game: Game[Any], kimg: float, out_dir: Path, device: str, checkpoint_every_s: float) -> GanReport:
    """Train to the end, from the last checkpoint if there is one; rank 0 writes the results, for which all wait."""
    task = loop.Task(
        name=run.stage if run.label is None else f"{run.stage} {run.label}",
        game=game,
        batches=run.batches,
        images=torch.from_numpy(run.images.pixels).to(device),
        labels=torch.from_numpy(run.images.numbers).to(device),
        seed=run.seed,
        kimg=kimg,
        meta=run.meta,
        out_dir=out_dir,
        checkpoint_every_s=checkpoint_every_s,
        snapshot_steps=run.snapshot_steps,
        score=run.scored,
    )
    start = {name: copy.deepcopy(network.state_dict()) for name, network in game.networks.items()}
    course = loop.train(task)
    collapse, kept_step, digest = course.collapse, None, None
    if collapse is None:
        kept_step, generator, discriminator = _kept(run, game, course, start)
        tensors = {**prefixed("generator", generator), **prefixed("discriminator", discriminator)}
        digest = game.ranks.by_first(lambda: save_weights(out_dir, tensors, run.meta))
    report = GanReport(
        status="trained" if collapse is None else "collapsed",
        reason=None if collapse is None else str(collapse),
        collapsed_step=None if collapse is None else collapse.step,
        collapsed_loss=None if collapse is None else collapse.loss,
        rollbacks=course.rollbacks,
        label=run.label,
        preset=run.settings.preset,
        settings=run.settings.model_dump(mode="json"),
        seed=run.seed,
        n_images=len(run.images.pixels),
        steps=course.step,
        kimg=task.batches.images_before(course.step) / 1000,
        snapshots=course.snapshots,
        kept_step=kept_step,
        generator_parameters=_count(game.generator),
        discriminator_parameters=_count(game.discriminator),
        weights_sha256=digest,
        parent_sha256=run.parent_sha256,
        curves=_curves(course.losses[: course.step].cpu().numpy(), task),
    )
    game.ranks.by_first(lambda: finish(out_dir, report))
    return report


def _kept(
    run: _Run, game: Game[Any], course: loop.Course, start: dict[str, dict[str, Tensor]]
) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """Step whose weights are kept, the averaged generator's and the discriminator's."""
    if run.snapshot_steps is None:
        return course.step, game.generator_ema.state_dict(), game.discriminator.state_dict()
    generator, discriminator = part(course.best, "generator_ema"), part(course.best, "discriminator")
    branched = run.label is not None and course.best_step > 0
    if branched and not _helps(run, run.label or "", game.generator_ema, generator, start["generator_ema"]):
        return 0, start["generator_ema"], start["discriminator"]
    return course.best_step, generator, discriminator


def _helps(run: _Run, label: str, network: Generator, branch: dict[str, Tensor], base: dict[str, Tensor]) -> bool:
    """Whether the branch's images are measurably nearer to the class's reals than the universal GAN's."""
    images = []
    for weights in (branch, base):
        network.load_state_dict(weights)
        images.append(run.drawn(network, label))
    gain, error = run.judge.gain(label, *images)
    return gain > SURE * error


def _curves(losses: npt.NDArray[np.float32], task: loop.Task) -> GanCurves:
    width = max(1, math.ceil(len(losses) / CURVE_POINTS))
    starts = range(0, len(losses), width)
    ends = [min(first + width, len(losses)) for first in starts]
    windows = [losses[first : first + width].astype(np.float64) for first in starts]
    return GanCurves(
        step=ends,
        kimg=[task.batches.images_before(end) / 1000 for end in ends],
        losses={
            name: _means([window[:, i] for window in windows], name in task.game.lazy)
            for i, name in enumerate(task.game.losses)
        },
    )


def _means(windows: list[npt.NDArray[np.float64]], lazy: bool) -> list[float]:
    """Mean of each window; of a lazy loss that of the steps that took it, and where none did, the one before."""
    means: list[float] = []
    for window in windows:
        taken = window[window != 0] if lazy else window
        means.append(round(float(taken.mean()), 6) if len(taken) else means[-1])
    return means


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
