"""Processes that a process spawned to share its work."""

import psutil


def workers_of(pid: int) -> list[psutil.Process]:
    """Those of a pool that are there now."""
    return [child for child in psutil.Process(pid).children() if _is_worker(child)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any("spawn_main" in word for word in process.cmdline())
    except psutil.NoSuchProcess:  # it ended meanwhile
        return False
