"""The clients: one process of raw keep-alive connections that send requests made beforehand.

As light as Python allows, since it shares the cores with the server; its own CPU time is told with its figures.
"""

import argparse
import asyncio
import json
import random
import resource
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.serving_processes import ROOT, Server

BOUNDARY = "benchmark"
SETTLE_S = 2.0
"""Answers of the first seconds do not count."""


def write_requests(folder: Path, path: str, bodies: Sequence[bytes], content_type: str) -> Path:
    """Whole HTTP requests, a file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, body in enumerate(bodies):
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}"
        (folder / f"{index:04d}").write_bytes(f"{head}\r\n\r\n".encode() + body)
    return folder


def write_uploads(folder: Path, images: Sequence[bytes]) -> Path:
    """Requests to /predict, one for each JPEG file."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n'
    head += "Content-Type: image/jpeg\r\n\r\n"
    bodies = [head.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode() for image in images]
    return write_requests(folder, "/predict", bodies, f"multipart/form-data; boundary={BOUNDARY}")


def load(server: Server, requests: Path, clients: int, seconds: float, rate: float = 0.0) -> dict[str, Any]:
    """Figures of some seconds of load.

    Args:
        requests: folder of `write_requests`; they are sent round and round.
        clients: connections, each of which waits for its answer before it asks again.
        rate: requests a second that come whether earlier ones were answered or not; `clients` does not count then.
    """
    command = [sys.executable, "-m", "benchmarks.serving_load", str(server.port), str(requests.resolve())]
    command += [str(clients), str(seconds), str(rate)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


class Tally:
    """What came back."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.seconds: list[float] = []
        self._counts_from = time.perf_counter() + SETTLE_S

    def add(self, status: str, began: float) -> None:
        """Count an answer, or a lost connection, to what was sent at `began`, if it is time to count."""
        now = time.perf_counter()
        if now < self._counts_from:
            return
        self.statuses[status] += 1
        if status == "200":
            self.seconds.append(now - began)

    def figures(self, seconds: float) -> dict[str, Any]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        quantiles = np.quantile(self.seconds, (0.5, 0.99)) * 1000 if self.seconds else (None, None)
        return {
            "per_s": self.statuses["200"] / seconds,
            "statuses": dict(self.statuses),
            "p50_ms": quantiles[0],
            "p99_ms": quantiles[1],
            "client_cpus": (usage.ru_utime + usage.ru_stime) / (seconds + SETTLE_S),
        }


class Connection(asyncio.Protocol):
    """One connection, on which one request at a time is under way."""

    def __init__(self, requests: Sequence[bytes], tally: Tally, closed: bool, idle: "deque[Connection]") -> None:
        """Prepare.

        Args:
            closed: whether the next request follows each answer by itself.
            idle: where the connection goes otherwise.
        """
        self._requests, self._tally, self._closed, self._idle = requests, tally, closed, idle
        self._began, self._received, self._missing = 0.0, b"", -1
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        if self._closed:
            self.ask(time.perf_counter())

    def ask(self, began: float) -> None:
        """Send a request that was due at `began`."""
        self._began, self._received, self._missing = began, b"", -1
        self._transport.write(random.choice(self._requests))

    def data_received(self, data: bytes) -> None:
        if self._missing < 0:
            self._received += data
            head, found, body = self._received.partition(b"\r\n\r\n")
            if not found:
                return
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            self._missing = int(length) - len(body)
        else:
            self._missing -= len(data)
        if self._missing <= 0:
            self._tally.add(self._received[9:12].decode(), self._began)
            self._began = 0.0
            if b"connection: close" in self._received.partition(b"\r\n\r\n")[0].lower():
                self._transport.close()
            elif self._closed:
                self.ask(time.perf_counter())
            else:
                self._idle.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._began:
            self._tally.add("lost", self._began)
        if self in self._idle:
            self._idle.remove(self)
        self.lost.set_result(None)


async def closed_loop(port: int, requests: Sequence[bytes], clients: int, tally: Tally) -> None:
    """Clients that ask, wait for the answer and ask again, for ever."""

    async def client() -> None:
        while True:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(requests, tally, True, deque()), "127.0.0.1", port
            )
            await connection.lost

    await asyncio.gather(*(client() for _ in range(clients)))


async def open_loop(port: int, requests: Sequence[bytes], rate: float, tally: Tally) -> None:
    """Requests at random times (Poisson), as many a second whatever the server does, for ever."""
    idle: deque[Connection] = deque()
    tasks: set[asyncio.Task[None]] = set()
    due = time.perf_counter()

    async def connect(began: float) -> None:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(requests, tally, False, idle), "127.0.0.1", port
            )
            connection.ask(began)
        except OSError:
            tally.add("refused", began)

    while True:
        due += random.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        if idle:
            idle.pop().ask(due)
        else:
            task = asyncio.create_task(connect(due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


async def run(port: int, requests: Sequence[bytes], clients: int, seconds: float, rate: float) -> dict[str, Any]:
    tally = Tally()
    work = open_loop(port, requests, rate, tally) if rate else closed_loop(port, requests, clients, tally)
    task = asyncio.create_task(work)
    await asyncio.wait({task}, timeout=seconds + SETTLE_S)
    figures = tally.figures(seconds)
    task.cancel()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (("port", int), ("requests", Path), ("clients", int), ("seconds", float), ("rate", float)):
        parser.add_argument(name, type=kind)
    args = parser.parse_args()
    requests = [path.read_bytes() for path in sorted(args.requests.iterdir())]
    random.seed(0)
    print(json.dumps(uvloop.run(run(args.port, requests, args.clients, args.seconds, args.rate))))


if __name__ == "__main__":
    main()
