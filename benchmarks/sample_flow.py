"""Time and memory of every stage of the flow on the sample data: `python -m benchmarks.sample_flow`.

With `--data DIR --params FILE` on other images; with `--out OUT` the table of a finished run is printed.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from raresynth.flow import STAGES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--out", type=Path, help="a finished run")
    arguments = parser.parse_args()
    if arguments.out is not None:
        print_table(arguments.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = ["--data", arguments.data, "--params", arguments.params, "--out", out]
        started = time.monotonic()
        subprocess.run([sys.executable, "-P", "-m", "raresynth.cli", "run", *map(str, command)], check=True)
        print(f"\nwhole flow: {time.monotonic() - started:.0f} s")
        print_table(out)


def print_table(out: Path) -> None:
    """The stages' seconds and peak memory, as run.json has them; loops added up, their largest memory taken."""
    log = json.loads((out / "run.json").read_text())
    print(f"{log['machine']['system']}, {log['machine']['cores']} cores, Python {platform.python_version()}\n")
    print("| stage | tasks | seconds, added up | peak memory of a task, MB |\n|---|---|---|---|")
    for name in STAGES:
        entries = [entry for task, entry in log["stages"].items() if task.split("/")[0] == name]
        if not entries:
            continue
        seconds, memory = sum(e["seconds"] for e in entries), max(e["peak_memory_mb"] for e in entries)
        print(f"| {name} | {len(entries)} | {seconds:.1f} | {memory:,.0f} |")


if __name__ == "__main__":
    main()
