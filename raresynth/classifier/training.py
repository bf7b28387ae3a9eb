"""Train one arm of the classifier, resumable at any step, bit for bit on a CPU."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from raresynth.classifier import augmentation
from raresynth.classifier.arms import ARMS, Arm, Pool, class_weights, draw
from raresynth.classifier.network import KIND, Classifier, create, has_pooled_linear_head
from raresynth.classifier.statistics import HEADLINE, Floats, Integers, figures, fit_temperature, softmax
from raresynth.config import ClassifierConfig, Symmetries
from raresynth.dataset.images import load_images
from raresynth.dataset.manifest import read_manifest, read_synthetic
from raresynth.errors import DataError, TrainingCollapse
from raresynth.lineage import Report, sha256_file, sha256_json
from raresynth.progress import progress
from raresynth.training_state import finish, flatten_optimizer, load_state, restore_optimizer, save_state, save_weights

CURVE_POINTS = 8
_WARM_UP = 0.1
_PREDICTION_BATCH = 128


class ImageCount(Report):
    real: int
    synthetic: int


class CurvePoint(Report):
    """Training as it went: mean loss since the last point, and figures on the val split."""

    step: int
    train_loss: float
    val_accuracy: float
    val_balanced_accuracy: float


class ClassifierReport(Report):
    """One trained arm; `status` is "skipped", with a reason, where there was nothing to train on."""

    status: Literal["trained", "skipped"]
    arm: str
    reason: str = ""
    model: str
    resolution: int
    labels: list[str]
    n_train: dict[str, ImageCount]
    n_val: int
    batch_size: int
    steps: int = 0
    val: dict[str, float] = Field(default_factory=dict)
    """Each of statistics.HEADLINE, after temperature scaling."""
    temperature: float | None = None
    curves: list[CurvePoint] = Field(default_factory=list)
    pooled_linear_head: bool | None = None
    """Whether class activation maps can be had from the last layer's weights and the feature map."""
    weights_sha256: str | None = None


@dataclass(frozen=True)
class _Data:
    pool: Pool
    pixels: Tensor
    val_pixels: Tensor
    val_targets: Integers
    symmetries: Symmetries


@dataclass
class _State:
    """All that a step reads and writes; `tensors` and `meta` hold it whole."""

    classifier: Classifier
    optimizer: torch.optim.Optimizer
    step: int = 0
    loss_sum: float = 0.0
    curves: list[CurvePoint] = field(default_factory=list)

    def save(self, out_dir: Path, inputs: str) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.classifier.model.state_dict().items()}
        curves = [point.model_dump() for point in self.curves]
        meta = {"run": inputs, "loss_sum": self.loss_sum, "curves": curves}
        save_state(out_dir, self.step, {**tensors, **flatten_optimizer("optimizer", self.optimizer)}, meta)

    def restore(self, out_dir: Path, inputs: str) -> None:
        """Go on from a saved state of these inputs, if there is one."""
        state = load_state(out_dir, inputs, "cpu")
        if state is None:
            return
        tensors, meta = state
        model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        self.classifier.model.load_state_dict(model)
        restore_optimizer("optimizer", self.optimizer, tensors)
        self.step, self.loss_sum = meta["step"], meta["loss_sum"]
        self.curves = [CurvePoint(**point) for point in meta["curves"]]


def train_classifier(
    data_dir: Path,
    manifest_path: Path,
    synthetic_manifest: Path | None,
    synthetic_root: Path | None,
    arm: str,
    out_dir: Path,
    config: ClassifierConfig,
    seed: int,
    device: str,
    cache_dir: Path | None,
    checkpoint_every_s: float,
    *,
    symmetries: Symmetries,
) -> ClassifierReport:
    """Train one arm and leave its checkpoint (weights of the timm model) and report in `out_dir`.

    All arms of a seed start from the same weights and take the same number of steps. The state in `out_dir`/state
    is taken up where an earlier process left it.

    Args:
        synthetic_manifest: synthetic images, read by the arms real+synthetic, which is skipped where it has no rows,
            and synthetic, which is skipped where a class has none.
        synthetic_root: folder that the synthetic manifest's paths are relative to.
        device: "cpu" or "cuda".
        symmetries: of the images, by which every arm augments them.

    Raises:
        DataError: an image cannot be read, a class has no train image, or val is empty.
        ParamsError, CheckpointError: the model or its weights cannot be had.
        TrainingCollapse: the loss stopped being a number.
    """
    manifest = read_manifest(manifest_path)
    labels = sorted(manifest["label"].unique())
    synthetic = _accepted(synthetic_manifest, labels) if ARMS[arm].synthetic else None
    train, val = (manifest[manifest["split"] == split] for split in ("train", "val"))
    lacking = [label for label in labels if label not in set(train["label"])]
    if lacking or val.empty:
        what = f"no train image of {lacking[0]!r}" if lacking else "no val image"
        raise DataError(
            f"{manifest_path} has {what}; run build-manifest with other splits, or validate to drop the class"
        )
    facts: dict[str, Any] = {
        "arm": arm,
        "model": config.model,
        "resolution": config.resolution,
        "labels": labels,
        "n_train": _count(labels, train if ARMS[arm].real else train[:0], synthetic),
        "n_val": len(val),
        "batch_size": config.batch_size,
    }
    reason = _without(ARMS[arm], synthetic, labels)
    if reason:
        report = ClassifierReport(status="skipped", reason=reason, **facts)
        finish(out_dir, report)
        return report
    if not ARMS[arm].real:
        train = train[:0]
    data = _load(
        data_dir, train, val, synthetic, synthetic_root, labels, config.resolution, device, cache_dir, symmetries
    )
    inputs = sha256_json(
        [config.model_dump(mode="json"), symmetries, arm, seed, sha256_file(manifest_path)]
        + ([sha256_file(synthetic_manifest)] if synthetic is not None and synthetic_manifest else [])
    )
    with torch.random.fork_rng():  # leaves the caller's random state as it was
        state = _start(config, len(labels), seed, device)
        state.restore(out_dir, inputs)
        _train(state, data, arm, config, seed, out_dir, inputs, checkpoint_every_s)
        return _finish(state, data, facts, config, seed, out_dir)


def predict_logits(classifier: Classifier, pixels: Tensor) -> Floats:
    """Logits (N, C) of uint8 images (N, H, W, 3) on the classifier's device, in fp32 and in batches."""
    classifier.eval()
    with torch.inference_mode():
        parts = [
            classifier(augmentation.to_input(batch)).double().cpu() for batch in torch.split(pixels, _PREDICTION_BATCH)
        ]
    logits: Floats = torch.cat(parts).numpy()
    return logits


def _accepted(path: Path | None, labels: list[str]) -> pd.DataFrame:
    if path is None:
        return pd.DataFrame(columns=["path", "label", "sha256"])
    synthetic = read_synthetic(path, "the gate")
    return synthetic[synthetic["label"].isin(labels)].reset_index(drop=True)


def _without(arm: Arm, synthetic: pd.DataFrame | None, labels: list[str]) -> str:
    """Why an arm that needs synthetic images cannot be trained; empty where it can."""
    if synthetic is None:
        return ""
    lacking = [label for label in labels if label not in set(synthetic["label"])]
    if not arm.real and lacking:
        return f"there are no synthetic images of {', '.join(lacking)}"
    return "no synthetic image was accepted by the class gate" if synthetic.empty else ""


def _count(labels: list[str], train: pd.DataFrame, synthetic: pd.DataFrame | None) -> dict[str, ImageCount]:
    def of(frame: pd.DataFrame | None, label: str) -> int:
        return 0 if frame is None else int((frame["label"] == label).sum())

    return {label: ImageCount(real=of(train, label), synthetic=of(synthetic, label)) for label in labels}


def _load(
    data_dir: Path,
    train: pd.DataFrame,
    val: pd.DataFrame,
    synthetic: pd.DataFrame | None,
    synthetic_root: Path | None,
    labels: list[str],
    resolution: int,
    device: str,
    cache_dir: Path | None,
    symmetries: Symmetries,
) -> _Data:
    def targets(frame: pd.DataFrame) -> Integers:
        return np.array([labels.index(label) for label in frame["label"]], np.int64)

    pixels = [load_images(train, data_dir, resolution, cache_dir)]
    classes = [targets(train)]
    if synthetic is not None:
        if synthetic_root is None:
            raise DataError("the arm real+synthetic needs the folder of the synthetic images; name it")
        pixels.append(load_images(synthetic, synthetic_root, resolution, cache_dir))
        classes.append(targets(synthetic))
    every = np.concatenate(classes)
    pool = Pool(every, np.arange(len(every)) >= len(train), len(labels))
    val_pixels = torch.from_numpy(np.array(load_images(val, data_dir, resolution, cache_dir)))
    train_pixels = torch.from_numpy(np.concatenate(pixels))
    return _Data(pool, train_pixels.to(device), val_pixels.to(device), targets(val), symmetries)


def _start(config: ClassifierConfig, classes: int, seed: int, device: str) -> _State:
    classifier = create(config.model, config.weights, classes, config.resolution, seed)
    classifier = classifier.to(device).to(memory_format=torch.channels_last)
    weights = [parameter for parameter in classifier.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in classifier.parameters() if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    return _State(classifier, torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay))


def _train(
    state: _State,
    data: _Data,
    arm: str,
    config: ClassifierConfig,
    seed: int,
    out_dir: Path,
    inputs: str,
    checkpoint_every_s: float,
) -> None:
    measured_at = {round(config.steps * (i + 1) / CURVE_POINTS) for i in range(CURVE_POINTS)}
    saved = time.monotonic()
    with progress(f"train-classifier {arm}", config.steps, "steps", done=state.step) as advance:
        while state.step < config.steps:
            loss = _step(state, data, arm, config, seed)
            if not math.isfinite(loss):
                advice = "lower classifier.learning_rate or set classifier.precision to fp32"
                raise TrainingCollapse(state.step, f"cross-entropy of arm {arm}", advice)
            state.loss_sum += loss
            if state.step in measured_at:
                _measure(state, data)
            if time.monotonic() - saved >= checkpoint_every_s and state.step < config.steps:
                state.save(out_dir, inputs)
                saved = time.monotonic()
            advance(1, f"loss {loss:.3f}")


def _step(state: _State, data: _Data, name: str, config: ClassifierConfig, seed: int) -> float:
    arm, device = ARMS[name], data.pixels.device
    # Dropout and the like draw from torch's global generator, augmentation from one of its own.
    step_seed = int(np.random.SeedSequence([seed, state.step]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.manual_seed(step_seed)
    generator = torch.Generator().manual_seed(step_seed)
    batch = torch.from_numpy(draw(data.pool, arm, config.batch_size, config.synthetic_share, seed, state.step))
    images = augmentation.to_input(data.pixels[batch.to(device)])
    classes = torch.from_numpy(data.pool.targets)[batch].to(device)
    targets = functional.one_hot(classes, data.pool.classes).float()
    if arm.strong:
        images = augmentation.strong(images, data.symmetries, generator)
        images, targets = augmentation.mix(images, targets, generator)
    else:
        images = augmentation.ordinary(images, data.symmetries, generator)
    targets = targets * (1 - config.label_smoothing) + config.label_smoothing / data.pool.classes
    if arm.weighted:
        weights = torch.from_numpy(class_weights(data.pool)).float().to(device)[classes]
        targets = targets * (weights / weights.mean())[:, None]
    for group in state.optimizer.param_groups:
        group["lr"] = config.learning_rate * _schedule(state.step / config.steps)
    state.classifier.train()
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        logits = state.classifier(images.contiguous(memory_format=torch.channels_last))
    loss = -(targets * functional.log_softmax(logits.float(), 1)).sum(1).mean()
    state.optimizer.zero_grad()
    torch.autograd.backward(loss)
    state.optimizer.step()
    state.step += 1
    return float(loss.detach())


def _schedule(done: float) -> float:
    """Learning rate's factor: linear warm-up, then half a cosine to zero."""
    if done < _WARM_UP:
        return (done + 1e-3) / (_WARM_UP + 1e-3)
    return (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP))) / 2


def _measure(state: _State, data: _Data) -> None:
    since = state.curves[-1].step if state.curves else 0
    scores = figures(data.val_targets, softmax(predict_logits(state.classifier, data.val_pixels)))
    point = CurvePoint(
        step=state.step,
        train_loss=state.loss_sum / (state.step - since),
        val_accuracy=float(scores.headline["accuracy"][0]),
        val_balanced_accuracy=float(scores.headline["balanced_accuracy"][0]),
    )
    state.curves.append(point)
    state.loss_sum = 0.0


def _finish(
    state: _State, data: _Data, facts: dict[str, Any], config: ClassifierConfig, seed: int, out_dir: Path
) -> ClassifierReport:
    classifier = state.classifier
    logits = predict_logits(classifier, data.val_pixels)
    temperature = fit_temperature(logits, data.val_targets)
    scores = figures(data.val_targets, softmax(logits / temperature))
    pooled = has_pooled_linear_head(classifier, config.resolution)
    meta = {
        "kind": KIND,
        "model": config.model,
        "labels": facts["labels"],
        "resolution": config.resolution,
        "input": "float NCHW in [-1, 1]",
        "normalisation": classifier.normalisation,
        "temperature": temperature,
        "pooled_linear_head": pooled,
        "arm": facts["arm"],
        "seed": seed,
        "steps": state.step,
    }
    digest = save_weights(out_dir, classifier.model.state_dict(), meta)
    report = ClassifierReport(
        status="trained",
        **facts,
        steps=state.step,
        val={metric: float(scores.headline[metric][0]) for metric in HEADLINE},
        temperature=temperature,
        curves=state.curves,
        pooled_linear_head=pooled,
        weights_sha256=digest,
    )
    finish(out_dir, report)
    return report
