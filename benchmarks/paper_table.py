"""The Lightweight-STGAN paper's Table III redone: one classifier, trained on each preset's images.

    python -m benchmarks.paper_table --run RUN --data ../shared/ham10000 --params PARAMS --series SERIES --out OUT

RUN is a finished run with PARAMS, whose real arms are the reference; SERIES comes from gan_series.py. As in the paper
the images fill every class up to the largest, and none is rejected. Two arms a preset: real+synthetic, and synthetic,
which sees no real image (the largest class is then drawn from the universal GAN). Started again, it goes on.
"""

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import pandas as pd

from benchmarks.gan_series import PRESETS, Inputs, folder
from raresynth import flow
from raresynth.classifier.arms import ARMS
from raresynth.classifier.evaluation import ArmResult, Estimate, evaluate
from raresynth.config import Params, load_params
from raresynth.dataset.balance import images_to_synthesize
from raresynth.dataset.manifest import read_manifest

WITH_SYNTHETIC = [name for name, arm in ARMS.items() if arm.synthetic]


def synthetic_images(inputs: Inputs, trained: Path, out: Path, params: Params) -> None:
    """Every class's images, and one manifest of all."""
    from raresynth.gan.synthesis import Drawing, synthesize

    manifest = read_manifest(inputs.manifest)
    counts = manifest["label"][manifest["split"] == "train"].value_counts()
    wanted = images_to_synthesize(manifest, params.balance)
    for label, real in counts.items():
        if not (out / label / "report.json").exists():
            place = trained / (label if label in wanted else "universal")
            drawing = Drawing(place, label, params.synthesis, "cpu", None)
            synthesize(drawing, wanted.get(label, real), out / label)
    tables = [pd.read_csv(out / label / "manifest.csv", keep_default_na=False) for label in sorted(counts.index)]
    pd.concat(tables).to_csv(out / "drawn.csv", index=False, lineterminator="\n")


def train_arm(inputs: Inputs, drawn: Path, arm: str, out: Path, params: Params) -> None:
    import torch

    from raresynth.classifier.training import train_classifier

    torch.set_num_threads(1)
    images = (drawn / "drawn.csv", drawn, arm, out)
    options = (params.classifier, params.seed, "cpu", inputs.packed, params.compute.checkpoint_every_s)
    train_classifier(inputs.data_dir, inputs.manifest, *images, *options, symmetries=inputs.symmetries)


def rows(inputs: Inputs, out: Path, params: Params) -> Iterator[str]:
    real = {
        arm: inputs.store / flow.read_record(inputs.store, "train-classifier", arm).output
        for arm in params.classifier.arms
        if not ARMS[arm].synthetic
    }
    for preset in PRESETS:
        arms = {arm: out / preset / arm for arm in WITH_SYNTHETIC}
        judged = (out / preset / "evaluation", params.classifier, params.release, params.seed, "cpu", inputs.packed)
        report = evaluate(inputs.data_dir, inputs.manifest, real | arms, *judged)
        results = {result.arm: result for result in report.arms}
        best = report.release.best_real_arm
        if preset == next(iter(PRESETS)):
            yield f"| none: {best} | {cells(results[best])} | | |"
        difference, cas = report.differences["balanced_accuracy"], report.cas
        assert cas is not None
        yield f"| {preset} | {cells(results['real+synthetic'])} | {percent(difference, '+')} | {percent(cas)} |"


def cells(arm: ArmResult) -> str:
    test = " | ".join(percent(arm.test[name]) for name in ("accuracy", "balanced_accuracy"))
    return f"{100 * arm.val['accuracy']:.1f} | {test}"


def percent(figure: Estimate, sign: str = "") -> str:
    if figure.value is None or figure.low is None or figure.high is None:
        return "undefined"
    return f"{100 * figure.value:{sign}.1f} ({100 * figure.low:{sign}.1f} to {100 * figure.high:{sign}.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--series", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the series")
    parser.add_argument("--tasks", type=int, default=2, help="at once")
    args = parser.parse_args()
    inputs, params = Inputs(args.run, args.data), load_params(args.params)
    os.environ["OMP_NUM_THREADS"] = "1"
    for preset in PRESETS:
        synthetic_images(inputs, folder(args.series, preset, args.seed), args.out / preset / "images", params)
    with ProcessPoolExecutor(args.tasks, get_context("spawn"), max_tasks_per_child=1) as pool:
        tasks = [
            pool.submit(train_arm, inputs, args.out / preset / "images", arm, args.out / preset / arm, params)
            for preset, arm in product(PRESETS, WITH_SYNTHETIC)
            if not (args.out / preset / arm / "report.json").exists()
        ]
        for task in tasks:
            task.result()
    print("| images of | accuracy, val | accuracy, test | balanced accuracy, test | minus best real arm | CAS, % |")
    print("|---|---|---|---|---|---|")
    for row in rows(inputs, args.out, params):
        print(row)


if __name__ == "__main__":
    main()
