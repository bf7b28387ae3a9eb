"""The sample data set is deterministic, and its classes, tones, lesions and planted defects are what it says."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from raresynth.config import DatasetConfig, ValidationConfig
from raresynth.dataset import sample
from raresynth.dataset.expectations import validate
from raresynth.dataset.images import decode_image
from raresynth.dataset.importers import build_manifest
from raresynth.dataset.sample import CLASS_SIZES, ITA_RANGES, PLANTED_DEFECTS, SIDE, Sample, Tone
from raresynth.lineage import dvc_dir_md5

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def clean() -> dict[str, Sample]:
    return sample.draw_sample()


@pytest.fixture(scope="module")
def defective(clean: dict[str, Sample], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("sample") / "data"
    sample.write_sample(sample.plant_defects(clean), folder)
    yield folder


def pixels(image: Sample) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(image.jpeg or b"")), dtype=float)


def paths_of(reason: str) -> list[str]:
    return [path for path, expected in PLANTED_DEFECTS if expected == reason]


def test_the_generator_draws_the_data_that_dvc_versions(clean, tmp_path):
    sample.write_sample(clean, tmp_path / "data")
    versioned = yaml.safe_load((ROOT / "data.dvc").read_text())["outs"][0]
    assert dvc_dir_md5(tmp_path / "data") == versioned["md5"]
    assert sum(1 for path in (tmp_path / "data").rglob("*") if path.is_file()) == versioned["nfiles"]


def test_an_image_depends_on_its_lesion_and_view_alone():
    few, many = sample.draw_class("vascular", 3, 4), sample.draw_class("vascular", 6, 4)
    assert few[:2] == many[:2]
    assert len({image.jpeg for image in many}) == 6


def test_classes_are_imbalanced_and_images_small(clean):
    assert Counter(image.label for image in clean.values()) == CLASS_SIZES
    assert max(CLASS_SIZES.values()) > 5 * min(CLASS_SIZES.values())
    assert {pixels(image).shape for image in clean.values()} == {(SIDE, SIDE, 3)}
    assert sum(len(image.jpeg or b"") for image in clean.values()) < 5_000_000


def test_a_lesion_has_one_label_one_tone_and_up_to_three_different_views(clean):
    lesions: dict[str, list[Sample]] = {}
    for image in clean.values():
        lesions.setdefault(image.group, []).append(image)
    sizes = Counter(len(views) for views in lesions.values())
    assert set(sizes) == {1, 2, 3}
    for views in lesions.values():
        assert len({view.label for view in views}) == len({view.tone for view in views}) == 1
        assert {view.view for view in views} == set(range(1, len(views) + 1))
        assert len({view.jpeg for view in views}) == len(views)


def test_typology_angle():
    assert Tone("II", (65.0, 12.0, 15.0)).ita == pytest.approx(45.0)
    assert Tone("VI", (40.0, 11.0, 10.0 * np.sqrt(3))).ita == pytest.approx(-30.0)


def test_tones_span_the_fitzpatrick_range_and_show_in_the_images(clean):
    tones = {image.tone for image in clean.values()}
    assert {tone.fitzpatrick for tone in tones} == set(ITA_RANGES)
    for tone in tones:
        low, high = ITA_RANGES[tone.fitzpatrick]
        assert low <= tone.ita <= high
    # The middle of each edge shows skin: corners may lie outside the field of view.
    edge = slice(SIDE // 2 - 6, SIDE // 2 + 6)
    brightness = [np.median(pixels(image)[[2, -3], edge]) for image in clean.values()]
    assert np.corrcoef(brightness, [image.tone.ita for image in clean.values()])[0, 1] > 0.85


def test_vascular_lesions_are_the_red_ones(clean):
    centre = slice(SIDE // 2 - 8, SIDE // 2 + 8)

    def redness(image: Sample) -> float:
        red, green, _ = pixels(image)[centre, centre].mean((0, 1))
        return float(red / green)

    medians = {label: np.median([redness(i) for i in clean.values() if i.label == label]) for label in CLASS_SIZES}
    assert max(medians, key=medians.__getitem__) == "vascular"


def test_planted_defects_are_what_they_are_called(defective):
    table = pd.read_csv(defective / "metadata.csv", keep_default_na=False).set_index("image_id")

    def label(path: str) -> str:
        return str(table.loc[Path(path).name, "label"])

    (missing,), (empty,), (truncated,) = paths_of("missing"), paths_of("empty"), paths_of("truncated")
    assert label(missing) and not (defective / missing).exists()
    assert label(empty) and (defective / empty).stat().st_size == 0
    with Image.open(defective / truncated) as image, pytest.raises(OSError, match="truncated"):
        image.load()
    (text,) = paths_of("not_an_image")
    assert (defective / text).read_bytes().isascii()
    assert [Image.open(defective / p).size for p in paths_of("too_small") + paths_of("too_large")] == [
        (1, 1),
        (12_000, SIDE),
    ]
    assert [label(path) for path in paths_of("unknown_label")] == [""]
    tiny = table.index[table["label"] == sample.TINY_CLASS]
    assert [f"images/{name}" for name in tiny] == paths_of("class_too_small")


def test_planted_duplicates_are_what_they_are_called(defective):
    table = pd.read_csv(defective / "metadata.csv", keep_default_na=False).set_index("image_id")
    by_bytes: dict[bytes, list[str]] = {}
    for path in sorted((defective / "images").iterdir()):
        by_bytes.setdefault(path.read_bytes(), []).append(path.name)
    copies = [names for names in by_bytes.values() if len(names) > 1]
    agreeing = [names[1:] for names in copies if table.loc[names, "label"].nunique() == 1]
    conflicting = [names for names in copies if table.loc[names, "label"].nunique() > 1]
    assert sorted(f"images/{n}" for names in agreeing for n in names) == paths_of("exact_duplicate")
    assert sorted(f"images/{n}" for names in conflicting for n in names) == paths_of("conflicting_label")
    (near,) = paths_of("near_duplicate")
    original, copy = table.loc["skin-0077.jpg"], table.loc[Path(near).name]
    assert copy["label"] == original["label"] and copy["group"] != original["group"]
    first, second = (decode_image(defective / path, SIDE).astype(int) for path in ("images/skin-0077.jpg", near))
    assert 0 < np.abs(first - second).mean() < 3


def test_validation_names_every_planted_defect_and_nothing_else(defective, tmp_path):
    build_manifest(defective, tmp_path / "manifest", DatasetConfig(), seed=0)
    validate(defective, tmp_path / "manifest" / "manifest.csv", tmp_path / "validation", ValidationConfig())
    quarantine = pd.read_csv(tmp_path / "validation" / "quarantine.csv")
    assert sorted(zip(quarantine["path"], quarantine["reason"], strict=True)) == sorted(PLANTED_DEFECTS)


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    command = [sys.executable, "-m", "raresynth.dataset.sample", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert "already exists; remove it or name a new folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
