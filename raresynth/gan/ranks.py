"""One training in several processes, its ranks: torchrun starts them, torch.distributed joins them.

    torchrun --standalone --nproc-per-node 4 -m raresynth.cli pretrain --out runs/big

trains on four GPUs of a machine, as does `compute.ranks: 4` without torchrun. On several machines or pods each runs

    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-id big --rdzv-endpoint HOST:29400 \
        -m raresynth.cli pretrain --data DATA --params PARAMS --out SHARED

with HOST the first machine and SHARED a folder that all of them see. Kubeflow's TrainJob and PyTorchJob give their pods
what stands before -m as variables (PET_NNODES, PET_MASTER_ADDR and so on), which torchrun reads.

Each rank takes its part of every batch: what is trained is what one process would train, but for rounding. A rank that
dies ends all, and the same command goes on from the last checkpoint, with as many ranks as it likes.
"""

import logging
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raresynth.errors import ParamsError, RaresynthError, describe
from raresynth.processes import end_with, rank_and_world

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

PATIENCE = timedelta(hours=12)
"""What rank 0 does alone, such as reading a large image set, is not to be taken for its death."""
GRACE_S = 3.0
"""A rank that is cut off by the end of another leaves it so much time to be noticed first."""
_REPEATING = ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn")
"""Loggers that print the traceback that is in the error that is raised."""

Value = TypeVar("Value")
Argument = TypeVar("Argument")


@dataclass(frozen=True)
class Ranks:
    """One process among those of a training. All ranks call the same methods in the same order."""

    rank: int
    world: int
    """How many they are."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that scores, writes and reports."""
        return self.rank == 0

    def own(self, batch: Tensor, axis: int = 0) -> Tensor:
        """The rank's part of what is the same in all of them; the parts are equal and contiguous."""
        return batch.chunk(self.world, axis)[self.rank]

    def total(self, values: Tensor) -> Tensor:
        """Sum over ranks, the same bits in all of them."""
        if self.world == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks, the same bits in all of them."""
        return self.total(values) / self.world

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give each parameter the mean over ranks of its gradient, so that all ranks take the same step.

        Once a step, after the backward pass: DistributedDataParallel would have to search each pass for parameters that
        it leaves out, as the class signal's are at first, and be bypassed where the generator learns.
        """
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        means = self.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = torch.split(means, [gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, parts, strict=True):
            gradient.copy_(mean.view_as(gradient))

    def by_first(self, make: Callable[[], Value]) -> Value:
        """What rank 0 makes, in all ranks; they wait for it."""
        if self.world == 1:
            return make()
        made = [make() if self.is_first else None]
        dist.broadcast_object_list(made, src=0, device=torch.device("cpu"))
        return made[0]  # type: ignore[return-value]

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """A block that the other ranks enter when rank 0 has left it."""
        if not self.is_first:
            self._meet()
        yield
        if self.is_first:
            self._meet()

    def _meet(self) -> None:
        self.by_first(lambda: None)


ALONE = Ranks(0, 1)
"""A training in one process, which pays nothing for all this."""


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started together with this one; without torchrun it is alone.

    Args:
        device: "cpu", or "cuda", which within the block is this rank's own.

    Raises:
        ParamsError: there are more ranks on this machine than GPUs.
    """
    rank, world = rank_and_world()
    if world == 1:
        yield ALONE
        return
    if dist.is_torchelastic_launched():
        end_with(os.getppid())
    if device == "cuda":
        _take_gpu()
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    yield Ranks(rank, world)
    # Not after an error: the process ends then, and the others must not be waited for.
    dist.destroy_process_group()


def _take_gpu() -> None:
    local, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= visible:
        raise ParamsError(f"there are more ranks on this machine than its GPUs ({visible}); start one a GPU")
    torch.cuda.set_device(local)


def launch(n: int, function: Callable[[Argument], Value], argument: Argument) -> Value:
    """Call a module's function as `n` ranks in new processes of this machine, by torchrun's engine.

    Returns:
        what it returned in rank 0.

    Raises:
        RaresynthError: a rank raised one, or was killed; the others have been ended.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in _REPEATING:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # What ranks leave that are cut off is cleaned up by a process of Python's, which would warn of it.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle="SIGTERM",  # Ctrl-C is said by the command line
    )
    try:
        results: dict[int, Value] = elastic_launch(config, _as_rank)(function, argument)
    except ChildFailedError as failed:
        sentence = _sentence(*failed.get_first_failure())
        if sentence is None:
            raise
        raise RaresynthError(sentence) from failed
    return results[0]


def _as_rank(function: Callable[[Argument], Value], argument: Argument) -> Value:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # sent by Ctrl-C or, through torch, by the parent's end: no last words
    try:
        return function(argument)
    except (RaresynthError, OSError) as error:
        raise RaresynthError(describe(error)) from error
    except RuntimeError:  # of torch.distributed, where another rank has gone
        time.sleep(GRACE_S)
        raise


def _sentence(rank: int, failure: "ProcessFailure") -> str | None:
    """What a user can cure about a rank that ended, or None where its traceback must be seen."""
    if failure.exitcode < 0:
        return f"rank {rank} was ended by {failure.signal_name()}, and the others with it; start the same command again"
    said = failure.error_file_data["message"]  # a dictionary where an exception was, with "<type>: <its words>" in it
    kind, _, words = said["message"].partition(": ") if isinstance(said, dict) else ("", "", "")
    return words if kind == RaresynthError.__name__ else None
