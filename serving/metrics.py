"""What Prometheus can ask: names begin with raresynth_, and no label takes a value from a request unchecked."""

import asyncio
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from prometheus_client import Counter, Gauge, Histogram, ProcessCollector

from raresynth import __version__
from serving.errors import CODES, ApiError
from serving.routes import ROUTES
from serving.settings import Settings

_FIGURES_BYTES = 1 << 20
"""Of each of the worker's files: several times what all series take."""
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
TENTHS = tuple(round(0.1 * step, 1) for step in range(1, 11))
LATEST: Literal["mostrecent"] = "mostrecent"
"""Of a worker that died and the one that came after it, the newer one's value."""

requests = Counter("raresynth_requests", "Requests by path (`other` for unknown ones) and status", ["path", "status"])
request_seconds = Histogram(
    "raresynth_request_seconds",
    "Time from a request's last byte to its answer's first: a slow client does not count",
    ["path"],
    buckets=SECONDS,
)
predictions = Counter("raresynth_predictions", "Predicted images by label", ["label"])
last_prediction = Gauge(
    "raresynth_last_prediction_timestamp_seconds", "When the newest image was predicted", multiprocess_mode=LATEST
)
confidence = Histogram("raresynth_prediction_confidence", "Highest probability of an image", buckets=TENTHS)
outliers = Counter("raresynth_out_of_distribution", "Predicted images that were flagged as out of distribution")
outlier_share = Gauge(
    "raresynth_out_of_distribution_share", "Flagged share of the newest predictions", multiprocess_mode=LATEST
)
drift = Gauge(
    "raresynth_drift",
    "Population stability index of the newest images' statistics and labels against the training data's",
    ["of"],
    multiprocess_mode=LATEST,
)
generated = Counter("raresynth_generated_images", "Synthetic images by label", ["label"])
tasks = Counter(
    "raresynth_tasks", "Batches of synthetic images that ended: `completed`, `dropped` or an error code", ["result"]
)
tasks_in_flight = Gauge("raresynth_tasks_in_flight", "Batches that run or wait", multiprocess_mode=LATEST)
tasks_limit = Gauge("raresynth_tasks_limit", "Batches that may run or wait", multiprocess_mode=LATEST)
rejected = Counter("raresynth_rejected", "Refused requests and images, by error code", ["reason"])
step_seconds = Histogram(
    "raresynth_inference_seconds",
    "Time of a step: decode, preprocess, model, encode, generate",
    ["step"],
    buckets=SECONDS,
)
batch_size = Histogram("raresynth_batch_size", "Images of one run of the classifier", buckets=SIZES)
waiting = Gauge("raresynth_queue_images", "Images that wait for the classifier", multiprocess_mode=LATEST)
waiting_limit = Gauge("raresynth_queue_images_limit", "Images that may wait", multiprocess_mode=LATEST)
in_flight = Gauge("raresynth_requests_in_flight", "Requests being answered", multiprocess_mode=LATEST)
in_flight_limit = Gauge("raresynth_requests_limit", "Requests that may be answered at once", multiprocess_mode=LATEST)
model_info = Gauge(
    "raresynth_model_info",
    "1, with the versions of what is served",
    ["bundle", "data_version", "classifier", "arm", "generators", "version"],
    multiprocess_mode=LATEST,
)
build_info = Gauge(
    "raresynth_build_info",
    "1, with the versions of what serves",
    ["version", "python", "bentoml", "onnxruntime"],
    multiprocess_mode=LATEST,
)
started = Gauge("raresynth_worker_start_time_seconds", "When the worker started", multiprocess_mode=LATEST)
resident = Gauge("raresynth_worker_resident_bytes", "Memory of the worker", multiprocess_mode=LATEST)
cpu_seconds = Counter("raresynth_worker_cpu_seconds", "Processor time of the worker")
"""In several-process mode, which BentoML sets, the client library's own process_* metrics are off."""


class Worker:
    """The process that answers, as it is seen from outside.

    Series are there from the start, at 0: Prometheus takes a counter that appears with its first failure for one that
    never rose, and a gauge may else still show what a worker left that died.
    """

    def __init__(self, settings: Settings) -> None:
        self._cpu_s = 0.0
        started.set_to_current_time()
        packages = {name: version(name) for name in ("bentoml", "onnxruntime")}
        build_info.labels(version=__version__, python=platform.python_version(), **packages).set(1)
        in_flight_limit.set(settings.max_requests)
        waiting_limit.set(settings.max_waiting)
        tasks_limit.set(settings.max_tasks)
        for gauge in (in_flight, waiting, tasks_in_flight):
            gauge.set(0)
        _create_series()

    def tell_use(self) -> None:
        """Bring memory and processor time up to date, for whoever reads them now."""
        used_s = time.process_time()
        cpu_seconds.inc(used_s - self._cpu_s)
        self._cpu_s = used_s
        for family in ProcessCollector(registry=None).collect():  # empty where there is no /proc
            if family.name == "process_resident_memory_bytes":
                resident.set(family.samples[0].value)


def _create_series() -> None:
    failures = [code for code, (status, _) in CODES.items() if status >= 500]
    statuses = {"200", *(str(status) for status, _ in CODES.values() if status == 429 or status >= 500)}
    for path in {route.path for route in ROUTES}:
        request_seconds.labels(path)
        for status in statuses:
            requests.labels(path, status)
    for code in CODES:
        rejected.labels(code)
    for result in ("completed", *failures):
        tasks.labels(result)
    for step in ("decode", "preprocess", "model", "encode", "generate"):
        step_seconds.labels(step)


def hold_space() -> None:
    """Have the disk set room aside for the worker's figures, which lie in mapped files: on a full disk, a page that
    is new to such a file would kill the process.
    """
    folder, process = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]), os.getpid()
    later = {folder / f"{kind}_{process}.db" for kind in ("gauge_livesum", "gauge_all")}  # BentoML's own
    for path in later.union(folder.glob(f"*_{process}.db")):
        with path.open("ab") as file:
            if sys.platform != "darwin":  # which has no such call
                os.posix_fallocate(file.fileno(), 0, _FIGURES_BYTES)


@contextmanager
def timed(step: str) -> Iterator[None]:
    """Measure a step of the inference."""
    began = time.perf_counter()
    try:
        yield
    finally:
        step_seconds.labels(step).observe(time.perf_counter() - began)


@contextmanager
def task_counted() -> Iterator[None]:
    """Count how a task ends."""
    result = "completed"
    try:
        yield
    except asyncio.CancelledError:
        result = "dropped"
        raise
    except ApiError as error:
        result = error.code
        raise
    except Exception:
        result = "internal"
        raise
    finally:
        tasks.labels(result).inc()
