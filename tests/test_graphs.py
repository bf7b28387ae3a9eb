"""dvc.yaml, the KFP pipeline and the library's table hold the same stages and the same edges."""

import re
from pathlib import Path

import pytest
import yaml
from kfp import compiler

from pipelines.augmentation import build, build_local
from pipelines.placement import anywhere
from raresynth import flow
from raresynth.config import ComputeConfig

ROOT = Path(__file__).parents[1]
KFP_ONLY = {"choose-params", "fetch-data", "plan-shards", "release-synthetic", "write-outcome"}
Edges = set[tuple[str, str]]

TABLE_EDGES: Edges = {(upstream, name) for name, stage in flow.STAGES.items() for upstream in stage.needs}


def dvc_edges() -> Edges:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    made = {next(iter(out)): name for name, stage in stages.items() for out in stage["outs"]}
    return {(made[dep], name) for name, stage in stages.items() for dep in stage["deps"] if dep in made}


@pytest.fixture(scope="module", params=["augmentation", "local"])
def kfp_spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("kfp") / "pipeline.yaml"
    pipeline = build(ComputeConfig(), anywhere) if request.param == "augmentation" else build_local(2)
    compiler.Compiler().compile(pipeline, str(path))
    return next(yaml.safe_load_all(path.read_text()))


def kfp_edges(spec: dict) -> tuple[set[str], Edges]:
    """Nodes and edges of all executable tasks; a loop stands for the tasks in it."""
    nodes: set[str] = set()
    edges: Edges = set()

    def stage_of(task: dict) -> str:
        return re.sub(r"-\d+$", "", task["componentRef"]["name"].removeprefix("comp-"))

    def tasks_in(task: dict) -> set[str]:
        component = spec["components"][task["componentRef"]["name"]]
        if "dag" not in component:
            return {stage_of(task)}
        return set().union(*(tasks_in(inner) for inner in component["dag"]["tasks"].values()))

    def walk(tasks: dict, outer: dict[str, set[str]]) -> None:
        for task in tasks.values():
            sources: dict[str, set[str]] = {}
            inputs = task.get("inputs", {})
            for name, value in [*inputs.get("artifacts", {}).items(), *inputs.get("parameters", {}).items()]:
                if "taskOutputArtifact" in value or "taskOutputParameter" in value:
                    reference = value.get("taskOutputArtifact") or value["taskOutputParameter"]
                    sources[name] = tasks_in(tasks[reference["producerTask"]])
                else:
                    inherited = value.get("componentInputArtifact") or value.get("componentInputParameter")
                    sources[name] = outer.get(inherited, set())
            waited = [tasks_in(tasks[name]) for name in task.get("dependentTasks", [])]
            component = spec["components"][task["componentRef"]["name"]]
            if "dag" in component:
                walk(component["dag"]["tasks"], sources)
            else:
                nodes.add(stage_of(task))
                edges.update((source, stage_of(task)) for source in set().union(*sources.values(), *waited))

    walk(spec["root"]["dag"]["tasks"], {})
    return nodes, edges


def test_dvc_holds_the_stages_and_edges_of_the_table() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert list(stages) == list(flow.STAGES)
    assert dvc_edges() == TABLE_EDGES


def test_kfp_holds_the_stages_and_edges_of_the_table(kfp_spec: dict) -> None:
    nodes, edges = kfp_edges(kfp_spec)
    assert nodes - KFP_ONLY == set(flow.STAGES)
    assert nodes & KFP_ONLY in (KFP_ONLY, {"release-synthetic"})
    waits_for_the_loop = {("draw", stage) for stage in ("gate", "package", "report")}
    assert {edge for edge in edges if not KFP_ONLY & set(edge)} == TABLE_EDGES | waits_for_the_loop


def test_classes_and_arms_are_loops(kfp_spec: dict) -> None:
    loops = {
        frozenset(kfp_spec["components"][task["componentRef"]["name"]]["dag"]["tasks"]): task
        for component in kfp_spec["components"].values()
        for task in component.get("dag", {}).get("tasks", {}).values()
        if "parameterIterator" in task
    }
    assert set(loops) == {
        frozenset({"probe"}),
        frozenset({"draw"}),
        frozenset({"finetune", "drawings", "synthesize", "measure"}),
        frozenset({"train-classifier"}),
    }
    assert all(task["iteratorPolicy"]["parallelismLimit"] == 2 for task in loops.values())


def test_release_is_the_only_branch(kfp_spec: dict) -> None:
    dags = [kfp_spec["root"], *kfp_spec["components"].values()]
    branches = [
        task
        for dag in dags
        for task in dag.get("dag", {}).get("tasks", {}).values()
        if "condition" in task.get("triggerPolicy", {})
    ]
    assert len(branches) == 1
    inside = kfp_spec["components"][branches[0]["componentRef"]["name"]]["dag"]["tasks"]
    assert set(inside) == {"release-synthetic"}


def test_dvc_follows_the_params_and_code_that_a_stage_depends_on() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for name, stage in flow.STAGES.items():
        shards = ["compute.shards"] if stage.each in {"shard", "part"} else []
        assert stages[name]["params"] == [*stage.sections, *shards]
        code = {f"raresynth/{part}".rstrip("/") for part in stage.code}
        assert {dep for dep in stages[name]["deps"] if dep.startswith("raresynth")} == code
        assert stages[name]["cmd"].split()[:2] == ["raresynth", name]


def test_table_is_in_running_order() -> None:
    seen: set[str] = set()
    for name, stage in flow.STAGES.items():
        assert set(stage.needs) <= seen
        seen.add(name)
