"""What is only read: the card, the documentation, the page, finished archives."""

from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from serving.errors import ApiError
from serving.openapi import openapi
from serving.routes import ASKED_PATH

PAGE = Path(__file__).parent / "page" / "index.html"


def pages() -> Starlette:
    """The app of these routes; `state.card` and `state.results_dir` are set once the bundle is open."""
    return Starlette(
        routes=[
            Route("/", _page),
            Route("/model", _card),
            Route("/docs.json", _docs),
            Route("/generated/{name}", _archive),
        ]
    )


async def _page(request: Request) -> Response:
    return FileResponse(PAGE)


async def _card(request: Request) -> Response:
    card: dict[str, Any] = request.app.state.card
    return JSONResponse(card)


async def _docs(request: Request) -> Response:
    return JSONResponse(openapi())


async def _archive(request: Request) -> Response:
    path: Path = request.app.state.results_dir / request.scope[ASKED_PATH].rpartition("/")[2]
    if not path.is_file():
        message = "there is no such archive; the oldest are deleted when new ones come"
        return ApiError("not_found", message).response()
    return FileResponse(path, media_type="application/zip", filename=path.name)
