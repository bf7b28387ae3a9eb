"""The end of a run in words, for people who look at the graph."""

from pathlib import Path

from kfp import dsl

from components.artifacts import write_text
from components.inputs import check_name
from components.task import batch_dir, batches_of, run_dir
from raresynth.errors import CheckpointError, ParamsError
from raresynth.lineage import write_json
from raresynth.report.summary import summarize

SUCCEEDED = "SUCCEEDED"


def write_outcome(store: str, status: dsl.PipelineTaskFinalStatus, artifact: dsl.Markdown) -> None:
    """How the run ended, with every class's decision and the release; its state goes to outcome.json beside them."""
    if not _is_name(store):
        _write_end(None, status, artifact, "")
        return
    try:
        decided = summarize(run_dir(store))
        if status.state != SUCCEEDED:
            decided = f"What was last decided under this name, perhaps by an earlier run:\n\n{decided}"
    except CheckpointError:
        decided = "It ended before its classifiers were judged; started again under the same name, it goes on there.\n"
    _write_end(run_dir(store), status, artifact, decided)


def write_batch_outcome(name: str, status: dsl.PipelineTaskFinalStatus, artifact: dsl.Markdown) -> None:
    """How the run ended, and the folders of its images; its state goes to outcome.json beside them."""
    if not _is_name(name):
        _write_end(None, status, artifact, "")
        return
    _write_end(batch_dir(name), status, artifact, "".join(f"- {folder}\n" for folder in batches_of(name)))


def _is_name(name: str) -> bool:
    """Whether the run's first task took the name; another one might lead to folders of others."""
    try:
        check_name(name)
    except ParamsError:
        return False
    return True


def _write_end(folder: Path | None, status: dsl.PipelineTaskFinalStatus, artifact: dsl.Markdown, text: str) -> None:
    said = {"state": status.state, "error": status.error_message or "", "run": status.pipeline_job_resource_name}
    if folder is not None:
        write_json(folder / "outcome.json", said)
    error = f"\n```\n{said['error']}\n```\n" if said["error"] else ""
    write_text(artifact, f"State of the run: {said['state']}\n{error}\n{text}")


def write_release(store: str, note: dsl.Markdown) -> None:
    """What is released, and that synthetic images are part of what it was trained on."""
    write_text(note, f"The classifier trained with synthetic images is released: `{run_dir(store) / 'bundle'}`.\n")
