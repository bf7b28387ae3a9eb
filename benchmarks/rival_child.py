"""Trains lightweight-gan on a CPU; run by rival.py in an environment of its own, which needs no raresynth.

Its code asks for CUDA when it is imported and when tensors are moved; both are answered here, nothing else is changed.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

IMAGE_SIZE = 64
BATCH_SIZE = 32
WARM_UP_STEPS = 4


class TorchOnCpu:
    """The module torch, but every device is the CPU."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    @staticmethod
    def device(*_: object) -> torch.device:
        return torch.device("cpu")


def trainer(images: Path) -> object:
    torch.cuda.is_available = lambda: True
    from lightweight_gan import lightweight_gan as rival

    torch.cuda.is_available = lambda: False
    rival.torch = TorchOnCpu()
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_: self
    made = rival.Trainer(image_size=IMAGE_SIZE, batch_size=BATCH_SIZE, num_workers=0, use_aim=False, base_dir="/tmp")
    # Pictures and checkpoints on the way cost time that is no training.
    made.evaluate = made.save = lambda *_, **__: None
    made.set_data_src(str(images))
    made.init_GAN()
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--samples", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = trainer(args.images)
    for _ in range(WARM_UP_STEPS):
        run.train()
    started, steps = time.monotonic(), 0
    while time.monotonic() - started < args.minutes * 60:
        run.train()
        steps += 1
    seconds = time.monotonic() - started
    # Its averaged generator is a copy of a beginner until step 20,000, so images are drawn from the generator itself.
    generator, drawn = run.GAN.G.eval(), []
    with torch.inference_mode():
        for first in range(0, args.samples, BATCH_SIZE):
            latents = torch.randn(min(BATCH_SIZE, args.samples - first), run.GAN.latent_dim)
            drawn.append((generator(latents).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy())
    np.save(args.out, np.concatenate(drawn))
    json.dump(
        {
            "images_per_s": steps * BATCH_SIZE / seconds,
            "kimg": steps * BATCH_SIZE / 1000,
            "minutes": seconds / 60,
            "parameters_m": [sum(p.numel() for p in net.parameters()) / 1e6 for net in (run.GAN.G, run.GAN.D)],
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
