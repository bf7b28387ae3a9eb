"""The classifier as a network: a timm model by name behind one fixed input range."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from raresynth.errors import CheckpointError, ParamsError
from raresynth.lineage import load_checkpoint

KIND = "classifier"


class Classifier(nn.Module):
    """A timm model that takes images in [-1, 1], whatever normalisation its weights were made with.

    Attributes:
        model: the timm model; its state dict alone is what a checkpoint holds.
        normalisation: the model's own `mean` and `std` per channel, for values in [0, 1].
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.normalisation = {"mean": list(mean), "std": list(std)}
        # (x / 2 + 1 / 2 - mean) / std as one product and one sum.
        deviation = torch.tensor(std).view(1, -1, 1, 1)
        self.register_buffer("scale", 0.5 / deviation, persistent=False)
        self.register_buffer("shift", (0.5 - torch.tensor(mean).view(1, -1, 1, 1)) / deviation, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C) of images (N, 3, H, W) in [-1, 1]."""
        return cast(Tensor, self.model(images * self.scale + self.shift))

    def forward_features(self, images: Tensor) -> Tensor:
        """Last feature map of the images, as the timm model gives it before pooling."""
        return cast(Tensor, cast(Any, self.model).forward_features(images * self.scale + self.shift))

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits (N, C) of a feature map."""
        return cast(Tensor, cast(Any, self.model).forward_head(features))


class WithFeatureMap(nn.Module):
    """The classifier as it is exported: images to (logits, last feature map)."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) in [-1, 1] to logits (N, C) and, for a convolutional net, features (N, K, h, w)."""
        features = self.classifier.forward_features(images)
        return self.classifier.forward_head(features), features


def check_model(name: str) -> None:
    """Refuse a name that timm does not know.

    Raises:
        ParamsError: timm has no such model.
    """
    import timm

    if not timm.is_model(name):
        raise ParamsError(f"classifier.model: timm has no model {name!r}; see timm.list_models() for the names")


def create(name: str, weights: str, classes: int, resolution: int, seed: int) -> Classifier:
    """A classifier ready for training; equal seeds give equal initial weights.

    Args:
        weights: "pretrained" (as timm fetches them), "scratch", or the path of a safetensors file for this model,
            whose last layer is replaced.

    Raises:
        ParamsError: timm has no such model, or it does not take images of this resolution.
        CheckpointError: the weights cannot be fetched, or the file does not fit the model.
    """
    import timm

    check_model(name)
    torch.manual_seed(seed)
    try:
        model = timm.create_model(name, pretrained=weights == "pretrained", num_classes=classes)
    except Exception as error:  # the hub's client raises errors of many kinds
        if weights != "pretrained":
            raise
        raise CheckpointError(
            f"classifier.weights: cannot fetch pretrained weights of {name} ({_one_line(error)});"
            " name a local safetensors file of that model, or use scratch"
        ) from error
    if weights not in ("pretrained", "scratch"):
        _load_all_but_head(model, name, Path(weights))
    expected = {"mean": (0.5,) * 3, "std": (0.5,) * 3} if weights == "scratch" else model.pretrained_cfg
    classifier = Classifier(model, expected["mean"], expected["std"])
    try:
        with torch.no_grad():
            classifier.eval()(_probe(classifier, resolution))
    except (AssertionError, RuntimeError) as error:
        raise ParamsError(
            f"classifier.resolution: {name} does not take {resolution} x {resolution} images ({_one_line(error)});"
            " choose another resolution or model"
        ) from error
    return classifier


def build(meta: Mapping[str, Any]) -> Classifier:
    """The network that a checkpoint's meta.json describes, with weights yet to be loaded."""
    import timm

    model = timm.create_model(meta["model"], pretrained=False, num_classes=len(meta["labels"]))
    return Classifier(model, meta["normalisation"]["mean"], meta["normalisation"]["std"])


def load(folder: Path, device: str = "cpu") -> tuple[Classifier, dict[str, Any]]:
    """A trained classifier in evaluation mode and its meta.

    Raises:
        CheckpointError: the folder holds no classifier's checkpoint, or a damaged one.
    """
    tensors, meta = load_checkpoint(folder, device)
    if meta.get("kind") != KIND:
        raise CheckpointError(f"{folder} holds no classifier; name the folder of a trained arm")
    classifier = build(meta)
    classifier.model.load_state_dict(tensors)
    return classifier.to(device).eval(), meta


@torch.no_grad()
def has_pooled_linear_head(classifier: Classifier, resolution: int) -> bool:
    """Whether the logits are a linear layer on the feature map's spatial mean, as class activation maps need."""
    head = cast(Any, classifier.model).get_classifier()
    classifier.eval()
    features = classifier.forward_features(_probe(classifier, resolution))
    if features.ndim != 4 or not isinstance(head, nn.Linear) or head.in_features != features.shape[1]:
        return False
    return torch.allclose(head(features.mean((2, 3))), classifier.forward_head(features), atol=1e-4)


def _probe(classifier: Classifier, resolution: int) -> Tensor:
    probe = torch.linspace(-1, 1, 2 * 3 * resolution * resolution, device=classifier.scale.device)
    return probe.view(2, 3, resolution, resolution)


def _load_all_but_head(model: nn.Module, name: str, path: Path) -> None:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"classifier.weights: {path} is no safetensors file that can be read ({_one_line(error)});"
            " name one, or use scratch or pretrained"
        ) from error
    heads = cast(Any, model).pretrained_cfg["classifier"]
    prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    body = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefixes)}
    own = {key: tensor.shape for key, tensor in model.state_dict().items() if not key.startswith(prefixes)}
    if {key: tensor.shape for key, tensor in body.items()} != own:
        raise CheckpointError(f"classifier.weights: {path} does not hold the weights of {name}; name a file that does")
    model.load_state_dict(body, strict=False)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
