"""Servers as processes of their own: started, waited for, watched (CPU, memory) and ended."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
START_S = 60
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Server:
    """A running server: a parent process and its children."""

    port: int
    process: subprocess.Popen[bytes]
    ready_s: float
    """From its start until it answered /readyz."""

    def processes(self) -> list[int]:
        """All its process ids."""
        found = [self.process.pid]
        for pid in found:
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                found += map(int, task.read_text().split())
        return found

    def cpu_s(self) -> float:
        """CPU seconds that its processes have used."""
        stats = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.processes())
        return sum(int(stat[11]) + int(stat[12]) for stat in stats) / TICKS

    def memory_mb(self) -> float:
        """Proportional set size of its processes together: shared pages count once."""
        total = 0
        for pid in self.processes():
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024


@contextmanager
def raresynth(bundle: Path, **settings: object) -> Iterator[Server]:
    """This project's service, without a limit for one client's rate."""
    settings = {"bundle": bundle.resolve(), "requests_per_minute": 1e9, "burst": 10**9, **settings}
    port = free_port()
    variables = {f"RARESYNTH_SERVING_{name.upper()}": str(value) for name, value in (settings | {"port": port}).items()}
    with _started([sys.executable, "-m", "serving"], port, variables) as server:
        yield server


@contextmanager
def rival(bundle: Path, workers: int, threads: int, compiled: bool = False) -> Iterator[Server]:
    """The FastAPI service of serving_rival.py."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "benchmarks.serving_rival:app", "--port", str(port)]
    command += ["--workers", str(workers), "--no-access-log", "--log-level", "warning"]
    variables = {"BUNDLE": str(bundle.resolve()), "THREADS": str(threads), "COMPILED": str(int(compiled))}
    with _started(command, port, variables, START_S * (5 if compiled else 1)) as server:
        yield server


@contextmanager
def _started(command: list[str], port: int, variables: dict[str, str], start_s: float = START_S) -> Iterator[Server]:
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RARESYNTH", "BENTO"))}
        process = subprocess.Popen(command, env=environment | variables, cwd=ROOT, stdout=log, stderr=log)
        try:
            while not _is_ready(port):
                if process.poll() is not None or time.perf_counter() - began > start_s:
                    log.seek(0)
                    raise SystemExit(f"{' '.join(command)} did not start:\n{log.read().decode()}")
                time.sleep(0.02)
            yield Server(port, process, time.perf_counter() - began)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
