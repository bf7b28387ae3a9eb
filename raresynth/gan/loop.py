"""The training loop: steps, the state that survives a kill, snapshots, and the way back after a collapse."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raresynth.errors import CheckpointError, TrainingCollapse
from raresynth.gan.batches import Batches
from raresynth.gan.game import Game
from raresynth.gan.rng import Rng
from raresynth.lineage import Report
from raresynth.progress import Advance, progress
from raresynth.training_state import flatten_optimizer, load_state, part, prefixed, restore_optimizer, save_state

CHECK_EVERY_STEPS = 25
"""Steps between looks at the losses, which on a GPU wait for it."""
EMA_RAMP = 0.05
"""The half-life of the average is at most this part of the images shown so far (EDM's ramp-up)."""
LOWER_RATE = 0.5
"""Factor on the learning rate after a rollback."""

Scores = Mapping[str, float]
Score = Callable[[Any], Scores]
"""Averaged generator -> label -> KID; lower is better."""


class Snapshot(Report):
    """How good the averaged generator was at one moment."""

    step: int
    kimg: float
    kid: dict[str, float]
    """By label; empty where the reals are too few to tell."""
    augmentation_strength: float

    @property
    def mean_kid(self) -> float | None:
        return sum(self.kid.values()) / len(self.kid) if self.kid else None


class Rollback(Report):
    """A collapse after which training went back once, and on with a lower rate."""

    step: int
    """Optimizer step, counted from 1, at which a loss was first not finite, or weights were found not to be."""
    loss: str
    """The loss, or the weights, `<network>.<tensor>`."""
    back_to_step: int
    learning_rate: float


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and where its state is kept.

    Attributes:
        images: uint8 (n, R, R, 3) on the device; `labels` (n,) their class numbers.
        meta: JSON values that make this training what it is; a state of another is never continued.
        snapshot_steps: steps between snapshots; None for no snapshots and no rollback.
    """

    name: str
    game: Game[Any]
    batches: Batches
    images: Tensor
    labels: Tensor
    seed: int
    kimg: float
    meta: Mapping[str, Any]
    out_dir: Path
    checkpoint_every_s: float
    snapshot_steps: int | None
    score: Score

    @property
    def steps(self) -> int:
        return self.batches.steps(self.kimg * 1000)


@dataclass
class Course:
    """How far a training has come, and what it can go back to.

    Attributes:
        losses: (steps, number of losses), filled up to `step`; of this rank until they are checked, then of all.
        last: the game's tensors but for its optimizers' at `last_step`, the latest snapshot.
        best: the same at the snapshot of least mean KID.
    """

    losses: Tensor
    step: int = 0
    snapshots: list[Snapshot] = field(default_factory=list)
    rollbacks: list[Rollback] = field(default_factory=list)
    last: dict[str, Tensor] = field(default_factory=dict)
    last_step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    collapse: TrainingCollapse | None = None


def train(task: Task) -> Course:
    """Train from the last saved state, if there is one, to the end or a collapse that going back did not cure.

    All ranks take the same decisions: rank 0 looks at the clock, and losses are checked as means over ranks.
    """
    ranks = task.game.ranks
    course = Course(torch.zeros(task.steps, len(task.game.losses), device=task.images.device))
    _resume(task, course)
    if course.step == 0 and task.snapshot_steps is not None:
        _snapshot(task, course)
    checked, saved_at = course.step, time.monotonic()
    with _shown(task, course) as advance:
        while course.step < task.steps:
            _step(task, course)
            due = ranks.by_first(partial(_is_due, task, saved_at))
            regular = course.step % CHECK_EVERY_STEPS == 0 or course.step == task.steps
            if not (due or regular):
                continue
            course.losses[checked : course.step] = ranks.mean(course.losses[checked : course.step])
            collapse = _collapse(task, course, checked)
            if collapse is not None:
                if not _roll_back(task, course, collapse):
                    course.collapse, course.step = collapse, collapse.step - 1
                    break
                checked = course.step
                continue
            shown = task.batches.images_before(course.step) - task.batches.images_before(checked)
            advance(shown, _in_words(task, course.losses[checked : course.step]))
            checked = course.step
            if regular:
                task.game.adapt()
            if task.snapshot_steps and _keeps(task, course.step):
                _snapshot(task, course)
            if due:
                _save(task, course)
                saved_at = time.monotonic()
    return course


def _is_due(task: Task, saved_at: float) -> bool:
    return time.monotonic() - saved_at >= task.checkpoint_every_s


def _shown(task: Task, course: Course) -> AbstractContextManager[Advance]:
    """The progress of all ranks together, by the first of them."""
    total, done = task.batches.images_before(task.steps), task.batches.images_before(course.step)
    if not task.game.ranks.is_first:
        return nullcontext(lambda n=1, note="": None)
    return progress(task.name, total, "images", done)


def _step(task: Task, course: Course) -> None:
    game, step = task.game, course.step
    batch = task.batches.indices(step)
    # Not waited for: of ordinary memory the driver has taken its copy when the call returns.
    indices = game.ranks.own(torch.from_numpy(batch)).to(task.images.device, non_blocking=True)
    real = task.images[indices].permute(0, 3, 1, 2).float() / 127.5 - 1.0
    rng = Rng(_generator(task.seed, step, task.images.device), game.ranks)
    game.schedule(step / task.steps)
    course.losses[step] = game.step(real, task.labels[indices], rng, step, task.steps)
    course.step = step + 1
    shown = task.batches.images_before(course.step)
    half_life = min(game.settings.ema_half_life_kimg * 1000, EMA_RAMP * shown)
    game.average(0.5 ** (len(batch) / half_life))


def _generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Random numbers of a step, a function of seed and step alone."""
    words = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0] >> 1))


def _in_words(task: Task, losses: Tensor) -> str:
    means = dict(zip(task.game.losses, losses.mean(0).tolist(), strict=True))
    return f"D {means['d_loss']:.2f}, G {means['g_loss']:.2f}"


def _collapse(task: Task, course: Course, first: int) -> TrainingCollapse | None:
    """The first loss since step `first` that is not finite, or the first weight where weights are to be kept."""
    bad = (~course.losses[first : course.step].isfinite()).nonzero().tolist()
    if bad:
        return TrainingCollapse(first + bad[0][0] + 1, task.game.losses[bad[0][1]])
    if not _keeps(task, course.step):
        return None
    broken = [name for name, tensor in _tensors(task.game).items() if not tensor.isfinite().all()]
    return TrainingCollapse(course.step, broken[0]) if broken else None


def _keeps(task: Task, step: int) -> bool:
    """Whether the weights after so many steps are kept, as a snapshot or as the last ones."""
    return step == task.steps or bool(task.snapshot_steps and step % task.snapshot_steps == 0)


def _roll_back(task: Task, course: Course, collapse: TrainingCollapse) -> bool:
    """Go back to the last snapshot, and on with a lower learning rate and fresh optimizers; once, and if there is one.

    Returns:
        whether it was done.
    """
    if not course.last or course.rollbacks:
        return False
    game, rate = task.game, task.game.settings.learning_rate * LOWER_RATE
    _put_back(game, course.last)
    game.start_optimizers(rate)
    course.rollbacks.append(
        Rollback(step=collapse.step, loss=collapse.loss, back_to_step=course.last_step, learning_rate=rate)
    )
    course.step = course.last_step
    return True


def _snapshot(task: Task, course: Course) -> None:
    """Keep the weights to go back to and, once the generator knows the classes, score them; the best are kept."""
    game = task.game
    course.last = _copies(game)
    course.last_step = course.step
    if not game.is_conditional(course.step, task.steps):
        return
    kimg = task.batches.images_before(course.step) / 1000
    snapshot = Snapshot(
        step=course.step,
        kimg=kimg,
        kid=game.ranks.by_first(lambda: dict(task.score(game.generator_ema))),
        augmentation_strength=float(game.extra_state()["augmentation_strength"]),
    )
    kid = snapshot.mean_kid
    others = [s.mean_kid for s in course.snapshots if s.mean_kid is not None]
    if kid is None or kid < min(others, default=float("inf")):
        course.best, course.best_step = _copies(game), course.step
    course.snapshots.append(snapshot)


def _tensors(game: Game[Any]) -> dict[str, Tensor]:
    """All that a game holds but for its optimizers."""
    networks = {name: network.state_dict() for name, network in game.networks.items()}
    parts = {**networks, "extra": game.extra_state()}
    return {f"{name}.{key}": tensor for name, tensors in parts.items() for key, tensor in tensors.items()}


def _copies(game: Game[Any]) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in _tensors(game).items()}


def _put_back(game: Game[Any], tensors: Mapping[str, Tensor]) -> None:
    for name, network in game.networks.items():
        network.load_state_dict(part(tensors, name))
    game.restore_extra(part(tensors, "extra"))


def _save(task: Task, course: Course) -> None:
    game = task.game
    if not game.ranks.is_first:
        return
    tensors = {
        **_tensors(game),
        **flatten_optimizer("g_optimizer", game.g_optimizer),
        **flatten_optimizer("d_optimizer", game.d_optimizer),
        **prefixed("last", course.last),
        **prefixed("best", course.best),
        "losses": course.losses[: course.step],
    }
    meta = {
        "run": task.meta,
        "last_step": course.last_step,
        "best_step": course.best_step,
        "snapshots": [s.model_dump(mode="json") for s in course.snapshots],
        "rollbacks": [r.model_dump(mode="json") for r in course.rollbacks],
    }
    save_state(task.out_dir, course.step, tensors, meta)


def _resume(task: Task, course: Course) -> None:
    """Put back the state of this very training if there is one, by however many ranks it was left.

    Raises:
        CheckpointError: the ranks see different states.
    """
    state = load_state(task.out_dir, task.meta, str(task.images.device))
    if state is not None:
        _restore(task.game, course, *state)
    ranks = task.game.ranks
    first = ranks.by_first(lambda: course.step)
    if first != course.step:
        raise CheckpointError(
            f"{task.out_dir} holds a state of step {first} for rank 0 and of step {course.step} for rank {ranks.rank}; "
            "give all ranks one shared folder"
        )


def _restore(game: Game[Any], course: Course, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    course.rollbacks = [Rollback.model_validate(r) for r in saved["rollbacks"]]
    if course.rollbacks:
        game.start_optimizers(course.rollbacks[-1].learning_rate)
    _put_back(game, tensors)
    restore_optimizer("g_optimizer", game.g_optimizer, tensors)
    restore_optimizer("d_optimizer", game.d_optimizer, tensors)
    course.snapshots = [Snapshot.model_validate(s) for s in saved["snapshots"]]
    course.last, course.last_step = part(tensors, "last"), saved["last_step"]
    course.best, course.best_step = part(tensors, "best"), saved["best_step"]
    course.step = saved["step"]
    course.losses[: course.step] = tensors["losses"]
