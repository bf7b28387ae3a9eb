"""Compile the packages for a cluster: `python -m pipelines.compile --params params.yaml --out pipelines/compiled`."""

import argparse
import sys
from pathlib import Path

from kfp import compiler

from pipelines import augmentation, synthesis
from pipelines.placement import on_cluster
from raresynth.config import load_params_file
from raresynth.errors import ParamsError


def compile_packages(params: Path, out: Path) -> list[Path]:
    """Write augmentation-cpu.yaml, augmentation-gpu.yaml and synthesis.yaml, which needs no GPU.

    Args:
        params: params file whose sections `cluster` and `compute` say where and how many tasks run at once.

    Raises:
        ParamsError: the file is missing or holds an impossible knob.
    """
    settings = load_params_file(params)
    cpu, gpu = on_cluster(settings, gpu=False), on_cluster(settings, gpu=True)
    packages = {
        out / "augmentation-cpu.yaml": augmentation.build(settings.compute, cpu),
        out / "augmentation-gpu.yaml": augmentation.build(settings.compute, gpu),
        out / "synthesis.yaml": synthesis.build(settings.compute.parallel_tasks, cpu),
    }
    out.mkdir(parents=True, exist_ok=True)
    for path, pipeline in packages.items():
        compiler.Compiler().compile(pipeline, str(path))
    return list(packages)


def main() -> int:
    """Compile; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.compile", description="compile the KFP packages")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--out", type=Path, default=Path("pipelines/compiled"))
    arguments = parser.parse_args()
    try:
        packages = compile_packages(arguments.params, arguments.out)
    except ParamsError as error:
        print(f"raresynth: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, packages)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
