"""What Prometheus can ask: names begin with raresynth_, and no label takes a value from a request unchecked."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from prometheus_client import Counter, Gauge, Histogram

_FIGURES_BYTES = 1 << 20
"""Of each of the worker's files: several times what all series take."""
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
TENTHS = tuple(round(0.1 * step, 1) for step in range(1, 11))
LATEST: Literal["mostrecent"] = "mostrecent"
"""Of a worker that died and the one that came after it, the newer one's value."""

requests = Counter("raresynth_requests", "Requests by path (`other` for unknown ones) and status", ["path", "status"])
request_seconds = Histogram("raresynth_request_seconds", "Time from request to answer", ["path"], buckets=SECONDS)
predictions = Counter("raresynth_predictions", "Predicted images by label", ["label"])
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
rejected = Counter("raresynth_rejected", "Refused requests and images, by error code", ["reason"])
step_seconds = Histogram(
    "raresynth_inference_seconds", "Time of a step: decode, preprocess, model, encode", ["step"], buckets=SECONDS
)
batch_size = Histogram("raresynth_batch_size", "Images of one run of the classifier", buckets=SIZES)
waiting = Gauge("raresynth_queue_images", "Images that wait for the classifier", multiprocess_mode=LATEST)
in_flight = Gauge("raresynth_requests_in_flight", "Requests being answered", multiprocess_mode=LATEST)
model_info = Gauge(
    "raresynth_model_info",
    "1, with the versions of what is served",
    ["bundle", "data_version", "classifier", "arm", "generators", "version"],
    multiprocess_mode=LATEST,
)


def hold_space() -> None:
    """Have the disk set room aside for the worker's figures, which lie in mapped files: on a full disk, a page that
    is new to such a file would kill the process.
    """
    folder, process = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]), os.getpid()
    later = {folder / f"{kind}_{process}.db" for kind in ("gauge_livesum", "gauge_all")}  # BentoML's own
    for path in later.union(folder.glob(f"*_{process}.db")):
        with path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, _FIGURES_BYTES)


@contextmanager
def timed(step: str) -> Iterator[None]:
    """Measure a step of the inference."""
    began = time.perf_counter()
    try:
        yield
    finally:
        step_seconds.labels(step).observe(time.perf_counter() - began)
