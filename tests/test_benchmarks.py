"""The commands beside the figures can be run, and take the options that they are shown with."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
SHOWN = [
    command
    for page in PAGES
    for command in re.findall(r"python -m (benchmarks[.][^`#\n]*(?:\\\n[^`#\n]*)*)", page.read_text(encoding="utf-8"))
]


@pytest.mark.slow
def test_each_command_shown_can_be_run_with_its_options():
    assert SHOWN
    for module in sorted({command.split()[0] for command in SHOWN}):
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], check=False, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        for command in SHOWN:
            if command.split()[0] == module:
                assert set(re.findall(r"--[a-z-]+", command)) <= set(re.findall(r"--[a-z-]+", done.stdout)), command
