"""Train-step throughput of the GAN: images/s by preset, resolution and stage, parameters and peak memory.

    python -m benchmarks.gan_step [--device cuda] [--resolution 64] [--precision fp32] [--ranks 2]

A step updates D and G, with the penalty as often as in training, and moves the average; nothing is read or saved.
Presets have their own widths and batches unless these are given.
"""

import argparse
import platform
import resource
import time
from collections.abc import Iterator
from itertools import product

import torch

from raresynth.config import GanConfig
from raresynth.gan.presets import PRESETS, resolve
from raresynth.gan.ranks import ALONE, Ranks, joined, launch
from raresynth.gan.rng import Rng
from raresynth.gan.training import new_game

RESOLUTIONS = (32, 64, 128, 256)
ROUND = 16
"""Steps timed together: two lazy penalties."""


def images_per_s(config: GanConfig, device: str, finetuning: bool, seconds: float, ranks: Ranks = ALONE) -> float:
    """Images shown a second over rounds of whole penalty intervals, after one round to warm up."""
    settings = resolve(config)
    game = new_game(settings, 7, 0, device, finetuning, ranks)
    rng = Rng(torch.Generator(device).manual_seed(0), ranks)
    shape = (settings.batch_size, settings.resolution, settings.resolution, 3)
    real = ranks.own(torch.rand(shape, device=device).permute(0, 3, 1, 2) * 2 - 1)
    labels = ranks.own(torch.arange(settings.batch_size, device=device) % 7)

    def rounds() -> float:
        start = time.perf_counter()
        for step in range(ROUND):
            game.step(real, labels, rng, step, ROUND)
            game.average(0.99)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    rounds()
    times = [rounds()]
    while ranks.by_first(lambda: sum(times)) < seconds:
        times.append(rounds())
    return ROUND * settings.batch_size * len(times) / sum(times)


def of_ranks(argument: tuple[GanConfig, str, float]) -> float:
    """Images shown a second by this rank and the others together, in pretraining."""
    config, device, seconds = argument
    torch.set_num_threads(1)
    with joined(device) as ranks:
        return images_per_s(config, device, False, seconds, ranks)


def parameters(config: GanConfig) -> tuple[float, float]:
    """Of generator and discriminator, in millions."""
    game = new_game(resolve(config), 7, 0, "cpu", finetuning=False)
    return tuple(sum(p.numel() for p in net.parameters()) / 1e6 for net in (game.generator, game.discriminator))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--preset", choices=PRESETS, action="append", help="only this one")
    parser.add_argument("--resolution", type=int, choices=RESOLUTIONS, action="append", help="only this one")
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seconds", type=float, default=5.0, help="timed seconds for each figure")
    parser.add_argument(
        "--ranks", type=int, default=1, help="processes of a thread each that share a pretraining batch"
    )
    args = parser.parse_args()
    if args.ranks > 1:
        print_ranks(args)
        return
    chip = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {chip}, torch {torch.__version__}, {args.precision}\n")
    print("| preset | resolution | width | batch | G + D, M parameters | pretrain, images/s | finetune, images/s |")
    print("|---|---|---|---|---|---|---|")
    for config in configs(args):
        settings = resolve(config)
        rates = [images_per_s(config, args.device, stage, args.seconds) for stage in (False, True)]
        size = "{:.2f} + {:.2f}".format(*parameters(config))
        print(
            f"| {config.preset} | {config.resolution} | {settings.width} | {settings.batch_size} | {size} "
            f"| {rates[0]:.0f} | {rates[1]:.0f} |",
            flush=True,
        )
    peak = torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else None
    peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak memory: {peak:,.0f} MB")


def print_ranks(args: argparse.Namespace) -> None:
    """One figure for each preset and resolution."""
    for config in configs(args):
        rate = launch(args.ranks, of_ranks, (config, args.device, args.seconds))
        what = f"{config.preset}, {config.resolution}, batch {resolve(config).batch_size}, {args.ranks} ranks"
        print(f"{what}: {rate:.0f} images/s")


def configs(args: argparse.Namespace) -> Iterator[GanConfig]:
    """What is asked for, by preset and resolution."""
    for preset, resolution in product(args.preset or PRESETS, args.resolution or RESOLUTIONS):
        yield GanConfig(
            preset=preset,
            resolution=resolution,
            width=args.width,
            batch_size=args.batch_size,
            precision=args.precision,
        )


if __name__ == "__main__":
    main()
