"""A package is uploaded once and run as often as asked; what is wrong is said before anything is sent."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import kfp
import kfp_api
import pytest
import urllib3
import yaml
from kfp import compiler, dsl
from kfp.dsl import base_component
from kfp_stand_in import KfpStandIn
from werkzeug.wrappers import Response

from pipelines import cluster, submit
from pipelines.arguments import ArgumentsError, PackageError, read_arguments, read_package
from pipelines.augmentation import build
from pipelines.cluster import ClusterError
from pipelines.placement import on_cluster
from pipelines.submit import Request
from raresynth import __version__
from raresynth.config import ComputeConfig, ParamsFile
from raresynth.lineage import sha256_file

ROOT = Path(__file__).parents[1]
ARGUMENTS = [
    "text=a=b",
    "number=3",
    "share=0.5",
    "flag=true",
    'labels=["df", "vasc"]',
    'overrides={"gan": {"width": 16}, "seed": 7}',
]
VALUES = {
    "text": "a=b",
    "number": 3,
    "share": 0.5,
    "flag": True,
    "labels": ["df", "vasc"],
    "overrides": {"gan": {"width": 16}, "seed": 7},
}


@dsl.component(base_image="train", packages_to_install=[], install_kfp_package=False)
def show(text: str):
    print(text)


@dsl.component(base_image="train", packages_to_install=[], install_kfp_package=False)
def read(data: dsl.Input[dsl.Dataset]):
    print(data.uri)


@dsl.pipeline(name="inner", description="A loop in a pipeline of its own.")
def inner(labels: list):
    with dsl.ParallelFor(labels) as label:
        show(text=label)


@dsl.pipeline(name="every-type", description="Takes a parameter of every type.")
def every_type(
    text: str,
    number: int,
    share: float,
    flag: bool,
    labels: list,
    overrides: dict,
    note: str = "none",
    often: int = 1,
):
    show(text=text)
    inner(labels=labels)


@dsl.pipeline(name="plain")
def plain(overrides: str = "{}"):
    show(text=overrides)


@dsl.pipeline(name="takes-artifact")
def takes_artifact(data: dsl.Input[dsl.Dataset]):
    read(data=data)


def compiled(pipeline: base_component.BaseComponent, path: Path) -> Path:
    compiler.Compiler().compile(pipeline, str(path))
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(every_type, tmp_path_factory.mktemp("package") / "every-type.yaml")


@pytest.fixture
def stand_in() -> Iterator[KfpStandIn]:
    with KfpStandIn() as server:
        yield server


@pytest.fixture(autouse=True)
def _of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of this machine's own cluster, and no waiting between two looks at a run."""
    for name in ("ENDPOINT", "UI_ENDPOINT", "SA_TOKEN_PATH"):
        monkeypatch.delenv(f"KF_PIPELINES_{name}", raising=False)
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    monkeypatch.setattr(cluster, "_LAST_POLL_S", 0.01)
    monkeypatch.setattr(cluster, "_FIRST_POLL_S", 0.01)


def request(package: Path, server: KfpStandIn, **asked: object) -> Request:
    given = {"package": str(package), "arguments": ARGUMENTS, "service_account": "trainer", "host": server.url}
    return Request(**{**given, **asked})


def test_a_run_is_asked_for_with_exactly_what_was_given(
    package: Path, stand_in: KfpStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.submit(request(package, stand_in, run="first", experiment="rare")) == 0
    ((pipeline_id, pipeline),) = stand_in.pipelines.items()
    ((version_id, version),) = stand_in.versions.items()
    ((experiment_id, experiment),) = stand_in.experiments.items()
    ((run_id, _),) = stand_in.runs.items()
    assert stand_in.bodies("run_service_create_run") == [
        {
            "display_name": "first",
            "experiment_id": experiment_id,
            "pipeline_version_reference": {"pipeline_id": pipeline_id, "pipeline_version_id": version_id},
            "runtime_config": {"parameters": VALUES},
            "service_account": "trainer",
        }
    ]
    assert (pipeline["name"], pipeline["description"]) == ("every-type", "Takes a parameter of every type.")
    assert version["name"] == f"{__version__}-{sha256_file(package)[:12]}"
    assert experiment["display_name"] == "rare"
    assert stand_in.packages[version_id] == package.read_text()
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"pipeline every-type: version {version['name']} uploaded",
        f"run first ({run_id}) -> {stand_in.url}/#/runs/details/{run_id}",
    ]


def test_the_same_package_is_uploaded_once_and_a_changed_one_again(
    package: Path, stand_in: KfpStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        submit.submit(request(package, stand_in))
    assert [len(kept) for kept in (stand_in.pipelines, stand_in.versions, stand_in.experiments)] == [1, 1, 1]
    assert len(stand_in.runs) == 2
    assert "is there already" in capsys.readouterr().out
    changed = tmp_path / package.name
    changed.write_text(package.read_text().replace("image: train", "image: train-2"))
    submit.submit(request(changed, stand_in))
    assert [len(kept) for kept in (stand_in.pipelines, stand_in.versions, stand_in.runs)] == [1, 2, 3]
    versions = [body["pipeline_version_reference"] for body in stand_in.bodies("run_service_create_run")]
    assert versions[0] == versions[1] != versions[2]


def caching(package: str) -> set[bool]:
    """Whether the tasks of a package are cached, those in loops and nested pipelines too."""
    spec = next(yaml.safe_load_all(package))
    dags = [one["dag"] for one in (spec["root"], *spec["components"].values()) if "dag" in one]
    tasks = [task for dag in dags for task in dag["tasks"].values()]
    run = [task for task in tasks if "executorLabel" in spec["components"][task["componentRef"]["name"]]]
    return {task.get("cachingOptions", {}).get("enableCache", False) for task in run}


def test_without_cache_a_version_is_run_that_caches_nothing(package: Path, stand_in: KfpStandIn) -> None:
    submit.submit(request(package, stand_in))
    submit.submit(request(package, stand_in, cache=False))
    submit.submit(request(package, stand_in, cache=False))
    cached, uncached = stand_in.packages.values()
    assert (caching(cached), caching(uncached)) == ({True}, {False})
    names = [version["name"] for version in stand_in.versions.values()]
    assert names[1] == f"{names[0]}-uncached"
    one, two, three = (body["pipeline_version_reference"] for body in stand_in.bodies("run_service_create_run"))
    assert one != two == three
    differing = [
        a for a, b in zip(*(list(yaml.safe_load_all(text)) for text in (cached, uncached)), strict=True) if a != b
    ]
    assert [sorted(document) for document in differing] == [
        ["components", "deploymentSpec", "pipelineInfo", "root", "schemaVersion", "sdkVersion"]
    ]


def test_the_flow_itself_is_submitted(stand_in: KfpStandIn, tmp_path: Path) -> None:
    path = compiled(build(ComputeConfig(), on_cluster(ParamsFile(), gpu=False)), tmp_path / "augmentation.yaml")
    needed = [name for name, parameter in read_package(path).parameters.items() if parameter.required]
    assert submit.submit(request(path, stand_in, arguments=[f"{name}=x" for name in needed], cache=False)) == 0
    assert caching(next(iter(stand_in.packages.values()))) == {False}
    (run,) = stand_in.runs.values()
    assert run["runtime_config"]["parameters"] == dict.fromkeys(needed, "x")


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("number=3.5", "number is '3.5', which is no whole number"),
        ("number=true", "number is 'true', which is no whole number"),
        ("number=three", "number is 'three', which is no whole number"),
        ("number=9007199254740993", "exact up to 2"),
        ("share=NaN", "share is 'NaN': Out of range"),
        ("share=1e999", "share is '1e999': Out of range"),
        ("share=", "share is '', which is no number"),
        ("flag=yes", "flag is 'yes', which is no truth value"),
        ("flag=1", "flag is '1', which is no truth value"),
        ("labels=df,vasc", "labels is 'df,vasc', which is no JSON list"),
        ('labels={"df": 1}', "which is no JSON list"),
        ("overrides=[]", "which is no JSON object"),
        ('overrides={"gan": {"depth": 3}}', r"overrides holds gan\.depth: Extra inputs are not permitted"),
        ('overrides={"gan": {"width": -1}, "sed": 1}', r"gan\.width: Input should be greater.*; sed: Extra"),
        ("txet=a", "txet is no parameter, did you mean text?"),
        ("text", "text is not of the form NAME=VALUE"),
    ],
)
def test_a_wrong_argument_is_named(package: Path, argument: str, sentence: str) -> None:
    name = argument.partition("=")[0]
    given = [one for one in ARGUMENTS if one.split("=")[0] != name] + [argument]
    with pytest.raises(ArgumentsError, match=sentence):
        read_arguments(read_package(package), given)


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_sent(package: Path, stand_in: KfpStandIn) -> None:
    given = ["numbr=3", "flag=maybe", "text=a", "text=b", "labels=[", "often=2"]
    with pytest.raises(ArgumentsError) as refused:
        submit.submit(request(package, stand_in, arguments=given))
    *problems, sent, _ = str(refused.value).split("; ")
    assert [problem.split(",")[0].split(" is '")[0] for problem in problems] == [
        "numbr is no parameter",
        "flag",
        "text is given twice",
        "labels",
        "number is missing",
        "overrides is missing",
        "share is missing",
    ]
    assert sent == "nothing was sent"
    assert "number (NUMBER_INTEGER)" in str(refused.value)
    assert stand_in.asked == []


def test_numbers_keep_their_type(package: Path) -> None:
    values = read_arguments(read_package(package), [*ARGUMENTS[3:], "text=5", "number=-2", "share=2", "often=0"])
    assert {name: values[name] for name in ("text", "number", "share", "often")} == {
        "text": "5",
        "number": -2,
        "share": 2,
        "often": 0,
    }


def test_overrides_in_a_text_are_checked_too(tmp_path: Path) -> None:
    package = read_package(compiled(plain, tmp_path / "plain.yaml"))
    assert read_arguments(package, []) == {}
    # Rules between knobs depend on the preset below: 0.9 alone does not add up to 1, and need not.
    text = '{"dataset": {"splits": {"train": 0.9}, "csv": {"file": "a.csv"}}}'
    assert read_arguments(package, [f"overrides={text}"]) == {"overrides": text}
    with pytest.raises(ArgumentsError, match=r"gan\.depth"):
        read_arguments(package, ['overrides={"gan": {"depth": 3}}'])
    with pytest.raises(ArgumentsError, match="no JSON object"):
        read_arguments(package, ["overrides=gan.depth"])


@pytest.mark.parametrize("text", ["", "seed: 1\n", "- a\n", "{", "root: {}\n", "\0"])
def test_a_file_that_is_no_package(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(PackageError, match=r"params\.yaml is no compiled KFP 2 package"):
        read_package(path)


def test_a_package_that_cannot_be_run(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"absent\.yaml: No such file"):
        read_package(tmp_path / "absent.yaml")
    with pytest.raises(PackageError, match=r"takes artifacts \(data\)"):
        read_package(compiled(takes_artifact, tmp_path / "artifact.yaml"))


@pytest.mark.parametrize(
    ("host", "sentence"),
    [
        (None, "no cluster is named"),
        ("pipelines.example.org", "is no URL"),
        ("http://[::1", "is no URL"),
        ("http://localhost:port", "is no URL"),
        ("http://localhost@example.org", "unencrypted; use https"),
        ("http://pipelines.example.org", "unencrypted; use https"),
        ("http://10.0.0.1:8888", "unencrypted; use https"),
    ],
)
def test_hosts_that_are_refused(package: Path, host: str | None, sentence: str) -> None:
    with pytest.raises(ClusterError, match=sentence):
        submit.submit(Request(str(package), ARGUMENTS, "trainer", host))


@pytest.mark.parametrize(
    "host", ["https://a.org/", "http://localhost:1", "http://[::1]:1", "http://ml-pipeline.kubeflow.svc:1"]
)
def test_hosts_that_are_taken(host: str) -> None:
    assert cluster.endpoint(host, plain_http=False) == host.rstrip("/")
    assert cluster.endpoint("http://a.org", plain_http=True) == "http://a.org"


def test_the_host_and_the_page_come_from_kfps_variables(
    package: Path, stand_in: KfpStandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", stand_in.url)
    monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://ui.example.org")
    assert submit.submit(Request(str(package), ARGUMENTS, "trainer")) == 0
    (run_id,) = stand_in.runs
    assert f"https://ui.example.org/#/runs/details/{run_id}" in capsys.readouterr().out


def test_a_token_is_read_from_its_file(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token"
    with KfpStandIn(token="let-me-in") as server:
        with pytest.raises(ClusterError, match=r"401 UNAUTHORIZED .*no user identity.* KF_PIPELINES_SA_TOKEN_PATH"):
            submit.submit(request(package, server))
        monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(path))
        with pytest.raises(OSError, match="token"):
            submit.submit(request(package, server))
        path.write_text("let-me-in")
        assert submit.submit(request(package, server)) == 0


def test_users_kept_apart_need_a_namespace(package: Path) -> None:
    with KfpStandIn(several_users=True) as server:
        with pytest.raises(ClusterError, match="name your namespace with --namespace"):
            submit.submit(request(package, server))
        for namespace in ("ann", "ben", "ben"):
            assert submit.submit(request(package, server, namespace=namespace)) == 0
        kept = (server.pipelines, server.experiments)
        assert [[one["namespace"] for one in of_kind.values()] for of_kind in kept] == [["ann", "ben"], ["ann", "ben"]]


def failure(status: int, message: str = "", key: str = "message") -> Response:
    return Response(json.dumps({key: message}), status, content_type="application/json")


@pytest.mark.parametrize(
    ("operation", "answer", "sentence"),
    [
        ("healthz_service_get_healthz", failure(403, "no"), r"403 FORBIDDEN \(no\); ask for the right"),
        ("healthz_service_get_healthz", failure(503, "no upstream"), "503 SERVICE UNAVAILABLE .*try again later"),
        ("healthz_service_get_healthz", failure(404), "404 NOT FOUND; is it the address"),
        ("healthz_service_get_healthz", Response("<html>", 200), "something else than JSON; is it the address"),
        ("healthz_service_get_healthz", Response("Bad Gateway", 502), "502 BAD GATEWAY; look into the log"),
        ("pipeline_service_get_pipeline_by_name", failure(500, "database"), r"\(database\); look into the log"),
        ("pipeline_service_create_pipeline", failure(409, "exists"), r"409 CONFLICT \(exists\); someone submitted it"),
        ("upload_pipeline_version", failure(400, "denied", "error_message"), r"400 BAD REQUEST \(denied\); correct"),
        ("run_service_create_run", failure(400, "archived"), r"400 BAD REQUEST \(archived\); correct what it names"),
    ],
)
def test_an_error_of_the_api_is_one_sentence(
    package: Path, stand_in: KfpStandIn, operation: str, answer: Response, sentence: str
) -> None:
    stand_in.failures[operation] = [answer]
    with pytest.raises(ClusterError, match=sentence) as refused:
        submit.submit(request(package, stand_in))
    assert str(refused.value).startswith(stand_in.url)
    assert stand_in.runs == {}


def test_a_host_that_is_not_there(package: Path, stand_in: KfpStandIn) -> None:
    with pytest.raises(ClusterError, match="Connection refused; check the address"):
        submit.submit(request(package, stand_in, host="http://127.0.0.1:1"))
    with pytest.raises(ClusterError, match=r"cannot trust https.*SSL_CERT_FILE"):
        submit.submit(request(package, stand_in, host=stand_in.url.replace("http", "https")))


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("SUCCEEDED", 0, ""),
        ("FAILED", 1, "the run ended FAILED (child 'train' failed; failed tasks: root, train)"),
        ("CANCELED", 1, "the run ended CANCELED: http"),
    ],
)
def test_waiting_ends_with_the_run(
    package: Path,
    stand_in: KfpStandIn,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    end: str,
    code: int,
    said: str,
) -> None:
    stand_in.course = ["PENDING", "RUNNING", "RUNNING", end]
    stand_in.failures["run_service_get_run"] = [failure(503), None, failure(502), None]
    monkeypatch.setattr(cluster, "_PATIENCE", 1)  # no two failures in a row
    assert submit.submit(request(package, stand_in, wait=True)) == code
    out, err = capsys.readouterr()
    assert [line.split()[-1] for line in out.splitlines()[2:]] == ["PENDING", "RUNNING", end]
    assert (said in err) and bool(said) == bool(err)


def test_waiting_has_an_end_where_the_server_does_not_come_back(package: Path, stand_in: KfpStandIn) -> None:
    stand_in.failures["run_service_get_run"] = [failure(503)] * 100
    with pytest.raises(ClusterError, match="503"):
        submit.submit(request(package, stand_in, wait=True))
    assert len(stand_in.runs) == 1


def test_a_connection_that_breaks_while_a_run_is_started(package: Path, stand_in: KfpStandIn) -> None:
    half = Response(iter([b"{"]), headers={"Content-Length": "9"}, content_type="application/json")
    stand_in.failures["run_service_create_run"] = [half]
    with pytest.raises(ClusterError, match=r"broke .* may have been done: look at the UI"):
        submit.submit(request(package, stand_in))
    assert len(stand_in.bodies("run_service_create_run")) == 1  # never asked for twice


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "raresynth.cli", "submit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_submits_and_waits(package: Path, stand_in: KfpStandIn) -> None:
    stand_in.course = ["SUCCEEDED"]
    options = ["--host", stand_in.url, "--no-cache", "--wait"]
    done = cli(package, *options, *ARGUMENTS)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].endswith(" SUCCEEDED")
    (run,) = stand_in.runs.values()
    manifest = (ROOT / "k8s" / "pipeline" / "base" / "runner.yaml").read_text()
    (account,) = [made for made in yaml.safe_load_all(manifest) if made["kind"] == "ServiceAccount"]
    assert (run["service_account"], run["runtime_config"]["parameters"]) == (account["metadata"]["name"], VALUES)
    assert cli(package, *options, "--service-account", "trainer", *ARGUMENTS).returncode == 0
    assert [run["service_account"] for run in stand_in.runs.values()][1:] == ["trainer"]


def test_the_command_says_what_is_wrong_in_one_sentence(package: Path) -> None:
    done = cli(package, "--host", "http://127.0.0.1:1", *ARGUMENTS)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("raresynth: cannot reach http://127.0.0.1:1: ")


def test_make_hands_its_variables_on() -> None:
    variables = ["HOST=http://localhost:8080", "PACKAGE=a.yaml", "ARGS=revision=main labels='[\"df\"]' --wait"]
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "submit", *variables],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    line = """raresynth submit --host http://localhost:8080 a.yaml revision=main labels='["df"]' --wait"""
    assert done.stdout.splitlines()[-1] == line


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "told"),
    [
        ("POST", "/apis/v2beta1/experiments", {"display_name": "a", "colour": "red"}, 400, "colour"),
        ("POST", "/apis/v2beta1/experiments", {"display_name": 5}, 400, "5 is not of type 'string'"),
        ("POST", "/apis/v2beta1/experiments", {"name": "a"}, 400, "name"),
        ("GET", "/apis/v2beta1/experiments?page_size=ten", None, 400, "page_size"),
        ("GET", "/apis/v2beta1/experiments?order=up", None, 400, "order"),
        ("GET", "/apis/v2beta1/experiments?filter=%7B%22predicate%22%3A%5B%5D%7D", None, 400, "predicate"),
        ("GET", "/apis/v1beta1/experiments", None, 404, "Not Found"),
        ("PUT", "/apis/v2beta1/experiments", {"display_name": "a"}, 405, "Method Not Allowed"),
        ("POST", "/apis/v2beta1/runs", {"display_name": "a", "state": "DONE"}, 400, "'DONE' is not one of"),
        ("POST", "/apis/v2beta1/runs", {"display_name": "a"}, 400, "one pipeline"),
        ("POST", "/apis/v2beta1/pipelines/upload_version?pipelineid=x&name=y", None, 400, "from file"),
    ],
)
def test_the_stand_in_refuses_what_the_schema_does_not_have(
    stand_in: KfpStandIn, method: str, path: str, body: dict | None, status: int, told: str
) -> None:
    answer = urllib3.request(method, stand_in.url + path, json=body)
    assert (answer.status, told in answer.json()["message"]) == (status, True), answer.data


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"number": "3"}, "number requires type NUMBER_INTEGER"),
        ({"flag": 1}, "flag requires type BOOLEAN"),
        ({"more": 1}, "more provided is not an input"),
        ({"text": None}, "text requires type STRING"),
    ],
)
def test_the_stand_in_refuses_what_does_not_fit_the_pipeline(
    package: Path, stand_in: KfpStandIn, change: dict, told: str
) -> None:
    submit.submit(request(package, stand_in))
    (body,) = stand_in.bodies("run_service_create_run")
    body["runtime_config"]["parameters"] = {**VALUES, **change}
    answer = urllib3.request("POST", f"{stand_in.url}/apis/v2beta1/runs", json=body)
    assert (answer.status, told in answer.json()["message"]) == (400, True), answer.data
    missing = {name: value for name, value in VALUES.items() if name != "text"}
    body["runtime_config"]["parameters"] = missing
    assert urllib3.request("POST", f"{stand_in.url}/apis/v2beta1/runs", json=body).status == 400


def test_the_published_schema_has_what_its_swagger_has() -> None:
    """Compared by eye with the swagger definition that kubeflow/pipelines publishes."""
    operations = {operation.name: operation for operation in kfp_api.operations()}
    upload = operations["upload_pipeline_version"]
    assert (upload.method, upload.path) == ("POST", "/apis/v2beta1/pipelines/upload_version")
    assert set(upload.query) == {"name", "display_name", "pipelineid", "description", "tags"}
    assert (upload.files, upload.body, upload.response) == ({"uploadfile"}, None, "V2beta1PipelineVersion")
    create = operations["run_service_create_run"]
    assert (create.method, create.path, create.body) == ("POST", "/apis/v2beta1/runs", "V2beta1Run")
    kfp_api.check({"run_details": {"task_details": [{"state": "FAILED", "state_history": []}]}}, "V2beta1Run")
    for wrong in ({"run_details": {"task_details": [{"state": "BROKEN"}]}}, {"created_at": "yesterday"}, {"id": "1"}):
        with pytest.raises(jsonschema.ValidationError):
            kfp_api.check(wrong, "V2beta1Run")
