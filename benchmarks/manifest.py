"""How fast `build-manifest` reads images, and how much memory 100,000 of them take.

    python -m benchmarks.manifest [HAM10000_FOLDER]

Throughput is that of the whole stage on HAM10000 (../shared/ham10000 unless named), the best of three runs in a new
process each, so that the files come from the system's cache. Memory is the peak resident set of a process that builds
the manifest of 100,000 image files, the import of all libraries included.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HAM10000 = Path(__file__).parents[1].parent / "shared" / "ham10000"
ROWS = 100_000
DISTINCT = 100
"""Different files among the rows; the others are hard links to them, since reading is what counts."""

STAGE = """
import json, resource, sys, time
from pathlib import Path
from raresynth.config import DatasetConfig
from raresynth.dataset.importers import build_manifest
start = time.perf_counter()
report = build_manifest(Path(sys.argv[1]), Path(sys.argv[2]), DatasetConfig(), seed=0)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"rows": report.n_rows, "seconds": seconds, "peak_mb": peak / 1024}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ham10000", type=Path, nargs="?", default=HAM10000)
    ham10000 = parser.parse_args().ham10000
    print(f"machine: {machine()}")
    if ham10000.is_dir():
        best = min((build(ham10000) for _ in range(3)), key=lambda result: result["seconds"])
        print(f"throughput: {best['rows'] / best['seconds']:,.0f} images/s ({best['rows']:,} images, {ham10000.name})")
    else:
        print(f"throughput: not measured, there is no {ham10000}")
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder))
        result = build(Path(folder))
    print(f"memory: {result['peak_mb']:,.0f} MB at the peak ({result['rows']:,} rows in {result['seconds']:.1f} s)")


def machine() -> str:
    names = (line.split(":")[1].strip() for line in cpu_info() if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {os.cpu_count()} cores, Python {platform.python_version()}"


def cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def build(data_dir: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", STAGE, str(data_dir), str(Path(folder) / "manifest")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout)


def make_images(folder: Path) -> None:
    """ROWS small JPEG files in folders of ten classes."""
    rng = np.random.default_rng(0)
    originals = []
    for index in range(ROWS):
        path = folder / f"class-{index % 10}" / f"{index:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        if index < DISTINCT:
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
            originals.append(path)
        else:
            path.hardlink_to(originals[index % DISTINCT])


if __name__ == "__main__":
    main()
