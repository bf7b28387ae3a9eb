"""What stands before BentoML: request ids, keys, limits, deadlines and the one error format.

BentoML's own middleware lies behind it, so that what is refused here costs next to nothing, and its metrics get no
series of unknown paths.
"""

import asyncio
import functools
import ipaddress
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import metrics
from serving.drain import Drain
from serving.errors import ApiError, log, request_id
from serving.exchange import RETRY_S, Exchange
from serving.keys import Keys
from serving.rate import RateLimit
from serving.requests import FORMS, PARSED, parse
from serving.routes import ASKED_PATH, Route, find_route
from serving.settings import Settings

_LARGEST_JSON = 16_384
_NOT_WHEN_STOPPING = ("/readyz", "/generate_batch/submit")
"""What says no from SIGTERM on; nobody could fetch the archive of a batch."""
_KEPT_BACK = {b"authorization", b"range"}
"""Headers that nothing behind the front may see: keys would be written down with tasks, and answers come whole."""
_DISCARD_BYTES, _DISCARD_S = 1_000_000, 1.0

Checks = dict[str, Callable[[Any], None]]
"""A route's path -> what raises an ApiError if its parsed body is to be refused."""


class Gone(Exception):
    """The client went away."""


class Front:
    """ASGI middleware around the whole service."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        drain: Drain | None = None,
        checks: Checks | None = None,
    ) -> None:
        """Stand before an app.

        Args:
            clock: of the rate limit.
            drain: told of SIGTERM once the server has started; a new one if there is none.
            checks: filled by the app once it has started; none if there are none.

        Raises:
            ParamsError: the file of keys cannot be used.
        """
        self._app, self.settings, self._drain = app, settings, drain or Drain()
        self._checks = {} if checks is None else checks
        self._keys = Keys(settings.keys_file) if settings.keys_file else None
        log.setLevel(logging.INFO)  # BentoML shows warnings alone
        self._rate = RateLimit(settings.requests_per_minute, settings.burst, clock)
        self._running, self._buffered = 0, 0
        self._worker = metrics.Worker(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._drain.watch(self.settings.linger_s)
            await self._app(scope, receive, send)
            return
        route, methods = find_route(scope["method"], scope["path"])
        exchange = Exchange(route, send, Headers(scope=scope), self._drain)
        request_id.set(exchange.request_id)
        try:
            if route is None:
                raise _no_route(scope, methods)
            if self._drain.begun and route.path in _NOT_WHEN_STOPPING:
                raise ApiError("stopping", "the service is going down; ask another one, or again", RETRY_S)
            self._admit(route, exchange, scope)
            await self._answer(route, exchange, scope, receive)
        except ApiError as error:
            if not exchange.body_is_read and error.code != "slow_body":
                exchange.body_is_read = await _discarded(receive)
            await exchange.refuse(error)
        except Gone:
            exchange.status = 499
        except Exception:
            log.exception("%s failed", exchange.request_id)
            await exchange.refuse(ApiError("internal", "the service failed; tell its admin the request_id"))
        finally:
            exchange.end()

    def _admit(self, route: Route, exchange: Exchange, scope: Scope) -> None:
        """Check the key, its scope and its rate."""
        if route.access == "public":
            return
        if self._keys is None:
            exchange.client = "local"
            _check_loopback(scope, exchange.headers)
        else:
            kind, _, presented = exchange.headers.get("authorization", "").partition(" ")
            found = self._keys.find(presented.strip()) if kind.lower() == "bearer" else None
            if found is None:
                message = "send an API key: `Authorization: Bearer KEY`"
                raise ApiError("no_key", message, headers={"WWW-Authenticate": "Bearer"})
            exchange.client, scopes = found
            if route.access != "any" and route.access not in scopes:
                raise ApiError("no_scope", f"this key may not {route.access}; ask for one with that scope")
        if wait := self._rate.take(exchange.client):
            raise ApiError("rate", "this key's rate is used up; wait", wait)

    async def _answer(self, route: Route, exchange: Exchange, scope: Scope, receive: Receive) -> None:
        headers = [pair for pair in scope["headers"] if pair[0] not in _KEPT_BACK]
        scope = {**scope, "headers": headers, "path": route.path, ASKED_PATH: scope["path"]}
        if route.path == "/metrics":
            self._worker.tell_use()
        if route.body is None:
            await self._run(exchange, scope, receive)
            return
        if self._running >= self.settings.max_requests:
            raise ApiError("overloaded", "too many requests are under way; try again", RETRY_S)
        most = self._most(route, exchange.headers)
        with self._room() as take:
            body = await self._read(receive, most, take)
            exchange.take_body()
            scope[PARSED] = await parse(route.body, exchange.headers.get("content-type", ""), body)
            if check := self._checks.get(route.path):
                check(scope[PARSED])
            if route.body in FORMS:
                body = b""  # nobody reads it again, and it would double what the uploads take
            await self._counted(exchange, scope, body, receive)

    def _most(self, route: Route, headers: Headers) -> int:
        """Bytes that the body may have: as many as it is said to have, if these are few enough and there is room."""
        most = int(self.settings.max_body_mb * 1e6) if route.body in FORMS else _LARGEST_JSON
        length = headers.get("content-length", "")
        size = int(length) if length.isascii() and length.isdigit() else most
        if size > most:
            raise ApiError("too_large", f"the body may have {most} bytes at most")
        self._check_room(size)
        return size

    def _check_room(self, size: int) -> None:
        if self._buffered + size > self.settings.max_buffered_mb * 1e6:
            raise ApiError("overloaded", "too much is being uploaded; try again", RETRY_S)

    @contextmanager
    def _room(self) -> Iterator[Callable[[int], None]]:
        """Room for a body in memory, taken as it comes: a client that promises much and sends little blocks nobody."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            self._check_room(size)
            self._buffered += size
            taken += size

        try:
            yield take
        finally:
            self._buffered -= taken

    async def _read(self, receive: Receive, most: int, take: Callable[[int], None]) -> bytes:
        chunks: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > most:
                        raise ApiError("too_large", f"the body may have {most} bytes at most")
                    take(len(chunks[-1]))
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError("slow_body", f"the body took longer than {self.settings.body_timeout_s:g} s") from None
        return b"".join(chunks)

    async def _counted(self, exchange: Exchange, scope: Scope, body: bytes, receive: Receive) -> None:
        if self._running >= self.settings.max_requests:
            raise ApiError("overloaded", "too many requests are under way; try again", RETRY_S)
        self._running += 1
        metrics.in_flight.set(self._running)

        def finished() -> None:
            self._running -= 1
            metrics.in_flight.set(self._running)

        exchange.on_end(finished)
        answering = asyncio.create_task(self._run(exchange, scope, _replay(body, receive)))
        watching = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done() and not exchange.ended:
                raise Gone
            await answering  # a task may go on after its answer
        finally:
            watching.cancel()
            answering.cancel()

    async def _run(self, exchange: Exchange, scope: Scope, receive: Receive) -> None:
        """Let BentoML answer within the deadline; what a task does after its answer has no deadline."""
        try:
            async with asyncio.timeout(self.settings.timeout_s) as deadline:
                exchange.deadline, exchange.answer_s = deadline, self.settings.timeout_s
                await self._app(scope, receive, exchange.send)
        except TimeoutError:
            raise ApiError("timeout", f"the work took longer than {self.settings.timeout_s:g} s") from None
        finally:
            exchange.deadline = None  # over; what is refused now has none


def _no_route(scope: Scope, methods: list[str]) -> ApiError:
    if methods:
        message = f"this path does not take {scope['method'][:10]}; see /docs.json"
        return ApiError("method", message, headers={"Allow": ", ".join(methods)})
    return ApiError("not_found", "there is no such path; see /docs.json")


def _check_loopback(scope: Scope, headers: Headers) -> None:
    """Without keys, only connections to a loopback address are served, whatever address the server was started on.

    The name that the client used must be one of loopback too: a web page could else have its own name resolve here.
    So must the page that asks, if one does: a form of any page can be sent here, though the page sees no answer.
    """
    reached = str((scope.get("server") or ("",))[0])
    asked_by = [origin.partition("://")[2] for origin in headers.getlist("origin")]
    if not all(map(_is_loopback, [reached, headers.get("host", ""), *asked_by])):
        raise ApiError("no_key", "the service has no API keys, so it answers on 127.0.0.1 and localhost alone")


@functools.lru_cache(maxsize=256)
def _is_loopback(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or host
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, for whoever still wants to read it; then what comes from the client."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _discarded(receive: Receive) -> bool:
    """Take the rest of a body that is not wanted, if it is small and quick: a client that still sends when the
    connection is closed may miss the answer. Returns whether all was taken.
    """
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            while size < _DISCARD_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return True
    return False


async def _disconnected(receive: Receive) -> None:
    """Return once the client is gone, or has its answer."""
    while (await receive())["type"] != "http.disconnect":
        pass
