"""The compiled packages: what a person sees in the form, where each task runs, and the traps of kfp that they avoid."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from kfp import dsl

from components import entry
from pipelines.compile import compile_packages
from pipelines.placement import GIT_SECRET, USER
from raresynth.config import Params, load_params_file
from raresynth.lineage import code_hash

ROOT = Path(__file__).parents[1]
TRAINING = {
    "train-encoder",
    "pretrain",
    "finetune",
    "draw",
    "synthesize",
    "synthesize-majority",
    "measure",
    "train-classifier",
    "evaluate",
}
STAGES = TRAINING | {"probe", "build-manifest", "validate", "gate", "package", "report"}
PARAMS = """
compute: {parallel_tasks: 5, ranks: 3}
cluster:
  image: registry.example/raresynth-train@sha256:0123
  volume_claim: shared
  data_secret: remote
  git_read_secret: reads
  git_write_secret: writes
  light: {cpu: 500m, memory: 2Gi, shared_memory: 64Mi}
  training: {cpu: "8", memory: 32Gi, shared_memory: 4Gi}
  gpu:
    type: vendor.example/gpu
    count: 2
    node_selector: {pool: gpus}
    tolerations: [{key: only, operator: Equal, value: gpus, effect: NoExecute}]
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict, dict]]:
    """Package -> its two documents: the graph, and what is particular to Kubernetes."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "params.yaml").write_text(PARAMS)
    paths = compile_packages(folder / "params.yaml", folder / "compiled")
    return {path.stem: tuple(yaml.safe_load_all(path.read_text())) for path in paths}


def executors(documents: tuple[dict, dict]) -> dict[str, tuple[dict, dict]]:
    """Component -> its container, and its Kubernetes settings."""
    spec, platform = documents
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    found: dict[str, tuple[dict, dict]] = {}
    for name, executor in spec["deploymentSpec"]["executors"].items():
        found[name.removeprefix("exec-")] = (executor["container"], settings[name])
    return found


def tasks(spec: dict) -> Iterator[tuple[str, dict]]:
    for component in [spec["root"], *spec["components"].values()]:
        yield from component.get("dag", {}).get("tasks", {}).items()


def test_there_is_a_package_for_cpu_and_one_for_gpu_nodes(packages: dict) -> None:
    assert list(packages) == ["augmentation-cpu", "augmentation-gpu", "synthesis"]
    assert set(executors(packages["augmentation-cpu"])) > STAGES


def test_every_input_of_the_form_is_described_and_has_a_default_where_it_can(packages: dict) -> None:
    for spec, _ in packages.values():
        inputs = spec["root"]["inputDefinitions"]["parameters"]
        assert all(len(entry["description"]) > 15 for entry in inputs.values())
        assert {name for name, entry in inputs.items() if "defaultValue" not in entry} <= {"repository"}
        assert spec["pipelineInfo"]["description"] and spec["pipelineInfo"]["displayName"]
    form = packages["augmentation-cpu"][0]["root"]["inputDefinitions"]["parameters"]
    assert set(form) == {"repository", "revision", "path", "preset", "resolution", "classes", "overrides", "name"}


def test_the_form_names_the_presets_that_there_are(packages: dict) -> None:
    from raresynth.config import preset_names

    said = packages["augmentation-cpu"][0]["root"]["inputDefinitions"]["parameters"]["preset"]["description"]
    assert all(name in said for name in preset_names())


def test_every_task_runs_the_one_image_as_the_one_user_with_nothing_installed(packages: dict) -> None:
    for documents in packages.values():
        for container, settings in executors(documents).values():
            assert container["image"] == "registry.example/raresynth-train@sha256:0123"
            assert "pip install" not in " ".join(container["command"])
            assert settings["securityContext"] == {
                "runAsUser": str(USER),
                "runAsGroup": str(USER),
                "runAsNonRoot": True,
            }
            assert [mount["mountPath"] for mount in settings["pvcMount"]] == ["/store"]
            assert settings["pvcMount"][0]["pvcNameParameter"]["runtimeValue"]["constant"] == "shared"


def test_resources_come_from_the_params(packages: dict) -> None:
    for name, (container, settings) in executors(packages["augmentation-gpu"]).items():
        resources, memory = container["resources"], settings["emptyDirMounts"][0]
        cpu, size, shared = ("8", "32Gi", "4Gi") if name in TRAINING else ("500m", "2Gi", "64Mi")
        if name == "pretrain":
            cpu, size, shared = "24", "96Gi", "12Gi"  # of three ranks
        assert resources["resourceCpuLimit"] == resources["resourceCpuRequest"] == cpu
        assert resources["resourceMemoryLimit"] == resources["resourceMemoryRequest"] == size
        assert (memory["mountPath"], memory["medium"], memory["sizeLimit"]) == ("/dev/shm", "Memory", shared)
        assert settings["podMetadata"]["labels"]["raresynth/stage"] == name


def test_gpus_go_to_training_tasks_of_the_gpu_package_alone(packages: dict) -> None:
    for package, documents in packages.items():
        for name, (container, settings) in executors(documents).items():
            gets = package == "augmentation-gpu" and name in TRAINING - {"measure"}
            assert ("accelerator" in container["resources"]) == gets
            assert (settings["podMetadata"]["labels"].get("raresynth/gpu") == "true") == gets
            assert ("tolerations" in settings) == ("nodeSelector" in settings) == gets
            if gets:
                accelerator = container["resources"]["accelerator"]
                count = "6" if name == "pretrain" else "2"
                assert (accelerator["resourceType"], accelerator["resourceCount"]) == ("vendor.example/gpu", count)
                assert settings["nodeSelector"]["labels"] == {"pool": "gpus"}
                assert settings["tolerations"] == [
                    {"key": "only", "operator": "Equal", "value": "gpus", "effect": "NoExecute"}
                ]


def test_a_run_has_the_ranks_that_its_package_gives_pretrain_room_for(
    packages: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = packages["augmentation-gpu"][0]["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    ranks = int(flow["choose-params"]["inputs"]["parameters"]["ranks"]["runtimeValue"]["constant"])

    def chosen(overrides: str) -> str:
        shown = dsl.Markdown(uri=str(tmp_path / "chosen.md"))
        form = {"preset": "demo", "resolution": 0, "classes": [], "overrides": overrides, "name": "run"}
        return entry.choose_params.python_func(**form, code=code_hash(""), ranks=ranks, chosen=shown)

    for overrides in ("{}", '{"compute": {"threads": 2, "ranks": 3}}'):
        assert Params.model_validate_json(chosen(overrides)).compute.ranks == 3
    with pytest.raises(SystemExit):
        chosen('{"compute": {"ranks": 4}}')
    said = capsys.readouterr().err
    assert "compute.ranks to 4, and this package gives pretrain room for 3" in said and said.count("\n") == 1


def test_secrets_are_named_and_reach_two_tasks_only(packages: dict) -> None:
    given = {
        (name, mount["secretNameParameter"]["runtimeValue"]["constant"])
        for documents in packages.values()
        for name, (_, settings) in executors(documents).items()
        for mount in [*settings.get("secretAsEnv", []), *settings.get("secretAsVolume", [])]
    }
    assert given == {
        ("fetch-data", "remote"),
        ("fetch-data", "reads"),
        ("publish-data", "remote"),
        ("publish-data", "writes"),
    }


def test_git_reads_its_credentials_from_the_secret_and_leaves_it_alone(packages: dict, tmp_path: Path) -> None:
    container, _ = executors(packages["augmentation-cpu"])["fetch-data"]
    given = {entry["name"]: entry["value"].replace(GIT_SECRET, str(tmp_path)) for entry in container["env"]}
    secret = tmp_path / ".git-credentials"
    secret.write_text("https://reader:token@git.example\n")
    told = "protocol=https\nhost=git.example\nusername=reader\npassword=token\n"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "absent"), "GIT_TERMINAL_PROMPT": "0", **given}

    def credential(action: str, asked: str) -> str:
        command = ["git", "credential", action]
        done = subprocess.run(command, env=environment, input=asked, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    assert credential("fill", "protocol=https\nhost=git.example\n") == told
    assert credential("approve", told) == credential("reject", told) == ""
    assert secret.read_text() == "https://reader:token@git.example\n"
    assert [file.name for file in tmp_path.iterdir()] == [secret.name]


def test_code_and_data_version_enter_every_cache_key(packages: dict) -> None:
    spec = packages["augmentation-cpu"][0]
    seen = set()
    for name, task in tasks(spec):
        if name in STAGES:
            seen.add(name)
            assert {"code", "data", "params"} <= set(task["inputs"]["parameters"])
    assert seen == STAGES
    wired = {
        name: task["inputs"]["parameters"]
        for name, task in spec["components"]["comp-exit-handler-1"]["dag"]["tasks"].items()
        if "code" in task["inputs"]["parameters"]
    }
    for name, inputs in wired.items():
        assert inputs["code"]["runtimeValue"]["constant"] == code_hash("")
        assert name == "choose-params" or inputs["data"]["taskOutputParameter"]["producerTask"] == "fetch-data"


def test_what_reads_more_than_its_inputs_name_is_never_cached(packages: dict) -> None:
    never = {
        name
        for spec, _ in packages.values()
        for name, task in tasks(spec)
        if "enableCache" not in task.get("cachingOptions", {})
        and spec["components"][task["componentRef"]["name"]].get("executorLabel")
    }
    assert never >= {"fetch-data", "open-bundle", "generate", "publish-data"}
    # Those of the classes, which are tried again after an error; what reads theirs; and the last.
    assert never & STAGES == {"finetune", "draw", "synthesize", "measure", "gate", "report"}


def test_loops_have_the_parallelism_of_the_params_and_retry_nothing(packages: dict) -> None:
    for spec, _ in packages.values():
        loops = [task for _, task in tasks(spec) if "parameterIterator" in task]
        assert loops and all(task["iteratorPolicy"]["parallelismLimit"] == 5 for task in loops)
        assert not any("retryPolicy" in task for _, task in tasks(spec))


def test_an_exit_handler_writes_how_the_run_ended(packages: dict) -> None:
    for spec, _ in packages.values():
        tasks = spec["root"]["dag"]["tasks"]
        (end,) = [task for task in tasks.values() if task.get("triggerPolicy")]
        assert end["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
        assert end["inputs"]["parameters"]["status"]["taskFinalStatus"]["producerTask"] in tasks
        assert set(tasks) == {end["taskInfo"]["name"].lower().replace(" ", "-"), "exit-handler-1"}


def calls(folder: str, name: str) -> list[ast.Call]:
    trees = [ast.parse(path.read_text()) for path in (ROOT / folder).glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node for node in nodes if ast.unparse(node.func).endswith(name)]


def test_the_sources_avoid_the_traps_of_kfp() -> None:
    loops = calls("pipelines", "ParallelFor")
    assert len(loops) == 5 and not any(keyword.arg == "name" for loop in loops for keyword in loop.keywords)
    assert not calls("pipelines", "set_retry") and not calls("pipelines", "Collected")
    for path in (ROOT / "components").glob("*.py"):
        assert "NamedTuple" not in path.read_text() and "from __future__" not in path.read_text()


def test_components_hold_imports_and_one_expression() -> None:
    bodies = {
        function.name: function.body
        for path in (ROOT / "components").glob("*.py")
        for function in ast.parse(path.read_text()).body
        if isinstance(function, ast.FunctionDef)
        and any(ast.unparse(decorator) == "component" for decorator in function.decorator_list)
    }
    assert len(bodies) >= len(STAGES) + 6
    logic = (ast.IfExp, ast.BoolOp, ast.BinOp, ast.Compare, ast.Lambda, ast.comprehension, ast.JoinedStr)
    for name, (docstring, *imports, last) in bodies.items():
        assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant), name
        assert all(isinstance(line, ast.ImportFrom) for line in imports), name
        assert isinstance(last, ast.Expr | ast.Return) and isinstance(last.value, ast.Call), name
        assert not any(isinstance(node, logic) for node in ast.walk(last)), name


def test_make_compile_names_what_it_wrote_and_refuses_in_one_sentence(tmp_path: Path) -> None:
    def compile_with(params: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "pipelines.compile", "--params", params, "--out", tmp_path / "compiled"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = compile_with(ROOT / "params.yaml")
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_file() for line in done.stdout.splitlines())
    (tmp_path / "params.yaml").write_text("cluster: {gpu: {count: 0}}")
    refused = compile_with(tmp_path / "params.yaml")
    assert refused.returncode == 2 and "cluster.gpu.count" in refused.stderr and refused.stderr.count("\n") == 1
    image = load_params_file(ROOT / "params.yaml").cluster.image
    assert image in (tmp_path / "compiled" / "synthesis.yaml").read_text()
