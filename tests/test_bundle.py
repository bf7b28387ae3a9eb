"""The bundle of a finished run: what comes out of it, and that it needs no torch."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from raresynth import flow, lineage
from raresynth.bundle.contents import open_bundle
from raresynth.bundle.onnx_export import TOLERANCE, export_onnx
from raresynth.bundle.predictor import Predictor, predict_folder
from raresynth.bundle.sampler import Sampler, generate_folder
from raresynth.classifier.network import WithFeatureMap, load
from raresynth.errors import CheckpointError, ParamsError
from raresynth.gan.latents import CHUNK, latents
from raresynth.gan.png import to_pixels
from raresynth.gan.residual.networks import Generator
from raresynth.gan.sampling import OfClass, load_generator

LABEL = "vascular"


@pytest.fixture
def bundle(accepted_bundle: Path) -> Path:
    return accepted_bundle


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    for index in range(3):
        Image.new("RGB", (50 + index, 40), (70 * index, 90, 120)).save(folder / "deeper" / f"{index}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / os.fsdecode(b"caf\xe9")).write_bytes(b"no image either")
    (folder / "notes.txt").write_text("not an image, and not named as one")
    return folder


def test_graphs_equal_torch(bundle: Path) -> None:
    generator, _ = load_generator(bundle / "generators" / LABEL, "cpu")
    rows = latents(5, 0, CHUNK, generator.latent_dim)
    session = onnxruntime.InferenceSession(str(bundle / "generators" / LABEL / "model.onnx"))
    with torch.no_grad():
        assert np.abs(session.run(None, {"latents": rows})[0] - generator(torch.from_numpy(rows)).numpy()).max() < 1e-4
    classifier, meta = load(bundle / "classifier")
    pixels = np.random.default_rng(0).uniform(-1, 1, (5, 3, meta["resolution"], meta["resolution"])).astype(np.float32)
    graph = onnxruntime.InferenceSession(str(bundle / "classifier" / "model.onnx"))
    with torch.no_grad():
        expected = WithFeatureMap(classifier).eval()(torch.from_numpy(pixels))
    for got, want in zip(graph.run(None, {"images": pixels}), expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=TOLERANCE, atol=TOLERANCE)


def test_the_graph_of_a_grey_generator_draws_grey(tmp_path: Path) -> None:
    torch.manual_seed(0)
    generator = OfClass(Generator(32, 8, 4, 3, grey=True), 1).eval()
    export_onnx(generator, torch.randn(2, 8), "latents", ["images"], tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    drawn = to_pixels(session.run(None, {"latents": latents(0, 0, 3, 8)})[0])
    assert drawn.shape == (3, 32, 32, 3)
    assert np.ptp(drawn, axis=-1).max() == 0
    assert drawn.std() > 1


def test_predictions_name_every_image_and_every_error(bundle: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions.csv"
    assert predict_folder(bundle, images, out) == (5, 2)
    rows = list(csv.DictReader(out.open()))
    labels = open_bundle(bundle).labels
    assert list(rows[0]) == ["image_id", "label", *(f"p_{label}" for label in labels), "error"]
    good = ["deeper/0.png", "deeper/1.png", "deeper/2.png"]
    assert [row["image_id"] for row in rows] == ["broken.jpg", r"caf\xe9", *good]
    assert all("cannot be decoded" in row["error"] and row["label"] == "" for row in rows[:2])
    for row in rows[2:]:
        probabilities = {label: float(row[f"p_{label}"]) for label in labels}
        assert row["error"] == "" and sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
        assert row["label"] == max(probabilities, key=probabilities.__getitem__)


def test_prediction_equals_torch_with_temperature(bundle: Path) -> None:
    classifier, meta = load(bundle / "classifier")
    side = meta["resolution"]
    pixels = np.random.default_rng(1).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    with torch.no_grad():
        logits = classifier(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
    expected = (logits / meta["temperature"]).softmax(1).numpy()
    np.testing.assert_allclose(Predictor(bundle).predict(pixels).probabilities, expected, atol=1e-4)


def test_same_seed_same_bytes_and_first_images_do_not_depend_on_n(bundle: Path, tmp_path: Path) -> None:
    for name, n, seed in (("a", 20, 3), ("b", 20, 3), ("c", 5, 3), ("d", 5, 4)):
        generate_folder(bundle, LABEL, n, seed, None, tmp_path / name)
    a, b, c, d = ({p.name: p.read_bytes() for p in (tmp_path / name).glob("*.png")} for name in "abcd")
    assert a == b and len(a) == 20
    assert c == {name: a[name] for name in c}
    assert all(c[name] != d[name] for name in c)
    rows = list(csv.DictReader((tmp_path / "a" / "manifest.csv").open()))
    assert [lineage.sha256_file(tmp_path / "a" / row["path"]) for row in rows] == [row["sha256"] for row in rows]
    with Image.open(tmp_path / "a" / "000007.png") as image:
        assert image.info["label"] == LABEL and image.info["seed"] == "3" and image.info["index"] == "7"


def test_truncation_is_that_of_the_gate_unless_another_is_asked_for(bundle: Path, tmp_path: Path) -> None:
    for name, truncation in (("gate", None), ("same", 1.0), ("narrow", 0.5)):
        generate_folder(bundle, LABEL, 2, 0, truncation, tmp_path / name)
    gate, same, narrow = ((tmp_path / name / "000001.png").read_bytes() for name in ("gate", "same", "narrow"))
    assert gate == same != narrow
    assert [row["truncation"] for row in csv.DictReader((tmp_path / "narrow" / "manifest.csv").open())] == ["0.5"] * 2
    with pytest.raises(ParamsError, match="--truncation must be above 0"):
        generate_folder(bundle, LABEL, 1, 0, 1.5, tmp_path / "x")


def test_images_are_those_that_torch_draws(bundle: Path) -> None:
    generator, _ = load_generator(bundle / "generators" / LABEL, "cpu")
    with torch.no_grad():
        drawn = to_pixels(generator(torch.from_numpy(latents(0, 0, CHUNK, generator.latent_dim))).numpy())
    sampled = Sampler(bundle, LABEL).generate(0, 0, CHUNK, 1.0)
    assert np.abs(drawn.astype(int) - sampled.astype(int)).max() <= 1


def test_an_image_is_the_same_whatever_is_asked_for_beside_it(bundle: Path) -> None:
    sampler = Sampler(bundle, LABEL)
    drawn = sampler.generate(3, 0, 12, 0.9)
    for first, n in ((0, 1), (3, 1), (4, 4), (5, 7), (11, 1)):
        assert np.array_equal(sampler.generate(3, first, n, 0.9), drawn[first : first + n])


def test_a_label_without_generator_is_refused_with_the_reason(bundle: Path, tmp_path: Path) -> None:
    rejected = next(
        label for label, entry in open_bundle(bundle).decisions["classes"].items() if entry["decision"] == "rejected"
    )
    with pytest.raises(CheckpointError, match=f"made so by a test.*accepted generators: {LABEL}"):
        generate_folder(bundle, rejected, 1, 0, None, tmp_path / "x")
    with pytest.raises(CheckpointError, match="labels are"):
        generate_folder(bundle, "unheard-of", 1, 0, None, tmp_path / "x")


def test_nothing_is_overwritten(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="already there"):
        generate_folder(bundle, LABEL, 1, 0, None, tmp_path)


@pytest.mark.parametrize("name", ["classifier/model.onnx", "reference.json", f"generators/{LABEL}/meta.json"])
def test_a_flipped_bit_is_named(bundle: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=Path(name).name):
        open_bundle(copy)


def test_bundle_accounts_for_itself(bundle: Path, tiny_run: flow.Run) -> None:
    content = open_bundle(bundle)
    on_disk = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()} - {
        "bundle.json",
        "bundle.sha256",
    }
    assert set(content.files) == on_disk
    assert content.lineage.data_md5 == lineage.dvc_dir_md5(tiny_run.data_dir)
    assert content.lineage.params == tiny_run.params.model_dump(mode="json")
    assert content.no_generators == ""
    reference = json.loads((bundle / "reference.json").read_text())
    assert sum(reference["class_priors"].values()) == pytest.approx(1)
    assert sum(reference["confidence"]["counts"]) == reference["n_val"]
    for graph in bundle.rglob("model.onnx"):
        assert str(Path(__file__).parents[1]).encode() not in graph.read_bytes()


def test_another_data_version_of_the_same_images_is_a_bundle_of_its_own(tiny_run: flow.Run, tmp_path: Path) -> None:
    """A file beside the images changes the hash by which DVC knows them, and nothing that was learned."""
    data, store = tmp_path / "data", tmp_path / "store"
    shutil.copytree(tiny_run.data_dir, data)
    shutil.copytree(tiny_run.store, store)
    (data / "LICENCE.txt").write_text("free")
    for stage in flow.STAGES:
        flow.execute_all(stage, flow.Run(data, store, tiny_run.params))
    named = open_bundle(store / "bundle").lineage.data_md5
    assert named == lineage.dvc_dir_md5(data) != lineage.dvc_dir_md5(tiny_run.data_dir)
    trained = [flow.read_record(run, "pretrain") for run in (store, tiny_run.store)]
    assert trained[0] == trained[1]
    assert named in (store / "report.html").read_text()


def test_a_run_without_accepted_generators_says_why(tiny_run: flow.Run) -> None:
    content = open_bundle(tiny_run.store / "bundle")
    accepted = [label for label, entry in content.decisions["classes"].items() if entry["decision"] == "accepted"]
    assert list(content.generators) == accepted
    assert bool(content.no_generators) == (not accepted)


@pytest.mark.parametrize("command", ["predict", "generate"])
def test_no_torch_is_loaded(bundle: Path, images: Path, tmp_path: Path, command: str) -> None:
    arguments = {
        "predict": ["--images", str(images), "--out", str(tmp_path / "p.csv")],
        "generate": ["--label", LABEL, "--n", "2", "--out", str(tmp_path / "new")],
    }[command]
    program = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'timm', 'pandas', 'sklearn', 'great_expectations'):\n"
        "    sys.modules[name] = None\n"  # an import of it raises
        "from raresynth.cli import main\n"
        f"sys.exit(main([{command!r}, '--bundle', {str(bundle)!r}, *{arguments!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
