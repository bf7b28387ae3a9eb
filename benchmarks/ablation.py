"""What each part of the preset raresynth is worth: HAM10000 at 64 x 64, 100,000 images, one part left out at a time.

    python -m benchmarks.ablation --run RUN --data ../shared/ham10000 --out OUT [--seeds 2]

RUN is a finished run at 64 x 64. Parts that were tried and left out of the library stand here, as they were tried. KID
is to train and val reals, by which snapshots are chosen too; nothing here looks at test.
Started again, it goes on.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import count, product
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gan_series import RESOLUTION, Inputs
from raresynth.config import GanConfig
from raresynth.gan import training
from raresynth.gan.residual import game as residual
from raresynth.gan.residual.game import ResidualGame
from raresynth.gan.residual.networks import Discriminator
from raresynth.gan.seed_paper.losses import barlow_twins
from raresynth.gan.training import GanReport
from raresynth.lineage import read_report, write_json
from raresynth.quality.judge import KidJudge

KIMG, BRANCH_KIMG = 88.0, 2.0
"""With a branch for each of six classes, 100 in all."""


class NonSaturating(ResidualGame):
    """The discriminator judges each image by itself (Goodfellow et al. 2014), with the same penalties."""

    def step(self, *args: Any) -> Tensor:
        return _with_loss(
            lambda winner, loser: F.softplus(-winner.float()).mean() + F.softplus(loser.float()).mean(),
            super().step,
            *args,
        )


def _with_loss(loss: Callable[[Tensor, Tensor], Tensor], step: Callable[..., Tensor], *args: Any) -> Tensor:
    original, residual.relativistic = residual.relativistic, loss
    try:
        return step(*args)
    finally:
        residual.relativistic = original


class AlwaysAugmented(ResidualGame):
    """Every image is changed before the discriminator sees it, as in DiffAugment."""

    def adapt(self) -> None:
        self.augmentation_strength = 1.0


class ConstantRate(ResidualGame):
    """The learning rate does not fall."""

    def rate(self, progress: float) -> float:
        return residual.BRANCH_RATE if self.finetuning else 1.0


class Barlow(ResidualGame):
    """Barlow Twins on the discriminator's features of two views of the reals while fine-tuning (seed paper, eq. 4)."""

    WEIGHT = 0.1

    def step(self, real: Tensor, *args: Any) -> Tensor:
        plain, losses = residual.relativistic, count()

        def loss(winner: Tensor, loser: Tensor) -> Tensor:
            of_discriminator = next(losses) == 0  # the generator's comes second
            extra = self.WEIGHT * self._barlow(real) if self.finetuning and of_discriminator else 0.0
            return plain(winner, loser) + extra

        return _with_loss(loss, super().step, real, *args)

    def _barlow(self, real: Tensor) -> Tensor:
        with self.autocast(real.device):
            first, second = (self._features(view) for view in (real, real.flip(3)))
        return barlow_twins(first, second, weight=5e-3) / first.shape[1]

    def _features(self, images: Tensor) -> Tensor:
        x = self.discriminator.stem(images.contiguous(memory_format=torch.channels_last))
        for block in self.discriminator.blocks:
            x = block(x)
        return F.adaptive_avg_pool2d(x.float(), 2).flatten(1)


class FreezeD(ResidualGame):
    """In a branch the discriminator's first blocks, those next to the image, no longer learn (Mo et al. 2020)."""

    BLOCKS = 2

    def build(self, n_classes: int) -> tuple[nn.Module, Discriminator]:
        generator, discriminator = super().build(n_classes)
        if self.finetuning:
            for block in [discriminator.stem, *discriminator.blocks][: self.BLOCKS]:
                block.requires_grad_(False)
        return generator, discriminator


class Row(NamedTuple):
    """What differs from the preset."""

    knobs: Mapping[str, Any] = MappingProxyType({})
    game: type[ResidualGame] = ResidualGame
    in_branches: bool = False
    """Whether nothing differs before the branches, so that the universal GAN is the preset's own."""


WHOLE = "raresynth"
ROWS = {
    WHOLE: Row(),
    "augmentation off": Row({"augmentation_target": 0.0}),
    "augmentation always on": Row(game=AlwaysAugmented),
    "no annealing (conditional from the start)": Row({"annealing": (0.0, 0.0)}),
    "no EMA": Row({"ema_half_life_kimg": 1e-6}),
    "no rare-class sampling": Row({"class_power": 0.0}),
    "non-saturating loss": Row(game=NonSaturating),
    "constant learning rate": Row(game=ConstantRate),
    "with Freeze-D": Row(game=FreezeD, in_branches=True),
    "with Barlow Twins": Row(game=Barlow, in_branches=True),
}


def folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(' ', '-')}-{seed}"


def train(inputs: Inputs, out: Path, name: str, seed: int) -> None:
    """The universal GAN and the six branches of one row; KIDs go to result.json."""
    torch.set_num_threads(1)
    row = ROWS[name]
    training.ResidualGame = row.game
    lengths = {"pretrain_kimg": KIMG, "finetune_kimg": BRANCH_KIMG, "ema_half_life_kimg": 5.0}
    config = GanConfig(resolution=RESOLUTION, **{**lengths, **row.knobs})
    judge = KidJudge(inputs.data_dir, inputs.manifest, inputs.encoder, 0, inputs.packed)
    common = (config, seed, "cpu", inputs.packed, 60.0, judge)
    place, base = folder(out, name, seed), folder(out, WHOLE if row.in_branches else name, seed) / "universal"
    images = (inputs.data_dir, inputs.manifest)
    universal = _report(base, training.pretrain, *images, base, *common)
    result: dict[str, Any] = {"status": universal.status, "universal": {}, "branch": {}, "kept": {}}
    if universal.status == "trained":
        result["universal"] = next(s.kid for s in universal.snapshots if s.step == universal.kept_step)
        for label in sorted(result["universal"]):
            if label == _majority(inputs):
                continue
            report = _report(place / label, training.finetune, *images, base, label, place / label, *common)
            result["kept"][label] = report.kept_step or 0  # of a collapsed branch too the universal GAN is kept
            kids = {snapshot.step: snapshot.kid[label] for snapshot in report.snapshots}
            result["branch"][label] = kids.get(result["kept"][label], result["universal"][label])
    write_json(place / "result.json", result)


def _report(out: Path, stage: Callable[..., GanReport], *arguments: Any) -> GanReport:
    """What a stage leaves in `out`, or has left there."""
    left = out / "report.json"
    return read_report(left, GanReport) if left.exists() else stage(*arguments)


def _majority(inputs: Inputs) -> str:
    from raresynth.dataset.manifest import read_manifest

    return str(read_manifest(inputs.manifest)["label"].value_counts().index[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=2, help="at once")
    parser.add_argument("--row", choices=ROWS, action="append", help="only this one")
    args = parser.parse_args()
    inputs = Inputs(args.run, args.data)
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = args.row or list(ROWS)
    # The preset's universal GAN is that of rows that differ in their branches alone.
    runs = list(product(range(args.seeds), dict.fromkeys([WHOLE, *rows])))
    with ProcessPoolExecutor(args.tasks, get_context("spawn"), max_tasks_per_child=1) as pool:
        for in_branches in (False, True):  # these come when the universal GAN that they share is there
            tasks = [
                pool.submit(train, inputs, args.out, name, seed)
                for seed, name in runs
                if ROWS[name].in_branches == in_branches and not (folder(args.out, name, seed) / "result.json").exists()
            ]
            for task in tasks:
                task.result()
    print("| | mean KID, universal | mean KID, branches kept where they help | branches kept |\n|---|---|---|---|")
    for row in rows:
        places = [folder(args.out, row, seed) for seed in range(args.seeds)]
        results = [json.loads((place / "result.json").read_text()) for place in places]
        if any(result["status"] == "collapsed" for result in results):
            print(f"| {row} | collapsed | | |")
            continue
        minor = [[r["universal"][label] for label in r["branch"]] for r in results]
        branch = [[r["branch"][label] for label in r["branch"]] for r in results]
        kept = sum(step > 0 for r in results for step in r["kept"].values())
        total = sum(len(r["kept"]) for r in results)
        # Mean over classes and seeds, and how far the seeds, if there are several, lie apart.
        told = (np.mean, np.ptp) if args.seeds > 1 else (np.mean,)
        cells = [" ± ".join(f"{f([np.mean(kids) for kids in each]):.3f}" for f in told) for each in (minor, branch)]
        print(f"| {row} | {cells[0]} | {cells[1]} | {kept} of {total} |")


if __name__ == "__main__":
    main()
