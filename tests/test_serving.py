"""The service as a whole: a real BentoML server over a real bundle, asked through HTTP."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import yaml
from bentoml import SyncHTTPClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serving_images import bad_uploads, encoded
from serving_process import ROOT, Served, environment, serving, wait_until_ready

from raresynth.bundle.contents import open_bundle
from raresynth.bundle.predictor import Predictor
from raresynth.bundle.sampler import Sampler
from raresynth.dataset.images import decode_image
from raresynth.lineage import sha256_file
from serving.errors import CODES

LABEL = "vascular"
SCOPES = {
    "all": ["predict", "generate", "admin"],
    "predictor": ["predict"],
    "generator": ["generate"],
    "hasty": ["predict"],
}
HEADERS = {"Authorization": "Bearer key-of-all"}
BURST = 300


@pytest.fixture(scope="module")
def served(accepted_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    keys = {
        name: {"sha256": hashlib.sha256(f"key-of-{name}".encode()).hexdigest(), "scopes": scopes}
        for name, scopes in SCOPES.items()
    }
    (folder / "keys.yaml").write_text(yaml.safe_dump(keys))
    settings = {
        "bundle": accepted_bundle,
        "bundle_sha256": sha256_file(accepted_bundle / "bundle.json"),
        "keys_file": folder / "keys.yaml",
        "work_dir": folder / "work",
        "max_image_mb": 1,
        "max_body_mb": 3,
        "max_megapixels": 2,
        "body_timeout_s": 1,
        "requests_per_minute": 1200,
        "burst": BURST,
    }
    with serving(folder / "log", **settings) as service:
        yield service
    left = subprocess.run(["pgrep", "-f", str(service.port)], capture_output=True, text=True, check=False)
    assert left.stdout == "", "processes are left behind"


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, headers=HEADERS, timeout=30) as client:
        yield client


def error_of(response: httpx.Response) -> str:
    detail = response.json()["error"]
    assert set(detail) == {"code", "message", "request_id"} and detail["message"]
    assert detail["request_id"] == response.headers["x-request-id"]
    assert CODES[detail["code"]][0] == response.status_code
    return str(detail["code"])


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return 0.0


# Predictions


def test_a_prediction_is_the_bundles(client: httpx.Client, accepted_bundle: Path) -> None:
    content = encoded(seed=7)
    answer = client.post("/predict", files={"image": ("a.jpg", content)}, data={"overlay": "true"}).json()
    predictor = Predictor(accepted_bundle)
    side, labels = predictor.bundle.classifier.resolution, predictor.bundle.labels
    expected = predictor.predict(decode_image(content, side)[None]).probabilities[0]
    assert answer["probabilities"] == pytest.approx(dict(zip(labels, expected.tolist(), strict=True)), abs=1e-5)
    assert answer["label"] == labels[int(expected.argmax())]
    strange = answer["out_of_distribution"]
    assert strange["flagged"] == (strange["score"] > strange["threshold"])
    assert answer["versions"] == {
        "bundle": sha256_file(accepted_bundle / "bundle.json"),
        "data_version": predictor.bundle.lineage.data_md5,
    }
    with Image.open(io.BytesIO(base64.b64decode(answer["overlay_png"]))) as overlay:
        assert overlay.size == (side, side) and overlay.format == "PNG"


def test_one_bad_image_never_spoils_its_neighbours(client: httpx.Client) -> None:
    good = [encoded(seed=seed) for seed in range(3)]
    alone = [client.post("/predict", files={"image": ("a.jpg", content)}).json() for content in good]
    bad = {name: upload for name, upload in bad_uploads().items() if len(upload[0]) < 10_000}
    files = [good[0], *(content for content, _ in bad.values()), *good[1:]]
    items = client.post("/predict_batch", files=[("images", ("x", content)) for content in files]).json()["items"]
    assert [item["index"] for item in items] == list(range(len(files)))
    assert [item["error"]["code"] for item in items if item["error"]] == [code for _, code in bad.values()]
    together = [item["prediction"] for item in items if item["prediction"]]
    for one, other in zip(alone, together, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)


def test_clients_at_once_get_their_own_answers(client: httpx.Client) -> None:
    images = [encoded(seed=seed) for seed in range(12)]

    def ask(content: bytes) -> dict[str, float]:
        answer = client.post("/predict", files={"image": ("a.jpg", content)})
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["probabilities"])

    one_by_one = [ask(content) for content in images]
    with ThreadPoolExecutor(12) as pool:
        at_once = list(pool.map(ask, images))
    for alone, together in zip(one_by_one, at_once, strict=True):
        assert alone == pytest.approx(together, abs=1e-4)


# Synthetic images


def test_equal_orders_give_equal_bytes(client: httpx.Client, accepted_bundle: Path) -> None:
    order = {"label": LABEL, "n": 20, "seed": 5}
    first = client.post("/generate", json=order)
    assert first.headers["content-type"] == "application/zip"
    assert first.content == client.post("/generate", json=order).content
    assert first.content != client.post("/generate", json={**order, "seed": 6}).content
    sampler = Sampler(accepted_bundle, LABEL)
    with zipfile.ZipFile(io.BytesIO(first.content)) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        assert manifest["bundle"] == sha256_file(accepted_bundle / "bundle.json")
        assert manifest["generator"] == sampler.generator.weights_sha256
        png = archive.read(manifest["images"][17]["path"])
    assert png == sampler.pngs(sampler.generate(5, 17, 1, 1.0), 5, 17, 1.0)[0]


def test_a_label_without_an_accepted_generator_is_a_404_with_the_reason(
    client: httpx.Client, accepted_bundle: Path
) -> None:
    judged = open_bundle(accepted_bundle).decisions["classes"]
    rejected = next(label for label, entry in judged.items() if entry["decision"] == "rejected")
    for label, reason in ((rejected, "made so by a test"), ("nonsense", "the labels are")):
        refused = client.post("/generate", json={"label": label})
        assert error_of(refused) == "no_generator"
        message = refused.json()["error"]["message"]
        assert reason in message and f"accepted generators: {LABEL}" in message


def test_a_large_batch_is_a_task_that_leaves_an_archive(client: httpx.Client) -> None:
    def finished(task: str) -> httpx.Response:
        for _ in range(300):
            status = client.get("/generate_batch/status", params={"task_id": task}).json()["status"]
            if status != "in_progress":
                return client.get("/generate_batch/get", params={"task_id": task})
            time.sleep(0.1)
        raise AssertionError("the task does not end")

    order = {"label": LABEL, "n": 300, "seed": 1, "format": "npz"}
    answer = finished(client.post("/generate_batch/submit", json=order).json()["task_id"])
    result = answer.json()
    archive = client.get(result["path"])
    assert len(archive.content) == result["n_bytes"]
    assert hashlib.sha256(archive.content).hexdigest() == result["sha256"]
    with (
        zipfile.ZipFile(io.BytesIO(archive.content)) as files,
        np.load(io.BytesIO(files.read("images.npz"))) as arrays,
    ):
        assert arrays["images"].shape == (300, 32, 32, 3)
    assert error_of(client.post("/generate_batch/submit", json={**order, "label": "nevus"})) == "no_generator"
    assert error_of(client.post("/generate_batch/submit", json={**order, "n": 10_001})) == "malformed"
    assert error_of(client.get("/generate_batch/get", params={"task_id": "unknown"})) == "not_found"
    assert error_of(client.get("/generate_batch/get")) == "malformed"


def test_bentos_own_client_speaks_to_it(served: Served, tmp_path: Path) -> None:
    image = tmp_path / "lesion.png"
    image.write_bytes(encoded("PNG"))
    with SyncHTTPClient(served.url, token="key-of-all") as client:
        assert client.predict(image=image)["label"] in client.predict(image=image)["probabilities"]
        assert len(client.predict_batch(images=[image, image], overlay=True)["items"]) == 2
        with zipfile.ZipFile(client.generate(label=LABEL, n=2)) as archive:
            assert len(archive.namelist()) == 3
        # Its `generate_batch.submit` fails after it has asked, in BentoML 1.4.39 (AttributeError: _opened_files).
        submitted = client.request("POST", "/generate_batch/submit", json={"label": LABEL, "n": 17})
        assert submitted.json()["status"] == "in_progress"


def test_the_examples_of_the_documentation_run(served: Served, tmp_path: Path) -> None:
    run_examples(ROOT / "docs" / "serving.md", served, tmp_path)


@pytest.mark.slow
def test_the_examples_of_the_readme_run(accepted_bundle: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", bundle=accepted_bundle) as without_keys:
        run_examples(ROOT / "README.md", without_keys, tmp_path)


def run_examples(page: Path, served: Served, tmp_path: Path) -> None:
    """Run a page's examples as they stand, but for the service's address, and look at what they left."""
    examples = re.findall(r"```(bash|python)\n(.*?)```", page.read_text(), re.DOTALL)
    assert [kind for kind, _ in examples] == ["bash", "python"]
    (tmp_path / "lesion.jpg").write_bytes(encoded())
    (tmp_path / "README.md").write_text("no image")
    variables = environment() | {"URL": served.url, "KEY": "key-of-all"}
    for kind, example in examples:
        command = ["bash", "-euo", "pipefail", "-c"] if kind == "bash" else [sys.executable, "-c"]
        command.append(example.replace("http://127.0.0.1:3000", served.url))
        done = subprocess.run(
            command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
    for name, n in (("synthetic.zip", 16), ("from-python.zip", 4)):
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert len(archive.namelist()) == n + 1


# What is told


def test_the_card_tells_what_is_served(client: httpx.Client, accepted_bundle: Path) -> None:
    card, bundle = client.get("/model").json(), open_bundle(accepted_bundle)
    assert card["labels"] == bundle.labels and card["decisions"] == bundle.decisions
    assert card["data"]["data_version"] == bundle.lineage.data_md5 and card["data"]["validation"]["passed"] is True
    assert set(card["generators"]) == {LABEL} and card["generators"][LABEL]["quality"]["label"] == LABEL
    assert "balanced_accuracy" in card["classifier"]["test"] and card["classifier"]["activation_maps"] == "on"
    assert "no medical device" in card["intended_use"] and card["limits"]
    assert ".jpg" not in json.dumps(card), "names of training images stay inside"


def test_every_documented_route_answers_and_its_errors_are_documented(client: httpx.Client) -> None:
    document = client.get("/docs.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            response = client.request(method, path.replace("{name}", "a" * 32 + ".zip"), content=b"{")
            assert str(response.status_code) in operation["responses"], (path, response.text)
            assert response.status_code == 200 or error_of(response)
            for header in ("content-security-policy", "x-content-type-options", "x-frame-options", "referrer-policy"):
                assert response.headers[header]
            assert "server" not in response.headers


def test_metrics_follow_what_is_asked(client: httpx.Client) -> None:
    def figures() -> dict[str, float]:
        return {
            "predicted": sum(
                metric(client, "raresynth_predictions_total", label=label)
                for label in ("keratosis", "nevus", "vascular")
            ),
            "confidence": metric(client, "raresynth_prediction_confidence_count"),
            "decoded": metric(client, "raresynth_inference_seconds_count", step="decode"),
            "generated": metric(client, "raresynth_generated_images_total", label=LABEL),
            "refused": metric(client, "raresynth_rejected_total", reason="wrong_type"),
        }

    before = figures()
    for seed in range(2):
        client.post("/predict", files={"image": ("a.jpg", encoded(seed=seed))})
    client.post("/predict", files={"image": ("a.jpg", b"no image")})
    client.post("/generate", json={"label": LABEL, "n": 7})
    after = figures()
    gained = {name: after[name] - before[name] for name in after}
    assert gained == {"predicted": 2, "confidence": 2, "decoded": 3, "generated": 7, "refused": 1}
    assert metric(client, "raresynth_model_info") == 1
    assert metric(client, "bentoml_service_request_total", endpoint="/predict") > 0


def test_unknown_paths_add_no_series(client: httpx.Client) -> None:
    def series() -> set[str]:
        lines = client.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}

    client.get("/nowhere")
    client.request("BREW", "/predict")
    assert client.request("PURGE", "/predict").status_code == 405
    before = series()
    for number in range(20):
        assert error_of(client.get(f"/nowhere/{number}")) == "not_found"
        assert client.request(f"BREW{number}", "/predict").status_code == 400  # no method of HTTP
    assert series() == before


# Who may ask, and what


@pytest.mark.parametrize(
    ("key", "method", "path", "code"),
    [
        (None, "GET", "/model", "no_key"),
        ("nobody", "GET", "/model", "no_key"),
        (None, "POST", "/predict", "no_key"),
        (None, "GET", "/metrics", "no_key"),
        ("predictor", "POST", "/generate", "no_scope"),
        ("predictor", "GET", "/metrics", "no_scope"),
        ("generator", "POST", "/predict", "no_scope"),
        ("generator", "POST", "/predict_batch", "no_scope"),
        ("predictor", "GET", "/generate_batch/get", "no_scope"),
        ("predictor", "GET", "/generated/" + "a" * 32 + ".zip", "no_scope"),
    ],
)
def test_a_key_is_needed_that_has_the_scope(served: Served, key: str | None, method: str, path: str, code: str) -> None:
    headers = {"Authorization": f"Bearer key-of-{key}"} if key else {}
    assert error_of(httpx.request(method, served.url + path, headers=headers)) == code


def test_probes_need_no_key(served: Served) -> None:
    assert [httpx.get(f"{served.url}/{path}").status_code for path in ("livez", "readyz", "")] == [200] * 3


def test_answers_come_whole_and_say_so(served: Served) -> None:
    whole = httpx.get(served.url, headers={"Range": "bytes=5-2"})
    assert whole.status_code == 200 and "accept-ranges" not in whole.headers


def test_a_hasty_key_is_told_to_wait_and_others_are_not(served: Served, client: httpx.Client) -> None:
    with httpx.Client(base_url=served.url, headers={"Authorization": "Bearer key-of-hasty"}) as hasty:
        for _ in range(3 * BURST):
            response = hasty.get("/model")
            if response.status_code != 200:
                break
    assert error_of(response) == "rate" and int(response.headers["retry-after"]) >= 1
    assert client.get("/model").status_code == 200


@pytest.mark.parametrize("name", bad_uploads())
def test_a_bad_upload_is_a_clear_4xx(client: httpx.Client, name: str) -> None:
    content, code = bad_uploads()[name]
    assert error_of(client.post("/predict", files={"image": ("a.png", content, "image/png")})) == code


def test_no_url_is_fetched(client: httpx.Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/image.png"
        for body in (
            {"data": {"image": url}, "files": {"other": b""}},
            {"json": {"image": url}},
            {"content": url, "headers": {"Content-Type": "application/json"}},
            {"data": {"image": url}},
            {"content": url, "headers": {"Content-Type": "application/vnd.bentoml+pickle"}},
        ):
            assert error_of(client.post("/predict", **body)) == "malformed"
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"vascular"',
        b'{"label": "vascular", "count": 3}',
        b'{"label": "vascular", "n": 0}',
        b'{"label": "vascular", "n": 257}',
        b'{"label": "vascular", "n": "3"}',
        b'{"label": "vascular", "n": 1.5}',
        b'{"label": "vascular", "n": true}',
        b'{"label": "vascular", "seed": -1}',
        b'{"label": "vascular", "seed": 9223372036854775808}',
        b'{"label": "vascular", "truncation": 0}',
        b'{"label": "vascular", "truncation": NaN}',
        b'{"label": "vascular", "truncation": 1e999}',
        b'{"label": "vascular", "format": "bmp"}',
        b'{"label": null}',
        b'{"label": "\\ud800"}',
        b"\xff\xfe",
        b"[" * 10_000,
    ],
)
def test_an_order_is_read_strictly(client: httpx.Client, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    assert error_of(client.post("/generate", content=body, headers=headers)) == "malformed"


def test_bodies_are_limited_before_they_are_read(served: Served, client: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield bytes(65_536)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert error_of(client.post("/predict", content=bytes(4_000_000), headers=headers)) == "too_large"
    assert error_of(client.post("/generate", json={"label": "x" * 20_000})) == "too_large"
    assert error_of(client.post("/predict", content=endless(), headers=headers)) == "too_large"
    assert client.get("/livez").status_code == 200


def raw_request(served: Served, head: str, body: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    lines = [head, "Host: 127.0.0.1", *(f"{name}: {value}" for name, value in HEADERS.items())]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return connection


def test_a_slow_client_is_let_go_and_one_that_goes_away_does_no_harm(served: Served, client: httpx.Client) -> None:
    head = "POST /predict HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000"
    gone = raw_request(served, head, b"--x\r\n")
    gone.close()
    order = json.dumps({"label": LABEL, "n": 256}).encode()
    head_of_order = f"POST /generate HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(order)}"
    raw_request(served, head_of_order, order).close()
    slow = [raw_request(served, head, b"--x\r\n") for _ in range(5)]
    assert client.post("/predict", files={"image": ("a.jpg", encoded())}).status_code == 200
    for connection in slow:
        assert b" 408 " in connection.recv(65_536).splitlines()[0]
        connection.close()
    assert metric(client, "raresynth_requests_in_flight") == 0
    assert metric(client, "raresynth_requests_total", path="/predict", status="499") == 1
    assert metric(client, "raresynth_requests_total", path="/generate", status="499") == 1


def test_nothing_of_an_image_is_logged_or_kept(served: Served, client: httpx.Client) -> None:
    secret = "patient-mueller.jpg"
    client.post("/predict", files={"image": (secret, encoded())}, headers={"X-Request-ID": "logged-by-this"})
    client.post("/predict", files={"image": (secret, b"no image")})
    client.get("/nowhere/patient-mueller")
    log = served.log.read_text()
    assert "logged-by-this all /predict 200" in log
    assert "mueller" not in log and "key-of" not in log and "Traceback" not in log
    work = served.log.parent / "work"
    database = b"".join(path.read_bytes() for path in (work / "bentoml").glob("task_result.db*"))
    assert b"generate_batch" in database and b"key-of" not in database
    assert {path.suffix for path in work.rglob("*") if path.is_file()} <= {".db", ".db-wal", ".db-shm", ".zip"}


def test_the_service_listens_on_its_own_port_alone(served: Served) -> None:
    # The supervisor's orders come through files that only its own user can open.
    processes = [psutil.Process(served.process.pid), psutil.Process(served.worker())]
    listening = {(c.laddr.ip, c.laddr.port) for p in processes for c in p.net_connections() if c.status == "LISTEN"}
    assert listening == {("127.0.0.1", served.port)}


def test_a_killed_worker_is_replaced(served: Served, client: httpx.Client) -> None:
    os.kill(served.worker(), signal.SIGKILL)
    time.sleep(0.2)
    wait_until_ready(served)
    assert client.post("/predict", files={"image": ("a.jpg", encoded())}).status_code == 200


def test_paths_may_be_told_from_where_the_service_is_started(accepted_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(accepted_bundle, tmp_path / "mine")
    key = {"sha256": hashlib.sha256(b"key").hexdigest(), "scopes": ["admin"]}
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"me": key}))
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"bundle": "mine", "keys_file": "keys.yaml"}))
    variables = {"RARESYNTH_SERVING": "settings.yaml", "PYTHONPATH": str(ROOT)}
    with serving(tmp_path / "log", variables, cwd=tmp_path, work_dir="work") as service:
        card = httpx.get(f"{service.url}/model", headers={"Authorization": "Bearer key"})
        assert card.status_code == 200
    assert (tmp_path / "work" / "bentoml").is_dir()


# What is not served at all


@pytest.mark.parametrize("fault", ["flipped", "missing", "unapproved", "another", "open", "keyless", "deep"])
def test_what_may_not_be_served_is_refused_in_one_sentence(accepted_bundle: Path, tmp_path: Path, fault: str) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(accepted_bundle, bundle)
    settings: dict[str, object] = {"bundle": bundle}
    temporary = Path(tempfile.gettempdir())
    match fault:
        case "flipped":
            path = bundle / "classifier" / "model.onnx"
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        case "missing":
            settings["bundle"] = tmp_path / "none"
        case "unapproved":
            content = json.loads((bundle / "bundle.json").read_text())
            content["decisions"]["classes"][LABEL]["decision"] = "rejected"
            (bundle / "bundle.json").write_text(json.dumps(content))
            digest = sha256_file(bundle / "bundle.json")
            (bundle / "bundle.sha256").write_text(f"{digest}  bundle.json\n")
        case "another":
            settings["bundle_sha256"] = "0" * 64
        case "open":
            settings["host"] = "0.0.0.0"
        case "keyless":
            settings["keys_file"] = bundle / "bundle.json"
        case "deep":
            temporary = tmp_path / ("d" * 90)
            temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "serving"],
        env=environment(**settings) | {"TMPDIR": str(temporary)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    reason = {
        "flipped": "model.onnx is missing or was changed",
        "missing": "is no bundle",
        "unapproved": f"generator of {LABEL} was rejected",
        "another": "another bundle",
        "open": "API keys are needed",
        "keyless": "is no file of API keys",
        "deep": "set TMPDIR to a shorter one",
    }[fault]
    assert line.startswith("cannot serve: ") and reason in line
