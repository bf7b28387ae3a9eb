"""Going down without losing a request: what happens between SIGTERM and the end of the server."""

import asyncio
import signal
from collections.abc import Callable


class Drain:
    """Goes before the server's own handler of SIGTERM.

    The server closes every idle connection at once, and a client may just be asking on one of them; nor does whoever
    spreads the requests know yet that this process goes. So for a while requests are still taken, readiness says no,
    and every answer closes its connection. Then the server ends what is under way.

    Attributes:
        begun: whether SIGTERM came.
    """

    def __init__(self) -> None:
        self.begun = False
        self._at_once: list[Callable[[], None]] = []

    def at_once(self, what: Callable[[], None]) -> None:
        """Have something done as soon as SIGTERM comes."""
        self._at_once.append(what)

    def watch(self, linger_s: float) -> None:
        """Take SIGTERM over from the server and give it back after `linger_s`; called in the server's event loop."""
        loop, servers_own = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)

        def give_back() -> None:
            loop.remove_signal_handler(signal.SIGTERM)
            signal.signal(signal.SIGTERM, servers_own)
            signal.raise_signal(signal.SIGTERM)

        def begin() -> None:
            if self.begun:
                return
            self.begun = True
            for what in self._at_once:
                what()
            loop.call_later(linger_s, give_back)

        loop.add_signal_handler(signal.SIGTERM, begin)
