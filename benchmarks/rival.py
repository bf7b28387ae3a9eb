"""Against lightweight-gan (PyPI) on a CPU: images/s, parameters, memory, and KID after equal time.

    python -m venv ENV && ENV/bin/python -m pip install lightweight-gan
    python -m benchmarks.rival --run RUN --data ../shared/ham10000 --python ENV/bin/python --out OUT

RUN is a finished run at 64 x 64, whose train images and encoder are used. Both train at the same time, each on one
thread, for `--minutes`; raresynth's length is set by its rate. KID is of the whole set, on the test split's reals.
"""

import argparse
import json
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.gan_quality import WHOLE, paired_difference
from benchmarks.gan_series import RESOLUTION, Inputs
from benchmarks.gan_step import images_per_s, parameters
from raresynth.config import GanConfig
from raresynth.dataset.images import load_images, resized
from raresynth.dataset.manifest import read_manifest
from raresynth.gan.sampling import generate, load_generator
from raresynth.gan.training import pretrain
from raresynth.lineage import write_json
from raresynth.quality.distances import kernel_distance
from raresynth.quality.encoder import Encoder
from raresynth.quality.judge import KidJudge
from raresynth.quality.reals import Reals, group_numbers

SAMPLES = 1000
SHARE_OF_RATE = 0.93
"""Snapshots cost time too: the length is that which this part of the bare step's rate allows."""


def export_images(inputs: Inputs, folder: Path) -> None:
    """The train split as the rival wants it: a folder of files."""
    manifest = read_manifest(inputs.manifest)
    train = manifest[manifest["split"] == "train"]
    folder.mkdir(parents=True, exist_ok=True)
    pixels = load_images(train, inputs.data_dir, RESOLUTION, inputs.packed)
    for image_id, image in zip(train["image_id"], pixels, strict=True):
        Image.fromarray(image).save(folder / f"{image_id}.png")


def train_both(python: Path, inputs: Inputs, out: Path, minutes: float) -> dict[str, dict[str, Any]]:
    """What each reached, by name."""
    export_images(inputs, out / "images")
    child = Path(__file__).with_name("rival_child.py")
    command = [python, "-P", child, out / "images", out / "rival.npy", "--minutes", minutes, "--samples", SAMPLES]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True) as rival:
        ours = train_ours(inputs, out, minutes)
        printed, _ = rival.communicate()
    if rival.returncode:
        raise SystemExit(f"lightweight-gan ended with exit status {rival.returncode}")
    return {"raresynth": ours, "lightweight-gan": json.loads(printed.splitlines()[-1])}


def train_ours(inputs: Inputs, out: Path, minutes: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    config = GanConfig(resolution=RESOLUTION, ema_half_life_kimg=5.0)
    rate = images_per_s(config, "cpu", finetuning=False, seconds=20.0)
    config = config.model_copy(update={"pretrain_kimg": round(SHARE_OF_RATE * rate * minutes * 60 / 1000)})
    judge = KidJudge(inputs.data_dir, inputs.manifest, inputs.encoder, 0, inputs.packed)
    started = time.monotonic()
    common = (config, 0, "cpu", inputs.packed, 60.0, judge)
    report = pretrain(inputs.data_dir, inputs.manifest, out / "ours", *common, symmetries=inputs.symmetries)
    seconds = time.monotonic() - started
    return {
        "images_per_s": 1000 * report.kimg / seconds,
        "kimg": report.kimg,
        "minutes": seconds / 60,
        "parameters_m": parameters(config),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True, help="of the environment that holds lightweight-gan")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    args = parser.parse_args()
    inputs = Inputs(args.run, args.data)
    kept = args.out / "results.json"
    if not kept.exists():
        write_json(kept, train_both(args.python, inputs, args.out, args.minutes))
    results = json.loads(kept.read_text())

    encoder, manifest = Encoder.load(inputs.encoder), read_manifest(inputs.manifest)
    test = manifest[manifest["split"] == "test"]
    real = Reals(encoder.features(load_images(test, args.data, encoder.resolution, inputs.packed)), group_numbers(test))
    shares = manifest["label"][manifest["split"] == "train"].value_counts(normalize=True)
    ours = [
        generate(load_generator(args.out / "ours", "cpu", label)[0], 7, range(round(SAMPLES * share)))
        for label, share in shares.items()
    ]
    images = {"raresynth": np.concatenate(ours), "lightweight-gan": np.load(args.out / "rival.npy")}
    features = {name: encoder.features(resized(each, encoder.resolution)) for name, each in images.items()}
    print(f"one thread each, torch {torch.__version__}, {RESOLUTION} x {RESOLUTION}, KID of the {WHOLE} on test\n")
    print(
        "| | images/s | parameters G + D, M | peak memory, MB | minutes | kimg | KID |\n|---|---|---|---|---|---|---|"
    )
    for name, r in results.items():
        kid = kernel_distance(real.features, features[name], real.groups)
        size = "{:.2f} + {:.2f}".format(*r["parameters_m"])
        cells = [
            f"{r['images_per_s']:.1f}",
            size,
            f"{r['peak_memory_mb']:,.0f}",
            f"{r['minutes']:.1f}",
            f"{r['kimg']:.1f}",
        ]
        print(f"| {name} | {' | '.join(cells)} | {kid:.3f} |")
    faster = results["raresynth"]["images_per_s"] / results["lightweight-gan"]["images_per_s"]
    d = paired_difference(real, [features["raresynth"]], [features["lightweight-gan"]])
    print(f"\n{faster:.1f} times the rate; KID difference {d.value:+.3f}")


if __name__ == "__main__":
    main()
