"""Going down: rolling restarts of real processes under load."""

import io
import json
import random
import shutil
import signal
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from ports import free_port
from serving_images import encoded
from serving_process import Served, environment, start, wait_until_ready

from raresynth.bundle.contents import open_bundle, write_bundle_json
from raresynth.bundle.predictor import Predictor
from raresynth.dataset.images import decode_image
from raresynth.lineage import sha256_file

LINGER_S = 2
PROPAGATION_S = 1.0
"""Time from a pod's end until nobody is sent to it any more; a cluster's may be longer, and so is its linger_s."""
SETTINGS = {"linger_s": LINGER_S, "requests_per_minute": 1e6, "burst": 100_000}
IMAGE = {"image": ("a.jpg", encoded(seed=7))}


@dataclass
class Cluster:
    """What a Deployment and a Service do, with processes as pods."""

    folder: Path
    endpoints: list[str] = field(default_factory=list)
    pods: list[Served] = field(default_factory=list)

    def start(self, bundle: Path, **settings: object) -> Served:
        """Start a pod; it is sent to once it is ready."""
        number = len(self.pods)
        pinned = {"bundle": bundle, "bundle_sha256": sha256_file(bundle / "bundle.json")}
        own = {"port": free_port(), "work_dir": self.folder / f"work{number}"}
        variables = environment(**SETTINGS | pinned | own | settings) | {"BENTOML_CONTAINERIZED": "true"}
        pod = start(self.folder / f"log{number}", variables)
        self.pods.append(pod)
        wait_until_ready(pod)
        self.endpoints = [*self.endpoints, pod.url]
        return pod

    def stop(self, pod: Served) -> None:
        """End a pod: it gets SIGTERM at once, and those who send to it know later."""
        pod.process.send_signal(signal.SIGTERM)
        time.sleep(PROPAGATION_S)
        self.endpoints = [url for url in self.endpoints if url != pod.url]
        assert pod.process.wait(30) == 0, pod.log.read_text()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    try:
        yield cluster
    finally:
        left = [pod.process for pod in cluster.pods if pod.process.poll() is None]
        for process in left:
            process.send_signal(signal.SIGTERM)
        for process in left:
            process.wait(30)


@pytest.fixture(scope="module")
def other_bundle(accepted_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose probabilities are others."""
    folder = tmp_path_factory.mktemp("other") / "bundle"
    shutil.copytree(accepted_bundle, folder)
    bundle = open_bundle(folder)
    classifier = bundle.classifier.model_copy(update={"temperature": 0.05 * bundle.classifier.temperature})
    write_bundle_json(folder, bundle.model_copy(update={"classifier": classifier}))
    return folder


Ask = Callable[[httpx.Client], httpx.Response]


def predict(connection: httpx.Client) -> httpx.Response:
    return connection.post("/predict", files=IMAGE)


def generate(connection: httpx.Client) -> httpx.Response:
    return connection.post("/generate", json={"label": "vascular", "n": 40})


def keep_asking(cluster: Cluster, stop: threading.Event, ask: Ask, pause_s: float, keep: bool) -> list[httpx.Response]:
    """One client: a new connection goes to any pod that is listed then, and lasts for as long as both sides keep it."""
    answers = []
    while not stop.is_set():
        with httpx.Client(base_url=random.choice(cluster.endpoints), timeout=30) as connection:
            again = True
            while again and not stop.is_set():
                answers.append(ask(connection))
                again = keep and answers[-1].headers.get("connection") != "close"
                time.sleep(pause_s)
    return answers


@contextmanager
def load(cluster: Cluster) -> Iterator[list[Future[list[httpx.Response]]]]:
    """Clients that ask until the block ends: eager and leisurely ones, and one with a connection a request."""
    kinds = [(predict, 0.0, True), (predict, 0.02, True), (predict, 0.3, True), (predict, 0.7, True)]
    kinds += [(predict, 0.02, False), (generate, 0.05, True), (generate, 0.05, True)]
    stop = threading.Event()
    with ThreadPoolExecutor(len(kinds)) as pool:
        try:
            yield [pool.submit(keep_asking, cluster, stop, *kind) for kind in kinds]
        finally:
            stop.set()


def version(answer: httpx.Response) -> str:
    """SHA-256 of the bundle that answered."""
    if answer.headers["content-type"] == "application/json":
        return str(answer.json()["versions"]["bundle"])
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        return str(json.loads(archive.read("manifest.json"))["bundle"])


@pytest.mark.slow
def test_pods_are_replaced_by_those_of_another_bundle_and_no_request_is_lost(
    cluster: Cluster, accepted_bundle: Path, other_bundle: Path
) -> None:
    expected = {}
    for bundle in (accepted_bundle, other_bundle):
        predictor = Predictor(bundle)
        pixels = decode_image(IMAGE["image"][1], predictor.bundle.classifier.resolution)[None]
        probabilities = predictor.predict(pixels).probabilities[0]
        expected[sha256_file(bundle / "bundle.json")] = dict(zip(predictor.bundle.labels, probabilities, strict=True))
    old, new = expected
    assert max(abs(expected[old][label] - expected[new][label]) for label in expected[old]) > 0.01
    pods = [cluster.start(accepted_bundle) for _ in range(2)]
    with load(cluster) as clients:
        time.sleep(1)
        with pytest.raises(AssertionError, match=r"cannot serve: .* is another bundle than the one to be served"):
            cluster.start(other_bundle, bundle_sha256="0" * 64)
        assert cluster.pods[-1].process.returncode == 2
        for pod in pods:
            cluster.start(other_bundle)
            cluster.stop(pod)
        time.sleep(1)
    answers = [answer for client in clients for answer in client.result()]
    assert {answer.status_code for answer in answers} == {200}
    for client in clients:
        versions = [version(answer) for answer in client.result()]
        assert versions[0] == old and versions[-1] == new
    for answer in answers:
        if answer.request.url.path == "/predict":
            assert answer.json()["probabilities"] == pytest.approx(expected[version(answer)], abs=1e-4)


def begin_upload(pod: Served, content_length: int, boundary: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", pod.port), timeout=20)
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {content_length}\r\n"
    connection.sendall(f"{head}Content-Type: multipart/form-data; boundary={boundary}\r\n\r\n".encode())
    return connection


@pytest.mark.slow
def test_what_is_under_way_ends_and_nothing_new_is_promised(cluster: Cluster, accepted_bundle: Path) -> None:
    linger_s = 4  # time enough to ask, on a busy machine too
    pod = cluster.start(accepted_bundle, drain_s=30, linger_s=linger_s)
    body = httpx.Request(
        "POST", pod.url, files=IMAGE, headers={"Content-Type": "multipart/form-data; boundary=x"}
    ).read()
    upload = begin_upload(pod, len(body), "x")
    upload.sendall(body[:100])
    with httpx.Client(base_url=pod.url) as connection:
        batch = {"label": "vascular", "n": 10_000}
        assert connection.post("/generate_batch/submit", json=batch).status_code == 200
        pod.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        while connection.get("/readyz").status_code == 200:
            assert time.monotonic() < began + linger_s
        refused = connection.post("/generate_batch/submit", json=batch)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        assert connection.get("/livez").status_code == 200
        answered = predict(connection)
        assert (answered.status_code, answered.headers["connection"]) == (200, "close")
        assert time.monotonic() < began + linger_s
    time.sleep(began + linger_s + 1 - time.monotonic())
    upload.sendall(body[100:])
    answer = upload.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 200 ") and b"connection: close" in answer.lower()
    # The batch was dropped at once: it holds nothing up, and nothing is left of it.
    assert pod.process.wait(5) == 0, pod.log.read_text()
    assert not list(pod.log.parent.glob("work0/generated/*"))
    assert "Traceback" not in pod.log.read_text()


def test_a_pod_that_is_still_starting_goes_at_once(accepted_bundle: Path, tmp_path: Path) -> None:
    pod = start(tmp_path / "log", environment(bundle=accepted_bundle, port=free_port(), **SETTINGS))
    try:
        while "raresynth at http" not in pod.log.read_text():
            assert pod.process.poll() is None, pod.log.read_text()
            time.sleep(0.01)
        pod.process.send_signal(signal.SIGTERM)
        assert pod.process.wait(20) == 0
    finally:
        pod.process.kill()
