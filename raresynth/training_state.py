"""A training's state on disk: plain named tensors, so that it resumes exactly and no pickle is needed.

A kill at any moment loses at most the work since the last state: a new state is complete before the older one goes,
and the result is complete before the states go.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from raresynth.errors import CheckpointError
from raresynth.lineage import Report, clear_unfinished, load_checkpoint, save_checkpoint, write_report


def save_state(out_dir: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Keep the state after `step` steps in `out_dir`/state, and drop the older ones.

    Args:
        meta: JSON values; `meta["run"]` says which training this is.
    """
    states = out_dir / "state"
    newest = states / f"{step:09d}"
    save_checkpoint(newest, tensors, {**meta, "step": step})
    for older in states.iterdir():
        if older != newest:
            shutil.rmtree(older)


def load_state(out_dir: Path, run: Any, device: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest complete state of this very training, if there is one."""
    for folder in sorted((out_dir / "state").glob("[0-9]*"), reverse=True):
        try:
            tensors, meta = load_checkpoint(folder, device)
        except CheckpointError:
            continue
        if meta["run"] == run:
            return tensors, meta
    return None


def save_weights(out_dir: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    """Put the trained weights and meta.json beside the states; returns the weights' SHA-256."""
    finished = out_dir / "finished"
    digest = save_checkpoint(finished, tensors, meta)
    for file in sorted(finished.iterdir()):
        file.replace(out_dir / file.name)
    finished.rmdir()
    return digest


def finish(out_dir: Path, report: Report) -> None:
    """Write report.json, and clear away the states and what killed processes left half-written."""
    write_report(out_dir / "report.json", report)
    shutil.rmtree(out_dir / "state", ignore_errors=True)
    clear_unfinished(out_dir)


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors named `<prefix>.<key>`, by key."""
    return {key.removeprefix(f"{prefix}."): t for key, t in tensors.items() if key.startswith(f"{prefix}.")}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by `<prefix>.<key>`."""
    return {f"{prefix}.{key}": t for key, t in tensors.items()}


def flatten_optimizer(prefix: str, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors named `<prefix>.<parameter index>.<entry>`."""
    return {
        f"{prefix}.{index}.{name}": torch.as_tensor(value)
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def restore_optimizer(prefix: str, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors made by `flatten_optimizer` back into an optimizer over the same parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in part(tensors, prefix).items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        # Fused optimizers walk through memory: moments must lie there in the order of their parameter.
        laid = torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor
        state.setdefault(int(index), {})[name] = laid.detach()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
