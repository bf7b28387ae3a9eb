import os
import subprocess
import sys

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
