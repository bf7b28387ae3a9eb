"""Long work says how far it is: a bar on a terminal, lines elsewhere."""

import os
import pty
import re
import subprocess
import sys

import pytest

from raresynth import progress

PROGRAM = (
    "from raresynth.progress import lines_only, progress\n"
    "with lines_only({lines}), progress('finetune df', 400, 'images', done=100) as advance:\n"
    "    for _ in range(3):\n"
    "        advance(100, 'D 1.2')\n"
)


def on_a_terminal(lines: bool) -> str:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", PROGRAM.format(lines=lines)], stderr=theirs, env=environment, check=True)
    os.close(theirs)
    return os.read(ours, 65536).decode()


def test_a_bar_on_a_terminal() -> None:
    output = on_a_terminal(lines=False)
    assert "━" in output and "400/400" in output and "images/s" in output


def test_lines_on_a_terminal_that_several_tasks_share() -> None:
    output = on_a_terminal(lines=True)
    assert "━" not in output
    assert re.search(r"finetune df: 400/400 images, [\d.]+ images/s, 0:00:00 left, D 1.2", output)


def test_a_line_every_few_seconds_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress("read images", 60, "images", done=20) as advance:
        for n in (10, 10, 10, 10):
            advance(n)
    assert capsys.readouterr().err.splitlines() == [
        "read images: 40/60 images, 3.3 images/s, 0:00:06 left",
        "read images: 60/60 images, 3.3 images/s, 0:00:00 left",
    ]
