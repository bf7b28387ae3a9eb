"""One request and its answer: its id, its headers, errors in the one format, and what is counted and logged of it."""

import asyncio
import json
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Send

from serving import metrics
from serving.drain import Drain
from serving.errors import CODES, ApiError, log
from serving.routes import Route

SECURITY = {
    # The page's own files, what it asks of this service, and images that it holds as blobs; nothing inline, and no
    # markup made from text: labels and file names are data.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
RETRY_S = 1.0
_PIECE = 262_144
_SAID_BY_BENTOML = {
    b"is not completed yet": "unfinished",
    b"disk is full": "no_space",
    b"disk I/O error": "no_space",
}
"""What its task routes say of themselves or of SQLite -> our code."""


def mark(headers: MutableHeaders, request_id: str) -> None:
    """Give an answer what every one has; only those that say otherwise may be kept by caches."""
    headers["X-Request-ID"] = request_id
    headers.update(SECURITY)
    headers.setdefault("Cache-Control", "no-store")


class Exchange:
    """One request and its answer.

    Attributes:
        client: name of the key that asks.
        status: of the answer, 0 before there is one.
        body_is_read: whether all that the client sends was taken.
        ended: whether the answer was sent or given up.
        deadline: put off by `answer_s` once the answer begins, lifted once it is sent: a task works on after that.
    """

    deadline: asyncio.Timeout | None = None
    answer_s = 0.0
    ended = False

    def __init__(self, route: Route | None, send: Send, headers: Headers, drain: Drain) -> None:
        self.route, self._send, self.headers, self._drain = route, send, headers, drain
        asked = headers.get("x-request-id", "")
        self.request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        self.client, self.status = "-", 0
        self.body_is_read = self._whole = not ({"content-length", "transfer-encoding"} & set(headers))
        self._began, self._answered = time.perf_counter(), 0.0
        self._failing: list[bytes] | None = None
        self._start: Message = {}
        self._at_end = [self._tell]

    def take_body(self) -> None:
        """Its last byte is there: what took until now was the client's time."""
        self.body_is_read = self._whole = True
        self._began = time.perf_counter()

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
            await self._send_in_pieces(message)
        else:
            self._failing.append(message.get("body", b""))
            if last:
                await self.refuse(_in_our_format(self._start, b"".join(self._failing)))
        if last:
            self._put_off_deadline(None)
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
        self.status, self._answered = start["status"], time.perf_counter()
        headers = MutableHeaders(raw=list(start["headers"]))
        mark(headers, self.request_id)
        if self._drain.begun:
            headers["Connection"] = "close"
        del headers["server"], headers["accept-ranges"]
        await self._send({**start, "headers": headers.raw})
        # A large archive, which lies on the disk, may take a slow client long; other answers fill memory until then.
        self._put_off_deadline(None if self.route and self.route.body is None else self.answer_s)

    async def _send_in_pieces(self, message: Message) -> None:
        """Let a slow client hold up what follows, instead of having the server keep a large answer for it."""
        body = message.get("body", b"")
        for end in range(_PIECE, len(body), _PIECE):
            await self._send({**message, "body": body[end - _PIECE : end], "more_body": True})
        await self._send({**message, "body": body[(len(body) - 1) // _PIECE * _PIECE :] if body else b""})

    def _put_off_deadline(self, seconds: float | None) -> None:
        if self.deadline and not self.deadline.expired():
            self.deadline.reschedule(None if seconds is None else asyncio.get_running_loop().time() + seconds)

    def _tell(self) -> None:
        """Count and log the exchange: never its body, nor its query or file names."""
        path = self.route.path if self.route else "other"
        seconds = (self._answered or time.perf_counter()) - self._began
        metrics.requests.labels(path, str(self.status)).inc()
        if self._whole:  # else all of it was the client's time
            metrics.request_seconds.labels(path).observe(seconds)
        if self.route is None or self.route.path not in ("/livez", "/readyz", "/metrics"):
            log.info("%s %s %s %d %.1f ms", self.request_id, self.client, path, self.status, seconds * 1000)


def _in_our_format(start: Message, body: bytes) -> ApiError:
    """An error of a route as it raised it; one of BentoML's by its status."""
    retry = Headers(raw=start["headers"]).get("retry-after")
    try:
        detail = json.loads(body)["error"]
        return ApiError(detail["code"], detail["message"], float(retry) if retry else None)
    except (ValueError, KeyError, TypeError):
        for phrase, code in _SAID_BY_BENTOML.items():
            if phrase in body:
                return ApiError(code, CODES[code][1])
        status = start["status"]
        by_status = {
            400: "malformed",
            404: "not_found",
            405: "method",
            413: "too_large",
            503: "not_ready",
            504: "timeout",
        }
        code = by_status.get(status, "internal" if status >= 500 else "malformed")
        return ApiError(code, CODES[code][1], RETRY_S if code == "overloaded" else None)
