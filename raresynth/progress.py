"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

LINE_INTERVAL_S = 5.0
_lines_only: ContextVar[bool] = ContextVar("lines_only", default=False)


class Advance(Protocol):
    """Report `n` more units done; `note` is shown beside them."""

    def __call__(self, n: int = 1, note: str = "") -> None: ...


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


@contextmanager
def progress(description: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
    """Show how far `total` units of work are, their rate and the time left.

    Args:
        description: what is being done, such as "finetune df".
        total: units of work altogether.
        unit: plural name of a unit, such as "images".
        done: units finished before this process started; they do not count towards the rate.
    """
    if sys.stderr.isatty() and not _lines_only.get():
        with _bar(description, total, unit, done) as advance:
            yield advance
    else:
        yield _lines(description, total, unit, done)


@contextmanager
def lines_only(wanted: bool) -> Iterator[None]:
    """Lines on a terminal too, within the block: several tasks at once would draw their bars over each other."""
    token = _lines_only.set(wanted)
    try:
        yield
    finally:
        _lines_only.reset(token)


def _lines(description: str, total: int, unit: str, done: int) -> Advance:
    start = last = time.monotonic()
    first = done

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last < LINE_INTERVAL_S and done < total:
            return
        last = now
        rate = (done - first) / max(now - start, 1e-9)
        left = (total - done) / max(rate, 1e-9)
        text = f"{description}: {done}/{total} {unit}, {rate:.1f} {unit}/s, {_duration(left)} left"
        print(f"{text}, {note}" if note else text, file=sys.stderr, flush=True)

    return advance


@contextmanager
def _bar(description: str, total: int, unit: str, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + ", {task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    start, first = time.monotonic(), done
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, completed=done, rate="", note="")

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal done
            done += n
            rate = (done - first) / max(time.monotonic() - start, 1e-9)
            bar.update(task, advance=n, rate=f"{rate:.1f} {unit}/s", note=note)

        yield advance
