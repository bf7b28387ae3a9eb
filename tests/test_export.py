"""The balanced set as folders: what is in it, that its hashes hold, and that it appears whole or not at all."""

import hashlib
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raresynth.config import DatasetConfig
from raresynth.dataset.export import export_dataset
from raresynth.dataset.importers import build_manifest
from raresynth.errors import DataError
from raresynth.lineage import UNFINISHED, sha256_tree


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def run(tmp_path):
    """A data folder of 20 nv and 10 df, and 3 accepted synthetic df; the arguments of export_dataset."""
    for index in range(30):
        draw(tmp_path / "data" / ("nv" if index < 20 else "df") / f"{index}.png", index)
    build_manifest(tmp_path / "data", tmp_path / "manifest", DatasetConfig(), seed=0)
    rows = []
    for index in range(3):
        path = f"df/images/{index:06d}.png"
        sha256 = draw(tmp_path / "synthetic" / path, 100 + index)
        rows.append((f"df-0-{index}", path, "df", "f" * 64, 0, index, sha256, 8, 8))
    columns = ["image_id", "path", "label", "generator", "seed", "index", "sha256", "width", "height"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "accepted.csv", index=False)
    return {
        "data_dir": tmp_path / "data",
        "manifest_path": tmp_path / "manifest" / "manifest.csv",
        "accepted_path": tmp_path / "accepted.csv",
        "synthetic_root": tmp_path / "synthetic",
        "out_dir": tmp_path / "export",
    }


def test_train_holds_real_and_synthetic_images_and_the_others_real_ones(run):
    report = export_dataset(**run)
    assert report.classes["train"]["df"] == {"real": 7, "synthetic": 3}
    assert all(report.classes[split][label]["synthetic"] == 0 for split in ("val", "test") for label in ("df", "nv"))
    assert report.n_files == 33 == len(list(run["out_dir"].glob("*/*/*.png")))
    assert len(list((run["out_dir"] / "train" / "df").iterdir())) == 10
    table = pd.read_csv(run["out_dir"] / "manifest.csv")
    assert set(table["path"]) == {p.relative_to(run["out_dir"]).as_posix() for p in run["out_dir"].glob("*/*/*")}
    assert dict(table["source"].value_counts()) == {"real": 30, "synthetic": 3}


def test_the_hash_list_is_what_sha256sum_reads(run):
    export_dataset(**run)
    lines = (run["out_dir"] / "SHA256SUMS").read_text().splitlines()
    assert len(lines) == 34
    for line in lines:
        sha256, path = line.split("  ", 1)
        assert hashlib.sha256((run["out_dir"] / path).read_bytes()).hexdigest() == sha256
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=run["out_dir"], check=True)


def test_equal_inputs_give_equal_bytes(run, tmp_path):
    export_dataset(**run)
    export_dataset(**run | {"out_dir": tmp_path / "again"})
    assert sha256_tree(run["out_dir"]) == sha256_tree(tmp_path / "again")


def test_the_export_is_a_data_folder_itself(run, tmp_path):
    """Its folders name the splits and labels, so that another run keeps them."""
    exported = export_dataset(**run)
    report = build_manifest(run["out_dir"], tmp_path / "again", DatasetConfig(), seed=5)
    assert report.splits_from_source
    for split, classes in exported.classes.items():
        for label, counts in classes.items():
            assert report.classes[label][split] == sum(counts.values())


def test_without_accepted_images_the_real_ones_are_exported(run):
    header = run["accepted_path"].read_text().splitlines()[0]
    run["accepted_path"].write_text(header + "\n")
    assert export_dataset(**run).n_files == 30


def test_ids_that_clash_as_file_names_are_told_apart(run):
    manifest = pd.read_csv(run["manifest_path"], dtype=str)
    df = manifest.index[manifest["label"] == "df"][:2]
    manifest.loc[df, "split"] = "train"
    manifest.loc[df[0], "image_id"], manifest.loc[df[1], "image_id"] = "a/b", "A_b"
    manifest.to_csv(run["manifest_path"], index=False)
    assert export_dataset(**run).n_files == 33 == len(list(run["out_dir"].glob("*/*/*.png")))


def test_a_changed_image_stops_the_export_and_leaves_nothing(run):
    draw(run["data_dir"] / "nv" / "3.png", 999)
    with pytest.raises(DataError, match=r"nv/3\.png was changed"):
        export_dataset(**run)
    assert not run["out_dir"].exists()
    assert not list(run["out_dir"].parent.glob(f"{UNFINISHED}*"))


def test_a_missing_image_is_named(run):
    (run["synthetic_root"] / "df/images/000001.png").unlink()
    with pytest.raises(DataError, match=r"000001\.png \(No such file"):
        export_dataset(**run)


def test_a_folder_in_use_is_left_alone(run):
    run["out_dir"].mkdir()
    (run["out_dir"] / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="not empty"):
        export_dataset(**run)
    assert (run["out_dir"] / "thesis.tex").read_text() == "years of work"


def test_the_gate_must_have_run(run):
    run["accepted_path"].unlink()
    with pytest.raises(DataError, match="run the gate first"):
        export_dataset(**run)
