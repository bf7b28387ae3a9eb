"""What the machine gives without a server: decoding and onnxruntime in a loop, sampler and encoder in a loop."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from raresynth.bundle.contents import open_bundle
from raresynth.bundle.predictor import Predictor
from raresynth.bundle.sampler import Sampler
from raresynth.dataset.images import Pixels, decode_image
from serving.archives import pieces

SETTLE_S = 1.0


@dataclass(frozen=True)
class Setting:
    """How the cores are used: processes, threads of a graph in each, images of one run."""

    processes: int
    threads: int
    batch: int


CORES = len(os.sched_getaffinity(0))
SETTINGS = [
    *(Setting(CORES, 1, batch) for batch in (1, 2, 4, 8, 16)),
    *(Setting(1, CORES, batch) for batch in (1, 4, 16)),
]


def predictions_per_s(bundle: Path, images: Sequence[bytes], setting: Setting, seconds: float) -> float:
    """Images decoded and classified a second."""
    return _in_processes(setting.processes, _predict, (bundle, images, setting, seconds))


def latency_ms(bundle: Path, images: Sequence[bytes], threads: int, seconds: float) -> float:
    """Median time to decode and classify one image, one after the other in one process."""
    with get_context("spawn").Pool(1) as pool:
        return float(pool.apply(_one_by_one, (bundle, images, threads, seconds)))


def generated_per_s(bundle: Path, label: str, n: int, processes: int, seconds: float) -> float:
    """Images drawn and encoded as PNG a second, in rounds of n."""
    return _in_processes(processes, _generate, (bundle, label, n, seconds))


def _in_processes(processes: int, work: Callable[..., float], arguments: tuple[Any, ...]) -> float:
    with get_context("spawn").Pool(processes) as pool:
        return sum(pool.starmap(work, [arguments] * processes, chunksize=1))


def _rate(work: Callable[[], int], seconds: float) -> float:
    """What `work` gets done a second, after some time that does not count."""
    _repeat(work, SETTLE_S)
    done, took = _repeat(work, seconds)
    return done / took


def _repeat(work: Callable[[], int], seconds: float) -> tuple[int, float]:
    began, done = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds or not done:
        done += work()
    return done, took


def _predict(bundle: Path, images: Sequence[bytes], setting: Setting, seconds: float) -> float:
    predictor = Predictor(bundle, threads=setting.threads)
    resolution, first = predictor.bundle.classifier.resolution, 0
    pool = ThreadPoolExecutor(setting.threads)

    def decode(content: bytes) -> Pixels:
        return decode_image(content, resolution)

    def work() -> int:
        nonlocal first
        chosen = [images[(first + i) % len(images)] for i in range(setting.batch)]
        first += setting.batch
        decoded = pool.map(decode, chosen) if setting.threads > 1 else map(decode, chosen)
        predictor.predict(np.stack(list(decoded)))
        return setting.batch

    return _rate(work, seconds)


def _one_by_one(bundle: Path, images: Sequence[bytes], threads: int, seconds: float) -> float:
    predictor = Predictor(bundle, threads=threads)
    times: list[float] = []

    def work() -> int:
        began = time.perf_counter()
        image = decode_image(images[len(times) % len(images)], predictor.bundle.classifier.resolution)
        predictor.predict(image[None])
        times.append(time.perf_counter() - began)
        return 1

    _rate(work, seconds)
    return 1000 * float(np.median(times))


def _generate(bundle: Path, label: str, n: int, seconds: float) -> float:
    sampler = Sampler(bundle, label, open_bundle(bundle), threads=1)
    seed = 0

    def work() -> int:
        nonlocal seed
        seed += 1
        for piece in pieces(n, threads=1):  # as the service draws them
            sampler.pngs(sampler.generate(seed, piece.start, len(piece), 1.0), seed, piece.start, 1.0)
        return n

    return _rate(work, seconds)
