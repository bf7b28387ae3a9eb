"""The service under measure: throughput, latency, memory, overload and strange images, each against a bare loop.

    python -m benchmarks.serving --bundle BUNDLE --images ../shared/ham10000 --out OUT [--parts start load ...]

BUNDLE is an approved bundle with a ResNet-18 and generators; `--images` the images it was made from. Everything runs
on this machine, the clients beside the servers on the same cores: the ratios are of one run, and what the clients cost
is the servers' loss. Photographs are 600 x 450 JPEG files, as HAM10000's were published. For 224 x 224 the bundle's own
network is exported anew, for speed alone. The parts, whose figures are kept in OUT, so that a run that was stopped goes
on:

    predict-64, predict-224   the service, a bare loop at its best setting, and FastAPI + torch at its best setting
    generate                  /generate beside sampler and PNG encoder in a loop
    start                     seconds until ready; memory (PSS of all processes) then and after work
    load                      twice as many requests as it can answer, for `--minutes`
    strange                   shares of strange images that pass the bundle's threshold
"""

import argparse
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks import serving_bare as bare
from benchmarks.manifest import machine
from benchmarks.serving_bundle import at_resolution, photographs
from benchmarks.serving_load import load, write_requests, write_uploads
from benchmarks.serving_outliers import accepted_shares
from benchmarks.serving_processes import Server, raresynth, rival
from raresynth.bundle.contents import open_bundle
from raresynth.lineage import write_json, write_text

CLIENTS = (1, 16, 64)
NUMBERS = (16, 64, 256)
STARTS = 5
RIVALS = ((1, 1), (1, 2), (2, 1), (2, 2))
"""Workers and threads of torch in each."""
OVERLOAD = 2.0
Figures = dict[str, Any]


class Bench:
    """What all parts need."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.bundle, self.images, self.out = args.bundle.resolve(), args.images.resolve(), args.out.resolve()
        self.others: dict[str, Path] = {folder.name: folder for folder in args.strange}
        self.seconds, self.minutes = float(args.seconds), float(args.minutes)

    @property
    def label(self) -> str:
        """A class that the bundle has a generator of."""
        return next(iter(open_bundle(self.bundle).generators))

    def photographs(self) -> list[bytes]:
        folder = self.out / "photographs"
        if not folder.exists():
            write_requests(folder, "/", photographs(self.images), "image/jpeg")
        return [path.read_bytes().partition(b"\r\n\r\n")[2] for path in sorted(folder.iterdir())]

    def uploads(self) -> Path:
        return write_uploads(self.out / "uploads", self.photographs())

    def orders(self, n: int) -> Path:
        """Requests for n images of one label, each of another seed."""
        orders = [json.dumps({"label": self.label, "n": n, "seed": seed}).encode() for seed in range(64)]
        return write_requests(self.out / f"orders-{n}", "/generate", orders, "application/json")

    def load(self, server: Server, requests: Path, clients: int, rate: float = 0.0) -> Figures:
        """Figures of load, and what it cost the server."""
        before = server.cpu_s()
        began = time.perf_counter()
        figures = load(server, requests, clients, self.seconds, rate)
        cpus = (server.cpu_s() - before) / (time.perf_counter() - began)
        return figures | {"clients": clients, "server_cpus": cpus, "memory_mb": server.memory_mb()}


def predict(bench: Bench, resolution: int) -> Figures:
    """Throughput and latency of predictions."""
    bundle = at_resolution(bench.bundle, resolution, bench.images, bench.out / f"bundle-{resolution}")
    images, uploads = bench.photographs(), bench.uploads()
    rate = partial(bare.predictions_per_s, bundle, images)
    sweep = {setting: rate(setting, bench.seconds / 3) for setting in bare.SETTINGS}
    best = max(sweep, key=lambda setting: sweep[setting])
    rates = [rate(best, bench.seconds)]
    latencies = {threads: bare.latency_ms(bundle, images, threads, bench.seconds / 3) for threads in (1, bare.CORES)}
    with raresynth(bundle) as server:
        answers = _answers(server, images)
        served = [bench.load(server, uploads, clients) for clients in CLIENTS]
    rates.append(rate(best, bench.seconds))
    fastapi = _best_rival(bench, bundle, images, answers)
    return {
        "resolution": resolution,
        "photograph_kb": float(np.mean([len(image) for image in images])) / 1000,
        "bare": [asdict(setting) | {"per_s": found} for setting, found in sweep.items()],
        "bare_best": asdict(best) | {"per_s": max(rates), "of": rates},
        "bare_latency_ms": latencies,
        "service": served,
        "fastapi": fastapi,
    }


def _best_rival(bench: Bench, bundle: Path, images: Sequence[bytes], expected: np.ndarray) -> Figures:
    """FastAPI + torch at that setting at which it answers most at 16 clients."""
    uploads, tried = bench.uploads(), []
    for workers, threads in RIVALS:
        tried.append(_rival(bench, bundle, images, expected, uploads, workers, threads, False))
    best = max(tried, key=lambda found: found["service"][1]["per_s"])
    compiled = _rival(bench, bundle, images, expected, uploads, best["workers"], best["threads"], True)
    return {"tried": [*tried, compiled]}


def _rival(
    bench: Bench,
    bundle: Path,
    images: Sequence[bytes],
    expected: np.ndarray,
    uploads: Path,
    workers: int,
    threads: int,
    compiled: bool,
) -> Figures:
    with rival(bundle, workers, threads, compiled) as server:
        time.sleep(5)  # one worker may be ready before another
        if not np.allclose(_answers(server, images), expected, atol=1e-3):
            raise SystemExit("the two services answer differently")
        served = [bench.load(server, uploads, clients) for clients in CLIENTS]
    return {"workers": workers, "threads": threads, "compiled": compiled, "service": served}


def _answers(server: Server, images: Sequence[bytes]) -> np.ndarray:
    """Probabilities of some images."""
    rows = []
    for image in images[:8]:
        url = f"http://127.0.0.1:{server.port}/predict"
        answer = httpx.post(url, files={"image": ("a.jpg", image)}, timeout=60).raise_for_status().json()
        rows.append(list(answer["probabilities"].values()))
    return np.array(rows)


def generate(bench: Bench) -> Figures:
    """Synthetic images a second, served and bare."""
    rows = []
    with raresynth(bench.bundle) as server:
        for n in NUMBERS:
            for clients in (1, 2):
                alone = [bare.generated_per_s(bench.bundle, bench.label, n, clients, bench.seconds / 2)]
                served = bench.load(server, bench.orders(n), clients)
                alone.append(bare.generated_per_s(bench.bundle, bench.label, n, clients, bench.seconds / 2))
                rows.append({"n": n, "bare_per_s": float(np.mean(alone)), **served, "per_s": n * served["per_s"]})
    return {"label": bench.label, "rows": rows}


def start(bench: Bench) -> Figures:
    """Seconds until ready, and memory before and after work."""
    seconds, fresh = [], []
    for _ in range(STARTS):
        with raresynth(bench.bundle) as server:
            seconds.append(server.ready_s)
            fresh.append(server.memory_mb())
            if len(seconds) == STARTS:
                for n in NUMBERS:
                    bench.load(server, bench.orders(n), 2)
                worked = [bench.load(server, bench.uploads(), clients)["memory_mb"] for clients in CLIENTS]
    n_generators = len(open_bundle(bench.bundle).generators)
    return {"seconds": seconds, "generators": n_generators, "fresh_mb": fresh, "worked_mb": max(worked)}


def overload(bench: Bench) -> Figures:
    """Minutes of twice as many requests as can be answered."""
    uploads = bench.uploads()
    with raresynth(bench.bundle) as server:
        capacity = bench.load(server, uploads, CLIENTS[-1])["per_s"]
        pids = server.processes()
        with _memory_series(server) as series:
            figures = load(server, uploads, 0, 60 * bench.minutes, OVERLOAD * capacity)
        survived = server.processes() == pids
    lines = [f"{seconds:.1f},{mb:.1f}" for seconds, mb in series]
    write_text(bench.out / "load.csv", "\n".join(["seconds,memory_mb", *lines]) + "\n")
    return {
        "capacity_per_s": capacity,
        "rate_per_s": OVERLOAD * capacity,
        "minutes": bench.minutes,
        "same_processes": survived,
        "memory_growth": _growth(series),
        **figures,
    }


@contextmanager
def _memory_series(server: Server) -> Iterator[list[tuple[float, float]]]:
    """Seconds and MB, once a second."""
    series: list[tuple[float, float]] = []
    ended = threading.Event()

    def watch() -> None:
        began = time.perf_counter()
        while not ended.wait(1.0):
            series.append((time.perf_counter() - began, server.memory_mb()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield series
    finally:
        ended.set()
        thread.join()


def _growth(series: Sequence[tuple[float, float]]) -> float:
    """Share by which the last tenth's mean lies above that of the tenth after the second minute (or fifth)."""
    memory = np.array([mb for _, mb in series])
    tenth = max(1, len(memory) // 10)
    first = min(120, len(memory) // 5)
    return float(memory[-tenth:].mean() / memory[first : first + tenth].mean() - 1)


def strange(bench: Bench) -> Figures:
    """Shares of images that are taken for the bundle's own kind."""
    return accepted_shares(bench.bundle, bench.images, bench.others)


PARTS: dict[str, Callable[[Bench], Figures]] = {
    "predict-64": partial(predict, resolution=64),
    "predict-224": partial(predict, resolution=224),
    "generate": generate,
    "start": start,
    "load": overload,
    "strange": strange,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--strange", type=Path, nargs="*", default=[], help="folders of images of another kind")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each measurement")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the overload")
    args = parser.parse_args()
    # Of numpy alone, as the service sets it: graphs and torch are told their threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    bench = Bench(args)
    names = ("bentoml", "onnxruntime", "fastapi", "torch", "uvicorn", "pillow", "numpy")
    print(f"{machine()}, Linux {platform.release()}, {', '.join(f'{name} {version(name)}' for name in names)}\n")
    for part in args.parts:
        path = bench.out / f"{part}.json"
        if not path.exists():
            write_json(path, PARTS[part](bench))
        print(f"### {part}\n\n{_table(part, json.loads(path.read_text()))}\n", flush=True)


def _table(part: str, figures: Figures) -> str:
    return {"generate": _generate_table, "start": _start_lines, "load": _load_lines, "strange": _strange_table}.get(
        part, _predict_table
    )(figures)


def _predict_table(figures: Figures) -> str:
    best = figures["bare_best"]
    how = "processes {processes}, threads of the graph {threads}, batch {batch}".format(**best)
    latencies = figures["bare_latency_ms"]
    rows = [(f"bare loop ({how})", best["per_s"], None)]
    rows += [(f"service, {row['clients']} clients", row["per_s"], row) for row in figures["service"]]
    for tried in figures["fastapi"]["tried"]:
        what = "FastAPI + torch, workers {workers}, threads {threads}".format(**tried)
        what += ", torch.compile" if tried["compiled"] else ""
        rows += [(f"{what}, {row['clients']} clients", row["per_s"], row) for row in tried["service"]]
    table = _markdown(
        "| what | images/s | share of bare | p50, ms | p99, ms | CPUs of server + client | memory, MB | statuses |",
        [[what, f"{rate:.1f}", f"{rate / best['per_s']:.2f}", *_costs(row)] for what, rate, row in rows],
    )
    one = figures["service"][0]["p50_ms"]
    added = ", ".join(f"{one - ms:.1f} ms over {ms:.1f} ms with {threads} threads" for threads, ms in latencies.items())
    photograph = f"JPEG files of 600 x 450, {figures['photograph_kb']:.0f} kB each"
    return f"{table}\n\n{photograph}; one client: {added} of the bare graph"


def _costs(row: Figures | None) -> list[str]:
    if row is None:
        return [""] * 5
    cpus = f"{row['server_cpus']:.2f} + {row['client_cpus']:.2f}"
    statuses = ", ".join(f"{status}: {n}" for status, n in row["statuses"].items())
    return [f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}", cpus, f"{row['memory_mb']:.0f}", statuses]


def _generate_table(figures: Figures) -> str:
    rows = [
        [
            *(f"{row[name]:.0f}" for name in ("n", "clients", "bare_per_s", "per_s", "p50_ms")),
            f"{row['per_s'] / row['bare_per_s']:.2f}",
        ]
        for row in figures["rows"]
    ]
    return _markdown("| n | clients | bare, images/s | served, images/s | p50 of a request, ms | served : bare |", rows)


def _start_lines(figures: Figures) -> str:
    return (
        f"ready after {np.median(figures['seconds']):.2f} s (median of {STARTS}); {figures['generators']} generators: "
        f"{np.median(figures['fresh_mb']):.0f} MB then, {figures['worked_mb']:.0f} MB after work"
    )


def _load_lines(figures: Figures) -> str:
    fate = "the same processes" if figures["same_processes"] else "A PROCESS DIED"
    return (
        f"{figures['minutes']:g} minutes at {figures['rate_per_s']:.0f} requests/s ({OVERLOAD:g} times "
        f"{figures['capacity_per_s']:.0f}): statuses {figures['statuses']}, {figures['per_s']:.0f} answered a second, "
        f"p50 {figures['p50_ms']:.0f} ms, p99 {figures['p99_ms']:.0f} ms; "
        f"memory {100 * figures['memory_growth']:+.1f} %, {fate}"
    )


def _strange_table(figures: Figures) -> str:
    rows = [[name, row["n"], f"{100 * row['accepted']:.1f} %"] for name, row in figures.items()]
    return _markdown("| images | n | accepted |", rows)


def _markdown(head: str, rows: Sequence[Sequence[object]]) -> str:
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


if __name__ == "__main__":
    main()
