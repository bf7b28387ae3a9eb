"""Builds and checks the manifests in k8s/ without a cluster, more strictly than one would."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = "1.36"
"""The oldest Kubernetes that knows every kind in use."""
SCHEMAS = Path(__file__).parent / "schemas"
"""JSON schemas of kinds that Kubernetes itself does not know, as KIND-GROUP-VERSION.json in lower case."""

NEEDED = "needed is kubectl 1.21 or later, on Debian 13 the package kubernetes-client"

Document = dict[str, Any]


class ManifestError(Exception):
    """A manifest cannot be built, or no cluster should get it."""


def build(overlay: Path) -> list[Document]:
    """All documents of a kustomize folder.

    Raises:
        ManifestError: there is no kubectl, or it refuses the folder.
    """
    if shutil.which("kubectl") is None:
        raise ManifestError(f"there is no kubectl; {NEEDED}")
    built = subprocess.run(["kubectl", "kustomize", overlay], capture_output=True, text=True, check=False)
    if built.returncode != 0:
        raise ManifestError(f"{overlay}: {built.stderr.strip()} ({NEEDED})")
    return list(yaml.safe_load_all(built.stdout))


def of_kind(documents: list[Document], kind: str) -> dict[str, Document]:
    """The documents of a kind, by name."""
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}


def selects(selector: Document, labels: dict[str, str]) -> bool:
    """Whether a label selector selects what carries the labels."""
    wanted = selector.get("matchLabels", {})
    rules = selector.get("matchExpressions", [])
    assert {rule["operator"] for rule in rules} <= {"Exists", "In"}
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        rule["key"] in labels and labels[rule["key"]] in rule.get("values", [labels[rule["key"]]]) for rule in rules
    )


def check(documents: list[Document], schemas: Path = SCHEMAS) -> None:
    """Hold every document against the schema of its kind and every image against moving tags.

    Raises:
        ManifestError: names each document that is wrong, the field, and what is wrong with it.
    """
    problems = [
        f"{document.get('kind')}/{document.get('metadata', {}).get('name')}: {problem}"
        for document in documents
        for problem in [*_against_schema(document, schemas), *_moving_images(document)]
    ]
    if problems:
        raise ManifestError("\n".join(problems))


def _against_schema(document: Document, schemas: Path) -> Iterator[str]:
    missing = {"apiVersion", "kind", "metadata"} - document.keys()
    if missing:
        yield f"has no {', '.join(sorted(missing))}"
        return
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield _describe(error)
    except kubernetes_validate.SchemaNotFoundError:
        yield from _against_own_schema(document, schemas)


def _against_own_schema(document: Document, schemas: Path) -> Iterator[str]:
    path = schemas / f"{document['kind']}-{document['apiVersion'].replace('/', '-')}.json".lower()
    if not path.exists():
        yield f"{document['apiVersion']} has no such kind in Kubernetes {KUBERNETES}, and there is no schema {path}"
        return
    validator = jsonschema.Draft202012Validator(json.loads(path.read_text(encoding="utf-8")))
    yield from map(_describe, validator.iter_errors(document))


def _describe(error: jsonschema.ValidationError) -> str:
    return f"{'.'.join(map(str, error.absolute_path))}: {error.message}"


def _moving_images(node: Any) -> Iterator[str]:
    """Images of containers, anywhere below the node, that are not held by a digest or by a tag other than latest."""
    if isinstance(node, list):
        for entry in node:
            yield from _moving_images(entry)
    elif isinstance(node, dict):
        for key in ("containers", "initContainers"):
            for container in node.get(key) or []:
                image = container.get("image", "")
                tag = image.rpartition("/")[2].partition(":")[2]
                if tag in ("", "latest"):
                    yield f"image {image or 'of ' + container['name']} has no tag that stays what it is"
        for value in node.values():
            yield from _moving_images(value)
