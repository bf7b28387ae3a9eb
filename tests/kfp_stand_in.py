"""A stand-in for the Pipelines API over HTTP: keeps pipelines, versions, experiments and runs, but runs nothing.

Requests and its own answers are held against the API's published schema (`kfp_api`). What the schema leaves open it
decides as the API's server does: names are unique, references lead somewhere, arguments fit the pipeline's inputs.
"""

import json
import logging
import threading
import uuid
from collections.abc import Callable
from typing import Any

import kfp_api
import yaml
from google.protobuf import json_format
from jsonschema import ValidationError
from kfp.pipeline_spec.pipeline_spec_pb2 import ParameterType, PipelineSpec, PlatformSpec
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, Rule
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

Json = dict[str, Any]
NOW = "2025-01-01T00:00:00Z"
SCHEMA_VERSION = "2.1.0"


class Refused(Exception):
    """The request is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class KfpStandIn:
    """A server on a free port of this machine, for as long as the `with` block lasts.

    Attributes:
        url: where it listens.
        token: what a request must bring along, if anything.
        several_users: whether it keeps users apart by namespace.
        course: states that a run shows, one after the other, each time it is asked for.
        failures: answers that an operation gives, one after the other, instead of doing its work; at None it does it.
        asked: name of the operation, query and body of every request that fits the schema.
        packages: the files uploaded, by version id.
    """

    def __init__(self, token: str | None = None, several_users: bool = False) -> None:
        self.token = token
        self.several_users = several_users
        self.course = ["PENDING", "RUNNING", "SUCCEEDED"]
        self.failures: dict[str, list[Response | None]] = {}
        self.asked: list[tuple[str, Json, Json | None]] = []
        self.pipelines: dict[str, Json] = {}
        self.versions: dict[str, Json] = {}
        self.packages: dict[str, str] = {}
        self.experiments: dict[str, Json] = {}
        self.runs: dict[str, Json] = {}
        implemented = [operation for operation in kfp_api.operations() if hasattr(self, operation.name)]
        self._operations = {operation.name: operation for operation in implemented}
        self._paths = Map([_rule(operation) for operation in implemented])
        self._server = make_server("127.0.0.1", 0, Request.application(self._answer), threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "KfpStandIn":
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line a request
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def bodies(self, name: str) -> list[Json | None]:
        """Bodies of the requests for an operation."""
        return [body for asked, _, body in self.asked if asked == name]

    def _answer(self, request: Request) -> Response:
        try:
            name, path = self._paths.bind_to_environ(request.environ).match()
            operation = self._operations[name]
            if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
                raise Refused(401, "Request header error: there is no user identity header.")
            query, body = _query(request, operation), _body(request, operation)
            self.asked.append((name, query, body))
            if self.failures.get(name) and (failure := self.failures[name].pop(0)) is not None:
                return failure
            given = {**path, **query, **{file: _text(request, file) for file in operation.files}}
            answer = getattr(self, name)(**given, **({} if body is None else {"body": body}))
            kfp_api.check(answer, operation.response)
        except HTTPException as error:
            return _json({"code": 5, "message": error.name}, error.code)
        except Refused as error:
            return _json({"code": 3, "message": str(error)}, error.status)
        return _json(answer, 200)

    def healthz_service_get_healthz(self) -> Json:
        return {"multi_user": self.several_users}

    def pipeline_service_get_pipeline_by_name(self, name: str, namespace: str = "") -> Json:
        return _one(self._of(self.pipelines, namespace), "name", name)

    def pipeline_service_create_pipeline(self, body: Json) -> Json:
        name = body.get("name") or body.get("display_name")
        if not name:
            raise Refused(400, "name is required")
        _refuse_twice(self._of(self.pipelines, body.get("namespace", "")), name)
        return _keep(self.pipelines, "pipeline_id", {"display_name": name, **body, "name": name})

    def pipeline_service_list_pipeline_versions(self, pipeline_id: str, filter: str = "", **_: str) -> Json:
        found = [version for version in self.versions.values() if version["pipeline_id"] == pipeline_id]
        return {"pipeline_versions": _filtered(found, filter)}

    def upload_pipeline_version(self, uploadfile: str, pipelineid: str = "", name: str = "", **rest: str) -> Json:
        if pipelineid not in self.pipelines or not name:
            raise Refused(400, "Failed to create a pipeline version")
        spec, _ = _parse(uploadfile)
        _refuse_twice([v for v in self.versions.values() if v["pipeline_id"] == pipelineid], name)
        version = {"pipeline_id": pipelineid, "name": name, "display_name": name, **rest}
        version |= {"pipeline_spec": json_format.MessageToDict(spec)}
        kept = _keep(self.versions, "pipeline_version_id", version)
        self.packages[kept["pipeline_version_id"]] = uploadfile
        return kept

    def experiment_service_list_experiments(self, namespace: str = "", filter: str = "", **_: str) -> Json:
        return {"experiments": _filtered(self._of(self.experiments, namespace), filter)}

    def experiment_service_create_experiment(self, body: Json) -> Json:
        if not body.get("display_name"):
            raise Refused(400, "Experiment has empty name")
        _refuse_twice(self._of(self.experiments, body.get("namespace", "")), body["display_name"], "display_name")
        return _keep(self.experiments, "experiment_id", body)

    def run_service_create_run(self, body: Json) -> Json:
        sources = {"pipeline_version_id", "pipeline_spec", "pipeline_version_reference"} & set(body)
        if not body.get("display_name") or len(sources) != 1:
            raise Refused(400, f"a run needs a name and one pipeline, not {sorted(sources)}")
        if body.get("experiment_id") not in self.experiments:
            raise Refused(404, f"Experiment {body.get('experiment_id')} not found.")
        reference = body.get("pipeline_version_reference", {})
        version = self.versions.get(reference.get("pipeline_version_id"))
        if version is None or version["pipeline_id"] != reference.get("pipeline_id"):
            raise Refused(404, f"PipelineVersion {reference.get('pipeline_version_id')} not found.")
        spec, _ = _parse(self.packages[version["pipeline_version_id"]])
        _check_inputs(spec, body.get("runtime_config", {}).get("parameters", {}))
        return _keep(self.runs, "run_id", {**body, "state": "RUNTIME_STATE_UNSPECIFIED"})

    def run_service_get_run(self, run_id: str, **_: str) -> Json:
        if run_id not in self.runs:
            raise Refused(404, f"Run {run_id} not found.")
        run = self.runs[run_id]
        run["state"] = self.course.pop(0) if len(self.course) > 1 else self.course[0]
        if run["state"] == "FAILED":
            run["error"] = {"code": 2, "message": "child 'train' failed"}
            tasks = [("root", "FAILED"), ("fetch", "SUCCEEDED"), ("train", "FAILED")]
            run["run_details"] = {"task_details": [{"display_name": task, "state": state} for task, state in tasks]}
        return run

    def _of(self, kept: dict[str, Json], namespace: str) -> list[Json]:
        """What is kept in a namespace; with a single user all namespaces are one."""
        if not self.several_users:
            return list(kept.values())
        if not namespace:
            raise Refused(400, "A resource cannot have an empty namespace in multi-user mode")
        return [one for one in kept.values() if one["namespace"] == namespace]


def _rule(operation: kfp_api.Operation) -> Rule:
    path = operation.path.replace("{", "<").replace("}", ">")
    return Rule(path, methods=[operation.method], endpoint=operation.name)


def _query(request: Request, operation: kfp_api.Operation) -> Json:
    query = request.args.to_dict(flat=False)
    for name, values in query.items():
        if name not in operation.query:
            raise Refused(400, f"{operation.name} has no parameter {name} in its query")
        if len(values) > 1 or (operation.query[name] == "int" and not values[0].isdigit()):
            raise Refused(400, f"{operation.name}: {name} is {values}")
    return {name: values[0] for name, values in query.items()}


def _body(request: Request, operation: kfp_api.Operation) -> Json | None:
    if operation.body is None:
        if request.mimetype == "application/json" and request.get_data():
            raise Refused(400, f"{operation.name} takes no body")
        return None
    return _checked(request.get_data(), operation.body)


def _checked(text: bytes | str, kind: str, spelled: Callable[[Any], Any] = lambda value: value) -> Any:
    """A JSON text as a value of one of the API's types."""
    try:
        value = spelled(json.loads(text))
        kfp_api.check(value, kind)
    except ValidationError as error:
        raise Refused(400, f"{kind}: {'.'.join(map(str, error.path))} {error.message}") from error
    except ValueError as error:
        raise Refused(400, f"{kind}: no JSON") from error
    return value


def _text(request: Request, file: str) -> str:
    if set(request.files) != {file}:
        raise Refused(400, "Failed to read pipeline from file")
    if not request.files[file].filename.endswith((".yaml", ".yml")):
        raise Refused(400, "Failed to read a pipeline spec file")
    return request.files[file].read().decode()


def _parse(package: str) -> tuple[PipelineSpec, PlatformSpec]:
    try:
        spec, *platforms = yaml.safe_load_all(package)
        pipeline = json_format.ParseDict(spec, PipelineSpec())
        platform = json_format.ParseDict(platforms[0] if platforms else {}, PlatformSpec())
    except (yaml.YAMLError, ValueError, json_format.ParseError) as error:
        raise Refused(400, f"invalid v2 pipeline spec: {error}") from error
    if pipeline.schema_version != SCHEMA_VERSION or not pipeline.pipeline_info.name:
        raise Refused(400, f"invalid v2 pipeline spec: schema version {pipeline.schema_version}")
    return pipeline, platform


def _check_inputs(spec: PipelineSpec, given: Json) -> None:
    inputs = spec.root.input_definitions.parameters
    for name, value in given.items():
        if name not in inputs:
            raise Refused(400, f"parameter {name} provided is not an input of the pipeline")
        kind = ParameterType.ParameterTypeEnum.Name(inputs[name].parameter_type)
        if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
            raise Refused(400, f"input parameter {name} requires type {kind}")
    for name, declared in inputs.items():
        if name not in given and not declared.is_optional and not declared.HasField("default_value"):
            raise Refused(
                400, f"parameter {name} is not optional, yet has neither default value nor user provided value"
            )


_TYPES = {
    "STRING": str,
    "NUMBER_INTEGER": int,
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": bool,
    "LIST": list,
    "STRUCT": dict,
}


def _filtered(kept: list[Json], text: str) -> list[Json]:
    if not text:
        return kept
    predicates = _checked(text, "V2beta1Filter", _published_spelling)["predicates"]
    if any((p["operation"], p["key"]) != ("EQUALS", "display_name") for p in predicates):
        raise Refused(400, f"cannot filter by {predicates}")
    return [one for one in kept if all(one["display_name"] == p["string_value"] for p in predicates)]


def _published_spelling(filter: Json) -> Json:
    """A filter as the schema spells it; the JSON of protobuf also allows camel case and the numbers of an enum."""
    names, operations = {"stringValue": "string_value"}, {1: "EQUALS"}
    predicates = [{names.get(key, key): value for key, value in p.items()} for p in filter.get("predicates", [])]
    spelled = [{**p, "operation": operations.get(p.get("operation"), p.get("operation"))} for p in predicates]
    return {**filter, "predicates": spelled}


def _one(kept: list[Json], field: str, value: str) -> Json:
    for one in kept:
        if one[field] == value:
            return one
    raise Refused(404, f"{value} not found")


def _refuse_twice(kept: list[Json], name: str, field: str = "name") -> None:
    if any(one[field] == name for one in kept):
        raise Refused(409, f"Already exist error: The name {name} already exists. Please specify a new name.")


def _keep(kept: dict[str, Json], id_field: str, one: Json) -> Json:
    made = {**one, id_field: str(uuid.uuid4()), "created_at": NOW}
    kept[made[id_field]] = made
    return made


def _json(value: Json, status: int | None) -> Response:
    return Response(json.dumps(value), status, content_type="application/json")
