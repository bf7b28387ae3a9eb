"""Optimizer state as plain named tensors, so that training resumes exactly and no pickle is needed."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer


def flatten_optimizer(prefix: str, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors named `<prefix>.<parameter index>.<entry>`."""
    return {
        f"{prefix}.{index}.{name}": torch.as_tensor(value)
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def restore_optimizer(prefix: str, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors made by `flatten_optimizer` back into an optimizer over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix + "."):
            index, name = key.removeprefix(prefix + ".").split(".", 1)
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
