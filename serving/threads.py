"""Threads for what takes long, and whether they still work."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads(ThreadPoolExecutor):
    """A pool that knows how long its oldest work has waited or run."""

    def __init__(self, n: int, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(n, name)
        self._clock = clock
        self._since: dict[Future[Any], float] = {}

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As a pool does."""
        future = super().submit(fn, *args, **kwargs)
        self._since[future] = self._clock()
        future.add_done_callback(lambda done: self._since.pop(done, None))
        return future

    def oldest_s(self) -> float:
        """Seconds since the oldest work that is not done was handed over; 0 if there is none.

        What nobody waits for any more counts only if it runs: the rest is dropped.
        """
        began = list(self._since.values())  # a copy, for other threads finish meanwhile
        return self._clock() - min(began) if began else 0.0
