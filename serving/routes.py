"""Every route, once: who may use it, what it takes and answers. What is not here is not reachable."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel

from serving.answers import BatchPredictions, BatchResult, Prediction, TaskStatus
from serving.keys import Scope
from serving.requests import Body, Image, Images, LargeOrder, Order

ASKED_PATH = "raresynth.path"
"""Where the path that was asked for lies in a request's ASGI scope. BentoML gets that of the route: its metrics have
series for each path that it sees."""
_ARCHIVE = "[0-9a-f]{32}[.]zip"
_METHODS = {"GET": ("GET", "HEAD"), "POST": ("POST",)}


@dataclass(frozen=True)
class Route:
    """One method of one path."""

    method: Literal["GET", "POST"]
    path: str
    summary: str
    access: Scope | Literal["public", "any"]
    """Scope that the key must have; `any` for every key, `public` for none."""
    answer: type[BaseModel] | str = "application/json"
    """Model of the answer's JSON, or its media type."""
    body: type[Body] | None = None
    query: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    """Codes beside those that every route can give."""
    example: Mapping[str, Any] = field(default_factory=dict)
    """Body that the documentation shows; for forms the text fields."""
    answer_example: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What its paths look like."""
        return re.compile(_ARCHIVE.join(map(re.escape, self.path.split("{name}"))))


_IMAGE_ERRORS = ("too_large", "too_many_pixels", "wrong_type", "animated", "undecodable", "trailing_data")
_VERSIONS = {"bundle": "5f0c…", "data_version": "9a3e….dir"}
_PREDICTION = {
    "label": "mel",
    "probabilities": {"mel": 0.83, "nv": 0.17},
    "out_of_distribution": {"score": 512.3, "threshold": 1263.8, "flagged": False},
    "overlay_png": None,
    "versions": _VERSIONS,
}
_REFUSED = {"code": "undecodable", "message": "the image is truncated or damaged; save it anew"}
_ORDER = {"label": "mel", "n": 16, "seed": 0, "truncation": None, "format": "png"}
_TASK = {"task_id": "3d8f0c0e6d2b4a6f9f4f6a1f0f5b7c11", "status": "in_progress"}

ROUTES = (
    Route(
        "POST",
        "/predict",
        "Label, calibrated probabilities and strangeness of one image",
        "predict",
        Prediction,
        Image,
        errors=(*_IMAGE_ERRORS, "too_many_images"),
        example={"overlay": True},
        answer_example=_PREDICTION,
    ),
    Route(
        "POST",
        "/predict_batch",
        "The same for several images; one that is refused spoils no other",
        "predict",
        BatchPredictions,
        Images,
        errors=("too_large", "too_many_images"),
        example={"overlay": False},
        answer_example={
            "items": [
                {"index": 0, "prediction": _PREDICTION, "error": None},
                {"index": 1, "prediction": None, "error": _REFUSED},
            ]
        },
    ),
    Route(
        "POST",
        "/generate",
        "Zip of synthetic images with manifest.json; equal orders give equal bytes",
        "generate",
        "application/zip",
        Order,
        errors=("no_generator", "too_large"),
        example=_ORDER,
    ),
    Route(
        "POST",
        "/generate_batch/submit",
        "Start a task that draws up to 10,000 images",
        "generate",
        TaskStatus,
        LargeOrder,
        errors=("no_generator", "too_large", "no_space", "stopping"),
        example={**_ORDER, "n": 10_000},
        answer_example=_TASK,
    ),
    Route(
        "GET",
        "/generate_batch/status",
        "Where a task stands",
        "generate",
        TaskStatus,
        query=("task_id",),
        errors=("malformed", "not_found"),
        answer_example={**_TASK, "status": "completed"},
    ),
    Route(
        "GET",
        "/generate_batch/get",
        "What a finished task left, or why it failed",
        "generate",
        BatchResult,
        query=("task_id",),
        errors=("malformed", "not_found", "unfinished", "no_space"),
        answer_example={
            "path": "/generated/0f9e6c5d7b8a49e2a1c3d5e7f9b1a3c5.zip",
            "sha256": "b5bb9d80…",
            "n_bytes": 98_304_211,
            "n": 10_000,
            "label": "mel",
        },
    ),
    Route(
        "GET",
        "/generated/{name}",
        "Archive that a task left; the newest few are kept",
        "generate",
        "application/zip",
        errors=("not_found",),
    ),
    Route("GET", "/model", "Card of what is served", "any"),
    Route("GET", "/", "Web page", "public", "text/html"),
    Route("GET", "/page.css", "The page's style", "public", "text/css"),
    Route("GET", "/page.js", "The page's script", "public", "text/javascript"),
    Route("GET", "/icon.svg", "The page's icon", "public", "image/svg+xml"),
    Route("GET", "/docs.json", "This document", "public"),
    Route("GET", "/schema.json", "Routes as bentoml.SyncHTTPClient reads them", "public"),
    Route("GET", "/livez", "200 while the process works", "public", "text/plain", errors=("not_ready",)),
    Route(
        "GET", "/readyz", "200 while requests should be sent", "public", "text/plain", errors=("not_ready", "stopping")
    ),
    Route("GET", "/metrics", "Metrics for Prometheus", "admin", "text/plain"),
)


def find_route(method: str, path: str) -> tuple[Route | None, list[str]]:
    """The route of a method and path, and the methods that the path takes: none if it is unknown."""
    at_path = [route for route in ROUTES if route.pattern.fullmatch(path)]
    found = next((route for route in at_path if route.method == ("GET" if method == "HEAD" else method)), None)
    return found, [name for route in at_path for name in _METHODS[route.method]]
