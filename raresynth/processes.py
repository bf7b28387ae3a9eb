"""The processes of a run: one run a folder, none that outlives its parent, threads within limits."""

import fcntl
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from raresynth.errors import RaresynthError

T = TypeVar("T")
R = TypeVar("R")


def in_processes(function: Callable[[T], R], items: Sequence[T], workers: int) -> list[R]:
    """`function` of every item, in as many processes as there are workers; each of them takes item after item.

    Raises:
        BrokenProcessPool: one of them was killed; those at work end their item first.
        Exception: what `function` raised for the first item for which it did.
    """
    # A pool a process: a pool of several, one of which is killed while the next is being started, waits for ever in
    # Python 3.11, because the manager's thread ends those it knows while the main thread adds to them.
    idle: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()

    def call(item: T) -> R:
        pool = idle.get()
        try:
            return pool.submit(function, item).result()
        finally:
            idle.put(pool)

    with ExitStack() as pools:
        for _ in range(workers):
            pool = ProcessPoolExecutor(1, get_context("spawn"), _prepare, (os.getpid(),))
            idle.put(pools.enter_context(pool))
        with ThreadPoolExecutor(workers) as threads:
            return list(threads.map(call, items))


def _prepare(parent: int) -> None:
    """What a process of a pool does first."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C the parent says what is to be said
    end_with(parent)


def end_with(parent: int) -> None:
    """End this process when the process `parent` ends, also where that is killed."""

    def watch() -> None:
        # Not os.kill(parent, 0): a killed process that nobody has waited for yet still takes signals.
        with suppress(ProcessLookupError):
            select.select([os.pidfd_open(parent)], [], [])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def rank_and_world() -> tuple[int, int]:
    """Number of this process among those that torchrun started for a training, and how many they are; alone 0 and 1."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ["RANK"]), world) if world > 1 else (0, 1)


def leads() -> bool:
    """Whether this process writes what is to be written once: alone, or as the first of the ranks."""
    return rank_and_world()[0] == 0


@contextmanager
def only_run_of(store: Path) -> Iterator[None]:
    """Within the block no other process works in this run's folder, but for the ranks of one training.

    Raises:
        RaresynthError: another one does.
    """
    if not leads():  # torchrun ends it where the first rank is refused
        yield
        return
    store.mkdir(parents=True, exist_ok=True)
    with _locked(store, fcntl.LOCK_EX):
        yield


@contextmanager
def one_task_of(store: Path) -> Iterator[None]:
    """Within the block this process is one of several that work in this run's folder, and no run takes it for its own.

    Raises:
        RaresynthError: one has.
    """
    store.mkdir(parents=True, exist_ok=True)
    with _locked(store, fcntl.LOCK_SH):
        yield


@contextmanager
def _locked(store: Path, how: int) -> Iterator[None]:
    with (store / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RaresynthError(f"another run is at work in {store}; wait for it or choose another --out") from None
        yield


def limit_threads(n: int) -> None:
    """Keep this process's numerical libraries to `n` threads, whether they are loaded already or not.

    How many there are changes the last digits of some results, so it must not depend on who loaded what first.
    """
    os.environ["OMP_NUM_THREADS"] = str(n)
    if "numpy" in sys.modules:
        from threadpoolctl import threadpool_limits

        threadpool_limits(n)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(n)
