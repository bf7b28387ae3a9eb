"""What the service does when something breaks: real processes, real files, real sockets."""

import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from serving_images import encoded
from serving_process import ROOT, Served, environment, serving, wait_until_ready

from serving.settings import Settings

LABEL = "vascular"
WHEN_S = 20


def eventually(what: Callable[[], bool], within_s: float = WHEN_S) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.05)
    return False


def predicted(served: Served) -> int:
    return httpx.post(f"{served.url}/predict", files={"image": ("a.jpg", encoded())}, timeout=30).status_code


def figure(served: Served, name: str, **labels: str) -> float:
    text = httpx.get(f"{served.url}/metrics", timeout=30).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())


def in_flight(served: Served) -> float:
    return figure(served, "raresynth_requests_in_flight")


def given_up(served: Served) -> float:
    return figure(served, "raresynth_requests_total", path="/generate", status="499")


def archives(served: Served) -> float:
    return figure(served, "raresynth_requests_total", path="/generate", status="200")


def status(served: Served, path: str) -> int:
    return httpx.get(served.url + path, timeout=30).status_code


def ordered(served: Served, n: int) -> str:
    answer = httpx.post(f"{served.url}/generate_batch/submit", json={"label": LABEL, "n": n}, timeout=30)
    return str(answer.json()["task_id"])


def task(served: Served, task_id: str, what: str = "status") -> httpx.Response:
    return httpx.get(f"{served.url}/generate_batch/{what}", params={"task_id": task_id}, timeout=30)


def head(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: 127.0.0.1", *headers, "", ""]).encode()


def connected(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), timeout=30)


@pytest.fixture(scope="module")
def served(accepted_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service with little patience, few connections and a worker of few open files."""
    folder = tmp_path_factory.mktemp("faults")
    settings = {
        "bundle": accepted_bundle,
        "work_dir": folder / "work",
        "head_timeout_s": 1.5,
        "body_timeout_s": 1.5,
        "timeout_s": 3,
        "max_connections": 40,
        "max_tasks": 1,
        "requests_per_minute": 6000,  # the tests look at the metrics many times a second
    }
    with serving(folder / "log", **settings) as service:
        yield service


# Clients


@pytest.mark.parametrize("sent", [b"", b"GET /model HT", b"GET /model HTTP/1.1\r\nHost: 127.0.0.1\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(served: Served, sent: bytes) -> None:
    with connected(served) as connection:
        began = time.monotonic()
        connection.sendall(sent)
        received = connection.recv(1000)
        assert received == b"" and 1 < time.monotonic() - began < WHEN_S


def test_a_head_that_drips_ends_the_connection_on_one_kept_alive_too(served: Served) -> None:
    with connected(served) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert connection.recv(10_000).startswith(b"HTTP/1.1 200")
        connection.settimeout(0.2)

        def closed() -> bool:
            try:
                connection.sendall(b"\r\n")
                return connection.recv(1000) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        assert eventually(closed)


def test_a_head_without_end_is_refused(served: Served) -> None:
    with connected(served) as connection, pytest.raises(ConnectionError):
        connection.sendall(b"GET /model HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        for _ in range(1000):
            connection.sendall(b"A: b\r\n" * 20_000)
    assert predicted(served) == 200


def test_a_body_that_drips_is_a_408(served: Served) -> None:
    with connected(served) as connection:
        connection.sendall(head("/predict", "Content-Type: multipart/form-data; boundary=x", "Content-Length: 999"))
        began = time.monotonic()
        connection.settimeout(0.2)
        answer = b""
        while not answer and time.monotonic() - began < WHEN_S:
            connection.sendall(b"-")
            try:
                answer = connection.recv(10_000)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408")


def test_many_idle_connections_keep_nobody_out(served: Served) -> None:
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connected(served))
        assert predicted(served) == 200 and status(served, "/readyz") == 200
        assert len(list(Path(f"/proc/{served.worker()}/fd").iterdir())) < 200


def test_work_for_a_client_that_goes_away_mid_answer_frees_its_place(served: Served) -> None:
    body = json.dumps({"label": LABEL, "n": 256, "format": "npz"}).encode()
    for wait_s in (0.0, 0.05, 0.5):
        with connected(served) as connection:
            connection.sendall(
                head("/generate", "Content-Type: application/json", f"Content-Length: {len(body)}") + body
            )
            time.sleep(wait_s)
    assert eventually(lambda: in_flight(served) == 0)


def test_what_clients_order_that_are_gone_is_not_drawn(served: Served) -> None:
    body = json.dumps({"label": LABEL, "n": 256}).encode()
    order = head("/generate", "Content-Type: application/json", f"Content-Length: {len(body)}") + body
    log_before = len(served.log.read_text())
    drawn_before, given_up_before = figure(served, "raresynth_generated_images_total"), given_up(served)
    for _ in range(40):
        with connected(served) as connection:
            connection.sendall(order)
    assert eventually(lambda: given_up(served) == given_up_before + 40)
    time.sleep(3)
    threads = Settings().threads
    assert figure(served, "raresynth_generated_images_total") - drawn_before <= threads * 256
    assert status(served, "/readyz") == 200 and in_flight(served) == 0
    assert "Traceback" not in served.log.read_text()[log_before:]


def test_a_batch_that_cannot_be_begun_is_refused_at_once(served: Served) -> None:
    first = ordered(served, 8000)
    assert eventually(lambda: figure(served, "raresynth_tasks_in_flight") == 1)
    for label, expected in ((LABEL, (503, "overloaded")), ("nevus", (404, "no_generator"))):
        refused = httpx.post(f"{served.url}/generate_batch/submit", json={"label": label, "n": 1}, timeout=30)
        assert (refused.status_code, refused.json()["error"]["code"]) == expected
        assert ("retry-after" in refused.headers) == (expected[0] == 503)
    assert task(served, first).json()["status"] == "in_progress", "it ended too soon to be in the way"
    assert eventually(lambda: task(served, first).json()["status"] == "completed", within_s=3 * WHEN_S)


def test_the_work_of_a_pipelined_request_is_dropped_with_its_client(served: Served) -> None:
    body = json.dumps({"label": LABEL, "n": 256}).encode()
    one = head("/generate", "Content-Type: application/json", f"Content-Length: {len(body)}") + body
    dropped_before, answered_before = given_up(served), archives(served)
    with connected(served) as connection:
        connection.sendall(one * 40)  # so many that the client is gone before the last, however busy the machine
    dropped = eventually(lambda: given_up(served) == dropped_before + 1 and in_flight(served) == 0)
    answered = archives(served) - answered_before
    assert dropped and answered < 39, (given_up(served) - dropped_before, answered)


def test_a_reader_that_takes_nothing_is_held_up_and_let_go(served: Served) -> None:
    body = json.dumps({"label": LABEL, "n": 256, "format": "npz"}).encode()
    request = head("/generate", "Content-Type: application/json", f"Content-Length: {len(body)}") + body

    def idle() -> bool:
        """Twice, since there is a moment between two requests of one connection; others are answered all the time."""
        assert predicted(served) == 200
        return in_flight(served) == 0 and not time.sleep(0.5) and in_flight(served) == 0

    before = archives(served)
    with ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", served.port))
            connection.sendall(request * 40)  # more than the kernel's own buffers hold
        # Dozens of archives are drawn, and lie in those buffers, before the two wait for their client.
        assert eventually(idle, within_s=9 * WHEN_S)
        assert 0 < archives(served) - before < 80


def test_a_page_of_another_site_gets_nothing_without_keys(served: Served) -> None:
    for origin, expected in (("http://evil.example", 401), ("null", 401), ("http://localhost:8080", 200)):
        files = {"image": ("a.jpg", encoded())}
        assert httpx.post(f"{served.url}/predict", files=files, headers={"Origin": origin}).status_code == expected


# The worker


@pytest.mark.slow
def test_work_that_does_not_end_is_told_by_the_probes_and_no_longer_than_it_lasts(
    accepted_bundle: Path, tmp_path: Path
) -> None:
    settings = {"bundle": accepted_bundle, "work_dir": tmp_path / "work", "timeout_s": 0.1, "threads": 1}
    # A progressive image that takes far longer than 0.4 s.
    with serving(tmp_path / "log", **settings) as service:
        heavy = many_scans(90)
        answers: list[httpx.Response] = []
        slow = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{service.url}/predict", files={"image": heavy}, timeout=30))
        )
        slow.start()
        seen: set[tuple[str, int]] = set()
        eventually(lambda: seen.add(("/readyz", status(service, "/readyz"))) or ("/readyz", 503) in seen)
        refused = httpx.get(f"{service.url}/readyz")
        eventually(lambda: status(service, "/livez") == 503)
        slow.join()
        assert answers[0].status_code == 504 and answers[0].json()["error"]["code"] == "timeout"
        assert ("/readyz", 503) in seen
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "not_ready"
        assert eventually(lambda: status(service, "/readyz") == status(service, "/livez") == 200)
        assert "Traceback" not in service.log.read_text()


def many_scans(n: int) -> bytes:
    """A JPEG of 25 megapixels whose last scan comes again and again."""
    jpeg = encoded("JPEG", (5000, 4999), progressive=True)
    scan = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[scan:-2] * (n - 10) + b"\xff\xd9"


def test_a_stopped_worker_goes_on_where_it_was(served: Served) -> None:
    worker = served.worker()
    os.kill(worker, signal.SIGSTOP)
    try:
        with pytest.raises(httpx.TimeoutException):
            httpx.get(f"{served.url}/livez", timeout=1)
        answers: list[int] = []
        waiting = threading.Thread(target=lambda: answers.append(predicted(served)))
        waiting.start()
        time.sleep(1)
        assert answers == []
    finally:
        os.kill(worker, signal.SIGCONT)
    waiting.join()
    assert answers == [200] and served.worker() == worker


@pytest.mark.slow
def test_a_task_of_a_worker_that_died_is_forgotten_and_leaves_nothing(served: Served) -> None:
    lost = ordered(served, 10_000)
    folder = Path(served.log.parent / "work" / "generated")
    assert eventually(lambda: any(folder.glob(".*.zip")))
    os.kill(served.worker(), signal.SIGKILL)
    time.sleep(0.2)
    wait_until_ready(served)
    assert task(served, lost).status_code == 404
    assert not any(folder.glob(".*.zip"))
    again = ordered(served, 3)
    assert eventually(lambda: task(served, again).json()["status"] == "completed")


@pytest.mark.slow
def test_in_a_container_the_whole_service_ends_with_its_worker(accepted_bundle: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", {"BENTOML_CONTAINERIZED": "true"}, bundle=accepted_bundle) as service:
        os.kill(service.worker(), signal.SIGKILL)
        assert service.process.wait(WHEN_S) is not None


# Files


@pytest.mark.slow
def test_a_bundle_that_is_changed_while_it_is_served_is_served_on_and_not_again(
    accepted_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(accepted_bundle, bundle)
    with serving(tmp_path / "log", bundle=bundle, work_dir=tmp_path / "work") as service:
        order = {"label": LABEL, "n": 4}
        before = httpx.post(f"{service.url}/generate", json=order, timeout=30).content
        for path in (bundle / "classifier" / "model.onnx", bundle / "generators" / LABEL / "model.onnx"):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        assert predicted(service) == 200
        assert httpx.post(f"{service.url}/generate", json=order, timeout=30).content == before
        refused = subprocess.run(
            [sys.executable, "-P", "-m", "serving"],
            env=environment(bundle=bundle),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert refused.returncode == 2 and "missing or was changed" in refused.stderr
        os.kill(service.worker(), signal.SIGKILL)
        assert service.process.wait(60) is not None, "a worker that may not start again ends the service"


@pytest.mark.slow
def test_keys_that_were_lost_end_the_service_with_its_worker(accepted_bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(yaml.safe_dump({"me": {"sha256": "0" * 64, "scopes": ["predict"]}}))
    with serving(tmp_path / "log", bundle=accepted_bundle, keys_file=keys) as service:
        keys.unlink()
        os.kill(service.worker(), signal.SIGKILL)
        assert service.process.wait(60) is not None
        assert "cannot serve any more" in service.log.read_text()


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={megabytes}m".encode()):
        pytest.skip(f"a small file system needs root ({os.strerror(ctypes.get_errno())})")
    try:
        yield folder
    finally:
        libc.umount2(str(folder).encode(), 2)


@pytest.mark.slow
def test_a_full_disk_fails_tasks_with_507_and_nothing_else(accepted_bundle: Path, tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", 40) as disk,
        serving(tmp_path / "log", bundle=accepted_bundle, work_dir=disk / "work") as service,
    ):
        worker = service.worker()
        too_large = ordered(service, 10_000)
        (disk / "ballast").write_bytes(bytes(36_000_000))
        assert eventually(lambda: task(service, too_large).json()["status"] == "failed", 60)
        told = task(service, too_large, "get")
        assert told.status_code == 507 and told.json()["error"]["code"] == "no_space"
        assert list((disk / "work" / "generated").iterdir()) == []
        with (disk / "rest").open("wb", buffering=0) as rest, pytest.raises(OSError, match="No space"):
            while True:
                rest.write(bytes(4096))
        refused = httpx.post(f"{service.url}/generate_batch/submit", json={"label": LABEL, "n": 3}, timeout=30)
        assert refused.status_code == 507 and refused.json()["error"]["code"] == "no_space"
        for _ in range(3):
            assert predicted(service) == 200
            assert httpx.post(f"{service.url}/generate", json={"label": LABEL}, timeout=30).status_code == 200
        assert status(service, "/metrics") == status(service, "/readyz") == 200
        assert service.worker() == worker
        (disk / "ballast").unlink()
        (disk / "rest").unlink()
        again = ordered(service, 3)
        assert eventually(lambda: task(service, again).json()["status"] == "completed")


@pytest.mark.slow
def test_few_files_may_be_open_and_many_connect(accepted_bundle: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        with serving(tmp_path / "log", bundle=accepted_bundle) as service:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            with ExitStack() as stack:
                for _ in range(200):
                    stack.enter_context(connected(service))
                assert predicted(service) == 200
            assert "Traceback" not in service.log.read_text()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
