"""Connections before there is a request: how long a request's head may take, how large it is, how many there may be.

uvicorn has no limit for any of these, and BentoML hands none of its options on.
"""

import asyncio
import resource
import socket
import uuid
from typing import Any

from uvicorn._types import ASGI3Application
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serving import metrics
from serving.errors import ApiError
from serving.exchange import RETRY_S, mark
from serving.settings import Settings

LARGEST_HEAD = 65_536
_waiting: dict["Connection", None] = {}
"""Connections without a request under way, the longest waiting first."""


def install() -> None:
    """Have uvicorn, which BentoML starts with its choice of protocol, take this one."""
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{Connection.__name__}"


class Connection(HttpToolsProtocol):
    """uvicorn's, with limits. A connection without a request gives way to a new one when there are too many."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings: Settings = self.config.app.settings  # type: ignore[union-attr]
        self._deadline: asyncio.TimerHandle | None = None
        self._in_head, self._head_bytes = False, 0
        self._answering: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Make room, and wait for the first request."""
        super().connection_made(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # a client that reads nothing of its answer is let go by the kernel
            milliseconds = int(self.settings.timeout_s * 1000)
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        if len(self.connections) > self._most():
            if not _waiting:
                self._refuse(ApiError("overloaded", "too many connections are open; try again", RETRY_S))
                return
            next(iter(_waiting)).let_go()
        _waiting[self] = None
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._wait_no_more()
        self._drop_answer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, unless the head is too large already."""
        if self._deadline is None and self in _waiting:
            self._set_deadline()
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > LARGEST_HEAD:
                self._refuse(ApiError("too_large", f"path and headers may have {LARGEST_HEAD} bytes at most"))

    def _should_upgrade_to_ws(self) -> bool:
        return False  # nothing here speaks it

    def on_message_begin(self) -> None:
        """A request's first bytes."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; what a chunked body has after its end is none."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request begins."""
        self._in_head = False
        self._wait_no_more()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, as long as uvicorn keeps idle connections."""
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            _waiting[self] = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP request, in the one error format."""
        self._refuse(ApiError("malformed", "this is no HTTP/1.1 request that can be read"))

    def let_go(self) -> None:
        """Close it without an answer: there is no whole request."""
        self._wait_no_more()
        self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle  # `cycle` may be one that came after it
        super()._start_asgi_task(cycle, app)

    def _drop_answer(self) -> bool:
        """Tell the request that is being answered, if there is one, that its client is gone."""
        if self._answering is None or self._answering.response_complete:
            return False
        self._answering.disconnected = True
        self._answering.message_event.set()
        return True

    def _most(self) -> int:
        return min(self.settings.max_connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    def _set_deadline(self) -> None:
        self._deadline = self.loop.call_later(self.settings.head_timeout_s, self.let_go)

    def _wait_no_more(self) -> None:
        _waiting.pop(self, None)
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, error: ApiError) -> None:
        self._wait_no_more()
        metrics.rejected.labels(error.code).inc()
        if not self._drop_answer():  # else it would stand in the middle of that
            response = error.response(request_id := uuid.uuid4().hex)
            mark(response.headers, request_id)
            response.headers["Connection"] = "close"
            lines = [b"HTTP/1.1 %d Refused" % response.status_code]
            lines += [name + b": " + value for name, value in response.raw_headers]
            self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self.transport.close()
