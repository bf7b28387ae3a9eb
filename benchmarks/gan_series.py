"""The three presets at equal images shown, several seeds: trains what the tables of gan_quality.py compare.

    python -m benchmarks.gan_series --run RUN --data ../shared/ham10000 --out SERIES

RUN is a finished run at 64 x 64: its validated manifest and its encoder are used. Each of the runs below shows 200,000
images, the universal GAN's and the six classes' together; it is one task on one thread, and as many as `--tasks` go on
at once. Started again after an interruption, the series goes on where it was; the time of what Ctrl-C ended counts.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from raresynth import flow
from raresynth.config import Symmetries
from raresynth.dataset.symmetries import read_symmetries
from raresynth.lineage import write_json

PRESETS: dict[str, dict[str, Any]] = {
    "raresynth": {"pretrain_kimg": 176, "finetune_kimg": 4, "ema_half_life_kimg": 5},
    # As in params/paper.yaml, with the ordinary augmentation of this project, which suits dermoscopy better.
    "stgan-lite": {
        **{"pretrain_kimg": 128, "finetune_kimg": 12, "ema_half_life_kimg": 5},
        **{"width": 32, "batch_size": 32},
    },
    "dcgan-base": {
        **{"pretrain_kimg": 128, "finetune_kimg": 12, "ema_half_life_kimg": 5},
        **{"width": 32, "batch_size": 32},
    },
}
RESOLUTION = 64
CHECKPOINT_EVERY_S = 60.0


@dataclass(frozen=True)
class Inputs:
    """A finished run and its images."""

    store: Path
    data_dir: Path

    @property
    def validated(self) -> Path:
        return self.store / flow.read_record(self.store, "validate").output

    @property
    def manifest(self) -> Path:
        return self.validated / "manifest.csv"

    @property
    def symmetries(self) -> Symmetries:
        return read_symmetries(self.validated).symmetries

    @property
    def encoder(self) -> Path:
        return self.store / flow.read_record(self.store, "train-encoder").output

    @property
    def packed(self) -> Path:
        return self.store / "packed"


def folder(out: Path, preset: str, seed: int) -> Path:
    return out / f"{preset}-{seed}"


def train(inputs: Inputs, out: Path, preset: str, knobs: dict[str, Any], seed: int) -> None:
    """One universal GAN and its classes' generators, unless they are there; times and peak memory go to times.json."""
    import resource

    import torch

    from raresynth.config import BalanceConfig, GanConfig
    from raresynth.dataset.balance import images_to_synthesize
    from raresynth.dataset.manifest import read_manifest
    from raresynth.gan.training import finetune, pretrain
    from raresynth.quality.judge import KidJudge

    torch.set_num_threads(1)
    config = GanConfig(preset=preset, resolution=RESOLUTION, **knobs)
    judge = KidJudge(inputs.data_dir, inputs.manifest, inputs.encoder, 0, inputs.packed)
    common = (config, seed, "cpu", inputs.packed, CHECKPOINT_EVERY_S, judge)
    labels = images_to_synthesize(read_manifest(inputs.manifest), BalanceConfig())
    for label in (None, *labels):
        place = out / ("universal" if label is None else label)
        if (place / "time.json").exists():  # written last
            continue
        spent = out / f"{place.name}-seconds.json"
        with added_to(spent):
            if label is None:
                pretrain(inputs.data_dir, inputs.manifest, place, *common, symmetries=inputs.symmetries)
            else:
                base = out / "universal"
                finetune(inputs.data_dir, inputs.manifest, base, label, place, *common, symmetries=inputs.symmetries)
        seconds, peak_kb = json.loads(spent.read_text()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        write_json(place / "time.json", {"seconds": round(seconds, 1), "peak_memory_mb": round(peak_kb / 1024)})


@contextmanager
def added_to(path: Path) -> Iterator[None]:
    """Add this process's CPU time within the block, in seconds, to what the file says, however the block ends."""
    before, started = json.loads(path.read_text()) if path.exists() else 0.0, time.process_time()
    try:
        yield
    finally:
        write_json(path, before + time.process_time() - started)


def task(*arguments: Any) -> None:
    """`train`; at Ctrl-C its process ends, since an exception would end this task alone and the pool begin the next."""
    try:
        train(*arguments)
    except KeyboardInterrupt:
        os._exit(1)


def tasks(presets: list[str], seeds: int) -> Iterator[tuple[str, int]]:
    """Seed by seed, so that a series that is cut short compares all presets."""
    for seed, preset in product(range(seeds), presets):
        yield preset, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--preset", choices=PRESETS, action="append", help="only this one")
    parser.add_argument("--tasks", type=int, default=2, help="at once")
    args = parser.parse_args()
    inputs = Inputs(args.run, args.data)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(args.tasks, get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {
            (preset, seed): pool.submit(task, inputs, folder(args.out, preset, seed), preset, PRESETS[preset], seed)
            for preset, seed in tasks(args.preset or list(PRESETS), args.seeds)
        }
        for (preset, seed), training in running.items():
            training.result()
            print(f"{preset}, seed {seed}: done", flush=True)


if __name__ == "__main__":
    main()
