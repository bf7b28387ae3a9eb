"""Is the best real arm a straw man? A plain ResNet-18 on the same split at the same steps says.

    python benchmarks/classifier_baseline.py --run runs/demo --data data

Trains timm's ResNet-18 from scratch with balanced sampling and flips, in a plain PyTorch loop that shares nothing
with the library's training, and compares it with the run's best real arm on the test split, paired.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from torch.nn import functional

from raresynth.classifier.evaluation import EvaluationReport
from raresynth.classifier.statistics import bootstrap, figures, interval, softmax
from raresynth.classifier.training import ClassifierReport
from raresynth.dataset.images import load_images
from raresynth.dataset.manifest import read_manifest
from raresynth.lineage import read_report

ALLOWED_LOSS = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--data", type=Path, required=True, help="the run's data folder")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    evaluation = read_report(args.run / "evaluation" / "report.json", EvaluationReport)
    best_real = evaluation.release.best_real_arm
    weights = next(result.weights_sha256 for result in evaluation.arms if result.arm == best_real)
    folders = (args.run / "checkpoints" / "train-classifier" / best_real).glob("*/report.json")
    trained = next(r for r in (read_report(p, ClassifierReport) for p in folders) if r.weights_sha256 == weights)

    manifest = read_manifest(args.run / "validation" / "manifest.csv")
    splits = {split: manifest[manifest["split"] == split] for split in ("train", "test")}
    images = {
        split: torch.from_numpy(load_images(rows, args.data, trained.resolution)) for split, rows in splits.items()
    }
    targets = {
        split: np.array([evaluation.labels.index(label) for label in rows["label"]]) for split, rows in splits.items()
    }

    torch.manual_seed(args.seed)
    model = train(images["train"], targets["train"], trained.steps, trained.batch_size, args)
    baseline = predict(model, images["test"], args.device)

    table = pd.read_csv(args.run / "evaluation" / "predictions.csv", dtype={"image_id": str, "label": str})
    ours = table[table["arm"] == best_real].set_index("image_id").loc[splits["test"]["image_id"]]
    arms = {"baseline": baseline, best_real: ours[[f"p_{label}" for label in evaluation.labels]].to_numpy()}
    groups = splits["test"]["group"].to_numpy(str)
    resamples = bootstrap(targets["test"], arms, groups, evaluation.bootstrap_samples, args.seed)
    balanced = {
        arm: figures(targets["test"], probabilities).headline["balanced_accuracy"][0]
        for arm, probabilities in arms.items()
    }
    print(f"{trained.steps} steps of {trained.batch_size} images at {trained.resolution} x {trained.resolution}")
    for arm in arms:
        low, high = interval(resamples[arm].headline["balanced_accuracy"])
        print(f"{arm}: test balanced accuracy {balanced[arm]:.3f} (95 % interval {low:.3f} to {high:.3f})")
    paired = resamples[best_real].headline["balanced_accuracy"] - resamples["baseline"].headline["balanced_accuracy"]
    low, high = interval(paired)
    difference = balanced[best_real] - balanced["baseline"]
    print(f"{best_real} minus baseline: {difference:+.3f} (95 % interval {low:+.3f} to {high:+.3f})")
    print("no straw man" if difference >= -ALLOWED_LOSS else "STRAW MAN: more than 3 points below the baseline")


def train(
    images: torch.Tensor, targets: np.ndarray, steps: int, batch_size: int, args: argparse.Namespace
) -> torch.nn.Module:
    model = timm.create_model("resnet18", num_classes=int(targets.max()) + 1).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps)
    chances = torch.from_numpy(1 / np.bincount(targets)[targets])
    sampler = torch.utils.data.WeightedRandomSampler(chances, steps * batch_size)
    data = torch.utils.data.TensorDataset(images, torch.from_numpy(targets))
    for step, (pixels, labels) in enumerate(torch.utils.data.DataLoader(data, batch_size, sampler=sampler), 1):
        batch = to_input(pixels, args.device)
        flipped = torch.stack([image.flip([d for d in (1, 2) if torch.rand(1) < 0.5]) for image in batch])
        loss = functional.cross_entropy(model(flipped), labels.to(args.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}/{steps}, loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.inference_mode()
def predict(model: torch.nn.Module, images: torch.Tensor, device: str) -> np.ndarray:
    logits = torch.cat([model(to_input(batch, device)).cpu() for batch in images.split(128)])
    return softmax(logits.double().numpy())


def to_input(pixels: torch.Tensor, device: str) -> torch.Tensor:
    return pixels.to(device).permute(0, 3, 1, 2) / 127.5 - 1


if __name__ == "__main__":
    main()
