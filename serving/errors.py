"""What a client can get wrong, in one format: {"error": {"code", "message", "request_id"}}."""

import functools
import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from pydantic import BaseModel
from starlette.responses import JSONResponse

log = logging.getLogger("raresynth.serving")
request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""Of the request that is being answered."""
P = ParamSpec("P")
T = TypeVar("T")


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str
    """A word for programs; it does not change."""
    message: str
    """A sentence for people: what is wrong and what to do."""
    request_id: str
    """The answer's X-Request-ID, by which the service's log names the request."""


class ErrorBody(BaseModel):
    """Every answer of status 400 and above."""

    error: ErrorDetail


CODES: dict[str, tuple[int, str]] = {
    "malformed": (400, "the request is not what this path takes"),
    "no_key": (401, "the API key is missing or unknown"),
    "no_scope": (403, "the API key does not have this path's scope"),
    "not_found": (404, "there is no such path, task or file"),
    "no_generator": (404, "the label has no accepted generator"),
    "method": (405, "the path takes another method"),
    "slow_body": (408, "the body did not arrive in time"),
    "unfinished": (409, "the task has not ended; ask for its status"),
    "too_large": (413, "the body, or an image in it, is too large"),
    "too_many_pixels": (413, "the image has too many pixels"),
    "too_many_images": (413, "the request holds too many images"),
    "wrong_type": (415, "the file is no JPEG, PNG or WebP image"),
    "animated": (422, "the image has more than one frame"),
    "undecodable": (422, "the image is truncated or damaged"),
    "trailing_data": (422, "the file goes on after the image's end"),
    "rate": (429, "the key's rate is used up"),
    "internal": (500, "the service failed"),
    "overloaded": (503, "too many requests wait already"),
    "stopping": (503, "the service is going down"),
    "not_ready": (503, "the service's threads are stuck"),
    "no_space": (507, "the service's disk is full"),
    "timeout": (504, "the work took too long and was dropped"),
}
"""Code -> HTTP status and meaning."""


class ApiError(Exception):
    """An error that is told to the client."""

    def __init__(
        self, code: str, message: str, retry_after_s: float | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.headers = headers or {}

    def response(self, request_id: str = "") -> JSONResponse:
        """As HTTP; the request's id is filled in on the way out."""
        detail = ErrorDetail(code=self.code, message=self.message, request_id=request_id)
        retry = {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}
        return JSONResponse(ErrorBody(error=detail).model_dump(), CODES[self.code][0], {**retry, **self.headers})


def answered(method: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Let a route raise ApiError: BentoML would log it as a crash and answer in a format of its own."""

    @functools.wraps(method)
    async def answering(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            return await method(*args, **kwargs)
        except ApiError as error:
            return error.response()
        except Exception as error:  # BentoML logs it once more, with its traceback, and without the request's id
            log.error("%s ends with %s: %s", request_id.get(), type(error).__name__, error)
            raise

    # BentoML asks for it at every request, and finds it so at once.
    answering.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    return answering
