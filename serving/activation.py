"""Class activation maps (Zhou et al., 2016): which places of an image spoke for its label."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from raresynth.bundle.contents import Bundle
from raresynth.bundle.predictor import Floats
from raresynth.dataset.images import Pixels

OPACITY = 0.45
HEAT = np.array([[0, 0, 128], [0, 128, 255], [64, 255, 160], [255, 192, 0], [160, 0, 0]], np.float32)
"""Colours from what spoke against the label to what spoke for it most."""


class ActivationMaps:
    """Maps of a classifier whose logits are a linear layer on the spatial mean of its features."""

    def __init__(self, folder: Path, bundle: Bundle) -> None:
        tensors = load_file(folder / "classifier" / "weights.safetensors")
        # A pooled linear head is the network's last layer: its only matrix with a row a label.
        self._rows = [t for t in tensors.values() if t.ndim == 2 and len(t) == len(bundle.labels)][-1]

    def overlay(self, pixels: Pixels, features: Floats, label: int) -> bytes:
        """The image with its map over it, as PNG.

        Args:
            pixels: uint8 (R, R, 3).
            features: (channels, height, width), the image's.
            label: number of the label that the map is for.
        """
        spoke = np.tensordot(self._rows[label], features, axes=1)
        share = (spoke - spoke.min()) / max(float(np.ptp(spoke)), 1e-12)
        size = (pixels.shape[1], pixels.shape[0])
        smooth = np.asarray(Image.fromarray(share.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
        stops = np.linspace(0, 1, len(HEAT))
        colours = np.stack([np.interp(smooth, stops, HEAT[:, channel]) for channel in range(3)], axis=2)
        blended = (1 - OPACITY) * pixels + OPACITY * colours
        buffer = BytesIO()
        Image.fromarray(blended.round().astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()


def activation_maps(folder: Path, bundle: Bundle) -> ActivationMaps | None:
    """The bundle's maps; None where its classifier has no pooled linear head."""
    return ActivationMaps(folder, bundle) if bundle.classifier.pooled_linear_head else None
