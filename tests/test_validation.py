"""Validation: every planted defect is caught and named, and equal data leave equal bytes."""

import socket
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tzlocal
from PIL import Image, ImageEnhance

from raresynth.config import DatasetConfig, ValidationConfig
from raresynth.dataset.duplicates import near_duplicates
from raresynth.dataset.expectations import ValidationReport, validate
from raresynth.dataset.importers import build_manifest
from raresynth.dataset.manifest import read_manifest
from raresynth.dataset.probe import Probe, probe_file, probe_files
from raresynth.dataset.quarantine import find_defects, find_small_classes
from raresynth.errors import DataError
from raresynth.lineage import read_report, sha256_file, sha256_tree

HAM10000 = Path(__file__).parents[1].parent / "shared" / "ham10000"


def picture(seed, side=64):
    """Random texture, coarser parts stronger, as in photographs; it differs from seed to seed."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((side, side, 3))
    for cells in (3, 6, 12, 24, 48):
        layer = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(layer.resize((side, side), Image.Resampling.BICUBIC)) / cells**0.7
    return Image.fromarray(np.clip(pixels * 255 / pixels.max(), 0, 255).astype(np.uint8))


def encode(image, kind="JPEG", **options):
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def whole(seed):
    return encode(picture(seed), quality=92)


SOUND = {f"{label}-{i:02d}.jpg": (label, f"{label}-{i // 2}", whole(1000 * code + i))
         for code, label in enumerate(("df", "mel", "nv")) for i in range(20)}  # fmt: skip


def write_set(data_dir, images):
    """A folder of images with metadata.csv; values are label, group and bytes (None: no file)."""
    (data_dir / "images").mkdir(parents=True)
    lines = ["image_id,label,group"]
    for name, (label, group, content) in images.items():
        lines.append(f"{name},{label},{group}")
        if content is not None:
            (data_dir / "images" / name).write_bytes(content)
    (data_dir / "metadata.csv").write_text("\n".join(lines) + "\n")
    return data_dir


def run(folder, images, **knobs):
    write_set(folder / "data", images)
    build_manifest(folder / "data", folder / "manifest", DatasetConfig(), seed=0)
    config = ValidationConfig(**{"min_images": 10, "min_images_per_split": 1, **knobs})
    return validate(folder / "data", folder / "manifest" / "manifest.csv", folder / "validation", config)


DEFECTS = {
    "z-missing.jpg": ("nv", "z1", None, "missing"),
    "z-empty.jpg": ("nv", "z2", b"", "empty"),
    "z-half.jpg": ("nv", "z3", whole(91)[: len(whole(91)) // 2], "truncated"),
    "z-header.jpg": ("nv", "z4", whole(92)[:40], "truncated"),
    "z-half.png": ("nv", "z5", encode(picture(93), "PNG")[:2000], "truncated"),
    "z-text.jpg": ("nv", "z6", b"<html>404 Not Found</html>", "not_an_image"),
    "z-dot.png": ("nv", "z7", encode(Image.new("RGB", (1, 1)), "PNG"), "too_small"),
    "z-ribbon.png": ("nv", "z8", encode(Image.new("L", (20_000, 40)), "PNG"), "too_large"),
    "z-bomb.png": ("nv", "z9", encode(Image.new("1", (13_500, 13_500)), "PNG"), "too_large"),
    "z-bright-bomb.png": ("nv", "za", encode(Image.new("1", (9_900, 9_900), 1), "PNG"), "too_large"),
    "z-unlabelled.jpg": ("", "zb", whole(94), "unknown_label"),
    "z-conflict-1.jpg": ("df", "zc", whole(95), "conflicting_label"),
    "z-conflict-2.jpg": ("mel", "zd", whole(95), "conflicting_label"),
    "z-copy.jpg": ("nv", "ze", SOUND["nv-03.jpg"][2], "exact_duplicate"),
    "z-copy-in-group.jpg": ("nv", "nv-1", SOUND["nv-02.jpg"][2], "exact_duplicate"),
    "z-recompressed.jpg": ("nv", "zf", encode(picture(2005), quality=50), "near_duplicate"),
    "z-tiny-1.jpg": ("akiec", "zg", whole(96), "class_too_small"),
    "z-tiny-2.jpg": ("akiec", "zh", whole(97), "class_too_small"),
}
"""Label, group, bytes and the reason for which it must be in quarantine."""


@pytest.fixture(scope="module")
def defective(tmp_path_factory):
    folder = tmp_path_factory.mktemp("defective")
    planted = {name: (label, group, content) for name, (label, group, content, _) in DEFECTS.items()}
    second_view = {"y-second-view.jpg": ("nv", "nv-2", encode(picture(2004), quality=50))}
    return folder, run(folder, SOUND | second_view | planted)


def test_every_planted_defect_is_caught_and_named(defective):
    folder, _ = defective
    quarantine = pd.read_csv(folder / "validation" / "quarantine.csv", keep_default_na=False)
    assert list(quarantine.columns) == ["path", "label", "reason", "detail"]
    found = {
        path.removeprefix("images/"): reason
        for path, reason in zip(quarantine["path"], quarantine["reason"], strict=True)
    }
    assert found == {name: defect[3] for name, defect in DEFECTS.items()}
    assert (quarantine["detail"] != "").all()


def test_details_say_which_image_is_meant(defective):
    quarantine = pd.read_csv(defective[0] / "validation" / "quarantine.csv").set_index("path")["detail"]
    assert quarantine["images/z-copy.jpg"] == "the same bytes as images/nv-03.jpg (nv)"
    assert quarantine["images/z-recompressed.jpg"].endswith("of 256 bits from images/nv-05.jpg (nv)")
    assert quarantine["images/z-conflict-1.jpg"] == "the same bytes are labelled df and mel"
    assert quarantine["images/z-tiny-1.jpg"] == "2 usable images, fewer than min_images = 10"
    assert quarantine["images/z-dot.png"] == "1 x 1 pixels, a side is under 32"


def test_the_report_counts_what_was_removed(defective):
    folder, report = defective
    assert report == read_report(folder / "validation" / "report.json", ValidationReport)
    assert report.quarantined == pd.Series([defect[3] for defect in DEFECTS.values()]).value_counts().to_dict()
    assert report.n_rows == report.n_kept + sum(report.quarantined.values()) == 61 + len(DEFECTS)
    assert report.dropped_classes == {"akiec": "2 usable images, fewer than min_images = 10"}
    assert {label: sum(n.values()) for label, n in report.classes.items()} == {"df": 20, "mel": 20, "nv": 21}
    assert report.passed


def test_the_clean_manifest_holds_the_sound_images_unchanged(defective):
    folder, report = defective
    before = read_manifest(folder / "manifest" / "manifest.csv").set_index("image_id")
    after = read_manifest(folder / "validation" / "manifest.csv").set_index("image_id")
    assert {name.removesuffix(".jpg") for name in SOUND} | {"y-second-view"} == set(after.index)
    assert after.equals(before.loc[after.index])
    assert report.manifest_sha256 == sha256_file(folder / "validation" / "manifest.csv")


def test_expectations_tell_what_was_found_and_hold_afterwards(defective):
    _, report = defective
    found = {item.demand: item.found.unexpected for item in report.expectations}
    assert found == {
        "an image_id names one image": 0,  # z-half.jpg and z-half.png are told apart
        "all images of a group are in one split": 0,
        "the split is train, val or test": 0,
        "there are two classes or more": 0,
        "the file exists": 1,
        "the file has bytes": 1,
        "the file is an image that can be decoded to its end": 4,
        "sides are from 32 to 10000 pixels long": 4,
        "a grey image of 16 bits uses more than 12 of them": 0,
        "the image has a label": 1,
        "the same bytes have one label": 2,
        "no two rows have the same bytes": 6,
        "no image of another group differs in 24 of 256 hash bits or fewer": 1,
        "a class has min_images images or more": 2,
        "a class has min_images_per_split images or more in each split": 2,
    }
    assert all(item.cleaned.success and item.cleaned.unexpected == 0 for item in report.expectations)
    assert all(item.found.success == (item.found.unexpected == 0) for item in report.expectations)
    assert {item.severity for item in report.expectations} == {"critical", "warning"}


def test_data_docs_can_be_read_from_the_first_page_on(defective):
    docs = defective[0] / "validation" / "data_docs"
    index = (docs / "index.html").read_text()
    for run_name in ("found", "cleaned"):
        page = next(docs.glob(f"validations/manifest/{run_name}/*/*.html"))
        assert page.relative_to(docs).as_posix() in index
        assert "no two rows have the same bytes" in page.read_text() or "rows_with_same_bytes" in page.read_text()
    assert "great-expectations-web-assets" not in index


@pytest.fixture
def another_time_zone(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    tzlocal.reload_localzone()
    yield
    monkeypatch.undo()
    tzlocal.reload_localzone()


@pytest.mark.usefixtures("another_time_zone")
def test_equal_data_leave_equal_bytes_wherever_they_lie(defective, tmp_path):
    """Reports, tables and Data Docs: no times, no random ids, no paths of the machine."""
    folder, _ = defective
    planted = {name: (label, group, content) for name, (label, group, content, _) in DEFECTS.items()}
    second_view = {"y-second-view.jpg": ("nv", "nv-2", encode(picture(2004), quality=50))}
    run(tmp_path / "elsewhere", SOUND | second_view | planted)
    assert sha256_tree(folder / "validation") == sha256_tree(tmp_path / "elsewhere" / "validation")
    for file in (folder / "validation").rglob("*"):
        assert not file.is_file() or str(folder).encode() not in file.read_bytes()


def test_nothing_is_sent_and_nothing_printed_but_progress(tmp_path, monkeypatch, capfd):
    called = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: called.append(address))
    run(tmp_path, SOUND)
    assert called == []
    out, err = capfd.readouterr()
    assert out == ""
    assert all(line.startswith(("read files:", "check images:")) for line in err.splitlines())


def test_a_sound_set_keeps_every_row(tmp_path):
    report = run(tmp_path, SOUND)
    assert (report.n_kept, report.quarantined, report.dropped_classes) == (60, {}, {})
    assert (tmp_path / "validation" / "quarantine.csv").read_text() == "path,label,reason,detail\n"


def test_a_file_that_vanished_after_the_manifest_was_made_is_missing(tmp_path):
    write_set(tmp_path / "data", SOUND)
    build_manifest(tmp_path / "data", tmp_path / "manifest", DatasetConfig(), seed=0)
    (tmp_path / "data" / "images" / "nv-07.jpg").unlink()
    manifest = tmp_path / "manifest" / "manifest.csv"
    report = validate(tmp_path / "data", manifest, tmp_path / "validation", ValidationConfig(min_images_per_split=1))
    assert report.quarantined == {"class_too_small": 19, "missing": 1}
    assert report.dropped_classes == {"nv": "19 usable images, fewer than min_images = 20"}


@pytest.mark.parametrize(("n_missing", "refused"), [(20, False), (21, True)])
def test_rows_of_which_more_than_a_quarter_name_no_file_stop_the_run(tmp_path, n_missing, refused):
    absent = {f"z-{i}.jpg": ("nv", f"z-{i}", None) for i in range(n_missing)}
    images = SOUND | absent
    unnamed = tmp_path / "data" / "images"
    write_set(tmp_path / "data", images)
    for number in range(30):  # files that the CSV does not name are no rows of it
        (unnamed / f"unnamed-{number}.jpg").write_bytes(whole(5000 + number))
    build_manifest(tmp_path / "data", tmp_path / "manifest", DatasetConfig(), seed=0)
    config = ValidationConfig(min_images=10, min_images_per_split=1)
    arguments = (tmp_path / "data", tmp_path / "manifest" / "manifest.csv", tmp_path / "validation", config)
    if refused:
        with pytest.raises(
            DataError, match=r"^21 of 81 rows name no file; see .*quarantine\.csv, correct the CSV's im"
        ):
            validate(*arguments)
    else:
        assert validate(*arguments).quarantined == {"missing": 20, "unknown_label": 30}
    assert len(pd.read_csv(tmp_path / "validation" / "quarantine.csv")) == n_missing + 30


def test_one_class_is_not_enough(tmp_path):
    images = {name: image for name, image in SOUND.items() if image[0] == "nv"} | {"df.jpg": SOUND["df-00.jpg"]}
    with pytest.raises(DataError, match=r"1 usable classes remain .*df: 1 usable images.*quarantine\.csv"):
        run(tmp_path, images)
    assert len(pd.read_csv(tmp_path / "validation" / "quarantine.csv")) == 1


def test_no_usable_image_at_all_is_one_sentence_too(tmp_path):
    with pytest.raises(DataError, match="0 usable classes remain of 2 rows"):
        run(tmp_path, {"a.jpg": ("nv", "1", b"broken"), "b.jpg": ("df", "2", None)})


def change_manifest(folder, **columns):
    path = folder / "manifest" / "manifest.csv"
    manifest = pd.read_csv(path, dtype=str)
    for column, values in columns.items():
        for row, value in values.items():
            manifest.loc[row, column] = value
    manifest.to_csv(path, index=False)


def test_a_group_in_two_splits_stops_the_run(tmp_path):
    write_set(tmp_path / "data", SOUND)
    build_manifest(tmp_path / "data", tmp_path / "manifest", DatasetConfig(), seed=0)
    change_manifest(tmp_path, split={0: "train", 1: "test"})
    with pytest.raises(DataError, match=r"2 rows .* group are in one split \(df-0 is in test and train\)"):
        validate(tmp_path / "data", tmp_path / "manifest" / "manifest.csv", tmp_path / "validation", ValidationConfig())
    report = read_report(tmp_path / "validation" / "report.json", ValidationReport)
    assert not report.passed


def test_an_id_of_two_images_stops_the_run(tmp_path):
    write_set(tmp_path / "data", SOUND)
    build_manifest(tmp_path / "data", tmp_path / "manifest", DatasetConfig(), seed=0)
    change_manifest(tmp_path, image_id={4: "df-05"})
    with pytest.raises(DataError, match=r"df-05 is images/df-04\.jpg and images/df-05\.jpg"):
        validate(tmp_path / "data", tmp_path / "manifest" / "manifest.csv", tmp_path / "validation", ValidationConfig())


# Parts


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cut_off_file_is_never_sound(tmp_path, kind, share):
    content = encode(picture(0), kind)
    path = tmp_path / "image"
    path.write_bytes(content)
    assert probe_file(path, 32, 100).defect is None
    path.write_bytes(content[: int(share * len(content))])
    assert probe_file(path, 32, 100).defect == "truncated"


def test_a_progressive_jpeg_that_ends_early_is_truncated(tmp_path):
    content = encode(picture(0, 256), quality=95, progressive=True)
    (tmp_path / "image.jpg").write_bytes(content[:-50])
    assert probe_file(tmp_path / "image.jpg", 32, 1000).defect == "truncated"


def test_probes_come_in_the_order_of_the_files(tmp_path):
    paths = []
    for index in range(150):
        paths.append(tmp_path / f"{index}.jpg")
        paths[-1].write_bytes(whole(0) if index % 3 else b"")
    paths.append(tmp_path / "nowhere.jpg")
    assert [probe.defect for probe in probe_files(paths, 32, 100)] == [
        *(None if index % 3 else "empty" for index in range(150)),
        "missing",
    ]


def distance(one, other):
    return sum((a ^ b).bit_count() for a, b in zip(one.phash, other.phash, strict=True))


def test_copies_look_alike_and_different_images_do_not(tmp_path):
    def probe(image, **options):
        (tmp_path / "image.jpg").write_bytes(encode(image, **options))
        return probe_file(tmp_path / "image.jpg", 32, 1000)

    originals = [probe(picture(seed, 200), quality=92) for seed in range(10)]
    for seed, original in enumerate(originals):
        image = picture(seed, 200)
        for copy in (image.resize((100, 100)), image.resize((300, 300)), ImageEnhance.Brightness(image).enhance(1.1)):
            assert distance(original, probe(copy, quality=70)) <= 24
        assert min(distance(original, other) for other in originals if other is not original) > 24


def test_near_duplicates_equal_a_comparison_of_all_pairs():
    draw = np.random.default_rng(0)
    base = draw.integers(0, 256, (400, 32), dtype=np.uint8)
    copies = base[draw.integers(0, 400, 300)].copy()
    for copy in copies:
        for bit in draw.integers(0, 256, draw.integers(0, 40)):
            copy[bit // 8] ^= 1 << (bit % 8)
    hashes = [row.tobytes() for row in draw.permutation(np.concatenate([base, copies]))]
    groups = [str(group) for group in draw.integers(0, 300, len(hashes))]

    expected = {}
    for later in range(len(hashes)):
        for earlier in range(later):
            bits = sum((a ^ b).bit_count() for a, b in zip(hashes[earlier], hashes[later], strict=True))
            if bits <= 20 and groups[earlier] != groups[later] and earlier not in expected:
                expected[later] = (earlier, bits)
                break
    assert near_duplicates(hashes, groups, 20) == expected
    assert len(expected) > 50


def test_of_many_equal_images_the_first_is_kept():
    found = near_duplicates([b"\0" * 32] * 500, [str(index) for index in range(500)], 24)
    assert found == dict.fromkeys(range(1, 500), (0, 0))


def test_opposite_hashes_are_no_duplicates():
    assert near_duplicates([b"\0" * 32, b"\xff" * 32], ["a", "b"], 255) == {}
    assert near_duplicates([b"\0" * 32, b"\xff" * 32], ["a", "b"], 256) == {1: (0, 256)}
    assert near_duplicates([], [], 24) == {}


def rows(*values):
    return pd.DataFrame(values, columns=["image_id", "path", "label", "group", "sha256"])


def test_the_first_of_three_copies_is_kept_by_image_id_not_by_order():
    table = rows(("c", "c", "nv", "1", "s"), ("a", "a", "nv", "2", "s"), ("b", "b", "nv", "3", "s"))
    defects = find_defects(table, [Probe(None, phash=bytes(32))] * 3, 24)
    assert dict(defects["reason"]) == {0: "exact_duplicate", 2: "exact_duplicate"}


def test_an_unlabelled_copy_does_not_cost_the_labelled_one():
    table = rows(("a", "a", "", "1", "s"), ("b", "b", "nv", "2", "s"))
    assert dict(find_defects(table, [Probe(None, phash=bytes(32))] * 2, 24)["reason"]) == {0: "unknown_label"}


def test_a_broken_file_has_one_reason_only():
    table = rows(("a", "a", "", "1", "s"), ("b", "b", "nv", "2", "s"))
    probes = [Probe("truncated", "cut"), Probe("truncated", "cut")]
    assert list(find_defects(table, probes, 24)["reason"]) == ["truncated", "truncated"]


def test_a_class_must_be_present_in_every_split():
    splits = ["train"] * 30 + ["val"] * 3 + ["test"] * 1
    table = pd.DataFrame({"label": "df", "split": splits})
    assert find_small_classes(table, ValidationConfig(min_images_per_split=1)) == {}
    small = find_small_classes(table, ValidationConfig(min_images_per_split=2))
    assert small == {"df": "1 usable images in test, fewer than min_images_per_split = 2"}
    absent = find_small_classes(table[:33], ValidationConfig(min_images_per_split=1))
    assert absent == {"df": "0 usable images in test, fewer than min_images_per_split = 1"}


@pytest.mark.skipif(not HAM10000.exists(), reason="needs the real images")
def test_copies_of_real_lesions_are_found_and_different_lesions_kept(tmp_path):
    """The measurement behind the default of near_duplicate_bits, on a part of the images."""
    lesions = sorted(HAM10000.rglob("*.jpg"))[::10]
    copies = []
    for number, lesion in enumerate(lesions[:60]):
        with Image.open(lesion) as image:
            small = image.resize((112, 112), Image.Resampling.BICUBIC)
            bright = ImageEnhance.Brightness(image).enhance(1.1)
            for name, copy, quality in (("small", small, 90), ("bright", bright, 90), ("quality-50", image, 50)):
                copies.append(tmp_path / f"{number}-{name}.jpg")
                copies[-1].write_bytes(encode(copy, quality=quality))
    files = [*lesions, *copies]
    hashes = [probe.phash for probe in probe_files(files, 32, 1000)]
    found = near_duplicates(hashes, [str(file) for file in files], ValidationConfig().near_duplicate_bits)
    assert set(found) == set(range(len(lesions), len(files)))
    assert all(found[len(lesions) + index][0] == index // 3 for index in range(len(copies)))


def test_grey_images_of_16_bits_are_told_apart_and_of_32_bits_refused(tmp_path):
    hashes = []
    for seed in range(3):
        grey = np.asarray(picture(seed).convert("L")).astype(np.uint16) * 257
        Image.fromarray(grey).save(tmp_path / f"{seed}.png")
        Image.fromarray(grey.astype(np.float32)).save(tmp_path / f"{seed}.tif")
        hashes.append(probe_file(tmp_path / f"{seed}.png", 32, 1000).phash)
        assert "32 bits" in probe_file(tmp_path / f"{seed}.tif", 32, 1000).detail
    assert near_duplicates(hashes, ["a", "b", "c"], 24) == {}


def test_grey_images_of_12_bits_in_16_are_told_and_what_loses_nothing_is_kept(tmp_path):
    def probe(values):
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / "grey.png")
        return probe_file(tmp_path / "grey.png", 32, 1000)

    grey = np.asarray(picture(0).convert("L")).astype(np.uint16) * 257
    grey[0, 0] = 65535
    assert probe(grey).defect is None
    assert probe(grey >> 3).defect is None
    dark = probe(grey >> 4)
    assert (dark.defect, dark.detail) == ("too_dark", "uses 12 of its 16 bits; scale it to the full range")
    assert probe(grey >> 6).detail == "uses 10 of its 16 bits; scale it to the full range"
    assert probe(grey >> 15).defect is None  # a mask of two values
    assert probe_file(tmp_path / "grey.png", 32, 1000).phash


def test_a_dark_image_of_16_bits_goes_into_quarantine(tmp_path):
    grey = Image.fromarray(np.asarray(picture(3000).convert("L")).astype(np.uint16) * 16)
    report = run(tmp_path, SOUND | {"z-dark.png": ("nv", "z", encode(grey, "PNG"))})
    assert report.quarantined == {"too_dark": 1}
