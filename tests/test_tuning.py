"""The search for knobs: real trainings, as small as they get."""

import json
import shutil
from dataclasses import replace

import pytest
import yaml

from raresynth import flow, tuning
from raresynth.config import Params, load_params
from raresynth.errors import DataError, ParamsError
from raresynth.gan import training
from raresynth.lineage import read_report
from raresynth.tuning import TuningReport, tune


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the finished run, whose first stages the search takes over."""
    shutil.copytree(tiny_run.store, tmp_path / "run")
    return flow.Run(tiny_run.data_dir, tmp_path / "run", tiny_run.params)


def test_the_best_trial_comes_first_and_its_knobs_are_the_params_file(run):
    tune(run, budget_s=0)
    report = tune(run, budget_s=0)  # goes on with a second trial
    assert len(report.trials) == 2
    assert read_report(run.store / "tuning" / "report.json", TuningReport) == report
    assert report.trials[0].score <= report.trials[1].score
    assert report.trials[0].knobs != report.trials[1].knobs
    for trial in report.trials:
        assert trial.score == pytest.approx(sum(trial.kid.values()) / len(trial.kid))
        assert set(trial.kid) <= set(flow.items(run, "label"))
    tuned = load_params(run.store / "tuning" / "params.yaml")
    knobs = report.trials[0].knobs
    assert tuned.gan.model_dump(include=set(knobs)) == knobs
    assert tuned.model_copy(update={"gan": run.params.gan}) == run.params
    assert tuned.gan.pretrain_kimg == run.params.gan.pretrain_kimg
    assert not list((run.store / "tuning").rglob("*.safetensors"))


def test_a_trial_that_was_interrupted_is_finished_first(run, monkeypatch):
    class Killed(BaseException):
        pass

    dataset = run.params.dataset.model_copy(update={"symmetries": "none"})
    run = replace(run, params=run.params.model_copy(update={"dataset": dataset}))

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "finetune", killed)
        tune(run, budget_s=0)
    (place,) = [p for p in (run.store / "tuning").glob("*/*") if p.is_dir()]
    trained = (place / "universal" / "report.json").read_bytes()

    asked = []
    original = tuning._train
    monkeypatch.setattr(
        tuning, "_train", lambda run, knobs, labels, place: asked.append(place) or original(run, knobs, labels, place)
    )
    report = tune(run, budget_s=0)
    assert asked == [place]
    assert len(report.trials) == 1
    assert json.loads(trained)["settings"]["symmetries"] == "none"
    assert json.loads(trained)["settings"]["gradient_penalty"] == report.trials[0].knobs["gradient_penalty"]


def test_knobs_that_collapse_come_last(run, monkeypatch):
    kids = iter([{}, {"keratosis": 3.0}, {"keratosis": 2.0}])
    monkeypatch.setattr(tuning, "_train", lambda run, knobs, labels, place: place.mkdir(parents=True) or next(kids))
    for _ in range(3):
        report = tune(run, budget_s=0)
    assert [trial.score for trial in report.trials] == [2.0, 3.0, None]


def test_what_cannot_be_tuned_is_refused(run):
    other = run.params.gan.model_copy(update={"preset": "stgan-lite", "snapshots": None})
    with pytest.raises(ParamsError, match="not of stgan-lite"):
        tune(flow.Run(run.data_dir, run.store, run.params.model_copy(update={"gan": other})), 0)
    balanced = Params.model_validate(
        yaml.safe_load(run.params.model_dump_json())
        | {"balance": {"policy": "ratio", "ratio": 1e-9, "max_per_class": 0}}
    )
    none = balanced.model_copy(
        update={"balance": balanced.balance.model_copy(update={"policy": "min_share", "share": 1e-6})}
    )
    with pytest.raises(DataError, match="nothing to tune"):
        tune(flow.Run(run.data_dir, run.store, none), 0)
