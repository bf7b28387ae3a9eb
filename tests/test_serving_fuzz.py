"""A small part of benchmarks/fuzz_serving.py at a real service, and what the whole of it once found, by name."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from serving_fuzz import Input as Thrown
from serving_fuzz import everything, finding, form, good_images, heavy_images, request, send
from serving_process import Served, serving

from serving.errors import ApiError
from serving.settings import Settings
from serving.uploads import decode_upload

KEY = "key-of-the-fuzzer"
LABEL = "vascular"


@pytest.fixture(scope="module")
def served(accepted_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("fuzzed")
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    keys = {"fuzzer": {"sha256": digest, "scopes": ["predict", "generate", "admin"]}}
    (folder / "keys.yaml").write_text(yaml.safe_dump(keys))
    settings = {
        "bundle": accepted_bundle,
        "keys_file": folder / "keys.yaml",
        "work_dir": folder / "work",
        "requests_per_minute": 1e9,
        "burst": 1_000_000,
        "body_timeout_s": 2,
    }
    with serving(folder / "log", **settings) as service:
        yield service
        assert "Traceback" not in service.log.read_text()


@pytest.mark.slow
def test_hostile_requests_get_clear_answers_and_break_nothing(served: Served) -> None:
    worker = served.worker()
    findings = [
        f"{one.kind}, number {number}: {wrong}"
        for number, one in enumerate(everything(7, 400, KEY, LABEL))
        if (wrong := finding(one, send(served.port, one)))
    ]
    assert findings == [] and served.worker() == worker
    assert httpx.get(f"{served.url}/readyz", timeout=10).status_code == 200


@pytest.mark.slow
def test_schemathesis_finds_nothing_in_the_documented_routes(served: Served, tmp_path: Path) -> None:
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/docs.json", "--no-color"]
    command += ["-H", f"Authorization: Bearer {KEY}", "--checks", f"{checks},unsupported_method,ignored_auth"]
    command += ["--phases", "examples,coverage", "--seed", "1", "--max-examples", "5", "--generation-database", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("name", good_images())
def test_every_kind_of_still_image_is_taken(name: str) -> None:
    assert decode_upload(good_images()[name], 32, Settings()).shape == (32, 32, 3)


@pytest.mark.parametrize("name", heavy_images())
def test_a_small_file_that_would_cost_minutes_or_gigabytes_is_refused_at_once(name: str) -> None:
    content = heavy_images()[name]
    began = time.process_time()
    with pytest.raises(ApiError):
        decode_upload(content, 32, Settings())
    assert time.process_time() - began < 3


def answered(served: Served, content: bytes) -> tuple[int, str]:
    """Status and error code of raw bytes; status 0 where the connection was closed without an answer."""
    answer = send(served.port, Thrown("raw", content))  # as strict, so that it is waited for
    assert finding(Thrown("raw", content, strict=False), answer) is None
    return answer.status, (answer.body.decode("utf-8", "replace").partition('"code":"')[2]).partition('"')[0]


AUTH = f"Host: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n".encode()
ORDER = b'{"label": "nevus"}'


def test_a_charset_that_takes_minutes_to_decode_is_refused(served: Served) -> None:
    content_type, body = form(b"a")
    assert answered(served, request("/predict", f"{content_type}; charset=punycode", body, KEY)) == (400, "malformed")


def test_what_is_no_http_is_told_so_in_the_one_format(served: Served) -> None:
    assert answered(served, b"GET / HTTP/1.1 \0\r\n\r\n") == (400, "malformed")


def test_a_head_that_is_too_large_is_told_so(served: Served) -> None:
    assert answered(served, b"GET /model HTTP/1.1\r\n" + AUTH + b"A: " + b"b" * 600_000) in {
        (413, "too_large"),
        (0, ""),
    }


def test_no_websocket_is_opened(served: Served) -> None:
    upgrade = (
        b"Upgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n\r\n"
    )
    assert answered(served, b"GET /model HTTP/1.1\r\n" + AUTH + upgrade)[0] == 200


def test_headers_after_a_chunked_body_are_none(served: Served) -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    body = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n" % (len(ORDER), ORDER)
    assert answered(served, head + body + f"Authorization: Bearer {KEY}\r\n\r\n".encode()) == (401, "no_key")


def test_what_comes_after_a_request_does_not_break_its_answer(served: Served) -> None:
    head = b"POST /generate HTTP/1.1\r\n" + AUTH + b"Content-Type: application/json\r\n"
    for _ in range(20):
        content = (
            head + b"Content-Length: %d\r\n\r\n" % len(ORDER) + ORDER + b"GET /model HTTP/1.1\r\n\r\nnonsense\r\n\r\n"
        )
        assert answered(served, content) in {(0, ""), (404, "no_generator")}
    assert "Traceback" not in served.log.read_text()


def test_a_method_or_key_that_is_refused_is_told_as_http_asks(served: Served) -> None:
    assert httpx.request("TRACE", f"{served.url}/model").headers["allow"] == "GET, HEAD"
    assert httpx.put(f"{served.url}/predict").headers["allow"] == "POST"
    assert httpx.get(f"{served.url}/model").headers["www-authenticate"] == "Bearer"


def test_a_task_that_has_not_ended_is_told_so(served: Served) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    order = {"label": LABEL, "n": 10_000}
    task = httpx.post(f"{served.url}/generate_batch/submit", json=order, headers=headers).json()["task_id"]
    answer = httpx.get(f"{served.url}/generate_batch/get", params={"task_id": task}, headers=headers)
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "unfinished"
