"""How often each client may ask."""

import time
from collections.abc import Callable


class RateLimit:
    """A bucket of tokens a client: it fills steadily, and each request takes one."""

    def __init__(self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with full buckets.

        Args:
            clock: seconds; one that never goes back, so that a changed wall clock locks nobody out.
        """
        self._per_second, self._burst, self._clock = per_minute / 60, burst, clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, client: str) -> float:
        """Take a token; returns the seconds until there is one again, 0 if one was taken.

        Args:
            client: name of a key; there are no more buckets than keys.
        """
        now = self._clock()
        tokens, then = self._buckets.get(client, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - then) * self._per_second)
        taken = tokens >= 1
        self._buckets[client] = (tokens - taken, now)
        return 0.0 if taken else (1 - tokens) / self._per_second
