"""Which flips and turns images have: found where they are known, and obeyed by every training."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raresynth import flow, lineage
from raresynth.dataset.probe import probe_file
from raresynth.dataset.symmetries import Change, changed, find_symmetries, read_symmetries, signs_of
from raresynth.gan.training import GanReport

SIDE = 64
TURNED = {
    "mirrored": np.fliplr,
    "upside_down": np.flipud,
    "quarter_turn": lambda x: np.rot90(x, -1),
    "half_turn": lambda x: x[::-1, ::-1],
}


def texture(seed: int) -> np.ndarray:
    """Random, the coarser parts stronger; as likely as its mirror images and turns."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((SIDE, SIDE))
    for cells in (2, 4, 8, 16, 32):
        layer = Image.fromarray(rng.integers(0, 255, (cells, cells), dtype=np.uint8))
        pixels += np.asarray(layer.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / cells**0.7
    return pixels * (160 / pixels.max())


DOWN, ACROSS = (np.mgrid[0:SIDE, 0:SIDE] + 0.5) / SIDE
UP = 60 * DOWN + 30 * (np.hypot(DOWN - 0.3, ACROSS - 0.5) < 0.2)
"""Something over something else, the same on both sides."""
LEFT = 60 * ACROSS
HEART = UP + 60 * (np.hypot(DOWN - 0.6, ACROSS - 0.7) < 0.25)


def hashed(pixels: np.ndarray, folder: Path) -> bytes:
    path = folder / "image.png"
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
    return probe_file(path, 1, 1000).phash


@pytest.mark.parametrize(
    ("added", "expected"),
    [(0, "all"), (UP, "mirror"), (LEFT, "none"), (HEART, "none")],
    ids=["0", "up", "left", "heart"],
)
def test_what_images_have_is_found(added: np.ndarray, expected: str, tmp_path: Path) -> None:
    hashes = [hashed(texture(seed) + 2 * added, tmp_path) for seed in range(150)]
    report = find_symmetries(hashes, [str(n) for n in range(150)])
    assert (report.symmetries, report.given, report.n_images) == (expected, False, 150), report


@pytest.mark.parametrize("change", TURNED)
def test_signs_change_as_those_of_the_changed_image(change: Change, tmp_path: Path) -> None:
    image = texture(5) + HEART
    turned = signs_of([hashed(TURNED[change](image), tmp_path)])
    signs = signs_of([hashed(image, tmp_path)])
    assert (changed(signs, change) == turned).mean() > 0.95 > 0.7 > (signs == turned).mean()


def test_images_of_one_lesion_do_not_tell_each_other(tmp_path: Path) -> None:
    hashes = [hashed(texture(0), tmp_path)] * 200
    assert find_symmetries(hashes, ["one"] * 200).symmetries == "all"
    assert find_symmetries(hashes, [str(n) for n in range(200)]).symmetries == "none"


def test_a_few_images_prove_nothing(tmp_path: Path) -> None:
    hashes = [hashed(texture(seed) + 3 * HEART, tmp_path) for seed in range(12)]
    report = find_symmetries(hashes, [str(n) for n in range(12)])
    assert report.symmetries == "all" and min(report.told.values()) > 0.7
    assert find_symmetries([], []).symmetries == "all"


@pytest.mark.slow
def test_every_training_obeys(tiny_run: flow.Run, tmp_path: Path) -> None:
    """The same run with symmetries said in the params: all weights are others, and the generators' reports say why."""
    assert read_symmetries(tiny_run.store / "validation").symmetries == "all"
    dataset = tiny_run.params.dataset.model_copy(update={"symmetries": "none"})
    run = replace(tiny_run, store=tmp_path / "store", params=tiny_run.params.model_copy(update={"dataset": dataset}))
    for stage in flow.STAGES:
        flow.execute_all(stage, run)
    report = read_symmetries(run.store / "validation")
    assert (report.symmetries, report.given) == ("none", True)
    for stage in ("train-encoder", "pretrain", "finetune", "train-classifier"):
        for item in flow.items(run, flow.STAGES[stage].each):
            was, now = (flow.read_record(one.store, stage, item) for one in (tiny_run, run))
            assert was.status == now.status == "skipped" or not weights(was) & weights(now), (stage, item)
            assert weights(was) or was.status == "skipped"
    universal = run.store / flow.read_record(run.store, "pretrain").output / "report.json"
    assert lineage.read_report(universal, GanReport).settings["symmetries"] == "none"


def weights(record: flow.Record) -> set[str]:
    return {digest for name, digest in record.files.items() if name.endswith("weights.safetensors")}
