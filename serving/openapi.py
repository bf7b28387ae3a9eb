"""The one OpenAPI document, made from the table of routes."""

import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from raresynth import __version__
from serving.errors import CODES, ErrorBody
from serving.requests import FORMS, Body, Image
from serving.routes import ROUTES, Route

_REF = "#/components/schemas/{model}"
_EVERYWHERE = ("rate", "internal", "overloaded", "timeout")
_WITH_BODY = ("malformed", "slow_body", "too_large")


def openapi() -> dict[str, Any]:
    """The document as JSON values, OpenAPI 3.1."""
    bodies = [route.body for route in ROUTES if route.body]
    answers = [route.answer for route in ROUTES if not isinstance(route.answer, str)]
    models: dict[type[BaseModel], None] = dict.fromkeys([*bodies, *answers, ErrorBody])
    _, definitions = models_json_schema([(model, "serialization") for model in models], ref_template=_REF)
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "raresynth",
            "version": __version__,
            "description": "Approved generators and the approved classifier of one bundle. No medical device.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": "_".join([route.method.lower(), *re.findall(r"\w+", route.path)]),
        "security": [] if route.access == "public" else [{"key": []}],
        "responses": {"200": _answer(route), **_errors(route)},
    }
    in_path = [name.partition("}")[0] for name in route.path.split("{")[1:]]
    if parameters := [*_parameters("path", in_path), *_parameters("query", route.query)]:
        operation["parameters"] = parameters
    if route.body:
        operation["requestBody"] = _body(route.body, route.example)
    return operation


def _answer(route: Route) -> dict[str, Any]:
    if isinstance(route.answer, str):
        binary = {"type": "string", "format": "binary"} if route.answer == "application/zip" else {}
        kind = {"application/json": {"type": "object"}}.get(route.answer, binary or {"type": "string"})
        return {"description": route.summary, "content": {route.answer: {"schema": kind}}}
    content: dict[str, Any] = {"schema": _reference(route.answer), "example": dict(route.answer_example)}
    return {"description": route.summary, "content": {"application/json": content}}


def _errors(route: Route) -> dict[str, Any]:
    codes = [*_EVERYWHERE, *route.errors, *(_WITH_BODY if route.body else ())]
    codes += [] if route.access == "public" else ["no_key", "no_scope"]
    by_status: dict[int, list[str]] = {}
    for code in dict.fromkeys(codes):
        by_status.setdefault(CODES[code][0], []).append(code)
    return {str(status): _error(status, by_status[status]) for status in sorted(by_status)}


def _error(status: int, codes: list[str]) -> dict[str, Any]:
    examples = {
        code: {"value": {"error": {"code": code, "message": CODES[code][1], "request_id": "7f3a…"}}} for code in codes
    }
    meaning = "; ".join(f"`{code}`: {CODES[code][1]}" for code in codes)
    content = {"application/json": {"schema": _reference(ErrorBody), "examples": examples}}
    return {"description": f"{HTTPStatus(status).phrase}. {meaning}", "content": content}


def _body(kind: type[Body], example: Mapping[str, Any]) -> dict[str, Any]:
    form = kind in FORMS
    content: dict[str, Any] = {"schema": _reference(kind), "example": dict(example)}
    if form:
        # A file cannot stand in an example; the fields' encoding says what the parts are.
        field = "image" if kind is Image else "images"
        content["encoding"] = {field: {"contentType": "image/jpeg, image/png, image/webp"}}
    return {"required": True, "content": {"multipart/form-data" if form else "application/json": content}}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _parameters(place: str, names: Iterable[str]) -> list[dict[str, Any]]:
    return [{"name": name, "in": place, "required": True, "schema": {"type": "string"}} for name in names]
