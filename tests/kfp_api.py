"""The published schema of the Pipelines API, version 2beta1.

Kubeflow publishes it as a swagger definition and, generated from that for each release, as the package
`kfp-server-api` (Apache-2.0): every model lists its fields and their types, every operation its path and parameters.
Here it is read from that package, so that it is of the very release that requirements/dev.txt names.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

import jsonschema
import kfp_server_api
from kfp_server_api import models

SERVICES = (
    "HealthzServiceApi",
    "ExperimentServiceApi",
    "PipelineServiceApi",
    "PipelineUploadServiceApi",
    "RunServiceApi",
)
CHECKER = jsonschema.Draft202012Validator
PLAIN = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "datetime": {"type": "string", "format": "date-time"},
    "object": {},
}


@dataclass(frozen=True)
class Operation:
    """A path and method of the API, and the types of all that goes in and comes out.

    Attributes:
        path: URL's path, its parameters in braces.
        query: type of each parameter in the query.
        body: type of the JSON body, if there is one.
        files: names of the files in the form.
        response: type of the answer.
    """

    name: str
    method: str
    path: str
    query: dict[str, str]
    body: str | None
    files: set[str]
    response: str


class _Recorder:
    """Takes the place of the package's HTTP client, and keeps what an operation would have sent."""

    client_side_validation = False

    def select_header_accept(self, accepts: list[str]) -> str:
        return accepts[0]

    def select_header_content_type(self, types: list[str]) -> str:
        return types[0]

    def call_api(self, path: str, method: str, path_params: dict, query: list, header: dict, **rest: Any) -> None:
        self.called = {"path": path, "method": method, "query": query, **rest}


@functools.cache
def operations() -> list[Operation]:
    """All operations of the services used, found by calling each with its parameters' types for their values."""
    found = []
    for service in SERVICES:
        recorder = _Recorder()
        api = getattr(kfp_server_api, service)(recorder)
        for name in dir(api):
            if name.startswith("_") or name.endswith("_with_http_info") or name == "api_client":
                continue
            types = re.findall(r":type (\w+): (\S+)$", getattr(api, name).__doc__, re.MULTILINE)
            getattr(api, name)(**{parameter: kind for parameter, kind in types if parameter not in _OF_THE_CALL})
            called = recorder.called
            query, files = dict(called["query"]), set(called["files"])
            found.append(
                Operation(name, called["method"], called["path"], query, called["body"], files, called["response_type"])
            )
    return found


_OF_THE_CALL = {"async_req", "_preload_content", "_request_timeout", "_return_http_data_only"}


def check(value: Any, kind: str) -> None:
    """Hold a JSON value against a type of the API; a field that the type does not have is an error.

    Raises:
        jsonschema.ValidationError: it does not fit.
    """
    CHECKER(_schema(kind), format_checker=CHECKER.FORMAT_CHECKER).validate(value)


@functools.cache
def _schema(kind: str) -> dict[str, Any]:
    if kind in PLAIN:
        return PLAIN[kind]
    if listed := re.fullmatch(r"list\[(.+)\]", kind):
        return {"type": "array", "items": _schema(listed[1])}
    if mapped := re.fullmatch(r"dict\(str, (.+)\)", kind):
        return {"type": "object", "additionalProperties": _schema(mapped[1])}
    model = getattr(models, kind)
    if hasattr(model, "allowable_values"):
        return {"enum": model.allowable_values}
    fields = {model.attribute_map[field]: _schema(of) for field, of in model.openapi_types.items()}
    return {"type": "object", "properties": fields, "additionalProperties": False}
