"""What comes before the stages and after them, as KFP components: imports and one call each."""

from typing import List  # noqa: UP035

from kfp import dsl

from components.base import component


@component
def choose_params(
    preset: str,
    resolution: int,
    classes: List[str],  # noqa: UP006
    overrides: str,
    name: str,
    code: str,
    ranks: int,
    chosen: dsl.Output[dsl.Markdown],
) -> str:
    """Check the inputs of the form and make the run's params of them, as JSON."""
    from components.inputs import chosen_params

    return chosen_params(preset, resolution, classes, overrides, name, code, ranks, chosen)


@component
def plan_shards(params: str) -> List[str]:  # noqa: UP006
    """Returns the shards among which reading and drawing images are divided; none where one task does it."""
    from components.inputs import planned_shards

    return planned_shards(params)


@component
def fetch_data(repository: str, revision: str, path: str, images: dsl.Output[dsl.Dataset]) -> str:
    """Get the images of one data version with DVC and check them; returns their folder, named by the `.dir` hash."""
    from components.inputs import fetched_images

    return fetched_images(repository, revision, path, images)


@component
def write_outcome(store: str, status: dsl.PipelineTaskFinalStatus, outcome: dsl.Output[dsl.Markdown]):
    """Write how the run ended, and its decisions, in words; runs also where it failed."""
    from components.outcome import write_outcome

    write_outcome(store, status, outcome)


@component
def open_bundle(
    run: str,
    classes: List[str],  # noqa: UP006
    name: str,
    code: str,
) -> List[str]:  # noqa: UP006
    """Check a run's bundle, every hash of it; returns the classes to make images of."""
    from components.batches import classes_to_make

    return classes_to_make(run, classes, name, code)


@component
def generate(label: str, run: str, name: str, n: int, seed: int, truncation: float, page: dsl.Output[dsl.HTML]):
    """Make images of one class and audit them against their bundle."""
    from components.batches import make_batch

    make_batch(label, run, name, n, seed, truncation, page)


@component
def publish_data(name: str, run: str, repository: str, branch: str, path: str, published: dsl.Output[dsl.Dataset]):
    """Push the batches as a DVC version of their own, and commit its pointers: the one step that writes to git."""
    from components.batches import publish

    publish(name, run, repository, branch, path, published)


@component
def write_batch_outcome(name: str, status: dsl.PipelineTaskFinalStatus, outcome: dsl.Output[dsl.Markdown]):
    """Write how the run ended and where its images are; runs also where it failed."""
    from components.outcome import write_batch_outcome

    write_batch_outcome(name, status, outcome)
