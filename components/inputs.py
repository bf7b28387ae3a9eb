"""The inputs that a person gives in a form, checked: which knobs, and which version of which images."""

import json
import re
from typing import Any

from kfp import dsl

from components.artifacts import write_text
from components.task import VOLUME, check_code, errors_as_sentences
from raresynth.config import Params, choose_params
from raresynth.dataset.shards import shard_names
from raresynth.errors import ParamsError
from raresynth.versions.fetch import fetch_data


def chosen_params(
    preset: str,
    resolution: int,
    classes: list[str],
    overrides: str,
    name: str,
    code: str,
    ranks: int,
    chosen: dsl.Markdown,
) -> str:
    """The run's params as JSON; `chosen` shows what differs from params.yaml.

    Args:
        ranks: processes for which the package gives `pretrain` room; they go before the preset's.

    Raises:
        SystemExit: an input is impossible.
    """
    with errors_as_sentences():
        check_code(code)
        check_name(name)
        room = {"compute": {"ranks": ranks}}
        params = choose_params(preset, room, _form(resolution, classes), _parse(overrides))
        if params.compute.ranks != ranks:
            raise ParamsError(
                f"overrides set compute.ranks to {params.compute.ranks}, and this package gives pretrain room for "
                f"{ranks}; leave it out, or set it in the params file and compile a package"
            )
    write_text(chosen, f"```json\n{params.model_dump_json(indent=2, exclude_defaults=True)}\n```\n")
    return params.model_dump_json()


def planned_shards(params: str) -> list[str]:
    """The shards that the run's params ask for."""
    return shard_names(Params.model_validate_json(params).compute.shards)


def fetched_images(repository: str, revision: str, path: str, images: dsl.Dataset) -> str:
    """The folder of one version's images on the volume; the artifact names the version.

    Raises:
        SystemExit: they cannot be had.
    """
    with errors_as_sentences():
        report = fetch_data(repository, revision, path, VOLUME / "data")
    images.metadata.update(report.model_dump(mode="json"))
    write_text(images, report.model_dump_json(indent=2))
    return report.folder


def check_name(name: str) -> None:
    """Refuse a name that is no folder's.

    Raises:
        ParamsError: it is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise ParamsError(
            f"name is {name!r}, which is no folder's name; take letters, digits, dots, - and _, 63 at most"
        )


def _parse(overrides: str) -> dict[str, Any]:
    try:
        parsed = json.loads(overrides)
    except ValueError as error:
        raise ParamsError(f'overrides is not valid JSON ({error}); write it as {{"gan": {{"width": 32}}}}') from error
    if not isinstance(parsed, dict) or not all(isinstance(knobs, dict) for knobs in parsed.values()):
        raise ParamsError('overrides must hold sections with knobs, such as {"gan": {"width": 32}}')
    return parsed


def _form(resolution: int, classes: list[str]) -> dict[str, Any]:
    """The form's own fields as overrides; images are made and classified at `resolution`."""
    sides = {"gan": {"resolution": resolution}, "classifier": {"resolution": resolution}} if resolution else {}
    named = {"balance": {"classes": classes}} if classes else {}
    return sides | named
