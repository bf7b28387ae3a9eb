"""`python -m serving`: one BentoML server over an approved bundle, in the foreground, until Ctrl-C or SIGTERM."""

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from raresynth.errors import ParamsError, RaresynthError, describe
from serving.settings import FILE, PREFIX, SERVER, Settings, read_settings

ROOT = Path(__file__).parents[1]
KEEP_ALIVE_S = 75
"""Time that an idle connection stays open: longer than proxies keep theirs, which may else ask on one as it closes."""
_LONGEST_FOLDER = 90
"""A socket's path may have 103 bytes (macOS; 107 on Linux)."""


def main() -> int:
    """Serve what the settings name."""
    # The server takes the signal over once it runs; until then process 1 of a container would not hear it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        settings = read_settings()
        with tempfile.TemporaryDirectory(prefix="raresynth-") as private:
            work_dir = (settings.work_dir or Path(private) / "work").absolute()
            work_dir.mkdir(parents=True, exist_ok=True)
            return _serve(settings, work_dir, Path(private))
    except (RaresynthError, OSError) as error:
        print(f"cannot serve: {describe(error)}", file=sys.stderr)
        return 2


def _serve(settings: Settings, work_dir: Path, private: Path) -> int:
    paths = {"WORK_DIR": work_dir, "BUNDLE": settings.bundle, "KEYS_FILE": settings.keys_file}
    # The worker works in another folder.
    absolute = {PREFIX + name: str(path.absolute()) for name, path in paths.items() if path}
    if named := os.environ.get(FILE):
        absolute[FILE] = str(Path(named).absolute())
    os.environ |= {
        **absolute,
        SERVER: str(os.getpid()),
        # Two servers that shared it would wipe each other's metrics and tasks.
        "BENTOML_HOME": str(work_dir / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
        # The graphs' threads are set one by one; numpy's own would only get in their way.
        "OMP_NUM_THREADS": "1",
    }
    from bentoml_cli.cli import cli

    _control_from(private)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    print(f"raresynth at http://{host}:{settings.port}/ once {settings.bundle} is checked; Ctrl-C ends it", flush=True)
    arguments = ["serve", "serving.service:Raresynth", "--host", settings.host, "--port", str(settings.port)]
    arguments += ["--working-dir", str(ROOT), "--timeout-graceful-shutdown", str(settings.drain_s)]
    arguments += ["--timeout-keep-alive", str(KEEP_ALIVE_S)]
    cli.main(arguments, prog_name="bentoml", standalone_mode=False)
    return 0


def _control_from(folder: Path) -> None:
    """Let the supervisor of the worker be reached through files in `folder` alone.

    It does what it is told there, starting any program included. BentoML has it listen on two ports of loopback, where
    every user of the machine can tell it, and which may by chance be the service's own.

    Raises:
        ParamsError: the folder's path is too long for a socket.
    """
    from bentoml._internal.utils import circus

    if len(os.fsencode(folder)) > _LONGEST_FOLDER:
        raise ParamsError(f"{folder} is too long a path for a socket; set TMPDIR to a shorter one, such as /tmp")
    plain = circus.Arbiter

    def arbiter(watchers: list[Any], endpoint: str, pubsub_endpoint: str, **options: Any) -> Any:
        return plain(watchers, f"ipc://{folder}/control", f"ipc://{folder}/events", **options)

    circus.Arbiter = arbiter


if __name__ == "__main__":
    sys.exit(main())
