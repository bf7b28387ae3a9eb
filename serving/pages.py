"""What is only read: the card, the documentation, the page, finished archives."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from serving.errors import ApiError
from serving.openapi import openapi
from serving.routes import ASKED_PATH

_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""The page: path -> file and media type."""


def pages() -> Starlette:
    """The app of these routes; `state.card` and `state.results_dir` are set once the bundle is open."""
    return Starlette(
        routes=[
            *(Route(path, _page) for path in _FILES),
            Route("/model", _card),
            Route("/docs.json", _docs),
            Route("/generated/{name}", _archive),
        ]
    )


async def _page(request: Request) -> Response:
    name, media_type = _FILES[request.url.path]
    content, etag = _read(name)
    # A browser asks each time and goes by the content, so that it never mixes the files of two versions.
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)


@cache
def _read(name: str) -> tuple[bytes, str]:
    """A file of the page, and its ETag."""
    content = (Path(__file__).parent / "page" / name).read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()}"'


async def _card(request: Request) -> Response:
    card: dict[str, Any] = request.app.state.card
    return JSONResponse(card)


async def _docs(request: Request) -> Response:
    return Response(_document(), media_type="application/json")


@cache
def _document() -> bytes:
    """Made once: that holds everyone up for longer than a prediction takes."""
    return bytes(JSONResponse(openapi()).body)


async def _archive(request: Request) -> Response:
    path: Path = request.app.state.results_dir / request.scope[ASKED_PATH].rpartition("/")[2]
    if not path.is_file():
        message = "there is no such archive; the oldest are deleted when new ones come"
        return ApiError("not_found", message).response()
    return FileResponse(path, media_type="application/zip", filename=path.name)
