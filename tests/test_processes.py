import os
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
from workers import workers_of

from raresynth.processes import in_processes

THREADS = """
{before}
from raresynth.processes import limit_threads
limit_threads(1)
import numpy, scipy.linalg, torch
from threadpoolctl import threadpool_info
print(torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info()))
"""


def test_threads_are_limited_whoever_loaded_what_first() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for before in ("", "import numpy, scipy.linalg", "import torch"):
        script = [sys.executable, "-c", THREADS.format(before=before)]
        done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == {"1"}, before


def square_root(n: int) -> tuple[float, int]:
    if n < 0:
        raise ValueError(f"{n} is below 0")
    return n**0.5, os.getpid()


def test_items_go_to_the_processes_in_turn_and_come_back_in_order() -> None:
    roots, processes = zip(*in_processes(square_root, [0, 1, 4, 9, 16, 25], 2), strict=True)
    assert roots == (0, 1, 2, 3, 4, 5)
    assert len(set(processes)) <= 2 and os.getpid() not in processes
    with pytest.raises(ValueError, match="-4 is below 0"):
        in_processes(square_root, [1, -4, 9], 2)


@pytest.mark.parametrize("after_s", [0, 0.001, 0.003, 0.5])
def test_a_process_that_is_killed_while_others_start_ends_the_rest(after_s: float) -> None:
    def kill() -> None:
        while not (workers := workers_of(os.getpid())):
            time.sleep(0.0002)
        time.sleep(after_s)
        workers[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(BrokenProcessPool):
        in_processes(time.sleep, [1, 1, 1, 1], 2)
    killer.join()
    assert not workers_of(os.getpid())
