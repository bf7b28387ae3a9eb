"""The cluster files of the pipeline side: they build, they are valid, and they grant no more than they must."""

import copy
import json
import re
from pathlib import Path

import pytest
from kubernetes_schema import Document, ManifestError, build, check, of_kind, selects

PIPELINE = Path(__file__).parents[1] / "k8s/pipeline"
NAMESPACES = {"local": "kubeflow", "production": "raresynth"}
"""Overlay -> the namespace that its runs live in."""
OF_THE_CLUSTER = {"Namespace", "PriorityClass", "MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding"}
"""Kinds in use that belong to no namespace."""
Peer = tuple[str, int]


@pytest.fixture(scope="module")
def overlays() -> dict[str, list[Document]]:
    return {name: build(PIPELINE / "overlays" / name) for name in NAMESPACES}


@pytest.fixture(scope="module", params=sorted(NAMESPACES))
def overlay(request: pytest.FixtureRequest, overlays: dict[str, list[Document]]) -> tuple[str, list[Document]]:
    """Every overlay in turn: its name and its documents."""
    return request.param, overlays[request.param]


@pytest.fixture(scope="module")
def production(overlays: dict[str, list[Document]]) -> list[Document]:
    return overlays["production"]


def test_every_overlay_is_known_here() -> None:
    assert {path.name for path in (PIPELINE / "overlays").iterdir()} == set(NAMESPACES)


def test_every_document_is_valid(overlay: tuple[str, list[Document]]) -> None:
    _, documents = overlay
    assert {"ServiceAccount", "Role", "RoleBinding", "PersistentVolumeClaim"} <= {d["kind"] for d in documents}
    check(documents)


POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "task"},
    "spec": {"containers": [{"name": "main", "image": "registry.example/raresynth:0.1.0"}]},
}


@pytest.mark.parametrize(
    ("kind", "path", "value", "sentence"),
    [
        ("NetworkPolicy", ["spec", "egres"], [], "NetworkPolicy/[a-z-]+: spec: .*'egres' was unexpected"),
        ("ResourceQuota", ["spec", "hard"], ["pods"], "ResourceQuota/raresynth: spec.hard: .*is not of type"),
        ("MutatingAdmissionPolicy", ["spec", "mutation"], [], "'mutation' was unexpected"),
        ("PersistentVolumeClaim", ["spec", "accessModes"], "ReadWriteOnce", "spec.accessModes: 'ReadWriteOnce' is not"),
        ("Role", ["kind"], "Rolle", "Rolle/raresynth-runner: .* has no such kind .* no schema .*rolle-rbac"),
        ("Role", ["apiVersion"], "rbac.authorization.k8s.io/v2", "has no such kind in Kubernetes"),
        ("NetworkPolicy", ["apiVersion"], "networking.example/v1", "'networking.example/v1' is not one of"),
        ("Role", ["apiVersion"], None, "Role/raresynth-runner: has no apiVersion"),
        ("Pod", ["spec", "containers", 0, "image"], "registry.example:5000/raresynth", "no tag that stays"),
        ("Pod", ["spec", "containers", 0, "image"], "raresynth:latest", "image raresynth:latest has no tag that stays"),
    ],
)
def test_a_mistake_is_found_and_named(
    production: list[Document], kind: str, path: list, value: object, sentence: str
) -> None:
    document = copy.deepcopy(next(document for document in [*production, POD] if document["kind"] == kind))
    check([document])
    changed = document
    *outer, last = path
    for key in outer:
        changed = changed[key]
    if value is None:
        del changed[last]
    else:
        changed[last] = value
    with pytest.raises(ManifestError, match=sentence):
        check([document])


def test_an_image_held_by_its_digest_is_fine() -> None:
    pod = copy.deepcopy(POD)
    pod["spec"]["containers"][0]["image"] = f"registry.example:5000/raresynth@sha256:{'0' * 64}"
    check([pod])


def test_a_kind_of_an_operator_needs_a_schema_of_its_own(tmp_path: Path) -> None:
    monitor = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": {"name": "service"},
        "spec": {"endpoints": [{"port": "http"}]},
    }
    with pytest.raises(ManifestError, match=r"no schema .*/servicemonitor-monitoring\.coreos\.com-v1\.json"):
        check([monitor], tmp_path)
    schema = {"properties": {"spec": {"properties": {"endpoints": {"type": "array"}}, "additionalProperties": False}}}
    (tmp_path / "servicemonitor-monitoring.coreos.com-v1.json").write_text(json.dumps(schema))
    check([monitor], tmp_path)
    monitor["spec"]["endpoint"] = []
    with pytest.raises(ManifestError, match=r"ServiceMonitor/service: spec: .*'endpoint' was unexpected"):
        check([monitor], tmp_path)


def test_without_kubectl_a_sentence_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ManifestError, match=r"no kubectl; .* on Debian \d+ the package kubernetes-client"):
        build(PIPELINE / "overlays/local")


def test_a_folder_that_kubectl_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [missing.yaml]\n")
    with pytest.raises(ManifestError, match=r"missing\.yaml"):
        build(tmp_path)


def test_documents_stay_in_the_namespace_of_their_overlay(overlay: tuple[str, list[Document]]) -> None:
    name, documents = overlay
    for document in documents:
        expected = None if document["kind"] in OF_THE_CLUSTER else NAMESPACES[name]
        assert document["metadata"].get("namespace") == expected, document["metadata"]
    other = next(namespace for namespace in NAMESPACES.values() if namespace != NAMESPACES[name])
    found = re.findall(rf'namespace": "{other}"|metadata\.name": "{other}"', json.dumps(documents))
    # Runs in their own namespace talk to Pipelines, and that is all they know of its namespace.
    assert found == ([] if name == "local" else ['metadata.name": "kubeflow"'] * 3)


def test_the_names_that_pipelines_use_exist(overlay: tuple[str, list[Document]]) -> None:
    name, documents = overlay
    modes = of_kind(documents, "PersistentVolumeClaim")["raresynth-store"]["spec"]["accessModes"]
    assert modes == {"local": ["ReadWriteOnce"], "production": ["ReadWriteMany"]}[name]
    assert list(of_kind(documents, "ServiceAccount")) == ["raresynth-runner"]


def test_every_name_that_is_referred_to_exists(overlay: tuple[str, list[Document]]) -> None:
    name, documents = overlay
    for binding in of_kind(documents, "RoleBinding").values():
        assert binding["roleRef"]["kind"] == "Role"
        assert binding["roleRef"]["name"] in of_kind(documents, "Role")
        for subject in binding["subjects"]:
            assert (subject["kind"], subject["namespace"]) == ("ServiceAccount", NAMESPACES[name])
            assert subject["name"] in of_kind(documents, "ServiceAccount")
    policies = of_kind(documents, "MutatingAdmissionPolicy")
    bound = [b["spec"]["policyName"] for b in of_kind(documents, "MutatingAdmissionPolicyBinding").values()]
    assert sorted(bound) == sorted(policies)
    for policy in policies.values():
        selected = policy["spec"]["matchConstraints"]["namespaceSelector"]["matchLabels"]
        assert selected["kubernetes.io/metadata.name"] in of_kind(documents, "Namespace")


def test_the_account_may_do_what_a_run_needs_and_no_more(overlay: tuple[str, list[Document]]) -> None:
    _, documents = overlay
    assert not {"ClusterRole", "ClusterRoleBinding"} & {document["kind"] for document in documents}
    granted = {
        (group, resource, verb, *rule.get("resourceNames", []))
        for role in of_kind(documents, "Role").values()
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert granted == {
        ("argoproj.io", "workflowtaskresults", "create"),
        ("argoproj.io", "workflowtaskresults", "patch"),
        ("", "configmaps", "get", "kfp-launcher"),
        ("", "secrets", "get", "mlpipeline-minio-artifact"),
        ("pipelines.kubeflow.org", "runs", "list"),
        ("pipelines.kubeflow.org", "runs", "createTask"),
    }


def test_no_secret_is_in_the_files(overlay: tuple[str, list[Document]]) -> None:
    _, documents = overlay
    assert "Secret" not in {document["kind"] for document in documents}


def reached(documents: list[Document], labels: dict[str, str]) -> set[Peer] | None:
    """Everything that a pod with the labels may call; None where no policy holds it."""
    policies = [
        policy["spec"]
        for policy in of_kind(documents, "NetworkPolicy").values()
        if "Egress" in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], labels)
    ]
    if not policies:
        return None
    rules = [rule for policy in policies for rule in policy.get("egress", [])]
    return {(peer, port["port"]) for rule in rules for peer in peers(rule) for port in rule["ports"]}


def peers(rule: Document) -> list[str]:
    if "to" not in rule:
        return ["anywhere"]
    return [peer["ipBlock"]["cidr"] if "ipBlock" in peer else pods(peer) for peer in rule["to"]]


def pods(peer: Document) -> str:
    labels = [peer[selector]["matchLabels"] for selector in ("namespaceSelector", "podSelector")]
    return "/".join(value for selected in labels for value in selected.values())


RUN = {"workflows.argoproj.io/workflow": "raresynth-augmentation-x7k2p"}
PIPELINES_AND_CLUSTER = {
    ("kube-system/kube-dns", 53),
    ("kubeflow/ml-pipeline", 8887),
    ("kubeflow/metadata-grpc-server", 8080),
    ("kubeflow/seaweedfs", 8333),
    ("192.0.2.1/32", 6443),
}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({}, set()),
        (RUN, PIPELINES_AND_CLUSTER),
        (RUN | {"raresynth/stage": "pretrain", "raresynth/gpu": "true"}, PIPELINES_AND_CLUSTER),
        (RUN | {"raresynth/stage": "fetch-data"}, PIPELINES_AND_CLUSTER | {("anywhere", 443), ("anywhere", 22)}),
        (RUN | {"raresynth/stage": "publish-data"}, PIPELINES_AND_CLUSTER | {("anywhere", 443), ("anywhere", 22)}),
    ],
    ids=["no task", "driver", "GPU stage", "fetch-data", "publish-data"],
)
def test_pods_reach_what_they_need_and_no_more(
    production: list[Document], labels: dict[str, str], expected: set[Peer]
) -> None:
    assert reached(production, labels) == expected


def test_no_pod_is_reached(production: list[Document]) -> None:
    specs = [policy["spec"] for policy in of_kind(production, "NetworkPolicy").values()]
    assert any(spec["podSelector"] == {} and "Ingress" in spec["policyTypes"] for spec in specs)
    assert not any("ingress" in spec for spec in specs)


def test_gpu_pods_get_the_class_with_the_numbers_it_has(production: list[Document]) -> None:
    gpu = of_kind(production, "PriorityClass")["raresynth-gpu-training"]
    policy = of_kind(production, "MutatingAdmissionPolicy")["raresynth-gpu-priority"]["spec"]
    assert policy["matchConstraints"]["objectSelector"] == {"matchLabels": {"raresynth/gpu": "true"}}
    patches = re.findall(r'path: "/spec/(\w+)", value: "?([\w-]+)', policy["mutations"][0]["jsonPatch"]["expression"])
    assert dict(patches) == {
        "priorityClassName": gpu["metadata"]["name"],
        "priority": str(gpu["value"]),
        "preemptionPolicy": gpu["preemptionPolicy"],
    }


def test_every_task_gets_the_group_that_owns_the_store(production: list[Document]) -> None:
    policy = of_kind(production, "MutatingAdmissionPolicy")["raresynth-store-group"]["spec"]
    (rule,) = policy["matchConstraints"]["objectSelector"]["matchExpressions"]
    assert rule == {"key": "raresynth/stage", "operator": "Exists"}
    assert "fsGroup: 10001," in policy["mutations"][0]["applyConfiguration"]["expression"]


def test_pods_must_be_restricted_and_all_together_bounded(production: list[Document]) -> None:
    labels = of_kind(production, "Namespace")["raresynth"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    hard = of_kind(production, "ResourceQuota")["raresynth"]["spec"]["hard"]
    assert {"requests.cpu", "requests.memory", "requests.nvidia.com/gpu", "requests.storage", "pods"} <= hard.keys()
    # Where a quota counts requests, a container without any is refused.
    (limits,) = of_kind(production, "LimitRange")["raresynth"]["spec"]["limits"]
    assert limits["defaultRequest"].keys() == {"cpu", "memory"}
