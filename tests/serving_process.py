"""The service as `make serve` runs it: a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import httpx
from ports import free_port

ROOT = Path(__file__).parents[1]
START_S = 60


@dataclass(frozen=True)
class Served:
    """A running service."""

    url: str
    port: int
    process: subprocess.Popen[str]
    log: Path

    def worker(self) -> int:
        """Process id of the one worker."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])


def environment(**settings: object) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RARESYNTH", "BENTOML"))}
    return kept | {f"RARESYNTH_SERVING_{name.upper()}": str(value) for name, value in settings.items()}


@contextmanager
def serving(
    log: Path, variables: Mapping[str, str] = MappingProxyType({}), cwd: Path = ROOT, **settings: object
) -> Iterator[Served]:
    """Start the service and wait until it is ready; ended by Ctrl-C's signal, after which no process may be left."""
    served = start(log, {**environment(port=free_port(), **settings), **variables}, cwd)
    try:
        wait_until_ready(served)
        yield served
    finally:
        served.process.send_signal(signal.SIGINT)
        try:
            served.process.wait(30)
        except subprocess.TimeoutExpired:
            served.process.kill()
            raise


def start(log: Path, variables: dict[str, str], cwd: Path = ROOT) -> Served:
    """Start the service with an environment, and leave it to itself."""
    command = [sys.executable, "-P", "-m", "serving"]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=variables, cwd=cwd, stdout=out, stderr=out, text=True)
    port = int(variables["RARESYNTH_SERVING_PORT"])
    return Served(f"http://127.0.0.1:{port}", port, process, log)


def wait_until_ready(served: Served) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            if httpx.get(f"{served.url}/readyz", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert served.process.poll() is None, served.log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"not ready after {START_S} s: {served.log.read_text()}")
