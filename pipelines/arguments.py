"""The arguments of a run, checked against what a compiled package declares, before anything is sent."""

import difflib
import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raresynth import __version__
from raresynth.config import Params
from raresynth.errors import RaresynthError
from raresynth.lineage import sha256_file

OVERRIDES = "overrides"
"""Parameter that holds knobs of a params file as JSON, whatever the package."""

_EXACT = 2**53
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "NUMBER_INTEGER": (int,),
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": (bool,),
    "LIST": (list,),
    "STRUCT": (dict,),
}
_KINDS = {
    "STRING": "text",
    "NUMBER_INTEGER": "whole number",
    "NUMBER_DOUBLE": "number",
    "BOOLEAN": "truth value (true or false)",
    "LIST": 'JSON list such as ["a", "b"]',
    "STRUCT": 'JSON object such as {"a": 1}',
}


class PackageError(RaresynthError):
    """A file is no compiled package that a run can be made of."""


class ArgumentsError(RaresynthError):
    """A run's arguments do not fit the package."""


@dataclass(frozen=True)
class Parameter:
    """An input of the pipeline.

    Attributes:
        kind: KFP's name of its type.
        required: whether it has no default.
    """

    kind: str
    required: bool


@dataclass(frozen=True)
class Package:
    """A compiled KFP 2 package.

    Attributes:
        path: its file.
        name: the pipeline's name.
        description: one line for the UI.
        version: the library's version and the start of the file's SHA-256; a changed file is another version.
        parameters: the pipeline's inputs by name.
        documents: the file's YAML documents; the first is the pipeline, the second its settings for Kubernetes.
    """

    path: Path
    name: str
    description: str
    version: str
    parameters: dict[str, Parameter]
    documents: list[dict[str, Any]]

    def uncached(self) -> str:
        """The package's YAML with caching off in every task, those inside loops and nested pipelines too."""
        pipeline, *settings = self.documents
        components = {name: _uncached(component) for name, component in pipeline.get("components", {}).items()}
        changed = {**pipeline, "root": _uncached(pipeline["root"]), "components": components}
        return str(yaml.safe_dump_all([changed, *settings], sort_keys=False))


def _uncached(component: dict[str, Any]) -> dict[str, Any]:
    if "dag" not in component:
        return component
    tasks = {name: {**task, "cachingOptions": {}} for name, task in component["dag"]["tasks"].items()}
    return {**component, "dag": {**component["dag"], "tasks": tasks}}


def read_package(path: Path) -> Package:
    """Read a compiled package.

    Raises:
        PackageError: the file is missing, no compiled package, or one whose inputs a run cannot be given.
    """
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
        pipeline = documents[0]
        inputs = pipeline["root"].get("inputDefinitions", {})
        parameters = {name: _parameter(declared) for name, declared in inputs.get("parameters", {}).items()}
        name, description = pipeline["pipelineInfo"]["name"], pipeline["pipelineInfo"].get("description", "")
    except OSError as error:
        raise PackageError(f"cannot read the package {path}: {error.strerror}; name a compiled package") from error
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
        raise PackageError(f"{path} is no compiled KFP 2 package in YAML; compile the pipeline first") from error
    artifacts = [name for name, declared in inputs.get("artifacts", {}).items() if not declared.get("isOptional")]
    if artifacts:
        raise PackageError(
            f"{path} takes artifacts ({', '.join(artifacts)}), which a run cannot be given; "
            "submit a pipeline that takes parameters only"
        )
    version = f"{__version__}-{sha256_file(path)[:12]}"
    return Package(path, name, description, version, parameters, documents)


def _parameter(declared: dict[str, Any]) -> Parameter:
    kind = declared["parameterType"]
    if kind not in _KINDS:
        raise LookupError(kind)
    return Parameter(kind, not declared.get("isOptional") and "defaultValue" not in declared)


def read_arguments(package: Package, given: Sequence[str]) -> dict[str, Any]:
    """The values of `NAME=VALUE` texts, of the types that the package declares.

    Raises:
        ArgumentsError: something is wrong with them; all that is wrong is said at once.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    names: list[str] = []
    for text in given:
        name, equals, value = text.partition("=")
        try:
            if not equals:
                raise ValueError("is not of the form NAME=VALUE")
            if name in names:
                raise ValueError("is given twice")
            names.append(name)
            values[name] = _value(package, name, value)
        except ValueError as error:
            problems.append(f"{name} {error}")
    absent = [name for name, parameter in package.parameters.items() if parameter.required and name not in names]
    problems += [f"{name} is missing" for name in absent]
    if problems:
        known = ", ".join(f"{name} ({parameter.kind})" for name, parameter in package.parameters.items()) or "none"
        raise ArgumentsError(f"{'; '.join(problems)}; nothing was sent; {package.path} has the parameters: {known}")
    return values


def _value(package: Package, name: str, text: str) -> Any:
    if name not in package.parameters:
        near = difflib.get_close_matches(name, package.parameters, n=1)
        raise ValueError("is no parameter" + (f", did you mean {near[0]}?" if near else ""))
    kind = package.parameters[name].kind
    value = text if kind == "STRING" else _from_json(text, kind)
    if name == OVERRIDES:
        _check_overrides(_from_json(text, "STRUCT"))
    return value


def _from_json(text: str, kind: str) -> Any:
    wrong = f"is {reprlib.repr(text)}, which is no {_KINDS[kind]}"
    try:
        value = json.loads(text, parse_int=_whole_number)
        json.dumps(value, allow_nan=False)
    except json.JSONDecodeError as error:
        raise ValueError(f"{wrong} ({error.msg} at character {error.pos + 1})") from error
    except ValueError as error:
        raise ValueError(f"is {reprlib.repr(text)}: {error}") from error
    # In Python true is an int; in a pipeline it is not.
    if not isinstance(value, _JSON_TYPES[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        raise ValueError(wrong)
    return value


def _whole_number(digits: str) -> int:
    number = int(digits)
    if abs(number) > _EXACT:
        raise ValueError("KFP carries numbers as doubles, which are exact up to 2**53 only")
    return number


def _check_overrides(overrides: dict[str, Any]) -> None:
    """Refuse a knob that is unknown, or out of its range.

    Rules between knobs, and knobs that are needed together, depend on the preset below; the run checks them.

    Raises:
        ValueError: names each such knob.
    """
    try:
        Params.model_validate(overrides)
    except ValidationError as error:
        items = [item for item in error.errors() if item["type"] not in {"value_error", "missing"}]
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in items]
        if problems:
            raise ValueError(f"holds {'; '.join(problems)}; see params.yaml for the knobs and their ranges") from error
