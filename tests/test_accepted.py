"""The gate as a stage: every class gets a decision, and only accepted images may be used."""

import json
import shutil
from pathlib import Path

import pandas as pd

from raresynth import flow
from raresynth.config import GateConfig
from raresynth.quality.accepted import COLUMNS, gate

GENEROUS = GateConfig(fd_ratio=1e9, kid_ratio=1e9, coverage_ratio=0.0, c_t=-1e9, near_copy_share=1.0)


def folders(run: flow.Run, stage: str) -> dict[str, Path]:
    return {label: run.store / flow.read_record(run.store, stage, label).output for label in flow.items(run, "label")}


def test_accepted_images_are_listed_and_others_are_not(tiny_run: flow.Run, tmp_path: Path) -> None:
    quality, synthetic = folders(tiny_run, "measure"), folders(tiny_run, "synthesize")
    rejected = next(iter(quality))
    report = gate(
        {label: folder for label, folder in quality.items() if label != rejected},
        {rejected: "training collapsed at step 7"},
        {"scarce": "class scarce has 3 real images"},
        synthetic,
        tmp_path,
        GENEROUS,
    )
    assert report.classes[rejected].decision == "rejected"
    assert report.classes["scarce"].decision == "insufficient"
    assert report.classes["scarce"].reasons == ["class scarce has 3 real images"]
    accepted = [label for label, entry in report.classes.items() if entry.decision == "accepted"]
    usable = pd.read_csv(tmp_path / "accepted.csv")
    assert list(usable.columns) == list(COLUMNS)
    assert sorted(usable["label"].unique()) == sorted(accepted)
    assert usable["label"].value_counts().to_dict() == report.n_accepted
    assert all((tiny_run.store / "synthetic" / path).is_file() for path in usable["path"])


def test_where_nothing_is_accepted_the_manifest_is_empty(tiny_run: flow.Run, tmp_path: Path) -> None:
    gate({}, {"a": "collapsed"}, {}, {}, tmp_path, GateConfig())
    assert pd.read_csv(tmp_path / "accepted.csv").empty
    assert json.loads((tmp_path / "decisions.json").read_text())["classes"]["a"]["decision"] == "rejected"


def test_a_class_too_small_to_measure_stops_nothing(tiny_run: flow.Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(tiny_run.store, store)
    few = tiny_run.params.balance.model_copy(update={"count": 3})
    run = flow.Run(tiny_run.data_dir, store, tiny_run.params.model_copy(update={"balance": few}))
    for stage in ("synthesize", "measure", "gate"):
        flow.execute_all(stage, run)
    assert {flow.read_record(store, "measure", label).status for label in flow.items(run, "label")} == {"skipped"}
    decisions = json.loads((store / "gate" / "decisions.json").read_text())["classes"]
    assert {entry["decision"] for entry in decisions.values()} == {"insufficient"}
    assert all("lists 3 images" in entry["reasons"][0] for entry in decisions.values())


def test_a_class_called_none_keeps_its_images(tiny_run: flow.Run, tmp_path: Path) -> None:
    quality, synthetic = folders(tiny_run, "measure"), folders(tiny_run, "synthesize")
    label = next(iter(quality))
    for source, name, file in ((quality[label], "quality", "report.json"), (synthetic[label], "fakes", "manifest.csv")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text((source / file).read_text().replace(label, "None"))
    gate({"None": tmp_path / "quality"}, {}, {}, {"None": tmp_path / "fakes"}, tmp_path, GENEROUS)
    usable = pd.read_csv(tmp_path / "accepted.csv", keep_default_na=False)
    assert set(usable["label"]) == {"None"}
