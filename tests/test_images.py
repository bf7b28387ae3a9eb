"""Pixels and manifests: one way of decoding, packed pixels equal decoded ones, text stays text."""

import contextlib
import itertools
import random
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raresynth.dataset.images import all_grey, decode_image, load_images
from raresynth.dataset.manifest import COLUMNS, count_classes, read_manifest, write_manifest
from raresynth.errors import DataError
from raresynth.lineage import sha256_file


def picture(width=40, height=40, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, kind="PNG", **options):
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode):
    pixels = decode_image(encode(picture().convert(mode), "TIFF"), 16)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = picture(32, 32)
    assert np.array_equal(decode_image(encode(image), 32), np.asarray(image))


def test_the_centre_square_is_taken():
    image = Image.new("RGB", (90, 30), "red")
    image.paste("lime", (30, 0, 60, 30))
    pixels = decode_image(encode(image), 10)
    assert (pixels[:, 1:-1] == (0, 255, 0)).all()
    assert (abs(pixels.astype(int) - (0, 255, 0)) < 30).all()  # the filter reaches a little beyond the square


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_grey_images_are_known_by_any_file_and_one_coloured_pixel_is_enough(kind):
    grey = np.stack([decode_image(encode(picture(40, 40, n).convert("L").convert("RGB"), kind), 32) for n in range(4)])
    assert all_grey(grey)
    grey[2, 7, 9] += np.array([0, 0, 3], dtype=np.uint8)
    assert not all_grey(grey)
    assert not all_grey(decode_image(encode(picture(), kind), 32)[None])


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*itertools.product(["JPEG", "PNG", "WEBP", "TIFF"], ["RGB", "L"]), ("PNG", "I;16"), ("TIFF", "I;16")],
)
def test_exif_orientation_is_applied_once(kind, mode):
    """PIL turns TIFFs itself, and nothing else."""
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 32, 16))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    pixels = decode_image(encode(image if mode == "I;16" else image.convert(mode), kind, exif=exif, quality=95), 8)
    assert pixels[:, 5:].min() > 200
    assert pixels[:, :3].max() < 50


def test_a_large_jpeg_decoded_at_a_reduced_scale_looks_the_same():
    image = picture(1024, 1024)
    reduced = decode_image(encode(image, "JPEG", quality=95), 32).astype(int)
    full = decode_image(encode(image, "PNG"), 32).astype(int)
    assert np.abs(reduced - full).mean() < 2


@pytest.mark.parametrize("content", [b"", b"no image", encode(picture())[:60], encode(picture(), "JPEG")[:400]])
def test_what_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "lesion.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"lesion\.jpg cannot be decoded"):
        decode_image(path, 16)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_bytes_end_in_a_data_error_or_in_pixels(kind):
    draw = random.Random(kind)
    whole = encode(picture(), kind)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        with contextlib.suppress(DataError):
            assert decode_image(bytes(damaged), 16).shape == (16, 16, 3)


@pytest.fixture
def folder(tmp_path):
    rows = []
    for index in range(5):
        (tmp_path / f"{index}.png").write_bytes(encode(picture(seed=index)))
        rows.append((f"{index}.png", sha256_file(tmp_path / f"{index}.png")))
    return tmp_path, pd.DataFrame(rows, columns=["path", "sha256"])


def test_images_come_in_the_manifests_order(folder):
    root, manifest = folder
    pixels = load_images(manifest[::-1], root, 16)
    assert pixels.shape == (5, 16, 16, 3)
    for index in range(5):
        assert np.array_equal(pixels[index], decode_image(root / f"{4 - index}.png", 16))


def test_packed_pixels_are_those_that_were_decoded(folder, tmp_path):
    root, manifest = folder
    cache = tmp_path / "packed"
    first = load_images(manifest, root, 16, cache)
    (root / "0.png").unlink()  # the second time nothing is decoded
    again = load_images(manifest, root, 16, cache)
    assert np.array_equal(first, again)
    assert len(list(cache.iterdir())) == 1
    assert not again.flags.writeable


def test_packed_pixels_are_told_apart_by_content_and_size(folder, tmp_path):
    root, manifest = folder
    cache = tmp_path / "packed"
    load_images(manifest, root, 16, cache)
    assert load_images(manifest, root, 8, cache).shape == (5, 8, 8, 3)
    assert load_images(manifest[:3], root, 16, cache).shape == (3, 16, 16, 3)
    assert len(list(cache.iterdir())) == 3


def test_a_failed_read_leaves_no_packed_pixels(folder, tmp_path):
    root, manifest = folder
    (root / "3.png").write_bytes(b"damaged")
    manifest.loc[3, "sha256"] = sha256_file(root / "3.png")
    with pytest.raises(DataError, match=r"3\.png cannot be decoded"):
        load_images(manifest, root, 16, tmp_path / "packed")
    assert not list((tmp_path / "packed").iterdir())


@pytest.mark.parametrize("cache", [None, "packed"])
def test_an_image_that_was_changed_after_its_manifest_is_not_taken_for_it(folder, tmp_path, cache):
    root, manifest = folder
    (root / "3.png").write_bytes((root / "4.png").read_bytes())
    cache_dir = cache and tmp_path / cache
    with pytest.raises(DataError, match=r"3\.png was changed after its manifest was written; start the run again"):
        load_images(manifest, root, 16, cache_dir)
    assert cache_dir is None or not list(cache_dir.iterdir())
    (root / "3.png").unlink()
    with pytest.raises(DataError, match=r"3\.png cannot be read \(No such file or directory\); put it back"):
        load_images(manifest, root, 16, cache_dir)


def a_manifest():
    return pd.DataFrame(
        {
            "ward": ["01", ""],
            "image_id": ["007", "NA"],
            "path": ["a,b.png", "c.png"],
            "label": ["null", "1"],
            "group": ["0010", "1e3"],
            "split": ["train", "val"],
            "sha256": ["ab", ""],
            "width": [3, 0],
            "height": [4, 0],
        }
    )


def test_a_manifest_survives_being_written_and_read(tmp_path):
    write_manifest(tmp_path / "m.csv", a_manifest())
    manifest = read_manifest(tmp_path / "m.csv")
    assert list(manifest.columns) == [*COLUMNS, "ward"]
    assert manifest.fillna("").to_dict("list") == a_manifest()[[*COLUMNS, "ward"]].to_dict("list")


def test_an_empty_manifest_can_be_read(tmp_path):
    write_manifest(tmp_path / "m.csv", a_manifest()[:0])
    assert len(read_manifest(tmp_path / "m.csv")) == 0


@pytest.mark.parametrize("text", ["", "image_id,path,label,group,split,width,height\n"])
def test_a_file_that_is_no_manifest_is_named(tmp_path, text):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(DataError, match=r"m\.csv is no manifest: column '(image_id|sha256)' is missing"):
        read_manifest(tmp_path / "m.csv")


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(DataError, match="run build-manifest first"):
        read_manifest(tmp_path / "m.csv")


def test_classes_are_counted_in_every_split():
    assert count_classes(a_manifest()) == {
        "1": {"train": 0, "val": 1, "test": 0},
        "null": {"train": 1, "val": 0, "test": 0},
    }


def test_sixteen_bit_grey_keeps_its_range() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = decode_image(encode(Image.fromarray(ramp), "PNG"), 64)
    assert np.abs(pixels[..., 0].astype(int) - (ramp >> 8)).max() <= 1
    assert (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, of the damage
def test_damaged_exif_costs_no_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "camera"
    whole = bytearray(encode(picture(), "JPEG", exif=exif, quality=95))
    start, end = whole.index(b"Exif"), whole.index(b"camera")
    pixels = decode_image(bytes(whole), 8)
    for position in range(start + 6, end):
        damaged = whole.copy()
        damaged[position] ^= 0xFF
        assert decode_image(bytes(damaged), 8).shape == pixels.shape


def test_sixteen_bits_are_scaled_and_thirty_two_refused():
    values = np.linspace(0, 65535, 40 * 40).reshape(40, 40)
    pixels = decode_image(encode(Image.fromarray(values.astype(np.uint16))), 8)
    assert pixels[0].mean() < 40 < 210 < pixels[-1].mean()
    for dtype in (np.float32, np.int32):
        with pytest.raises(DataError, match="32 bits"):
            decode_image(encode(Image.fromarray(values.astype(dtype)), "TIFF"), 8)
