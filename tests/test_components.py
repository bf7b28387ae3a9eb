"""Components called as functions, on a finished run: what they hand on, and what the UI is given to show."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from kfp import dsl

from components import batches, outcome, stages, task
from raresynth import flow
from raresynth.bundle.contents import open_bundle, write_bundle_json
from raresynth.errors import RaresynthError
from raresynth.lineage import UNFINISHED, code_hash


@pytest.fixture
def where(tiny_run: flow.Run, tmp_path: Path) -> dict[str, str]:
    """A copy of the finished run, as a component is given it."""
    shutil.copytree(tiny_run.store, tmp_path / "store")
    params = tiny_run.params.model_dump_json()
    return {"data": str(tiny_run.data_dir), "params": params, "store": str(tmp_path / "store"), "code": code_hash("")}


def record_of(where: dict[str, str], stage: str, item: str = flow.ALL) -> dsl.Artifact:
    return dsl.Artifact(uri=str(flow.record_path(Path(where["store"]), stage, item)))


def made(kind: type, folder: Path, name: str) -> dsl.Artifact:
    return kind(name=name, uri=str(folder / "out" / name))


def test_the_classes_come_from_the_validated_manifest(where: dict[str, str], tmp_path: Path) -> None:
    out = made(dsl.Artifact, tmp_path, "record")
    labels = stages.validate.python_func(**where, manifest=record_of(where, "build-manifest"), record=out)
    assert labels == ["keratosis", "vascular"]
    assert json.loads(Path(out.path).read_text())["stage"] == "validate"


def test_the_released_arm_is_shown_with_confusion_and_roc(where: dict[str, str], tmp_path: Path) -> None:
    metrics, shown = made(dsl.Metrics, tmp_path, "metrics"), made(dsl.ClassificationMetrics, tmp_path, "shown")
    arm = stages.evaluate.python_func(
        **where,
        validation=record_of(where, "validate"),
        decisions=record_of(where, "gate"),
        record=made(dsl.Artifact, tmp_path, "record"),
        metrics=metrics,
        classification=shown,
    )
    report = json.loads((Path(where["store"]) / "evaluation" / "report.json").read_text())
    assert arm == report["release"]["arm"]
    assert shown.metadata["confusionMatrix"]["annotationSpecs"] == [
        {"displayName": label} for label in report["labels"]
    ]
    points = shown.metadata["confidenceMetrics"]
    rates = np.array([[point["falsePositiveRate"], point["recall"], -point["confidenceThreshold"]] for point in points])
    assert 2 < len(points) <= 101
    assert (np.diff(rates, axis=0) >= 0).all()
    assert rates[0, :2].tolist() == [0, 0] and rates[-1, :2].tolist() == [1, 1]
    assert metrics.metadata["balanced_accuracy.value"] == pytest.approx(
        next(entry for entry in report["arms"] if entry["arm"] == arm)["test"]["balanced_accuracy"]["value"]
    )


def test_a_class_that_failed_says_why_instead_of_figures(where: dict[str, str], tmp_path: Path) -> None:
    store = Path(where["store"])
    shutil.rmtree(store / flow.read_record(store, "synthesize", "vascular").output)
    (store / "stages" / "synthesize" / "vascular.json").unlink()
    shutil.rmtree(store / flow.read_record(store, "finetune", "vascular").output)  # nothing to draw from
    metrics, made_of = made(dsl.Metrics, tmp_path, "metrics"), made(dsl.Artifact, tmp_path, "synthetic")
    given = {"validation": record_of(where, "validate"), "encoder": record_of(where, "train-encoder")}
    generator = record_of(where, "finetune", "vascular")
    stages.synthesize.python_func(label="vascular", **where, **given, generator=generator, record=made_of)
    record = made(dsl.Artifact, tmp_path, "record")
    stages.measure.python_func(label="vascular", **where, **given, synthetic=made_of, record=record, metrics=metrics)
    assert json.loads(Path(record.path).read_text())["status"] == "failed"
    assert "no complete checkpoint" in metrics.metadata["failed"]


def test_an_image_of_other_code_than_the_package_is_refused(
    where: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        stages.build_manifest.python_func(**where | {"code": "0" * 64}, record=made(dsl.Artifact, tmp_path, "record"))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert code_hash("")[:12] in said and "0" * 12 in said and said.count("\n") == 1


def test_a_run_is_a_name_on_the_volume_or_a_folder() -> None:
    assert task.run_dir("skin") == Path("/store/runs/skin")
    assert task.run_dir("/somewhere/else") == Path("/somewhere/else")


def test_classes_that_there_are_not_are_one_sentence(
    where: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = json.loads(where["params"])
    params["balance"]["classes"] = ["nope"]
    with pytest.raises(SystemExit) as ended:
        stages.validate.python_func(
            **where | {"params": json.dumps(params)},
            manifest=record_of(where, "build-manifest"),
            record=made(dsl.Artifact, tmp_path, "record"),
        )
    assert ended.value.code == 2
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("raresynth: "))
    assert "no train images of nope" in said


def test_a_result_that_another_run_has_replaced_on_the_volume_is_refused(
    where: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads(flow.record_path(Path(where["store"]), "train-encoder").read_text())
    handed = tmp_path / "train-encoder.json"
    handed.write_text(json.dumps(before | {"key": "0" * 64}))
    with pytest.raises(SystemExit):
        stages.pretrain.python_func(
            **where,
            validation=record_of(where, "validate"),
            encoder=dsl.Artifact(uri=str(handed)),
            record=made(dsl.Artifact, tmp_path, "record"),
        )
    assert "no longer holds the result of train-encoder" in capsys.readouterr().err


def test_tasks_share_a_runs_folder_which_no_other_run_takes_meanwhile(tmp_path: Path) -> None:
    refused = pytest.raises(RaresynthError, match="another run is at work")
    with task._place(tmp_path), task._place(tmp_path), refused, flow.alone_in(tmp_path):
        pass
    with flow.alone_in(tmp_path), refused, task._place(tmp_path):
        pass


def ended(state: str) -> dsl.PipelineTaskFinalStatus:
    return dsl.PipelineTaskFinalStatus(state, "jobs/1", "flow", None, "it broke" if state == "FAILED" else None)


def test_a_run_that_failed_does_not_show_earlier_decisions_as_its_own(
    tiny_run: flow.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "VOLUME", tmp_path)
    shutil.copytree(tiny_run.store, tmp_path / "runs" / "skin")
    texts = {}
    for state in ("SUCCEEDED", "FAILED"):
        page = made(dsl.Markdown, tmp_path, state)
        outcome.write_outcome("skin", ended(state), page)
        texts[state] = Path(page.path).read_text()
        assert json.loads((tmp_path / "runs" / "skin" / "outcome.json").read_text())["state"] == state
        assert "is released" in texts[state]
    assert "earlier run" in texts["FAILED"] and "earlier run" not in texts["SUCCEEDED"]


def test_a_name_that_was_refused_leads_the_exit_handlers_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "VOLUME", tmp_path / "volume")
    (tmp_path / "volume" / "data" / "images").mkdir(parents=True)
    for write in (outcome.write_outcome, outcome.write_batch_outcome):
        page = made(dsl.Markdown, tmp_path, write.__name__)
        write("../data/images", ended("FAILED"), page)
        assert "FAILED" in Path(page.path).read_text()
    assert not list((tmp_path / "volume").rglob("outcome.json"))


def test_what_a_killed_task_left_of_a_batch_is_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "VOLUME", tmp_path)
    for name in ("df", f"{UNFINISHED}vasc.abc"):
        (task.batch_dir("july") / name).mkdir(parents=True)
        (task.batch_dir("july") / name / "manifest.csv").touch()
    assert task.batches_of("july") == [task.batch_dir("july") / "df"]


def test_a_batch_of_another_truncation_is_not_taken_for_the_one_asked_for(
    accepted_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task, "VOLUME", tmp_path)
    shutil.copytree(accepted_bundle, tmp_path / "runs" / "skin" / "bundle")
    for truncation in (0.5, 0.5, 0.0):  # made, found, and refused: 0 is that of the images that the gate judged
        with pytest.raises(SystemExit) if not truncation else nullcontext():
            batches.make_batch("vascular", "skin", "july", 4, 1, truncation, made(dsl.HTML, tmp_path, "page"))
    assert "holds other images of vascular; choose another name" in capsys.readouterr().err


def test_a_bundle_without_generators_makes_no_batch_and_says_why(
    tiny_run: flow.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task, "VOLUME", tmp_path)
    bundle = tmp_path / "runs" / "skin" / "bundle"
    shutil.copytree(tiny_run.store / "bundle", bundle)
    content = open_bundle(bundle)
    write_bundle_json(bundle, content.model_copy(update={"generators": {}, "no_generators": "none was accepted"}))
    with pytest.raises(SystemExit):
        batches.classes_to_make("skin", [], "july", code_hash(""))
    assert "none was accepted" in capsys.readouterr().err
