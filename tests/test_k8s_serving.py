"""The service's cluster files: they build, are valid, agree with the service's settings, and grant next to nothing."""

import copy
import hashlib
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from kubernetes_schema import Document, build, check, of_kind, selects
from ports import free_port
from prometheus_client import REGISTRY
from serving_images import encoded
from serving_process import environment as environment_of_tests
from serving_process import start, wait_until_ready

from raresynth.errors import CheckpointError
from serving import metrics
from serving.publish import main, publish
from serving.routes import ROUTES, find_route
from serving.settings import Settings, read_settings

SERVING = Path(__file__).parents[1] / "k8s/serving"
NAMESPACES = {"local": "kubeflow", "production": "raresynth"}
"""Overlay -> the namespace that the pipelines' overlay of that name works in."""
NAME = "raresynth-serving"
UNITS = {"Mi": 2**20, "Gi": 2**30}
Pod = dict[str, Any]


@pytest.fixture(scope="module")
def overlays() -> dict[str, list[Document]]:
    return {name: build(SERVING / "overlays" / name) for name in NAMESPACES}


@pytest.fixture(scope="module", params=sorted(NAMESPACES))
def documents(request: pytest.FixtureRequest, overlays: dict[str, list[Document]]) -> list[Document]:
    """Every overlay in turn."""
    return overlays[request.param]


@pytest.fixture(scope="module")
def production(overlays: dict[str, list[Document]]) -> list[Document]:
    return overlays["production"]


def template(documents: list[Document]) -> Document:
    """The pods' metadata and spec."""
    (deployment,) = of_kind(documents, "Deployment").values()
    return deployment["spec"]["template"]


def pod(documents: list[Document]) -> Pod:
    return template(documents)["spec"]


def publishing() -> Document:
    return yaml.safe_load((SERVING / "publish.yaml").read_text())


def environment(documents: list[Document]) -> dict[str, str]:
    """The container's environment, as kubelet makes it."""
    (container,) = pod(documents)["containers"]
    values: dict[str, str] = {}
    for variable in container["env"]:
        value = variable.get("value")
        if value is None:
            key = variable["valueFrom"]["configMapKeyRef"]
            value = of_kind(documents, "ConfigMap")[key["name"]]["data"][key["key"]]
        values[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda name: values[name[1]], value)
    return values


def mounts(spec: Pod) -> dict[str, Document]:
    """Where -> the volume that is mounted there, with `readOnly` of the mount."""
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    (container,) = spec["containers"]
    return {m["mountPath"]: {**volumes[m["name"]], "readOnly": m.get("readOnly")} for m in container["volumeMounts"]}


def settings_file(documents: list[Document]) -> str:
    where, _, name = environment(documents)["RARESYNTH_SERVING"].rpartition("/")
    return of_kind(documents, "ConfigMap")[mounts(pod(documents))[where]["configMap"]["name"]]["data"][name]


def settings(documents: list[Document], folder: Path) -> Settings:
    """What the service in the pod reads; its parent's refusals of what is unknown are its own."""
    path = folder / "settings.yaml"
    path.write_text(settings_file(documents))
    return read_settings(environment(documents) | {"RARESYNTH_SERVING": str(path)})


def n_bytes(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


# What is in the files


def test_every_overlay_is_known_here() -> None:
    assert {path.name for path in (SERVING / "overlays").iterdir()} == set(NAMESPACES)


def test_every_document_is_valid_and_in_its_namespace(overlays: dict[str, list[Document]]) -> None:
    check([publishing()])
    for name, documents in overlays.items():
        check(documents)
        for document in documents:
            expected = None if document["kind"] == "PriorityClass" else NAMESPACES[name]
            assert document["metadata"].get("namespace") == expected
            assert document["metadata"]["labels"]["app.kubernetes.io/part-of"] == "raresynth"


def test_no_secret_is_in_the_files(documents: list[Document]) -> None:
    assert "Secret" not in {document["kind"] for document in documents}
    named = re.findall(r"secret\w*: [{ ]*(?:secretName: )?[\w-]+", yaml.safe_dump(documents))
    assert {name.split()[-1] for name in named} <= {"raresynth-api-keys", "raresynth-tls"}
    assert "raresynth-api-keys" in yaml.safe_dump(pod(documents)["volumes"])


@pytest.mark.parametrize("which", ["local", "production", "publish"])
def test_pods_are_restricted(overlays: dict[str, list[Document]], which: str) -> None:
    spec = publishing()["spec"] if which == "publish" else pod(overlays[which])
    assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & spec.keys()
    context = spec["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"], context["fsGroup"]) == (True, 10001, 10001)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys() & container["resources"]["limits"].keys()
    for volume in spec["volumes"]:
        assert volume.keys() - {"name"} <= {"configMap", "secret", "persistentVolumeClaim", "emptyDir"}
        assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"]


def test_the_account_may_do_nothing(documents: list[Document]) -> None:
    account = of_kind(documents, "ServiceAccount")[pod(documents)["serviceAccountName"]]
    assert account["automountServiceAccountToken"] is False
    assert not {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"} & {d["kind"] for d in documents}


def test_everything_that_selects_pods_selects_these(documents: list[Document]) -> None:
    labels, spec = template(documents)["metadata"]["labels"], pod(documents)
    (deployment,) = of_kind(documents, "Deployment").values()
    assert selects(deployment["spec"]["selector"], labels)
    assert all(selects(spread["labelSelector"], labels) for spread in spec["topologySpreadConstraints"])
    for service in of_kind(documents, "Service").values():
        assert selects({"matchLabels": service["spec"]["selector"]}, labels)
        assert [(port["name"], port["targetPort"]) for port in service["spec"]["ports"]] == [("http", "http")]
    assert selects(of_kind(documents, "NetworkPolicy")[NAME]["spec"]["podSelector"], labels)
    assert labels["app.kubernetes.io/name"] == NAME and not selects(
        {"matchLabels": {"app.kubernetes.io/name": NAME}}, publishing()["metadata"]["labels"]
    )


def test_pods_are_asked_by_two_and_ask_nobody(documents: list[Document]) -> None:
    labels = template(documents)["metadata"]["labels"]
    policies = [policy["spec"] for policy in of_kind(documents, "NetworkPolicy").values()]
    of_the_service = [policy for policy in policies if selects(policy["podSelector"], labels)]
    assert [policy["policyTypes"] for policy in of_the_service] == [["Ingress", "Egress"]]
    assert not of_the_service[0].get("egress")
    (rule,) = of_the_service[0]["ingress"]
    namespaces = [peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for peer in rule["from"]]
    assert namespaces == ["ingress-nginx", "monitoring"] and all("podSelector" in peer for peer in rule["from"])
    assert [port["port"] for port in rule["ports"]] == ["http"]
    (closed,) = [policy for policy in policies if selects(policy["podSelector"], publishing()["metadata"]["labels"])]
    assert closed["policyTypes"] == ["Ingress", "Egress"] and not {"ingress", "egress"} & closed.keys()


# What the files and the service must agree on


def test_every_variable_and_line_is_a_setting(documents: list[Document], tmp_path: Path) -> None:
    found, mounted = settings(documents, tmp_path), mounts(pod(documents))
    (container,) = pod(documents)["containers"]
    assert [(port["name"], port["containerPort"]) for port in container["ports"]] == [("http", found.port)]
    assert not found.local and found.keys_file and found.work_dir
    assert "secret" in mounted[str(found.keys_file.parent)] and "emptyDir" in mounted[str(found.work_dir)]
    assert found.bundle.name == found.bundle_sha256
    assert mounted[str(found.bundle.parent)]["persistentVolumeClaim"]["claimName"] == "raresynth-bundles"
    assert {where for where, volume in mounted.items() if not volume["readOnly"]} == {"/work", "/tmp"}
    for where in ("/work", "/tmp"):
        assert "emptyDir" in mounted[where]
    assert mounts(publishing()["spec"])["/bundles"]["persistentVolumeClaim"]["claimName"] == "raresynth-bundles"


def test_a_line_that_is_no_setting_is_found(production: list[Document], tmp_path: Path) -> None:
    changed = copy.deepcopy(production)
    for content in of_kind(changed, "ConfigMap").values():
        if "settings.yaml" in content["data"]:
            content["data"]["settings.yaml"] += "lingers: 3\n"
    with pytest.raises(Exception, match="setting lingers"):
        settings(changed, tmp_path)


def test_probes_ask_for_what_is_there(documents: list[Document]) -> None:
    (container,) = pod(documents)["containers"]
    asked = {name: container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert [probe["path"] for probe in asked.values()] == ["/readyz", "/readyz", "/livez"]
    for probe in asked.values():
        route, _ = find_route("GET", probe["path"])
        assert route and route.access == "public" and probe["port"] == "http"


def test_pods_have_the_time_to_go_down(documents: list[Document], tmp_path: Path) -> None:
    found, spec = settings(documents, tmp_path), pod(documents)
    assert "lifecycle" not in spec["containers"][0], "a preStop hook's time would count too"
    assert spec["terminationGracePeriodSeconds"] >= found.linger_s + found.drain_s + 5
    # A request that is taken at the last moment may send its body, and then be worked on, for as long as any.
    assert found.drain_s >= found.body_timeout_s + found.timeout_s
    probe = spec["containers"][0]["readinessProbe"]
    assert found.linger_s > probe["periodSeconds"] * probe["failureThreshold"]
    (deployment,) = of_kind(documents, "Deployment").values()
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_pods_have_the_memory_and_disk_that_the_limits_allow(documents: list[Document], tmp_path: Path) -> None:
    found, spec = settings(documents, tmp_path), pod(documents)
    resources = spec["containers"][0]["resources"]
    assert n_bytes(resources["requests"]["memory"]) >= 600e6
    decoded = found.threads * found.max_megapixels * 3e6
    assert n_bytes(resources["limits"]["memory"]) >= 600e6 + found.max_buffered_mb * 1e6 + decoded
    sizes = {
        volume["name"]: n_bytes(volume["emptyDir"]["sizeLimit"]) for volume in spec["volumes"] if "emptyDir" in volume
    }
    assert sizes["work"] >= (found.kept_results + 1) * 10_000 * 128 * 128 * 3
    assert n_bytes(resources["limits"]["ephemeral-storage"]) >= sum(sizes.values())


# Production alone


def test_there_are_always_several_pods(production: list[Document]) -> None:
    (deployment,) = of_kind(production, "Deployment").values()
    assert "replicas" not in deployment["spec"], "each apply would undo what the autoscaler did"
    (scaler,) = of_kind(production, "HorizontalPodAutoscaler").values()
    assert scaler["spec"]["minReplicas"] >= 2
    assert scaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": NAME}
    (budget,) = of_kind(production, "PodDisruptionBudget").values()
    assert budget["spec"]["maxUnavailable"] == 1
    assert selects(budget["spec"]["selector"], template(production)["metadata"]["labels"])
    (priority,) = of_kind(production, "PriorityClass")
    assert pod(production)["priorityClassName"] == priority


def test_it_is_scaled_by_a_metric_that_there_is(production: list[Document]) -> None:
    (scaler,) = of_kind(production, "HorizontalPodAutoscaler").values()
    (name,) = [metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"] if metric["type"] == "Pods"]
    assert name in {family.name for family in REGISTRY.collect()} and name == metrics.in_flight.describe()[0].name
    (block,) = re.findall(r"```yaml\n(rules:.*?)```", (SERVING / "README.md").read_text(), re.DOTALL)
    (rule,) = yaml.safe_load(block)["rules"]
    assert rule["seriesQuery"].partition("{")[0] == name


def test_images_are_held_by_their_digest(production: list[Document]) -> None:
    (container,) = pod(production)["containers"]
    assert re.fullmatch(r"registry\.example/raresynth-serve@sha256:[0-9a-f]{64}", container["image"])


def test_the_ingress_lets_through_what_the_service_takes(production: list[Document], tmp_path: Path) -> None:
    found = settings(production, tmp_path)
    services = of_kind(production, "Service")
    paths: dict[bool, set[str]] = {True: set(), False: set()}
    backends: dict[bool, set[tuple[str, str]]] = {True: set(), False: set()}
    for ingress in of_kind(production, "Ingress").values():
        notes = {name.rpartition("/")[2]: value for name, value in ingress["metadata"]["annotations"].items()}
        assert int(notes["proxy-body-size"].removesuffix("m")) * 2**20 >= found.max_body_mb * 1e6
        assert notes["proxy-request-buffering"] == "off"
        assert int(notes["proxy-read-timeout"]) > found.body_timeout_s + found.timeout_s
        assert "non_idempotent" not in notes["proxy-next-upstream"]
        (tls,), (rule,) = ingress["spec"]["tls"], ingress["spec"]["rules"]
        assert tls["hosts"] == [rule["host"]]
        for path in rule["http"]["paths"]:
            backend = path["backend"]["service"]
            assert backend["port"]["name"] in {port["name"] for port in services[backend["name"]]["spec"]["ports"]}
            hashed = "upstream-hash-by" in notes
            paths[hashed].add(path["path"])
            backends[hashed].add((backend["name"], backend["port"]["name"]))
    assert not backends[True] & backends[False], "ingress-nginx has one rule for each service and port"
    # What a pod keeps to itself.
    own = {
        "/" + route.path.split("/")[1] for route in ROUTES if route.path.startswith(("/generate_batch", "/generated"))
    }
    assert paths[True] == own


def test_each_pod_is_watched_once(production: list[Document]) -> None:
    (monitor,) = of_kind(production, "ServiceMonitor").values()
    found = {
        name
        for name, service in of_kind(production, "Service").items()
        if selects(monitor["spec"]["selector"], service["metadata"]["labels"])
    }
    assert found == {NAME}


# Bundles


def pin(folder: Path, sha256: str) -> list[Document]:
    """The production overlay with another bundle."""
    shutil.copytree(SERVING, folder)
    path = folder / "overlays/production/kustomization.yaml"
    text, n = re.subn(r"sha256=[0-9a-f]{64}", f"sha256={sha256}", path.read_text())
    assert n == 1, "the bundle is pinned in one place"
    path.write_text(text)
    return build(path.parent)


def test_another_bundle_or_setting_makes_new_pods(production: list[Document], tmp_path: Path) -> None:
    changed = pin(tmp_path / "serving", "5" * 64)
    assert template(changed) != template(production)
    assert environment(changed)["RARESYNTH_SERVING_BUNDLE"] == f"/bundles/{'5' * 64}"
    path = tmp_path / "serving/base/settings.yaml"
    path.write_text(path.read_text() + "max_requests: 32\n")
    assert template(build(tmp_path / "serving/overlays/production")) != template(changed)


def test_what_is_published_is_the_bundle_and_nothing_else(
    accepted_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, folder = tmp_path / "bundle", tmp_path / "bundles"
    shutil.copytree(accepted_bundle, bundle)
    (bundle / "notes.txt").write_text("not the bundle's")
    assert main([str(bundle), str(folder)]) == 0
    sha256 = capsys.readouterr().out.strip()
    assert [path.name for path in folder.iterdir()] == [sha256]
    files = {path.relative_to(bundle) for path in bundle.rglob("*") if path.is_file()} - {Path("notes.txt")}
    assert {path.relative_to(folder / sha256) for path in (folder / sha256).rglob("*") if path.is_file()} == files
    assert publish(bundle, folder) == sha256
    graph = folder / sha256 / "classifier/model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.onnx is missing or was changed"):
        publish(bundle, folder)
    (bundle / "bundle.json").write_text("{}")
    assert main([str(bundle), str(folder / "other")]) == 2
    assert capsys.readouterr().err.startswith("cannot publish: ")
    assert not (folder / "other").exists()


@pytest.mark.slow
def test_the_service_starts_as_the_deployment_starts_it(accepted_bundle: Path, tmp_path: Path) -> None:
    sha256 = publish(accepted_bundle, tmp_path / "bundles")
    documents = pin(tmp_path / "serving", sha256)
    key = {"someone": {"sha256": hashlib.sha256(b"key").hexdigest(), "scopes": ["predict"]}}
    for name, content in (
        ("settings/settings.yaml", settings_file(documents)),
        ("keys/keys.yaml", yaml.safe_dump(key)),
    ):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(content)
    variables = {
        name: f"{tmp_path}{value}" if value.startswith("/") else value for name, value in environment(documents).items()
    }
    served = start(tmp_path / "log", environment_of_tests(port=free_port(), linger_s=0) | variables)
    try:
        wait_until_ready(served)
        headers = {"Authorization": "Bearer key"}
        answer = httpx.post(f"{served.url}/predict", headers=headers, files={"image": ("a.jpg", encoded())})
        assert answer.json()["versions"]["bundle"] == sha256
        assert httpx.post(f"{served.url}/predict", files={"image": ("a.jpg", encoded())}).status_code == 401
    finally:
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"bundles", "serving", "settings", "keys", "log", "work"}
