"""What a component does at run time: one call into the flow, errors as one sentence."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from raresynth import flow
from raresynth.config import Params
from raresynth.errors import RaresynthError, describe
from raresynth.lineage import UNFINISHED, code_hash
from raresynth.processes import end_with, one_task_of

VOLUME = Path("/store")
"""Where tasks on a cluster see the volume that they share: images below data/, runs below runs/,
batches of images from an approved bundle below batches/."""
PARENT_PID = "RARESYNTH_PARENT_PID"
CONSOLE = "RARESYNTH_CONSOLE"
ERROR_FILE = "RARESYNTH_ERROR_FILE"


def run_dir(store: str) -> Path:
    """Folder of a run: by its name on the volume, or as an absolute path."""
    return VOLUME / "runs" / store


def batch_dir(name: str) -> Path:
    """Folder of the batches of a name on the volume, one folder a class."""
    return VOLUME / "batches" / name


def batches_of(name: str) -> list[Path]:
    """The folders of the finished batches of a name."""
    folders = (manifest.parent for manifest in batch_dir(name).glob("*/manifest.csv"))
    return sorted(folder for folder in folders if not folder.name.startswith(UNFINISHED))


def open_run(data: str, params: str, store: str) -> flow.Run:
    """The run that a pipeline's parameters describe; `params` is JSON."""
    return flow.Run(Path(data), run_dir(store), Params.model_validate_json(params))


def run(
    stage: str,
    data: str,
    params: str,
    store: str,
    code: str,
    record: str,
    given: Mapping[str, str],
    item: str = flow.ALL,
) -> flow.Run:
    """Run one stage and hand its record on as an artifact.

    Args:
        code: the library's hash, as the pipeline was compiled with.
        record: path of the artifact that gets the stage's record.
        given: upstream stage -> path of its record artifact.

    Raises:
        SystemExit: the user can cure what went wrong; the sentence has been printed or handed to the local runner.
    """
    _attach_to_parent()
    opened = open_run(data, params, store)
    with errors_as_sentences(), _place(opened.store):
        check_code(code)
        flow.execute(stage, opened, item, {name: Path(path) for name, path in given.items()})
    Path(record).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(flow.record_path(opened.store, stage, item), record)
    return opened


def check_code(code: str) -> None:
    """Refuse to run a pipeline that was compiled from other code: cached results would be taken for this code's.

    Raises:
        RaresynthError: the hashes differ.
    """
    if code != code_hash(""):
        raise RaresynthError(
            f"this image's code ({code_hash('')[:12]}) is not what the pipeline was compiled from ({code[:12]}); "
            "build the image and compile the pipeline from one commit"
        )


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """End with what a user can cure as one sentence, printed or handed to the local runner.

    Raises:
        SystemExit: there was such an error.
    """
    try:
        yield
    except (RaresynthError, OSError) as error:
        sentence = describe(error)
        if ERROR_FILE in os.environ:  # the local runner says it at the end
            Path(os.environ[ERROR_FILE]).write_text(sentence, encoding="utf-8")
        else:
            print(f"raresynth: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def items_after(each: flow.Each, *stage: Any) -> list[str]:
    """Run a stage, with the arguments of `run`, and say what those that come after it are repeated for.

    Raises:
        SystemExit: as in `run`, or that cannot be told.
    """
    opened = run(*stage)
    with errors_as_sentences():
        return flow.items(opened, each)


def _place(store: Path) -> AbstractContextManager[None]:
    """The run's folder, to work in beside other tasks; the local runner has it to itself and to its tasks."""
    return nullcontext() if PARENT_PID in os.environ else one_task_of(store)


def _attach_to_parent() -> None:
    """Under the local runner: report on the user's console, and end when the runner is killed."""
    if CONSOLE in os.environ:
        # Into the same terminal, pipe or file, past kfp's own log; what this process starts writes there too.
        with Path(os.environ[CONSOLE]).open("a") as console:
            os.dup2(console.fileno(), sys.stderr.fileno())
    if PARENT_PID in os.environ:
        end_with(int(os.environ[PARENT_PID]))
