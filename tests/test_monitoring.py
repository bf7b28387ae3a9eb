"""What watches the service: Debian's own Prometheus beside the running service, and its rules by promtool."""

import asyncio
import copy
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from kubernetes_schema import Document, ManifestError, build, check
from ports import free_port
from prometheus_client import REGISTRY
from serving_images import bad_uploads, encoded
from serving_process import ROOT, Served, serving
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from serving import metrics
from serving.errors import CODES, ApiError
from serving.front import Front
from serving.routes import ROUTES
from serving.settings import Settings

MONITORING = ROOT / "k8s/serving/monitoring"
NAMESPACE, POD, LABEL, KEY = "raresynth", "raresynth-serving-0", "vascular", "key-of-prometheus"
VARIABLES = {"$namespace": NAMESPACE, "$pod": ".*", "$__rate_interval": "1m"}
"""What Grafana fills in."""

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="there is no Prometheus; on Debian it is the package prometheus",
)


@pytest.fixture(scope="module")
def documents() -> dict[str, Document]:
    """Kind -> its one document."""
    return {document["kind"]: document for document in build(MONITORING)}


@pytest.fixture(scope="module")
def rules(documents: dict[str, Document], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules as Prometheus reads them, with their unit tests beside them."""
    path = tmp_path_factory.mktemp("rules") / "alerts.yaml"
    path.write_text(yaml.safe_dump(documents["PrometheusRule"]["spec"], sort_keys=False))
    shutil.copy(MONITORING / "alerts.test.yaml", path.parent)
    return path


@pytest.fixture(scope="module")
def dashboard(documents: dict[str, Document]) -> dict[str, Any]:
    return json.loads(documents["ConfigMap"]["data"]["dashboard.json"])


def rules_of(path: Path, kind: str) -> list[dict[str, Any]]:
    """All rules of a kind: alert or record."""
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"] if kind in rule]


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: dict[str, Any]) -> dict[str, str]:
    """Title and letter of each query -> the query, with its variables filled in."""
    found = {f"{p['title']} {t['refId']}": t["expr"] for p in panels(dashboard) for t in p["targets"]}
    for variable, value in VARIABLES.items():
        found = {name: expression.replace(variable, value) for name, expression in found.items()}
    return found


def selectors(expression: str) -> set[str]:
    """The series that an expression names, each with its matchers: `up{job="a"}`."""
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)|\[[^\]]*\]", " ", expression)
    named = re.finditer(r"(?<![\w.])([a-zA-Z_:][a-zA-Z0-9_:]*+)(\{[^}]*\})?(?!\s*\()", bare)
    return {match[0] for match in named if match[1] not in ("and", "or", "unless")}


def test_selectors_are_found() -> None:
    text = (
        'sum by (pod) (rate(a_total{b=~"c.", d="e"}[5m])) / on (pod) x:y:z > 0.2 * 1e3 and max(up) or absent(g{h="i"})'
    )
    assert selectors(text) == {'a_total{b=~"c.", d="e"}', "x:y:z", "up", 'g{h="i"}'}


# The files


def test_the_files_are_valid(documents: dict[str, Document]) -> None:
    assert documents.keys() == {"ConfigMap", "PrometheusRule", "ServiceMonitor"}
    check(list(documents.values()))
    assert {document["metadata"]["namespace"] for document in documents.values()} == {NAMESPACE}


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("PrometheusRule", ["spec", "group"], []),
        ("PrometheusRule", ["spec", "groups", 0, "rule"], []),
        ("PrometheusRule", ["spec", "groups", 1, "rules", 0, "fore"], "5m"),
        ("PrometheusRule", ["spec", "groups", 1, "rules", 0, "for"], "5 m"),
        ("PrometheusRule", ["spec", "groups", 1, "rules", 0, "record"], "both_of_them"),
        ("PrometheusRule", ["spec", "groups", 1, "rules", 0, "labels", "severity"], 1),
        ("PrometheusRule", ["apiVersion"], "monitoring.coreos.com/v2"),
        ("ServiceMonitor", ["spec", "selectors"], {}),
        ("ServiceMonitor", ["spec", "selector", "matchLabel"], {}),
        ("ServiceMonitor", ["spec", "endpoints", 0, "ports"], "http"),
        ("ServiceMonitor", ["spec", "endpoints", 0, "scrape_timeout"], "5s"),
        ("ServiceMonitor", ["spec", "endpoints", 0, "authorization", "credential"], {}),
        ("ServiceMonitor", ["spec", "endpoints", 0, "authorization", "credentials", "key"], ""),
        ("ServiceMonitor", ["metadata", "label"], {}),
    ],
)
def test_a_mistake_in_an_operators_kind_is_found(
    documents: dict[str, Document], kind: str, path: list, value: object
) -> None:
    document = copy.deepcopy(documents[kind])
    *outer, last = path
    changed: Any = document
    for key in outer:
        changed = changed[key]
    changed[last] = value
    with pytest.raises(ManifestError, match=kind):
        check([document])


def test_no_key_is_in_the_files(documents: dict[str, Document]) -> None:
    (endpoint,) = documents["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "raresynth-metrics-key", "key": "key"}


# Alerts


@needs_prometheus
def test_promtool_finds_no_fault_in_the_rules(rules: Path) -> None:
    told = promtool("check", "rules", "--lint=all", "--lint-fatal", rules.name, cwd=rules.parent)
    assert f"SUCCESS: {len(rules_of(rules, 'alert')) + len(rules_of(rules, 'record'))} rules found" in told


@needs_prometheus
def test_alerts_fire_when_they_should_and_only_then(rules: Path) -> None:
    promtool("test", "rules", "alerts.test.yaml", cwd=rules.parent)


def promtool(*arguments: str, cwd: Path | None = None, stdin: str | None = None) -> str:
    done = subprocess.run(
        ["promtool", *arguments], cwd=cwd, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_alert_has_tests_that_it_fires_and_that_it_does_not(rules: Path) -> None:
    tested = [
        case
        for test in yaml.safe_load((MONITORING / "alerts.test.yaml").read_text())["tests"]
        for case in test.get("alert_rule_test", [])
    ]
    alerts = {rule["alert"] for rule in rules_of(rules, "alert")}
    assert {case["alertname"] for case in tested if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in tested if not case.get("exp_alerts")} == alerts


def test_every_alert_says_how_bad_it_is_where_how_much_and_what_to_do(rules: Path) -> None:
    section = (ROOT / "docs/serving.md").read_text().partition("\n### Alerts\n")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(Raresynth\w+)` \| (\w+) \|", section, re.MULTILINE)
    assert documented == [(rule["alert"], rule["labels"]["severity"]) for rule in rules_of(rules, "alert")]
    for rule in rules_of(rules, "alert"):
        told = rule["annotations"]
        assert told.keys() == {"summary", "description", "runbook"} and told["runbook"] == "docs/serving.md#alerts"
        whole = rule["alert"] == "RaresynthDown"  # it has neither a pod nor a figure
        assert whole or re.search(r"\$labels\.(pod|namespace)", told["description"])
        assert whole or "$value" in told["description"] or "{{ $labels.pod }}" in told["description"]


# The dashboard


def test_the_dashboard_is_complete_and_nothing_overlaps(dashboard: dict[str, Any]) -> None:
    every = dashboard["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    cells = [
        (x, y)
        for panel in every
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) == 23
    for panel in panels(dashboard):
        assert panel["title"] and panel["description"] and unit_of(panel), panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        letters = [target["refId"] for target in panel["targets"]]
        assert letters and len(set(letters)) == len(letters)


def unit_of(panel: dict[str, Any]) -> str:
    if panel["type"] == "heatmap":
        return panel["options"]["yAxis"]["unit"]
    return panel["fieldConfig"]["defaults"]["unit"]


def test_the_dashboards_sidecar_finds_it(documents: dict[str, Document], dashboard: dict[str, Any]) -> None:
    assert documents["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"
    variables = {variable["name"]: variable["type"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource": "datasource", "namespace": "query", "pod": "query"}
    used = set(re.findall(r"\$\w+", " ".join(t["expr"] for p in panels(dashboard) for t in p["targets"])))
    assert used == VARIABLES.keys()


def test_every_metric_of_the_service_is_shown_or_watched(rules: Path, dashboard: dict[str, Any]) -> None:
    used = " ".join([*expressions(dashboard).values(), rules.read_text()])
    names = {family.name for family in REGISTRY.collect() if family.name.startswith("raresynth_")}
    assert len(names) > 20
    assert {name for name in names if not re.search(rf"\b{name}(_total|_bucket|_sum|_count)?\b", used)} == set()


# What the service counts


def sample(name: str, **labels: str) -> float:
    value = REGISTRY.get_sample_value(f"raresynth_{name}", labels)
    assert value is not None, (name, labels)
    return value


def test_a_slow_client_does_not_make_the_service_slow() -> None:
    async def slow_body() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.3)
        yield b'{"label": "a", "n": 1}'

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.05)
        await PlainTextResponse("x")(scope, receive, send)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Front(app, Settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            headers = {"Content-Type": "application/json"}
            return await client.post("/generate", content=slow_body(), headers=headers)

    Front(app, Settings())  # creates the series
    before = sample("request_seconds_sum", path="/generate")
    assert asyncio.run(ask()).status_code == 200
    assert 0.05 <= sample("request_seconds_sum", path="/generate") - before < 0.25


def test_what_alerts_rest_on_is_there_before_anything_happens() -> None:
    metrics.in_flight.set(9)  # as a worker left it that died
    metrics.Worker(Settings(max_requests=7, max_waiting=8, max_tasks=2))
    assert (sample("requests_in_flight"), sample("requests_limit")) == (0, 7)
    assert (sample("queue_images"), sample("queue_images_limit")) == (0, 8)
    assert (sample("tasks_in_flight"), sample("tasks_limit")) == (0, 2)
    for route in ROUTES:
        for status in ("200", "429", "500", "503", "504", "507"):
            assert sample("requests_total", path=route.path, status=status) >= 0
    for code in CODES:
        assert sample("rejected_total", reason=code) >= 0


def test_the_workers_own_use_is_told_anew_each_time() -> None:
    worker = metrics.Worker(Settings())
    worker.tell_use()
    used = sample("worker_cpu_seconds_total")
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    worker.tell_use()
    assert 0.1 <= sample("worker_cpu_seconds_total") - used < 0.5
    assert 10e6 < sample("worker_resident_bytes") < 10e9


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (None, "completed"),
        (ApiError("no_space", "full"), "no_space"),
        (RuntimeError("broken"), "internal"),
        (asyncio.CancelledError(), "dropped"),
    ],
)
def test_a_task_is_counted_by_how_it_ends(error: BaseException | None, result: str) -> None:
    before = REGISTRY.get_sample_value("raresynth_tasks_total", {"result": result}) or 0
    with suppress(type(error) if error else ()), metrics.task_counted():
        if error:
            raise error
    assert sample("tasks_total", result=result) == before + 1


# Against the running service


@dataclass(frozen=True)
class Watched:
    """The running service, and the Prometheus that watches it."""

    served: Served
    prometheus: httpx.Client

    def get(self, path: str, **parameters: str) -> Any:
        response = self.prometheus.get(f"/api/v1/{path}", params=parameters)
        assert response.status_code == 200, (parameters, response.text)
        return response.json()["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return self.get("query", query=expression)["result"]

    def value(self, expression: str) -> float:
        (sample,) = self.query(expression)
        return float(sample["value"][1])

    def alerts(self) -> dict[str, dict[str, Any]]:
        return {alert["labels"]["alertname"]: alert for alert in self.get("alerts")["alerts"]}

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.served.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)


def until(what: Callable[[], Any], seconds: float = 15) -> Any:
    """The first value of `what` that is true."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.2)
    return value


def configuration(documents: dict[str, Document], rules: Path, key: Path, target: str) -> dict[str, Any]:
    """What the operator would make of the ServiceMonitor, with one pod that is known beforehand, and in a hurry."""
    spec = documents["ServiceMonitor"]["spec"]
    (endpoint,) = spec["endpoints"]
    assert endpoint.keys() == {"port", "path", "interval", "scrapeTimeout", "authorization"}
    labels = {
        "namespace": NAMESPACE,
        "service": "raresynth-serving",
        "pod": POD,
        "container": "serving",
        "endpoint": endpoint["port"],
    }
    job = {
        "job_name": labels["service"],
        "metrics_path": endpoint["path"],
        "authorization": {"type": endpoint["authorization"]["type"], "credentials_file": str(key)},
        "sample_limit": spec["sampleLimit"],
        "static_configs": [{"targets": [target], "labels": labels}],
    }
    hurry = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    return {"global": hurry, "rule_files": [str(rules)], "scrape_configs": [job]}


@contextmanager
def prometheus(folder: Path, settings: dict[str, Any]) -> Iterator[httpx.Client]:
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        "--config.file=prometheus.yaml",
        "--storage.tsdb.path=data",
        f"--web.listen-address={address}",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=10) as client:

            def ready() -> bool:
                assert process.poll() is None, (folder / "prometheus.log").read_text()
                try:
                    return client.get("/-/ready").status_code == 200
                except httpx.TransportError:
                    return False

            until(ready)
            yield client
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def watched(
    documents: dict[str, Document], rules: Path, accepted_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """The service with its keys on, and Prometheus with one for admins; nothing was asked yet."""
    folder = tmp_path_factory.mktemp("watched")
    entry = {"sha256": hashlib.sha256(KEY.encode()).hexdigest(), "scopes": ["predict", "generate", "admin"]}
    (folder / "keys.yaml").write_text(yaml.safe_dump({"all": entry}))
    (folder / "key").write_text(KEY)
    settings = {
        "bundle": accepted_bundle,
        "keys_file": folder / "keys.yaml",
        "work_dir": folder / "work",
        "max_image_mb": 1,  # the bad uploads are made for these limits
        "max_megapixels": 2,
    }
    with serving(folder / "log", **settings) as served:
        target = f"127.0.0.1:{served.port}"
        with prometheus(folder, configuration(documents, rules, folder / "key", target)) as client:
            yield Watched(served, client)


@pytest.fixture(scope="module")
def asked(watched: Watched) -> Watched:
    """The same, after people have asked for all kinds of things."""
    until(lambda: watched.query("up == 1"))
    with watched.client() as client:
        for seed in range(3):
            assert client.post("/predict", files={"image": ("a", encoded(seed=seed))}).status_code == 200
        images = [("images", ("a", encoded(seed=seed))) for seed in range(30)]
        for _ in range(11):
            client.post("/predict_batch", files=images, data={"overlay": "true"})
        for content, _ in bad_uploads().values():
            client.post("/predict", files={"image": ("a", content)})
        archive = client.post("/generate", json={"label": LABEL, "n": 5})
        with zipfile.ZipFile(io.BytesIO(archive.content)) as file:
            assert len(file.namelist()) == 6
        assert client.post("/generate_batch/submit", json={"label": LABEL, "n": 20}).status_code == 200
        for number in range(20):
            client.get(f"/nowhere/{number}")
            client.get(f"/generated/{number:032x}.zip")
    until(lambda: watched.query('raresynth_tasks_total{result="completed"} == 1'))
    until(lambda: watched.query(f'raresynth_requests_total{{path="{"/generated/{name}"}", status="404"}} == 20'))
    time.sleep(2)  # rates need two scrapes, and rules an evaluation after them
    return watched


@needs_prometheus
@pytest.mark.slow
def test_a_service_that_was_just_started_raises_no_alert(watched: Watched) -> None:
    until(lambda: watched.query("count_over_time(up[1m]) >= 3"))
    assert watched.query("up")[0]["metric"] == {
        "__name__": "up",
        "job": "raresynth-serving",
        "instance": f"127.0.0.1:{watched.served.port}",
        "namespace": NAMESPACE,
        "service": "raresynth-serving",
        "pod": POD,
        "container": "serving",
        "endpoint": "http",
    }
    assert watched.alerts() == {}


@needs_prometheus
@pytest.mark.slow
def test_every_rule_is_healthy_and_every_series_that_it_names_exists(asked: Watched, rules: Path) -> None:
    loaded = [rule for group in asked.get("rules")["groups"] for rule in group["rules"]]
    assert len(loaded) == len(rules_of(rules, "alert")) + len(rules_of(rules, "record"))
    assert [(rule["name"], rule.get("lastError")) for rule in loaded if rule["health"] != "ok"] == []
    named = {selector for rule in loaded for selector in selectors(rule["query"])}
    assert len(named) > 20
    assert {selector for selector in named if not asked.query(selector)} == set()


@needs_prometheus
@pytest.mark.slow
def test_every_panel_has_data(asked: Watched, dashboard: dict[str, Any]) -> None:
    assert {name for name, expression in expressions(dashboard).items() if not asked.query(expression)} == set()
    annotation = dashboard["annotations"]["list"][0]["expr"]
    asked.query(annotation)


@needs_prometheus
@pytest.mark.slow
def test_prometheus_counts_what_was_asked(asked: Watched) -> None:
    assert asked.value("sum(raresynth_predictions_total)") == 3 + 11 * 30
    assert asked.value("raresynth_prediction_confidence_count") == 3 + 11 * 30
    assert asked.value(f'raresynth_generated_images_total{{label="{LABEL}"}}') == 5 + 20
    refused = {code: [c for _, c in bad_uploads().values()].count(code) for _, code in bad_uploads().values()}
    for code in ("wrong_type", "animated", "undecodable", "trailing_data", "too_many_pixels"):
        assert asked.value(f'raresynth_rejected_total{{reason="{code}"}}') == refused[code]
    assert asked.value('sum(raresynth_requests_total{path="other"})') == 20
    assert asked.value("raresynth_requests_limit") == 64 and asked.value("raresynth_requests_in_flight") == 0


@needs_prometheus
@pytest.mark.slow
def test_images_of_another_kind_are_on_their_way_to_an_alert(asked: Watched) -> None:
    assert asked.value("max(raresynth_drift)") > 0.2
    (drift, *_) = [a for a in asked.get("alerts")["alerts"] if a["labels"]["alertname"] == "RaresynthDrift"]
    assert drift["state"] == "pending" and drift["labels"]["pod"] == POD
    index = asked.value(f'raresynth_drift{{of="{drift["labels"]["of"]}"}}')
    figure = f"On pod {POD}, the stability index of {drift['labels']['of']} is {index:.2f} over the newest images."
    assert drift["annotations"]["description"] == figure


@needs_prometheus
@pytest.mark.slow
def test_unknown_urls_mint_no_series_in_bentomls_metrics_either(asked: Watched) -> None:
    paths = {s["metric"]["exported_endpoint"] for s in asked.query('{__name__=~"bentoml_.+", exported_endpoint!=""}')}
    assert "/predict" in paths
    assert paths <= {route.path for route in ROUTES} | {"/generate_batch"}
    assert asked.value("scrape_samples_scraped") < 2000


@needs_prometheus
@pytest.mark.slow
def test_promtool_finds_no_fault_in_the_metrics(asked: Watched) -> None:
    with asked.client() as client:
        text = client.get("/metrics").text
    kept = [line for line in text.splitlines() if re.match(r"(# (HELP|TYPE) )?raresynth_", line)]
    assert len(kept) > 100
    promtool("check", "metrics", stdin="\n".join([*kept, ""]))


@needs_prometheus
@pytest.mark.slow
def test_a_dead_service_is_on_its_way_to_an_alert(asked: Watched) -> None:
    """The last one: nothing serves after it."""
    assert not {"RaresynthDown", "RaresynthPodDown"} & asked.alerts().keys()
    worker = asked.served.worker()
    for process in (asked.served.process.pid, worker):
        os.kill(process, signal.SIGKILL)
    alerts = until(lambda: (found := asked.alerts()).keys() >= {"RaresynthDown", "RaresynthPodDown"} and found)
    assert {alerts[name]["state"] for name in ("RaresynthDown", "RaresynthPodDown")} == {"pending"}
    assert alerts["RaresynthPodDown"]["labels"]["pod"] == POD
    assert POD in alerts["RaresynthPodDown"]["annotations"]["description"]
