"""Run the augmentation pipeline on this machine: `python -m pipelines.run DATA PARAMS OUT`."""

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from components import task
from raresynth.config import load_params
from raresynth.errors import INTERRUPTED, RaresynthError, describe
from raresynth.flow import Run, alone_in, note_start
from raresynth.report.summary import summarize


def main() -> int:
    """Run the pipeline; returns the exit code."""
    data, params_path, store = map(Path, sys.argv[1:4])
    try:
        params = load_params(params_path)
        with alone_in(store), tempfile.TemporaryDirectory(prefix="raresynth-") as scratch:
            note_start(Run(data, store, params), params_path)
            _end_on_interrupt(scratch)
            error = _run_pipeline(data.resolve(), params.model_dump_json(), store.resolve(), Path(scratch))
    except (RaresynthError, OSError) as refused:
        error = describe(refused)
    if error is not None:
        print(f"raresynth: {error}", file=sys.stderr)
        return 2
    print(summarize(store))
    return 0


def _run_pipeline(data: Path, params: str, store: Path, scratch: Path) -> str | None:
    """Run all tasks as subprocesses; returns the sentence for an error that the user can cure."""
    from kfp import local

    from pipelines.augmentation import build_local
    from raresynth.config import Params
    from raresynth.dataset.shards import shard_names
    from raresynth.lineage import code_hash

    error_file, log = scratch / "error", scratch / "kfp.log"
    os.environ |= {
        task.PARENT_PID: str(os.getpid()),
        task.ERROR_FILE: str(error_file),
        task.CONSOLE: _console(),
        "PYTHONSAFEPATH": "1",
    }
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(scratch / "artifacts"))
    compute = Params.model_validate_json(params).compute
    pipeline, shards = build_local(compute.parallel_tasks), shard_names(compute.shards)
    with log.open("w", encoding="utf-8") as file:
        try:
            with _quiet(file):
                pipeline(shards=shards, data=str(data), params=params, store=str(store), code=code_hash(""))
        except Exception as failure:
            if error_file.exists():
                return error_file.read_text(encoding="utf-8")
            file.flush()
            print(log.read_text(encoding="utf-8"), file=sys.stderr)
            raise RuntimeError("a task of the pipeline failed; its log stands above") from failure
    return None


def _end_on_interrupt(scratch: str) -> None:
    """On Ctrl-C and SIGTERM end at once with one sentence; the tasks end with this process."""

    def end(code: int) -> None:
        os.write(2, f"raresynth: {INTERRUPTED}\n".encode())
        shutil.rmtree(scratch, ignore_errors=True)
        os._exit(code)

    # Not blocked or ignored as below: what tasks start and end by SIGTERM would inherit that.
    signal.signal(signal.SIGTERM, lambda *_: end(128 + signal.SIGTERM))
    # Blocked in every thread from here on, so that it stays pending for sigwait; ignored by every process started.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        signal.sigwait({signal.SIGINT})
        end(128 + signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _quiet(log: IO[str]) -> Iterator[None]:
    """Send kfp's own output to a file; the tasks report on the console themselves."""
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def _console() -> str:
    """The file behind this process's stderr, for the tasks to write to."""
    for descriptor in (1, 2):
        # Tasks open a log file anew; without this, what is written here would overwrite what they wrote.
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)
    return os.ttyname(2) if os.isatty(2) else f"/proc/{os.getpid()}/fd/2"


if __name__ == "__main__":
    sys.exit(main())
