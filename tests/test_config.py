from pathlib import Path

import pytest
import yaml

from raresynth.config import Params, ParamsFile, choose_params, load_params, load_params_file, preset_names
from raresynth.errors import ParamsError

ROOT = Path(__file__).parents[1]


def test_params_file_holds_every_knob_with_its_default() -> None:
    assert yaml.safe_load((ROOT / "params.yaml").read_text()) == ParamsFile().model_dump(mode="json")


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda path: path.name)
def test_presets_are_valid(path: Path) -> None:
    assert load_params(path) != Params()


def refusal(tmp_path: Path, text: str) -> str:
    """What is said of params that cannot be used."""
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    return str(caught.value)


def test_the_four_presets_are_there() -> None:
    names = {path.stem for path in (ROOT / "params").glob("*.yaml")}
    assert names == {"ham10000-cpu", "ham10000-gpu", "paper", "smoke"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("gan: {presets: stgan-lite}", "gan.presets"),
        ("gan: {width: 0}", "gan.width"),
        ("gan: {width: wide}", "gan.width"),
        ("balance: {share: 1.5}", "balance.share"),
        ("nonsense: 1", "nonsense"),
        ("gan: {resolution: 48}", "gan.resolution"),
        ("dataset: {splits: {train: 0.9}}", "dataset.splits"),
        ("classifier: {arms: [real+synthetic]}", "classifier"),
        ("gan: [1, 2]", "gan"),
        ("gan: {betas: [0.5, 1.0]}", "gan.betas.1"),
        ("gan: {pretrain_kimg: .inf}", "gan.pretrain_kimg"),
        ("gate: {nearer_share: .nan}", "gate.nearer_share"),
        ("seed: 99999999999999999999", "seed"),
        ("cluster: {training: {memory: plenty}}", "cluster.training.memory"),
        ("cluster: {training: {memory: 1.5Gi}}", "cluster.training.memory"),
        ("cluster: {training: {cpu: 2Gi}}", "cluster.training.cpu"),
    ],
)
def test_an_impossible_knob_is_named(tmp_path: Path, text: str, named: str) -> None:
    said = refusal(tmp_path, text)
    assert f"{named}:" in said
    assert "\n" not in said


def test_a_gate_as_strict_as_the_sieve_is_possible() -> None:
    for typical in (0.95, 0.97, 0.98, 0.99):
        raw = {"synthesis": {"typical_share": typical}, "gate": {"atypical_share": round(1 - typical, 2)}}
        assert Params.model_validate(raw).gate.atypical_share < 0.1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("synthesis: {near_copy_distance: 0.7}", "must not be above gate.near_copy_distance, or reals would count"),
        ("synthesis: {typical_share: 0.85}", "gate.atypical_share must not be under 1 - synthesis.typical_share"),
    ],
)
def test_a_sieve_that_the_gate_would_hold_against_reals_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gan: {resolutions: 32}", "gan.resolutions: there is no such knob; did you mean resolution?;"),
        ("gann: {}", "gann: there is no such knob; did you mean gan?;"),
        (
            "dataset: {csv: {file: a, image: b, labels: c, label: c}}",
            "labels: there is no such knob; did you mean label?",
        ),
        (
            "cluster: {gpu: {tolerations: [{key: a, operators: b}]}}",
            "0.operators: there is no such knob; did you mean op",
        ),
        ("gan: {zzz: 32}", "gan.zzz: there is no such knob; see params.yaml"),
        ("dataset: {1: 2}", "dataset.1"),
    ],
)
def test_an_unknown_knob_is_told_in_plain_words(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_a_section_with_all_knobs_commented_out_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("gan:\n#  width: 8\ndataset:\n  splits:\n  csv:\ncluster:\n")
    assert load_params(path) == Params()


@pytest.mark.parametrize("text", ["gan: {", "- a\n- b", "gan: \x00"])
def test_what_is_no_params_file_is_refused(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"absent\.yaml"):
        load_params(tmp_path / "absent.yaml")


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("")
    assert load_params(path) == Params()


def test_the_cluster_is_read_apart_from_what_changes_results(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("cluster: {image: registry.example/raresynth-train:1}")
    assert load_params_file(path).cluster.image == "registry.example/raresynth-train:1"
    assert load_params(path) == Params()


def test_a_preset_is_taken_with_overrides() -> None:
    assert preset_names() == ["demo", "ham10000-cpu", "ham10000-gpu", "paper", "smoke"]
    chosen = choose_params("smoke", {"gan": {"pretrain_kimg": 2}, "balance": {"classes": ["df"]}})
    smoke = load_params(ROOT / "params" / "smoke.yaml")
    assert chosen.gan == smoke.gan.model_copy(update={"pretrain_kimg": 2.0})
    assert chosen.balance == smoke.balance.model_copy(update={"classes": ("df",)})
    assert chosen.classifier == smoke.classifier
    assert choose_params("demo", {}) == Params()


@pytest.mark.parametrize(
    ("preset", "overrides", "named"),
    [("smokes", {}, "smokes"), ("smoke", {"gan": {"widht": 3}}, "gan.widht:"), ("demo", {"gan": 3}, "gan:")],
)
def test_what_no_preset_can_take_is_named(preset: str, overrides: dict, named: str) -> None:
    with pytest.raises(ParamsError, match=named):
        choose_params(preset, overrides)
