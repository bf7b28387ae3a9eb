"""What the flow costs as the images grow in number: measured at three sizes, the third also predicted from the others.

    python -m benchmarks.scale --out OUT [--sizes 2000 8000 32000]

Made-up images of HAM10000's size (600 x 450) in seven classes. Networks are small and training is short, and both the
same at all sizes: what is measured is all that grows with the images. Model of a stage: a + b N seconds for N images,
and c N^2 besides for `validate`, which compares all pairs (as `measure` does within a class, which shows only above
these sizes). a and b come from the two smaller sizes, c from hashes alone. Started again, it goes on.
"""

import argparse
import csv
import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from raresynth import flow
from raresynth.config import Params
from raresynth.dataset.duplicates import near_duplicates
from raresynth.lineage import new_dir

SHARES = {"nv": 0.6, "mel": 0.2, "bkl": 0.08, "bcc": 0.05, "akiec": 0.04, "vasc": 0.02, "df": 0.01}
SIZE = (600, 450)
WARM_UP = 1_000
HASHES = 20_000
SHARDS = 8
PROJECTED = (10_000, 100_000, 1_000_000)
Seconds = Mapping[str, float]


def params(n: int, shards: int) -> Params:
    """Short training on small networks; N / 50 images are made for each class but the largest."""
    return Params.model_validate(
        {
            "compute": {"device": "cpu", "parallel_tasks": 1, "shards": shards},
            "encoder": {"steps": 30, "width": 8},
            "gan": {"resolution": 64, "width": 8, "pretrain_kimg": 2, "finetune_kimg": 0.5, "snapshots": 2},
            "balance": {"policy": "fixed", "count": n // 50},
            # No image is rejected: nothing trained so shortly would pass.
            "synthesis": {"typical_share": 1.0, "near_copy_distance": 0.0},
            "classifier": {"model": "test_resnet", "resolution": 64, "steps": 30},
        }
    )


def make_images(folder: Path, n: int) -> None:
    """Write `n` JPEG files and metadata.csv; two images are of one lesion."""
    rng = np.random.default_rng(0)
    labels = [label for label, share in SHARES.items() for _ in range(round(share * n))]
    with new_dir(folder) as new, ProcessPoolExecutor(os.cpu_count()) as pool:
        (new / "images").mkdir()
        with (new / "metadata.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image_id", "label", "lesion_id"])
            writer.writerows([f"{i:07d}", label, f"{label}-{i // 2}"] for i, label in enumerate(labels))
        paths = [new / "images" / f"{i:07d}.jpg" for i in range(len(labels))]
        list(pool.map(_make_image, paths, rng.integers(0, 2**31, len(labels)), chunksize=64))


def _make_image(path: Path, seed: int) -> None:
    cells = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(cells).resize(SIZE, Image.Resampling.BICUBIC).save(path, quality=90)


def measure(out: Path, n: int, shards: int) -> Seconds:
    """Seconds of each stage, all its items one after the other."""
    data, store = out / f"images-{n}", out / f"run-{n}-{shards}"
    if not data.exists():
        make_images(data, n)
    run = flow.Run(data, store, params(n, shards))
    for stage in flow.STAGES:
        flow.execute_all(stage, run)
    return seconds(store)


def seconds(store: Path) -> Counter[str]:
    """As noted in run.json."""
    total: Counter[str] = Counter()
    for name, entry in json.loads((store / "run.json").read_text())["stages"].items():
        total[name.split("/")[0]] += entry["seconds"]
    return total


def seconds_a_pair() -> float:
    """Of comparing two perceptual hashes."""
    rng = np.random.default_rng(0)
    hashes = [rng.bytes(32) for _ in range(HASHES)]
    started = time.perf_counter()
    near_duplicates(hashes, [str(i) for i in range(HASHES)], 24)
    return (time.perf_counter() - started) / (HASHES * (HASHES - 1) / 2)


class Model:
    """Seconds of each stage for N images."""

    def __init__(self, first: tuple[int, Seconds], second: tuple[int, Seconds], pair: float) -> None:
        (n1, t1), (n2, t2) = first, second
        self._pair = pair
        # No stage gets faster with more images; where the noise says so, it does not depend on them.
        self._slope = {s: max(0.0, (t2[s] - t1[s] - self._pairs(s, n2) + self._pairs(s, n1)) / (n2 - n1)) for s in t1}
        self._offset = {s: max(0.0, t2[s] - self._pairs(s, n2) - self._slope[s] * n2) for s in t1}

    def _pairs(self, stage: str, n: int) -> float:
        return self._pair * n * (n - 1) / 2 if stage == "validate" else 0.0

    def __call__(self, stage: str, n: int) -> float:
        return self._offset[stage] + self._slope[stage] * n + self._pairs(stage, n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs=3, default=[2_000, 8_000, 32_000])
    args = parser.parse_args()
    sizes: list[int] = args.sizes
    measure(args.out, WARM_UP, 1)  # loads all libraries, which is not to count
    measured = {n: measure(args.out, n, 1) for n in sizes}
    pair = seconds_a_pair()
    model = Model((sizes[0], measured[sizes[0]]), (sizes[1], measured[sizes[1]]), pair)
    print(f"{1 / pair / 1e6:.0f} million pairs of hashes a second\n")
    columns = [f"{n:,} images, s" for n in sizes]
    print(f"| stage | {' | '.join(columns)} | predicted | ratio | {' | '.join(f'{n:,}, h' for n in PROJECTED)} |")
    print("|---" * (len(sizes) + 3 + len(PROJECTED)) + "|")
    totals = np.zeros(len(sizes) + 1 + len(PROJECTED))
    for stage in measured[sizes[-1]]:
        row = np.array([*(measured[n][stage] for n in sizes), *(model(stage, n) for n in (sizes[-1], *PROJECTED))])
        print_row(stage, row)
        totals += row
    print_row("all", totals)
    divided = measure(args.out, sizes[-1], SHARDS)
    print(f"\n{sizes[-1]:,} images, {SHARDS} shards: {slowest(args.out / f'run-{sizes[-1]}-{SHARDS}', divided)}")


def print_row(stage: str, row: np.ndarray) -> None:
    """Measured seconds, the predicted ones of the last size, and projected hours."""
    *seen, predicted = row[:4]
    hours = " | ".join(f"{value / 3600:.2f}" for value in row[4:])
    cells = " | ".join(f"{value:.1f}" for value in (*seen, predicted))
    ratio = f"{predicted / seen[-1]:.2f}" if seen[-1] >= 0.1 else "-"
    print(f"| {stage} | {cells} | {ratio} | {hours} |")


def slowest(store: Path, divided: Seconds) -> str:
    """What the stages take where each shard is a task of its own."""
    entries = json.loads((store / "run.json").read_text())["stages"]
    longest = {stage: max(entries[name]["seconds"] for name in entries if name.startswith(f"{stage}/"))
               for stage in ("probe", "draw")}  # fmt: skip
    merged = {stage: divided[stage] for stage in ("build-manifest", "validate", "synthesize")}
    return ", ".join(f"{stage} {value:.1f} s" for stage, value in (longest | merged).items())


if __name__ == "__main__":
    main()
