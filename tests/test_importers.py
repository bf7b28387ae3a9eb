"""Importers: every layout becomes the same manifest, and what cannot be placed is kept in sight."""

import json
import os
import random
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raresynth.config import CsvColumns, DatasetConfig, SplitShares
from raresynth.dataset.importers import build_manifest
from raresynth.dataset.manifest import COLUMNS, read_manifest
from raresynth.errors import DataError
from raresynth.lineage import sha256_file, sha256_tree

SHARED = Path(__file__).parents[1].parent / "shared"


def draw(path, seed=0, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def importing(data_dir, **knobs):
    """The report and the manifest, by image_id, of `data_dir`."""
    out_dir = data_dir.parent / "manifest"
    report = build_manifest(data_dir, out_dir, DatasetConfig(**knobs), seed=0)
    assert json.loads((out_dir / "report.json").read_text())["n_rows"] == report.n_rows
    return report, read_manifest(out_dir / "manifest.csv").fillna("").set_index("image_id", drop=False)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


# HAM10000


def ham10000(data, metadata="HAM10000_metadata.csv", separator=","):
    rows = ["lesion_id,image_id,dx,dx_type,age,sex,localization"]
    for index in range(12):
        draw(data / f"HAM10000_images_part_{1 + index // 6}" / f"ISIC_{index:07d}.jpg", index)
        rows.append(
            f"HAM_{index // 2:07d},ISIC_{index:07d},{'nv' if index < 8 else 'mel'},histo,{40 + index}.0,male,back"
        )
    write(data / metadata, *(row.replace(",", separator) for row in rows))


@pytest.mark.parametrize(
    ("metadata", "separator"),
    [("HAM10000_metadata.csv", ","), ("HAM10000_metadata", ","), ("HAM10000_metadata.tab", "\t")],
)
def test_ham10000(data, metadata, separator):
    ham10000(data, metadata, separator)
    report, manifest = importing(data)
    assert report.layout == "ham10000"
    assert list(manifest.columns) == [*COLUMNS, "dx_type", "age", "sex", "localization"]
    row = manifest.loc["ISIC_0000007"]
    assert row["path"] == "HAM10000_images_part_2/ISIC_0000007.jpg"
    assert (row["label"], row["group"], row["age"]) == ("nv", "HAM_0000003", "47.0")
    assert (row["width"], row["height"]) == (12, 10)
    assert row["sha256"] == sha256_file(data / row["path"])
    assert manifest.groupby("group")["split"].nunique().max() == 1


def test_a_name_without_a_file_and_a_file_without_a_name_are_kept(data):
    ham10000(data)
    (data / "HAM10000_images_part_1" / "ISIC_0000003.jpg").unlink()
    draw(data / "HAM10000_images_part_1" / "ISIC_0099999.jpg", 99)
    report, manifest = importing(data)
    assert (report.n_rows, report.n_missing, report.n_unlabelled) == (13, 1, 1)
    assert (manifest.loc["ISIC_0000003", "sha256"], manifest.loc["ISIC_0000003", "width"]) == ("", 0)
    assert manifest.loc["HAM10000_images_part_1/ISIC_0099999.jpg", "label"] == ""


def test_what_is_obviously_no_image_is_counted_and_ignored(data):
    ham10000(data)
    write(data / "README.md", "read me")
    write(data / "HAM10000_images_part_1" / ".DS_Store", "finder")
    write(data / ".dvc" / "config.png", "hidden")
    write(data / "HAM10000_images_part_1" / "broken.png", "this is for validate to find")
    report, manifest = importing(data)
    assert (report.n_rows, report.n_ignored) == (13, 2)  # the README and the metadata
    assert manifest.loc["HAM10000_images_part_1/broken.png", "width"] == 0


@pytest.mark.skipif(not (SHARED / "ham10000").exists(), reason="needs the real images")
def test_the_real_ham10000(tmp_path):
    report = build_manifest(SHARED / "ham10000", tmp_path / "manifest", DatasetConfig(), seed=0)
    found = {label: sum(splits.values()) for label, splits in report.classes.items()}
    assert found == {"nv": 4323, "bkl": 583, "mel": 491, "bcc": 264, "akiec": 183, "vasc": 80, "df": 60}
    assert (report.layout, report.n_groups, report.n_missing, report.n_unlabelled) == ("ham10000", 5984, 0, 0)
    for splits in report.classes.values():
        n = sum(splits.values())
        assert abs(splits["train"] - 0.7 * n) <= 1
        assert abs(splits["val"] - 0.15 * n) <= 1
    manifest = read_manifest(tmp_path / "manifest" / "manifest.csv")
    assert set(manifest["width"]) == set(manifest["height"]) == {224}


# ISIC challenge


def isic(data, several=False):
    rows = ["image,MEL,NV,UNK"]
    for index in range(10):
        draw(data / "ISIC2018_Task3_Training_Input" / f"ISIC_{index:07d}.jpg", index)
        rows.append(f"ISIC_{index:07d},{'1.0,0.0' if index < 4 else '0.0,1.0'},0.0")
    if several:
        rows[5] = "ISIC_0000004,1.0,1.0,0.0"
    write(data / "ISIC2018_Task3_Training_GroundTruth" / "ISIC2018_Task3_Training_GroundTruth.csv", *rows)


def test_isic(data):
    isic(data)
    report, manifest = importing(data)
    assert (report.layout, report.empty_classes) == ("isic", ("UNK",))
    assert (manifest["label"] == "MEL").sum() == 4
    assert manifest.loc["ISIC_0000009", "path"] == "ISIC2018_Task3_Training_Input/ISIC_0000009.jpg"
    assert list(manifest["group"]) == list(manifest["image_id"])


def test_isic_with_lesion_groupings(data):
    isic(data)
    lines = [f"ISIC_{index:07d},HAM_{index // 3},histopathology" for index in range(9)]
    write(data / "ISIC2018_Task3_Training_LesionGroupings.csv", "image,lesion_id,diagnosis_confirm_type", *lines)
    _, manifest = importing(data)
    assert manifest.loc["ISIC_0000005", "group"] == "HAM_1"
    assert manifest.loc["ISIC_0000009", "group"] == "ISIC_0000009"
    assert manifest.loc["ISIC_0000005", "diagnosis_confirm_type"] == "histopathology"


def test_an_isic_lesion_in_two_grouping_files_is_one_group(data):
    isic(data)
    write(data / "a.csv", "image,lesion_id,label", *(f"ISIC_{index:07d},HAM_{index // 4},MEL" for index in range(5)))
    write(data / "b.csv", "image,lesion_id,site", *(f"ISIC_{index:07d},HAM_{index // 4},arm" for index in range(4, 10)))
    _, manifest = importing(data)
    assert list(manifest["group"]) == [f"HAM_{index // 4}" for index in range(10)]
    assert (manifest["site"] == "arm").sum() == 6
    assert (manifest["label"] == "MEL").sum() == 4


def test_isic_grouping_files_that_disagree_are_refused(data):
    isic(data)
    write(data / "a.csv", "image,lesion_id", "ISIC_0000001,HAM_1")
    write(data / "b.csv", "image,lesion_id", "ISIC_0000001,HAM_2")
    with pytest.raises(DataError, match=r"b\.csv has ISIC_0000001 as an image of lesion HAM_2, .* of HAM_1"):
        importing(data)


def test_an_isic_row_without_a_label_is_kept_unlabelled(data):
    isic(data)
    truth = next(data.rglob("*.csv"))
    truth.write_text(truth.read_text().replace("ISIC_0000002,1.0", "ISIC_0000002,0.0"))
    report, manifest = importing(data)
    assert report.n_unlabelled == 1
    assert manifest.loc["ISIC_0000002", "label"] == ""


def test_an_isic_row_with_several_labels_is_refused(data):
    isic(data, several=True)
    with pytest.raises(DataError, match=r"multi-label \(ISIC_0000004 is MEL and NV\)"):
        importing(data)


# Folders


def folders(data, prefix="", n=6):
    for label in ("df", "nv"):
        for index in range(n):
            draw(data / prefix / label / f"{index}.png", hash((prefix, label, index)) % 1000)


def test_folders(data):
    folders(data)
    (data / "akiec").mkdir()
    report, manifest = importing(data)
    assert (report.layout, report.n_rows, report.empty_classes) == ("folders", 12, ("akiec",))
    assert manifest.loc["df/3", ["path", "label", "group"]].to_list() == ["df/3.png", "df", "df/3"]


def test_folders_of_splits(data):
    for split, n in (("train", 6), ("valid", 3), ("test", 2)):
        folders(data, split, n)
    report, manifest = importing(data)
    assert report.splits_from_source
    assert report.classes["df"] == {"train": 6, "val": 3, "test": 2}
    assert manifest.loc["valid/nv/2", ["label", "split"]].to_list() == ["nv", "val"]


def test_split_folders_beside_others_are_refused(data):
    for split in ("train", "val", "test"):
        folders(data, split)
    draw(data / "figures" / "fig.png")
    with pytest.raises(DataError, match="the split folders test, train and val and also figures; move figures out, or"):
        importing(data)
    draw(data / "notes" / "fig.png")
    with pytest.raises(DataError, match="also figures and notes; move figures and notes out"):
        importing(data, layout="folders")


def test_one_folder_called_like_a_split_is_a_label(data):
    for label in ("train", "tram", "bus"):
        draw(data / label / "0.png", 1)
    assert set(importing(data)[1]["label"]) == {"train", "tram", "bus"}


def test_files_that_differ_in_extension_only_keep_it_in_their_ids(data):
    folders(data)
    draw(data / "df" / "3.jpg", 77)
    _, manifest = importing(data)
    assert {"df/3.jpg", "df/3.png", "df/4"} <= set(manifest.index)


def test_files_of_unknown_kind_in_label_folders_are_kept_for_validation(data):
    folders(data)
    write(data / "df" / "scan.dcm", "dicom")
    write(data / "df" / "noextension", "?")
    write(data / "df" / "notes.txt", "not an image")
    report, _ = importing(data)
    assert (report.n_rows, report.n_ignored) == (14, 1)


def test_linked_folders_are_followed_once(data, tmp_path):
    folders(tmp_path / "elsewhere")
    for label in ("df", "nv"):
        (data / label).symlink_to(tmp_path / "elsewhere" / label)
    (tmp_path / "elsewhere" / "df" / "loop").symlink_to(tmp_path / "elsewhere" / "df")
    assert importing(data)[0].n_rows == 12


# CSV


def csv_set(data, header="image_id,label,group,tone", folder="images", **changed):
    lines = []
    for index in range(12):
        draw(data / folder / f"{index:03d}.png", index)
        lines.append(changed.get(f"row{index}", f"{index:03d}.png,{'a' if index < 8 else 'b'},g{index // 2},IV"))
    write(data / "metadata.csv", header, *lines)


def test_metadata_csv_is_recognised(data):
    csv_set(data)
    report, manifest = importing(data)
    assert report.layout == "csv"
    expected = ["images/007.png", "a", "g3", "IV"]
    assert manifest.loc["007", ["path", "label", "group", "tone"]].to_list() == expected
    assert manifest.groupby("group")["split"].nunique().max() == 1


def test_a_missing_image_is_expected_beside_the_others(data):
    csv_set(data)
    (data / "images" / "003.png").unlink()
    _, manifest = importing(data)
    assert manifest.loc["003", ["path", "sha256"]].to_list() == ["images/003.png", ""]


def test_a_csv_named_in_params(data):
    csv_set(data, header="file name,diagnosis,patient,split")
    text = (data / "metadata.csv").read_text().replace(",IV", ",")
    (data / "metadata.csv").rename(data / "labels.csv").write_text(text.replace("split", "sha256"))
    columns = CsvColumns(file="labels.csv", image="file name", label="diagnosis", group="patient", images_dir="images")
    for layout in ("auto", "csv"):
        _, manifest = importing(data, layout=layout, csv=columns)
        assert manifest.loc["007", ["label", "group"]].to_list() == ["a", "g3"]
        assert len(manifest.loc["007", "sha256"]) == 64
        assert "source_sha256" in manifest


def test_names_may_lack_their_extension_or_carry_their_folder(data):
    csv_set(
        data, row0="000,a,g0,IV", row1="images/001.png,a,g0,IV", row2="images\\002.png,a,g1,IV", row3=" 003 ,a,g1,IV"
    )
    report, manifest = importing(data)
    assert (report.n_rows, report.n_missing) == (12, 0)
    assert {"000", "images/001", "003"} <= set(manifest.index)


def test_names_in_another_case_or_unicode_form_are_found(data):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    csv_set(
        data,
        row0="000.PNG,a,g0,IV",
        row1=f"Caf{composed}.png,a,g0,IV",
        row2=f"n{decomposed}vus,a,g1,IV",
        row3="IMAGES/003.Png,a,g1,IV",
    )
    (data / "images" / "001.png").rename(data / "images" / f"caf{decomposed}.PNG")
    (data / "images" / "002.png").rename(data / "images" / f"N{composed}vus.png")
    report, manifest = importing(data)
    assert (report.n_rows, report.n_missing, report.n_unlabelled) == (12, 0, 0)
    assert manifest.loc["IMAGES/003.Png".removesuffix(".Png"), "path"] == "images/003.png"


def test_a_name_that_may_mean_another_file_or_name_is_not_guessed(data):
    csv_set(
        data,
        row0="X.png,a,g0,IV",  # images/x.PNG or more/X.Png?
        row1="001.png,a,g0,IV",
        row2="001.PNG,b,g1,IV",  # 001.png is that of the row above
        row3="Y.png,a,g2,IV",  # two names, one file
        row4="y.PNG,b,g3,IV",
    )
    (data / "images" / "000.png").rename(data / "images" / "x.PNG")
    draw(data / "more" / "X.Png", 50)
    (data / "images" / "003.png").rename(data / "images" / "Y.PNG")
    report, manifest = importing(data)
    assert report.n_missing == 4
    assert set(manifest.loc[manifest["sha256"] == "", "image_id"]) == {"X", "001.PNG", "Y", "y"}


def test_splits_of_the_source_are_kept(data):
    rows = {f"row{i}": f"{i:03d}.png,{'ab'[i % 2]},g{i},{('train', 'Validation', 'test')[i % 3]}" for i in range(12)}
    csv_set(data, header="image_id,label,group,split", **rows)
    report, manifest = importing(data)
    assert report.splits_from_source
    assert manifest.loc["004", "split"] == "val"
    assert report.classes["a"] == {"train": 2, "val": 2, "test": 2}


def test_unknown_splits_are_refused(data):
    csv_set(data, header="image_id,label,group,split")
    with pytest.raises(DataError, match="split holds 'IV'"):
        importing(data)


def test_rows_without_a_group_are_groups_of_their_own(data):
    csv_set(data, row3="003.png,a,,IV")
    assert importing(data)[1].loc["003", "group"] == "003"


@pytest.mark.parametrize("separator", [None, ";"])
def test_a_multi_label_csv_is_refused(data, separator):
    csv_set(data, row5=f"005.png,a{separator or '|'}b,g2,IV")
    columns = CsvColumns(file="metadata.csv", image="image_id", label="label", label_separator=separator)
    with pytest.raises(DataError, match=r"metadata\.csv is multi-label \(005 is a and b\)"):
        importing(data, csv=columns)


def test_one_label_an_image_with_a_separator_is_fine(data):
    csv_set(data)
    columns = CsvColumns(file="metadata.csv", image="image_id", label="label", label_separator="|")
    assert importing(data, csv=columns)[0].n_rows == 12


@pytest.mark.parametrize("label", ["a/b", "..", ".hidden", "a\\b"])
def test_a_label_that_cannot_name_a_folder_is_refused(data, label):
    csv_set(data, row5=f"005.png,{label},g2,IV")
    with pytest.raises(DataError, match="cannot be the name of a folder"):
        importing(data)


def test_a_path_out_of_the_data_folder_is_missing(data):
    draw(data.parent / "secret.png")
    csv_set(data, row5="../secret.png,a,g2,IV", row6=f"{data.parent}/secret.png,a,g3,IV")
    report, _ = importing(data)
    assert report.n_missing == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"file": "nowhere.csv"}, "nowhere.csv: No such file"),
        ({"label": "dx"}, "no column 'dx', only image_id, label, group, tone"),
        ({"images_dir": "photos"}, "no images lie below .*photos"),
    ],
)
def test_what_params_name_wrongly_is_named(data, columns, message):
    csv_set(data)
    named = {"file": "metadata.csv", "image": "image_id", "label": "label"} | columns
    with pytest.raises(DataError, match=message):
        importing(data, csv=CsvColumns(**named))


def test_a_file_that_is_no_csv_is_named(data):
    csv_set(data)
    (data / "metadata.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match=r"metadata\.csv is no CSV file in UTF-8 .*; save it as UTF-8$"):
        importing(data)


@pytest.mark.skipif(not (SHARED / "pad_ufes_20").exists(), reason="needs the real images")
def test_the_real_pad_ufes_20(tmp_path):
    columns = CsvColumns(file="metadata.csv", image="img_id", label="diagnostic", group="patient_id")
    config = DatasetConfig(csv=columns)
    report = build_manifest(SHARED / "pad_ufes_20", tmp_path / "manifest", config, seed=0)
    found = {label: sum(splits.values()) for label, splits in report.classes.items()}
    assert found == {"BCC": 132, "NEV": 111, "ACK": 76, "SEK": 65, "MEL": 30, "SCC": 17}
    manifest = read_manifest(tmp_path / "manifest" / "manifest.csv")
    assert manifest.groupby("group")["split"].nunique().max() == 1
    assert manifest["fitspatrick"].isna().sum() == 154


@pytest.mark.skipif(not (SHARED / "nih_chestxray14").exists(), reason="needs the real images")
def test_the_real_nih_set_is_refused_as_multi_label(tmp_path):
    with pytest.raises(DataError, match=r"Data_Entry_2017_v2020\.csv is multi-label .* one label"):
        build_manifest(SHARED / "nih_chestxray14", tmp_path / "manifest", DatasetConfig(), seed=0)
    assert not (tmp_path / "manifest").exists()


# All layouts


def test_an_unknown_layout_names_those_that_were_looked_for(data):
    draw(data / "0.png")
    with pytest.raises(
        DataError, match=r"HAM10000_metadata\.csv.*metadata\.csv.*ISIC.*folders.*dataset\.csv in params"
    ):
        importing(data)


def test_a_folder_without_images_is_told_so_first(data):
    write(data / "README.md", "read me")
    with pytest.raises(DataError, match="data holds no image file; name the folder that holds the images"):
        importing(data)


@pytest.mark.parametrize("layout", ["ham10000", "isic"])
def test_a_layout_that_is_not_there_is_named(data, layout):
    folders(data)
    with pytest.raises(DataError, match="set dataset"):
        importing(data, layout=layout)


def test_a_missing_data_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        build_manifest(tmp_path / "nowhere", tmp_path / "manifest", DatasetConfig(), seed=0)


def test_equal_folders_give_equal_bytes_wherever_they_lie(tmp_path):
    order = list(range(40))
    for name in ("here", "there"):
        random.Random(name).shuffle(order)
        for index in order:
            draw(tmp_path / name / "data" / ("df" if index < 12 else "nv") / f"{index}.png", index)
        build_manifest(tmp_path / name / "data", tmp_path / name / "manifest", DatasetConfig(), seed=4)
    assert sha256_tree(tmp_path / "here" / "manifest") == sha256_tree(tmp_path / "there" / "manifest")


def test_broken_files_do_not_use_up_a_class_s_share_of_a_split(data):
    folders(data, n=20)
    for index in range(20):
        write(data / "df" / f"broken-{index}.png", "no image")
    _, manifest = importing(data, splits=SplitShares(train=0.5, val=0.25, test=0.25))
    sound = manifest[(manifest["label"] == "df") & (manifest["width"] > 0)]
    assert dict(sound["split"].value_counts()) == {"train": 10, "val": 5, "test": 5}


def test_an_image_too_large_to_decode_is_only_hashed(data):
    folders(data)
    side = 13_500
    Image.new("1", (side, side)).save(data / "df" / "bomb.png")
    _, manifest = importing(data)
    assert manifest.loc["df/bomb", "width"] in (0, side)
    assert manifest.loc["df/bomb", "sha256"] == sha256_file(data / "df" / "bomb.png")


def test_metadata_that_names_an_image_twice_keeps_both_rows(data):
    csv_set(data, row5="004.png,b,g9,IV")
    report, manifest = importing(data)
    assert report.n_rows == 13  # 005.png has lost its row and is kept without a label
    assert list(manifest.loc["004", "label"]) == ["a", "b"]


def test_the_report_names_the_manifest_it_belongs_to(data):
    folders(data)
    report, _ = importing(data)
    assert report.manifest_sha256 == sha256_file(data.parent / "manifest" / "manifest.csv")
    assert pd.read_csv(data.parent / "manifest" / "manifest.csv").columns.to_list() == list(COLUMNS)


def test_a_set_that_names_only_some_splits_is_told_what_to_do(data):
    folders(data, "train")
    folders(data, "test")
    with pytest.raises(DataError, match=r"none is val; .* leave the splits out"):
        importing(data)


def test_a_name_that_is_not_utf_8_is_named(data):
    folders(data)
    (data / "df" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    with pytest.raises(DataError, match=r"caf\\xe9\.png, whose name is not UTF-8; rename it"):
        importing(data)


def test_semicolons_separate_too(data):
    csv_set(data)
    text = (data / "metadata.csv").read_text().replace(",", ";")
    (data / "metadata.csv").write_text(text)
    _, manifest = importing(data)
    assert manifest.loc["007", ["path", "label", "group", "tone"]].to_list() == ["images/007.png", "a", "g3", "IV"]


def test_rows_longer_than_the_header_are_refused(data):
    csv_set(data)
    text = (data / "metadata.csv").read_text().replace(",IV", ",IV,")
    (data / "metadata.csv").write_text(text)
    with pytest.raises(DataError, match="more values than its header names"):
        importing(data)


def test_columns_called_like_the_manifest_s_own_get_free_names(data):
    csv_set(data, header="image_id,label,width,source_width")
    _, manifest = importing(data)
    assert manifest.loc["007", ["source_source_width", "source_width"]].to_list() == ["g3", "IV"]
    assert int(manifest.loc["007", "width"]) == 12


def test_a_label_too_long_for_a_folder_is_refused(data):
    csv_set(data, row0=f"000.png,{'l' * 201},g0,IV")
    with pytest.raises(DataError, match="cannot be the name of a folder"):
        importing(data)
