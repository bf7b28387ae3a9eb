import json
import subprocess
import sys
import zlib
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from raresynth.config import GanConfig, SynthesisConfig
from raresynth.dataset.manifest import SYNTHETIC_COLUMNS
from raresynth.errors import CheckpointError
from raresynth.gan.latents import CHUNK, aligned_chunks, latents
from raresynth.gan.png import Provenance, encode_png, encode_pngs, to_pixels
from raresynth.gan.presets import resolve
from raresynth.gan.residual.game import ResidualGame
from raresynth.gan.sampling import generate, load_generator
from raresynth.gan.seed_paper.game import SeedPaperGame
from raresynth.gan.synthesis import MOST_DRAWN, Drawing, draw_part, synthesize
from raresynth.lineage import save_checkpoint, sha256_file

CLASSES = ["df", "nv", "vasc"]
SMALL = {"resolution": 32, "latent_dim": 8, "width": 4}


@pytest.fixture(scope="module", params=["raresynth", "stgan-lite"])
def generator_dir(request, tmp_path_factory):
    settings = resolve(GanConfig(preset=request.param, **SMALL))
    game = ResidualGame if request.param == "raresynth" else SeedPaperGame
    generator = game(settings, len(CLASSES), 0, "cpu", finetuning=False).generator_ema
    torch.manual_seed(0)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tensors = {f"generator.{k}": t for k, t in generator.state_dict().items()}
    folder = tmp_path_factory.mktemp("generator") / "df"
    save_checkpoint(folder, tensors, {"architecture": settings.architecture, "label": "df", "classes": CLASSES})
    return folder


def draw(generator_dir, label, n, out, seed=0, sieve=None, **knobs):
    return synthesize(Drawing(generator_dir, label, SynthesisConfig(seed=seed, **knobs), "cpu", sieve), n, out)


def test_a_latent_depends_on_seed_and_index_alone():
    whole = latents(7, 0, 40, 5)
    assert whole.dtype == np.float32
    assert np.array_equal(latents(7, 13, 4, 5), whole[13:17])
    assert not np.array_equal(latents(8, 0, 40, 5), whole)
    assert len(np.unique(whole[:, 0])) == 40


def test_latents_are_standard_normal():
    rows = latents(0, 0, 4000, 8)
    assert abs(rows.mean()) < 0.02
    assert abs(rows.std() - 1) < 0.02
    assert np.abs(np.corrcoef(rows.T) - np.eye(8)).max() < 0.08


def test_chunks_are_aligned_and_hold_each_index_once():
    asked = [3, 15, 16, 17, 40]
    chunks = list(aligned_chunks(asked))
    assert [first for first, _ in chunks] == [0, 16, 32]
    assert [first + row for first, rows in chunks for row in rows] == asked


def test_an_image_is_the_same_however_it_is_asked_for(generator_dir):
    generator, _ = load_generator(generator_dir, "cpu")
    whole = generate(generator, 3, range(50))
    assert whole.shape == (50, 32, 32, 3)
    assert whole.dtype == np.uint8
    for indices in ([0], [49], [5, 6, 7], range(20, 37), [1, 16, 33]):
        assert np.array_equal(generate(generator, 3, indices), whole[list(indices)])
    assert not np.array_equal(generate(generator, 4, [0]), whole[:1])


def test_pixels_round_to_the_nearest_level_and_clip():
    levels = np.array([-1.0, 1.0, 0.0, 2.0, -3.0, 10 / 127.5 - 1, 10.4 / 127.5 - 1, 10.6 / 127.5 - 1], np.float32)
    pixels = to_pixels(np.broadcast_to(levels, (1, 3, 1, 8)))
    assert pixels.shape == (1, 1, 8, 3)
    assert pixels[0, 0, :, 0].tolist() == [0, 255, 128, 255, 0, 10, 10, 11]


def test_png_is_lossless_names_its_origin_and_is_deterministic():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    origin = Provenance("ab" * 32, "Kératose “séborrhéique”", 1, 2)
    png = encode_png(pixels, origin)
    assert png == encode_png(pixels, origin)
    Image.open(BytesIO(png)).verify()
    image = Image.open(BytesIO(png))
    assert np.array_equal(np.asarray(image), pixels)
    assert image.text == {
        "generator": "ab" * 32,
        "label": "Kératose “séborrhéique”",
        "seed": "1",
        "index": "2",
        "truncation": "1.0",
        "synthetic": "true",
    }


def test_images_encoded_together_are_the_same_files_as_each_alone():
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 8, 3), dtype=np.uint8)
    origins = [
        Provenance("ab" * 32, label, 1, 1, truncation) for label, truncation in (("a", 1), ("é", 1.0), ("日", 0.5))
    ]
    files = encode_pngs(images, origins)
    for png, pixels, origin in zip(files, images, origins, strict=True):
        assert png == encode_png(pixels, origin)
        with Image.open(BytesIO(png)) as image:
            assert np.array_equal(np.asarray(image), pixels)
            assert (image.text["label"], image.text["truncation"]) == (origin.label, str(origin.truncation))


def test_synthesize_writes_images_beside_a_manifest_that_names_each(generator_dir, tmp_path):
    out = tmp_path / "synthetic" / "df"
    report = draw(generator_dir, "df", 21, out, seed=5)
    rows = pd.read_csv(out / "manifest.csv")
    assert tuple(rows.columns) == SYNTHETIC_COLUMNS
    assert rows["index"].tolist() == list(range(21))
    assert set(rows["label"]) == {"df"}
    assert set(rows["seed"]) == {5}
    assert set(rows["generator"]) == {sha256_file(generator_dir / "weights.safetensors")} == {report.generator}
    generator, _ = load_generator(generator_dir, "cpu")
    for index, path, digest in rows[["index", "path", "sha256"]].itertuples(index=False):
        file = tmp_path / "synthetic" / path
        assert sha256_file(file) == digest
        assert np.array_equal(np.asarray(Image.open(file)), generate(generator, 5, [index])[0])
    assert json.loads((out / "report.json").read_text())["n_images"] == 21
    assert report.manifest_sha256 == sha256_file(out / "manifest.csv")


class Quarrelsome:
    """Rejects the images of indices 0, 1 mod 5, for two reasons."""

    def __init__(self):
        self.seen = 0

    def judge(self, images):
        whys = [{0: "atypical", 1: "near_copy"}.get((self.seen + i) % 5) for i in range(len(images))]
        self.seen += len(images)
        return whys


def test_rejected_images_are_passed_over_and_counted_in_the_manifest(generator_dir, tmp_path):
    report = draw(generator_dir, "df", 20, tmp_path / "df", sieve=Quarrelsome())
    rows = pd.read_csv(tmp_path / "df" / "manifest.csv")
    kept = [index for index in range(35) if index % 5 > 1][:20]
    assert rows["index"].tolist() == kept
    assert rows["rejected_atypical"].tolist() == rows["rejected_near_copy"].tolist()
    assert rows["rejected_atypical"].tolist() == [int(index % 5 == 2) for index in kept]
    assert report.rejected == {"atypical": 7, "near_copy": 7}
    assert (report.n_images, report.n_wanted, report.n_drawn) == (20, 20, kept[-1] + 1)
    assert len(list((tmp_path / "df" / "images").iterdir())) == 20


def test_drawing_ends_where_nothing_is_kept(generator_dir, tmp_path):
    class Strict:
        def judge(self, images):
            return ["atypical"] * len(images)

    report = draw(generator_dir, "df", 8, tmp_path / "df", sieve=Strict())
    assert (report.n_images, report.n_wanted, report.n_drawn) == (0, 8, 8 * MOST_DRAWN)
    assert report.rejected == {"atypical": 64, "near_copy": 0}
    assert pd.read_csv(tmp_path / "df" / "manifest.csv").empty


def test_truncation_narrows_the_latents_and_the_images(generator_dir, tmp_path):
    np.testing.assert_allclose(latents(0, 3, 4, 8, truncation=0.5), latents(0, 3, 4, 8) / 2)
    generator, _ = load_generator(generator_dir, "cpu")
    wide, narrow = (generate(generator, 0, range(64), truncation).astype(float) for truncation in (1.0, 0.1))
    assert narrow.std(0).mean() < wide.std(0).mean()
    draw(generator_dir, "df", 2, tmp_path / "df", truncation=0.1)
    rows = pd.read_csv(tmp_path / "df" / "manifest.csv")
    assert rows["truncation"].tolist() == [0.1, 0.1]
    image = Image.open(tmp_path / "df" / "images" / "000001.png")
    assert np.array_equal(np.asarray(image), narrow[1])
    assert image.text["truncation"] == "0.1"


def test_a_universal_generator_draws_each_class_it_knows(tmp_path):
    settings = resolve(GanConfig(**SMALL))
    generator = ResidualGame(settings, len(CLASSES), 0, "cpu", finetuning=False).generator_ema
    torch.manual_seed(0)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tensors = {f"generator.{k}": t for k, t in generator.state_dict().items()}
    save_checkpoint(
        tmp_path / "all", tensors, {"architecture": settings.architecture, "label": None, "classes": CLASSES}
    )
    drawn = [generate(load_generator(tmp_path / "all", "cpu", label)[0], 0, range(4)) for label in CLASSES]
    earlier = {name: value for name, value in settings.architecture.items() if name != "grey"}
    save_checkpoint(tmp_path / "earlier", tensors, {"architecture": earlier, "label": None, "classes": CLASSES})
    assert np.array_equal(generate(load_generator(tmp_path / "earlier", "cpu", "df")[0], 0, range(4)), drawn[0])
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[1], drawn[2])
    with pytest.raises(CheckpointError, match="knows df, nv, vasc, not mel"):
        load_generator(tmp_path / "all", "cpu", "mel")


def test_more_images_leave_the_first_ones_unchanged(generator_dir, tmp_path):
    draw(generator_dir, "df", 3, tmp_path / "df")
    few = {p.name: p.read_bytes() for p in (tmp_path / "df" / "images").iterdir()}
    draw(generator_dir, "df", 2 * CHUNK + 1, tmp_path / "df")
    many = {p.name: p.read_bytes() for p in (tmp_path / "df" / "images").iterdir()}
    assert len(many) == 2 * CHUNK + 1
    assert few.items() <= many.items()


def test_no_image_asked_for_gives_an_empty_manifest(generator_dir, tmp_path):
    assert draw(generator_dir, "df", 0, tmp_path / "df").n_images == 0
    assert tuple(pd.read_csv(tmp_path / "df" / "manifest.csv").columns) == SYNTHETIC_COLUMNS


def test_another_class_and_damaged_weights_are_refused(generator_dir, tmp_path):
    with pytest.raises(CheckpointError, match="draws df, not mel"):
        draw(generator_dir, "mel", 1, tmp_path / "mel")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "meta.json").write_bytes((generator_dir / "meta.json").read_bytes())
    content = bytearray((generator_dir / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "weights.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="was changed"):
        draw(damaged, "df", 1, tmp_path / "df")


def test_latents_and_png_load_no_torch():
    code = "import sys, raresynth.gan.latents, raresynth.gan.png; assert 'torch' not in sys.modules, 'torch was loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)


class Particular:
    """Rejects a third of the images by their pixels, as a sieve does, and counts the chunks that it sees."""

    def __init__(self):
        self.chunks = 0

    def judge(self, images):
        self.chunks += 1
        return [("atypical", None, None)[zlib.crc32(image.tobytes()) % 3] for image in images]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_class_drawn_in_parts_is_the_same_bytes(generator_dir, tmp_path, count):
    drawing = Drawing(generator_dir, "df", SynthesisConfig(seed=3), "cpu", Particular())
    whole = synthesize(drawing, 100, tmp_path / "whole" / "df")
    parts = [tmp_path / f"part-{number}" for number in range(count)]
    for number, part in enumerate(parts):
        assert draw_part(drawing, 100, number, count, part) >= 100 // count
    sieve = Particular()
    merging = Drawing(generator_dir, "df", SynthesisConfig(seed=3), "cpu", sieve)
    assert synthesize(merging, 100, tmp_path / "merged" / "df", parts) == whole
    few = sieve.chunks
    assert few <= 3  # nearly all was drawn in the parts
    files = {p.relative_to(tmp_path / "whole"): p.read_bytes() for p in (tmp_path / "whole").rglob("*") if p.is_file()}
    assert files == {
        p.relative_to(tmp_path / "merged"): p.read_bytes() for p in (tmp_path / "merged").rglob("*") if p.is_file()
    }
    some = synthesize(merging, 100, tmp_path / "some" / "df", parts[1:])
    assert some == whole
    assert sieve.chunks - few > few


def test_parts_that_are_missing_or_damaged_are_refused(generator_dir, tmp_path):
    drawing = Drawing(generator_dir, "df", SynthesisConfig(), "cpu", None)
    with pytest.raises(CheckpointError, match="run the stage draw again"):
        synthesize(drawing, 4, tmp_path / "df", [tmp_path / "nowhere"])
    draw_part(drawing, 4, 0, 2, tmp_path / "part")
    (tmp_path / "part" / "verdicts.json").write_text("{")
    with pytest.raises(CheckpointError, match="run the stage draw again"):
        synthesize(drawing, 4, tmp_path / "df", [tmp_path / "part"])
    assert not (tmp_path / "df").exists()


def test_a_part_gives_up_where_nothing_is_kept(generator_dir, tmp_path):
    class Strict:
        def judge(self, images):
            return ["near_copy"] * len(images)

    drawing = Drawing(generator_dir, "df", SynthesisConfig(), "cpu", Strict())
    assert draw_part(drawing, 8, 1, 2, tmp_path / "part") == 0
    report = synthesize(drawing, 8, tmp_path / "df", [tmp_path / "part"])
    assert (report.n_images, report.n_drawn) == (0, 8 * MOST_DRAWN)
