"""Train-step throughput of the GAN: images/s per preset and resolution, both stages.

    .venv/bin/python benchmarks/gan_step.py [--device cuda] [--precision fp32] [--width 32] [--batch-size 32]

A step updates D and G once and moves the average; nothing is read or saved. Median of the timed steps.
"""

import argparse
import platform
import statistics
import time

import torch

from raresynth.config import GanConfig
from raresynth.gan.game import Game, build
from raresynth.gan.presets import PRESETS, resolve

RESOLUTIONS = (32, 64, 128)


def images_per_s(config: GanConfig, device: str, finetuning: bool, seconds: float) -> float:
    settings = resolve(config)
    networks = build(settings, 0, device)
    if finetuning:
        networks.discriminator.freeze(settings.freeze_d)
    game = Game(networks, settings, alpha=settings.barlow_alpha if finetuning else 0.0)
    rng = torch.Generator(device).manual_seed(0)
    shape = (settings.batch_size, settings.resolution, settings.resolution, 3)
    real = torch.rand(shape, device=device).permute(0, 3, 1, 2) * 2 - 1

    def step() -> float:
        start = time.perf_counter()
        game.step(real, rng)
        game.average(0.99)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        step()
    times = [step()]
    while sum(times) < seconds:
        times.append(step())
    return settings.batch_size / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0, help="timed seconds for each row")
    args = parser.parse_args()
    chip = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    machine = f"{platform.machine()}, {chip}, torch {torch.__version__}"
    print(f"{machine}, {args.precision}, width {args.width}, batch {args.batch_size}\n")
    print("| preset | resolution | pretrain, images/s | finetune, images/s |\n|---|---|---|---|")
    for preset in PRESETS:
        for resolution in RESOLUTIONS:
            config = GanConfig(
                preset=preset, resolution=resolution, width=args.width, batch_size=args.batch_size,
                precision=args.precision,
            )  # fmt: skip
            rates = [images_per_s(config, args.device, stage, args.seconds) for stage in (False, True)]
            print(f"| {preset} | {resolution} | {rates[0]:.0f} | {rates[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
