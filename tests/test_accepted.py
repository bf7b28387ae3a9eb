"""The gate as a stage: every class gets a decision, and only accepted images may be used."""

import json
import shutil
from pathlib import Path

import pandas as pd
from known import GENEROUS

from raresynth import flow
from raresynth.config import GateConfig
from raresynth.dataset.manifest import SYNTHETIC_COLUMNS
from raresynth.lineage import read_report, write_report
from raresynth.quality.accepted import gate
from raresynth.quality.reports import QualityReport

NO_LIMITS = GateConfig(**GENEROUS)
GOOD = {"ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.6}


def folders(run: flow.Run, stage: str) -> dict[str, Path]:
    return {label: run.store / flow.read_record(run.store, stage, label).output for label in flow.items(run, "label")}


def settled(folder: Path, to: Path) -> Path:
    """The report of a class as it would be if its few images settled every ratio and left no doubt."""
    report = read_report(folder / "report.json", QualityReport)
    known = {name: getattr(report, name).model_copy(update=GOOD) for name in ("fd", "kid", "coverage", "recall")}
    write_report(to / "report.json", report.model_copy(update={**known, "doubts": []}))
    return to


def gated_again(tiny_run: flow.Run, store: Path, judged: int) -> flow.Run:
    """A copy of the run in which three images balance a class, and `judged` are drawn, after its gate."""
    shutil.copytree(tiny_run.store, store)
    params = tiny_run.params
    few = {
        "balance": params.balance.model_copy(update={"count": 3}),
        "synthesis": params.synthesis.model_copy(update={"min_images": judged}),
    }
    run = flow.Run(tiny_run.data_dir, store, params.model_copy(update=few))
    for stage in ("synthesize", "measure", "gate"):
        flow.execute_all(stage, run)
    return run


def test_accepted_images_are_listed_and_others_are_not(tiny_run: flow.Run, tmp_path: Path) -> None:
    quality, synthetic = folders(tiny_run, "measure"), folders(tiny_run, "synthesize")
    rejected = next(iter(quality))
    report = gate(
        {label: settled(folder, tmp_path / label) for label, folder in quality.items() if label != rejected},
        {rejected: "training collapsed at step 7"},
        {"scarce": "class scarce has 3 real images"},
        synthetic,
        dict.fromkeys(synthetic, 5),
        tiny_run.store,
        tmp_path,
        NO_LIMITS,
    )
    assert report.classes[rejected].decision == "rejected"
    assert report.classes["scarce"].decision == "insufficient"
    assert report.classes["scarce"].reasons == ["class scarce has 3 real images"]
    accepted = [label for label, entry in report.classes.items() if entry.decision == "accepted"]
    assert accepted == [label for label in quality if label != rejected]
    usable = pd.read_csv(tmp_path / "accepted.csv")
    assert list(usable.columns) == list(SYNTHETIC_COLUMNS)
    assert sorted(usable["label"].unique()) == sorted(accepted)
    assert usable["label"].value_counts().to_dict() == report.n_accepted == dict.fromkeys(accepted, 5)
    assert all(usable.groupby("label")["index"].apply(list) == [list(range(5))] * len(accepted))
    drawn = pd.read_csv(tmp_path / "drawn.csv")
    assert sorted(drawn["label"].unique()) == sorted(synthetic)  # accepted or not
    assert all((tiny_run.store / path).is_file() for path in drawn["path"])
    assert all((tiny_run.store / path).is_file() for path in usable["path"])


def test_where_nothing_is_accepted_the_manifest_is_empty(tiny_run: flow.Run, tmp_path: Path) -> None:
    gate({}, {"a": "collapsed"}, {}, {}, {}, tmp_path, tmp_path, GateConfig())
    assert pd.read_csv(tmp_path / "accepted.csv").empty
    assert json.loads((tmp_path / "decisions.json").read_text())["classes"]["a"]["decision"] == "rejected"


def test_a_class_too_small_to_measure_stops_nothing(tiny_run: flow.Run, tmp_path: Path) -> None:
    run = gated_again(tiny_run, tmp_path / "store", judged=3)
    assert {flow.read_record(run.store, "measure", label).status for label in flow.items(run, "label")} == {"skipped"}
    decisions = json.loads((run.store / "gate" / "decisions.json").read_text())["classes"]
    assert {entry["decision"] for entry in decisions.values()} == {"insufficient"}
    assert all("got 3 synthetic images" in entry["reasons"][0] for entry in decisions.values())


def test_a_class_that_needs_few_images_is_judged_by_more(tiny_run: flow.Run, tmp_path: Path) -> None:
    run = gated_again(tiny_run, tmp_path / "store", judged=32)
    labels = flow.items(run, "label")
    quality = [read_report(run.store / "quality" / label / "report.json", QualityReport) for label in labels]
    assert [report.n_fake for report in quality] == [32] * len(labels)
    drawn = pd.read_csv(run.store / "gate" / "drawn.csv")
    of_classes = drawn[drawn["label"].isin(labels)]
    assert of_classes.groupby("label")["index"].apply(list).to_dict() == {label: [0, 1, 2] for label in labels}


def test_a_class_called_none_keeps_its_images(tiny_run: flow.Run, tmp_path: Path) -> None:
    quality, synthetic = folders(tiny_run, "measure"), folders(tiny_run, "synthesize")
    label = next(iter(quality))
    good = settled(quality[label], tmp_path / "good")
    for source, name, file in ((good, "quality", "report.json"), (synthetic[label], "fakes", "manifest.csv")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text((source / file).read_text().replace(label, "None"))
    gate({"None": tmp_path / "quality"}, {}, {}, {"None": tmp_path / "fakes"}, {}, tmp_path, tmp_path, NO_LIMITS)
    usable = pd.read_csv(tmp_path / "accepted.csv", keep_default_na=False)
    assert set(usable["label"]) == {"None"}
