"""What the routes take. Bodies are read strictly and before BentoML sees them.

BentoML's own reading fetches URLs that stand where a file should, ignores unknown fields, writes uploads to disk and
answers 500 to much that is malformed.
"""

import asyncio
from collections.abc import AsyncGenerator
from email.message import Message
from typing import Annotated, Any, Literal, Self, cast

from bentoml import IODescriptor
from pydantic import ConfigDict, Field, ValidationError, WithJsonSchema
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from serving.errors import ApiError

PARSED = "raresynth.parsed"
"""Where a request's parsed body lies in its ASGI scope."""
MAX_IMAGES = 32
MAX_GENERATED = 256
MAX_BATCH_GENERATED = 10_000
LARGE = 200_000
"""Bytes of a form from which on it is read in a thread: about 10 ms."""

Upload = Annotated[
    bytes,
    WithJsonSchema({"type": "file", "format": "image"}, mode="validation"),
    WithJsonSchema({"type": "string", "format": "binary"}, mode="serialization"),
]
"""An uploaded file; BentoML's clients know it by the type `file`."""


class Body(IODescriptor):
    """A body that was parsed already."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    async def from_http_request(cls, request: Request, serde: Any) -> Self:
        """What `parse` made of the request's body."""
        return cast(Self, request.scope[PARSED])


class Image(Body):
    """One image."""

    image: Upload
    """JPEG, PNG or WebP."""
    overlay: bool = False
    """Whether to draw the class activation map."""


class Images(Body):
    """Several images."""

    images: Annotated[list[Upload], Field(min_length=1, max_length=MAX_IMAGES)]
    overlay: bool = False


FORMS = (Image, Images)
"""Bodies that are multipart forms; the others are JSON."""


class Order(Body):
    """Synthetic images of one label: images 0 .. n - 1 of a seed."""

    label: Annotated[str, Field(max_length=200)]
    n: Annotated[int, Field(ge=1, le=MAX_GENERATED)] = 16
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    truncation: Annotated[float | None, Field(gt=0, le=1)] = None
    """Standard deviation of the latents: less gives more typical images. Null for that of the images that the gate
    judged."""
    format: Literal["png", "jpeg", "npz"] = "png"


class LargeOrder(Order):
    """As Order, for a task."""

    n: Annotated[int, Field(ge=1, le=MAX_BATCH_GENERATED)] = 1000


async def parse(kind: type[Body], content_type: str, body: bytes) -> Body:
    """A body of the kind.

    Raises:
        ApiError: it is malformed, or holds too many images.
    """
    files = kind in FORMS
    expected = "multipart/form-data" if files else "application/json"
    if _media_type(content_type) != expected:
        raise ApiError("malformed", f"the body must be {expected}")
    try:
        if files:
            form = _form(kind, content_type, body)
            # Large ones take long enough to hold up everyone else.
            values = await asyncio.to_thread(asyncio.run, form) if len(body) > LARGE else await form
            return cast(Body, kind.model_validate(values))
        return cast(Body, kind.model_validate_json(body))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        if first["type"] == "too_long" and files:
            raise ApiError("too_many_images", f"{place}: at most {MAX_IMAGES}; send several requests") from error
        raise ApiError("malformed", f"{place}: {first['msg']}") from error


class _InMemory(MultiPartParser):
    """Uploads never touch the disk: bodies are small enough, and nothing of an image is kept."""

    spool_max_size = 2**40


async def _form(kind: type[Body], content_type: str, body: bytes) -> dict[str, Any]:
    """A multipart body's fields; a file field's value is the file's bytes."""
    most = MAX_IMAGES + 1  # one more, which is then refused by name
    try:
        # Python has charsets in which a little text takes minutes to decode.
        if parse_options_header(content_type)[1].get(b"charset", b"utf-8").lower() != b"utf-8":
            raise ValueError
        headers = Headers({"content-type": content_type})
        parser = _InMemory(headers, _once(body), max_files=most, max_fields=4, max_part_size=1000)
        form = await parser.parse()
    except (MultiPartException, MultipartParseError, KeyError, ValueError) as error:
        raise ApiError("malformed", "the body is no multipart form in UTF-8 that can be read") from error
    field = "image" if kind is Image else "images"
    values: dict[str, Any] = {}
    uploads = []
    for name, value in form.multi_items():
        if name == field:
            if not isinstance(value, UploadFile):
                message = f"{field} must be a file, with a file name; text and URLs are not taken"
                raise ApiError("malformed", message)
            uploads.append(await value.read())
        elif name in values or isinstance(value, UploadFile):
            raise ApiError("malformed", f"the form may hold {field} as files, and overlay once as text")
        else:
            values[name] = {"true": True, "false": False}.get(value, value)
    if kind is Images:
        return {**values, field: uploads}
    if len(uploads) > 1:
        raise ApiError("too_many_images", "send one image here, or several to /predict_batch")
    return {**values, **dict.fromkeys([field] if uploads else [], uploads[0] if uploads else None)}


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


def _media_type(content_type: str) -> str:
    message = Message()
    message["content-type"] = content_type
    return message.get_content_type()
