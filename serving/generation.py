"""Archives of synthetic images: small ones as an answer, large ones as a file that a task leaves."""

import asyncio
import hashlib
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from raresynth.bundle.sampler import Sampler
from serving import metrics
from serving.answers import BatchResult
from serving.archives import Order as Drawing
from serving.archives import draw, pieces, write_archive
from serving.errors import ApiError
from serving.models import Models
from serving.requests import Order
from serving.settings import Settings
from serving.threads import Threads

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
RETRY_S = 60.0


class Dropped(Exception):
    """Nobody waits for the batch any more."""


class _Batch(threading.Event):
    """A batch that may be dropped; knows when its thread last asked whether it was, as it does every few images."""

    _asked = math.inf

    def is_set(self) -> bool:
        self._asked = time.monotonic()
        return super().is_set()

    def still_s(self) -> float:
        return time.monotonic() - self._asked


class Generation:
    """Draws images with the bundle's generators."""

    def __init__(self, models: Models, settings: Settings, results_dir: Path) -> None:
        self._models, self._settings, self._results_dir = models, settings, results_dir
        # Threads of their own: predictions never queue behind an archive, nor small archives behind a large one. What
        # is drawn is put together by others, for it would come after the pieces that are drawn for the next archive.
        self._threads, self._writers = Threads(settings.threads, "generate"), Threads(settings.threads, "archive")
        self._archives = asyncio.Semaphore(settings.threads)  # no more lie in memory
        self._task_thread = ThreadPoolExecutor(1, "generate_batch")
        self._finished = self._left_by_another_worker()
        self._tasks: set[_Batch] = set()
        lineage = models.bundle.lineage
        self._lineage = {"bundle": models.version, "data_version": lineage.data_md5, "commit": lineage.commit}

    async def archive(self, order: Order) -> bytes:
        """The archive of a small order; the work stops when nobody waits for it any more.

        Raises:
            ApiError: the label has no accepted generator.
        """
        sampler, drawing = self._prepare(order)
        out = BytesIO()
        async with self._archives:
            with metrics.timed("generate"):
                images = await self._draw(sampler, drawing)
                await _in_thread(self._writers, write_archive, out, sampler, drawing, images, self._lineage)
        metrics.generated.labels(drawing.label).inc(drawing.n)
        return out.getvalue()

    async def _draw(self, sampler: Sampler, drawing: Drawing) -> list[bytes]:
        """All images, on all cores, though no more pieces at once than there are: others' come in between."""
        turns = asyncio.Semaphore(self._settings.threads)

        async def drawn(piece: range) -> list[bytes]:
            async with turns:
                return await _in_thread(self._threads, draw, sampler, drawing, piece)

        found = await asyncio.gather(*map(drawn, pieces(drawing.n, self._settings.threads)))
        return list(chain.from_iterable(found))

    def check(self, order: Order) -> None:
        """Whether a batch may be begun.

        Raises:
            ApiError: the label has no accepted generator, or too many batches run or wait.
        """
        self._models.sampler(order.label)
        self._check_room(RETRY_S)

    async def batch(self, order: Order) -> BatchResult:
        """Leave the archive of a large order as a file.

        Raises:
            ApiError: the label has no accepted generator, too many batches wait, or the disk is full.
        """
        with metrics.task_counted():
            return await self._batch(order)

    async def _batch(self, order: Order) -> BatchResult:
        sampler, drawing = self._prepare(order)
        self._check_room(None)  # again, for others may have been begun since `check`
        dropped = _Batch()
        self._tasks.add(dropped)
        metrics.tasks_in_flight.set(len(self._tasks))
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._task_thread, self._as_file, sampler, drawing, dropped
            )
        except OSError as error:
            raise ApiError(
                "no_space", "the service cannot write the archive; ask for less, or tell its admin"
            ) from error
        except Dropped:
            raise ApiError("overloaded", "the service was going down; submit it again") from None
        finally:
            self._tasks.discard(dropped)
            metrics.tasks_in_flight.set(len(self._tasks))

    def _check_room(self, retry_after_s: float | None) -> None:
        """No time is told where the answer is kept as a task's: it stays the same."""
        if len(self._tasks) >= self._settings.max_tasks:
            raise ApiError("overloaded", "too many batches run or wait already; submit it again", retry_after_s)

    def oldest_s(self) -> float:
        """How long the oldest piece of an archive has been under way or a batch has made no image, in seconds."""
        pools = (self._threads.oldest_s(), self._writers.oldest_s())
        return max(*pools, *(batch.still_s() for batch in set(self._tasks)))

    def stop(self) -> None:
        """Drop all batches that run or wait."""
        for dropped in set(self._tasks):
            dropped.set()

    def _prepare(self, order: Order) -> tuple[Sampler, Drawing]:
        sampler = self._models.sampler(order.label)
        truncation = sampler.generator.truncation if order.truncation is None else order.truncation
        return sampler, Drawing(**{**order.model_dump(), "truncation": truncation})

    def _as_file(self, sampler: Sampler, drawing: Drawing, dropped: threading.Event) -> BatchResult:
        name = f"{uuid.uuid4().hex}.zip"
        unfinished = self._results_dir / f".{name}"
        try:
            with unfinished.open("wb") as out, metrics.timed("generate"):
                write_archive(out, sampler, drawing, _one_by_one(sampler, drawing, dropped), self._lineage)
            with unfinished.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = unfinished.stat().st_size
            unfinished.replace(self._results_dir / name)
        finally:
            unfinished.unlink(missing_ok=True)
        metrics.generated.labels(drawing.label).inc(drawing.n)
        self._finished.append(self._results_dir / name)
        self._forget_oldest()
        return BatchResult(path=f"/generated/{name}", sha256=digest, n_bytes=size, n=drawing.n, label=drawing.label)

    def _left_by_another_worker(self) -> deque[Path]:
        """Finished archives, the oldest first; what is unfinished is deleted."""
        for unfinished in self._results_dir.glob(".*.zip"):
            unfinished.unlink()
        return deque(sorted(self._results_dir.glob("[!.]*.zip"), key=lambda path: path.stat().st_mtime_ns))

    def _forget_oldest(self) -> None:
        """By the order in which they were finished: the clock that dates files may jump."""
        while len(self._finished) > self._settings.kept_results:
            self._finished.popleft().unlink(missing_ok=True)


def _one_by_one(sampler: Sampler, drawing: Drawing, dropped: threading.Event) -> Iterator[bytes]:
    for piece in pieces(drawing.n, threads=1):
        if dropped.is_set():
            raise Dropped
        yield from draw(sampler, drawing, piece)


async def _in_thread(threads: Threads, work: Callable[[*Ts], T], *args: *Ts) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, work, *args)
