"""What stands before BentoML: request ids, keys, limits, deadlines and the one error format.

BentoML's own middleware lies behind it, so that what is refused here costs next to nothing, and its metrics get no
series of unknown paths.
"""

import asyncio
import ipaddress
import json
import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import metrics
from serving.errors import CODES, ApiError
from serving.keys import Keys
from serving.rate import RateLimit
from serving.requests import PARSED, parse
from serving.routes import Route, find_route
from serving.settings import Settings

SECURITY = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RETRY_S = 1.0
_LARGEST_JSON = 16_384
log = logging.getLogger("raresynth.serving")


class Gone(Exception):
    """The client went away."""


class Front:
    """ASGI middleware around the whole service."""

    def __init__(self, app: ASGIApp, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        """Stand before an app.

        Args:
            clock: of the rate limit.

        Raises:
            ParamsError: the file of keys cannot be used.
        """
        self._app, self._settings = app, settings
        self._keys = Keys(settings.keys_file) if settings.keys_file else None
        log.setLevel(logging.INFO)  # BentoML shows warnings alone
        self._rate = RateLimit(settings.requests_per_minute, settings.burst, clock)
        self._running, self._buffered = 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        route, known = find_route(scope["method"], scope["path"])
        exchange = Exchange(route, send, Headers(scope=scope))
        try:
            if route is None:
                raise _no_route(scope, known)
            self._admit(route, exchange, scope)
            await self._answer(route, exchange, scope, receive)
        except ApiError as error:
            await exchange.refuse(error)
        except Gone:
            exchange.status = 499
        finally:
            exchange.end()

    def _admit(self, route: Route, exchange: "Exchange", scope: Scope) -> None:
        """Check the key, its scope and its rate."""
        if route.access == "public":
            return
        if self._keys is None:
            exchange.client = "local"
            _check_loopback(scope)
        else:
            kind, _, presented = exchange.headers.get("authorization", "").partition(" ")
            found = self._keys.find(presented.strip()) if kind.lower() == "bearer" else None
            if found is None:
                raise ApiError("no_key", "send an API key: `Authorization: Bearer KEY`")
            exchange.client, scopes = found
            if route.access != "any" and route.access not in scopes:
                raise ApiError("no_scope", f"this key may not {route.access}; ask for one with that scope")
        if wait := self._rate.take(exchange.client):
            raise ApiError("rate", "this key's rate is used up; wait", wait)

    async def _answer(self, route: Route, exchange: "Exchange", scope: Scope, receive: Receive) -> None:
        scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"authorization"]}
        if route.body is None:
            await self._run(exchange, scope, receive)
            return
        if self._running >= self._settings.max_requests:
            raise ApiError("overloaded", "too many requests are under way; try again", _RETRY_S)
        reserved = self._reserve(route, exchange.headers)
        try:
            body = await self._read(receive, reserved)
            exchange.body_is_read = True
            scope[PARSED] = await parse(route.body, exchange.headers.get("content-type", ""), body)
            await self._counted(exchange, scope, body, receive)
        finally:
            self._buffered -= reserved

    def _reserve(self, route: Route, headers: Headers) -> int:
        """Bytes that the body may have, put aside before it is read."""
        form = route.body is not None and "multipart" in headers.get("content-type", "")
        most = int(self._settings.max_body_mb * 1e6) if form else _LARGEST_JSON
        length = headers.get("content-length", "")
        size = int(length) if length.isascii() and length.isdigit() else most
        if size > most:
            raise ApiError("too_large", f"the body may have {most} bytes at most")
        if self._buffered + size > self._settings.max_buffered_mb * 1e6:
            raise ApiError("overloaded", "too much is being uploaded; try again", _RETRY_S)
        self._buffered += size
        return size

    async def _read(self, receive: Receive, most: int) -> bytes:
        chunks: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > most:
                        raise ApiError("too_large", f"the body may have {most} bytes at most")
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError("slow_body", f"the body took longer than {self._settings.body_timeout_s:g} s") from None
        return b"".join(chunks)

    async def _counted(self, exchange: "Exchange", scope: Scope, body: bytes, receive: Receive) -> None:
        if self._running >= self._settings.max_requests:
            raise ApiError("overloaded", "too many requests are under way; try again", _RETRY_S)
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

    async def _run(self, exchange: "Exchange", scope: Scope, receive: Receive) -> None:
        """Let BentoML answer within the deadline; what a task does after its answer has no deadline."""
        try:
            async with asyncio.timeout(self._settings.timeout_s) as deadline:
                exchange.deadline = deadline
                await self._app(scope, receive, exchange.send)
        except TimeoutError:
            raise ApiError("timeout", f"the work took longer than {self._settings.timeout_s:g} s") from None
        except (ApiError, asyncio.CancelledError):
            raise
        except Exception as error:
            log.exception("%s failed", exchange.request_id)
            raise ApiError("internal", "the service failed; tell its admin the request_id") from error


class Exchange:
    """One request and its answer.

    Attributes:
        client: name of the key that asks.
        status: of the answer, 0 before there is one.
        body_is_read: whether all that the client sends was taken.
        ended: whether the answer was sent or given up.
        deadline: lifted once the answer is sent: a task works on after that.
    """

    deadline: asyncio.Timeout | None = None
    ended = False

    def __init__(self, route: Route | None, send: Send, headers: Headers) -> None:
        self.route, self._send, self.headers = route, send, headers
        asked = headers.get("x-request-id", "")
        self.request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        self.client, self.status = "-", 0
        self.body_is_read = not ({"content-length", "transfer-encoding"} & set(headers))
        self._began = time.perf_counter()
        self._failing: list[bytes] | None = None
        self._start: Message = {}
        self._at_end = [self._tell]

    def on_end(self, what: Callable[[], None]) -> None:
        """Have something done as soon as the answer is sent or given up."""
        self._at_end.append(what)

    def end(self) -> None:
        """Do what waits for the end, the first time."""
        self.ended = True
        while self._at_end:
            self._at_end.pop()()

    async def send(self, message: Message) -> None:
        """Pass BentoML's answer on; one that tells an error is held back until it can be put into our format."""
        if message["type"] == "http.response.start":
            self._start = message
            if message["status"] >= 400:
                self._failing = []
            else:
                await self._begin(message)
            return
        last = not message.get("more_body", False)
        if self._failing is None:
            await self._send(message)
        else:
            self._failing.append(message.get("body", b""))
            if last:
                await self.refuse(_in_our_format(self._start, b"".join(self._failing)))
        if last:
            self._lift_deadline()
            self.end()

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error, unless an answer is under way already."""
        if self.status:
            return
        metrics.rejected.labels(error.code).inc()
        response = error.response(self.request_id)
        if not self.body_is_read:
            response.headers["Connection"] = "close"  # rather than take the rest of a body that nobody wants
        start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        await self._begin(start)
        await self._send({"type": "http.response.body", "body": response.body})

    async def _begin(self, start: Message) -> None:
        self.status = start["status"]
        headers = MutableHeaders(raw=list(start["headers"]))
        headers["X-Request-ID"] = self.request_id
        headers.update(SECURITY)
        del headers["server"]
        await self._send({**start, "headers": headers.raw})
        if self.route and self.route.body is None:
            self._lift_deadline()  # a large archive may take a slow client long

    def _lift_deadline(self) -> None:
        if self.deadline and not self.deadline.expired():
            self.deadline.reschedule(None)

    def _tell(self) -> None:
        """Count and log the exchange: never its body, nor its query or file names."""
        path = self.route.path if self.route else "other"
        seconds = time.perf_counter() - self._began
        metrics.requests.labels(path, str(self.status)).inc()
        metrics.request_seconds.labels(path).observe(seconds)
        if self.route is None or self.route.path not in ("/livez", "/readyz", "/metrics"):
            log.info("%s %s %s %d %.1f ms", self.request_id, self.client, path, self.status, seconds * 1000)


def _no_route(scope: Scope, known: bool) -> ApiError:
    if known:
        return ApiError("method", f"this path does not take {scope['method'][:10]}; see /docs.json")
    return ApiError("not_found", "there is no such path; see /docs.json")


def _check_loopback(scope: Scope) -> None:
    """Without keys, only connections to a loopback address are served, whatever address the server was started on."""
    host = (scope.get("server") or ("",))[0]
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise ApiError("no_key", "the service has no API keys, so it answers on loopback alone")


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, for whoever still wants to read it; then what comes from the client."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _disconnected(receive: Receive) -> None:
    """Return once the client is gone, or has its answer."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _in_our_format(start: Message, body: bytes) -> ApiError:
    """An error of a route as it raised it; one of BentoML's by its status."""
    retry = Headers(raw=start["headers"]).get("retry-after")
    try:
        detail = json.loads(body)["error"]
        return ApiError(detail["code"], detail["message"], float(retry) if retry else None)
    except (ValueError, KeyError, TypeError):
        status = start["status"]
        by_status = {
            400: "malformed",
            404: "not_found",
            405: "method",
            413: "too_large",
            503: "overloaded",
            504: "timeout",
        }
        code = by_status.get(status, "internal" if status >= 500 else "malformed")
        return ApiError(code, CODES[code][1], _RETRY_S if code == "overloaded" else None)
