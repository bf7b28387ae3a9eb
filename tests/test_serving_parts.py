"""The service's parts, each alone."""

import asyncio
import gc
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from collections.abc import AsyncIterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from jsonschema import Draft202012Validator
from PIL import Image
from prometheus_client import REGISTRY
from serving_images import animated, archive, bad_uploads, encoded
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from raresynth import lineage
from raresynth.bundle.contents import open_bundle, read_reference, write_bundle_json
from raresynth.bundle.predictor import Predictor
from raresynth.bundle.sampler import PASS, Sampler
from raresynth.dataset.images import Pixels, decode_image
from raresynth.errors import CheckpointError, ParamsError
from raresynth.gan.png import read_provenance
from serving import service
from serving.activation import ActivationMaps
from serving.approval import open_approved
from serving.archives import Order, draw, pieces, write_archive
from serving.batching import Batcher
from serving.drift import ENOUGH, Drift, beyond_chance, stability_index
from serving.errors import CODES, ApiError, answered
from serving.front import Front
from serving.generation import Generation
from serving.keys import Keys, main
from serving.models import Models
from serving.openapi import openapi
from serving.pages import pages
from serving.rate import RateLimit
from serving.requests import MAX_IMAGES, Images, LargeOrder, parse
from serving.requests import Image as OneImage
from serving.requests import Order as ImageOrder
from serving.routes import ROUTES, find_route
from serving.settings import Settings, read_settings
from serving.threads import Threads
from serving.uploads import check_upload, decode_upload

SMALL = Settings(max_image_mb=1, max_megapixels=2)


# What is uploaded


@pytest.mark.parametrize("name", bad_uploads())
def test_a_bad_upload_is_refused_by_name(name: str) -> None:
    content, code = bad_uploads()[name]
    with pytest.raises(ApiError) as refused:
        decode_upload(content, 32, SMALL)
    assert refused.value.code == code


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO"])
def test_a_good_upload_is_decoded_as_in_training(kind: str) -> None:
    content = animated("MPO") if kind == "MPO" else encoded(kind)
    assert np.array_equal(decode_upload(content, 32, SMALL), decode_image(content, 32))


def test_a_jpeg_whose_preview_was_dropped_is_taken_and_one_whose_preview_is_damaged_is_not() -> None:
    content = animated("MPO")
    preview = content.rindex(b"\xff\xd8\xff")
    for taken in (content[:preview], content[:preview] + bytes(100) + content[preview:], content + b"\r\n"):
        check_upload(taken, SMALL)
    with pytest.raises(ApiError, match="damaged"):
        check_upload(content[:-20], SMALL)


def test_a_phones_jpeg_with_a_gain_map_is_taken() -> None:
    content = animated("MPO")
    said = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/" hdrgm:Version="1.0"/>'
    content = content[:2] + b"\xff\xe1" + (len(said) + 2).to_bytes(2, "big") + said + content[2:]
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "JPEG"  # to PIL the second image is nothing
    assert np.array_equal(decode_upload(content, 32, SMALL), decode_image(content, 32))
    for more in (archive(), 9 * encoded("JPEG")):
        with pytest.raises(ApiError, match="goes on after"):
            check_upload(content + more, SMALL)


def test_a_progressive_jpeg_of_many_scans_is_refused() -> None:
    content = encoded("JPEG", progressive=True)
    check_upload(content, SMALL)
    scan = content.rindex(b"\xff\xda")
    with pytest.raises(ApiError, match="scans"):
        check_upload(content[:-2] + content[scan:-2] * 100 + b"\xff\xd9", SMALL)


def test_an_image_is_turned_as_its_exif_says() -> None:
    image = Image.new("RGB", (64, 64), "white")
    image.paste("black", (0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    upright = decode_upload(buffer.getvalue(), 32, SMALL)
    assert upright[:, 20:].mean() < 60 < 200 < upright[:, :12].mean()


def form(*parts: tuple[str, str | None, bytes]) -> tuple[str, bytes]:
    body = b"".join(
        f'--x\r\nContent-Disposition: form-data; name="{name}"'.encode()
        + (f'; filename="{file}"'.encode() if file is not None else b"")
        + b"\r\n\r\n"
        + content
        + b"\r\n"
        for name, file, content in parts
    )
    return "multipart/form-data; boundary=x", body + b"--x--\r\n"


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([("image", None, b"http://127.0.0.1:1/x.png")], "malformed"),
        ([("image", "a.png", b"1"), ("other", None, b"1")], "malformed"),
        ([("image", "a.png", b"1"), ("overlay", None, b"perhaps")], "malformed"),
        ([("image", "a.png", b"1"), ("overlay", "b.png", b"true")], "malformed"),
        ([("image", "a.png", b"1"), ("image", "b.png", b"2")], "too_many_images"),
        ([("overlay", None, b"true")], "malformed"),
        ([], "malformed"),
    ],
)
def test_a_form_that_is_not_asked_for_is_refused(parts: list[tuple[str, str | None, bytes]], code: str) -> None:
    with pytest.raises(ApiError) as refused:
        asyncio.run(parse(OneImage, *form(*parts)))
    assert refused.value.code == code


def test_forms_are_read() -> None:
    one = asyncio.run(parse(OneImage, *form(("image", "a.png", b"\x00\xff"), ("overlay", None, b"true"))))
    assert one.model_dump() == {"image": b"\x00\xff", "overlay": True}
    parts = [("images", f"{i}.png", bytes([i])) for i in range(MAX_IMAGES)]
    several = asyncio.run(parse(Images, *form(*parts)))
    assert several.model_dump() == {"images": [bytes([i]) for i in range(MAX_IMAGES)], "overlay": False}
    with pytest.raises(ApiError, match="too_many_images"):
        asyncio.run(parse(Images, *form(*parts, parts[0])))


# What is served


def test_only_approved_bundles_are_opened(accepted_bundle: Path, tmp_path: Path) -> None:
    bundle = open_approved(accepted_bundle)
    digest = lineage.sha256_file(accepted_bundle / "bundle.json")
    assert open_approved(accepted_bundle, digest) == bundle
    with pytest.raises(CheckpointError, match=f"another bundle.*{digest}"):
        open_approved(accepted_bundle, "0" * 64)
    changed = tmp_path / "bundle"
    changed.mkdir()
    for path in accepted_bundle.iterdir():
        (changed / path.name).symlink_to(path)
    for name in ("bundle.json", "bundle.sha256"):
        (changed / name).unlink()
    rejected = {**bundle.decisions["classes"]["vascular"], "decision": "rejected"}
    classes = {**bundle.decisions["classes"], "vascular": rejected}
    release = bundle.decisions["release"]
    for decisions, reason in (
        ({"classes": classes, "release": release}, "generator of vascular was rejected"),
        ({"classes": {}, "release": release}, "generator of vascular was never judged"),
        ({**bundle.decisions, "release": {**release, "arm": "synthetic"}}, "was not released"),
        ({**bundle.decisions, "release": {**release, "decision": "rejected", "best_real_arm": "x"}}, "not released"),
        ({"classes": bundle.decisions["classes"]}, "was not released"),
    ):
        write_bundle_json(changed, bundle.model_copy(update={"decisions": decisions}))
        with pytest.raises(CheckpointError, match=reason):
            open_approved(changed)
    files = {name: digest for name, digest in bundle.files.items() if name != "generators/vascular/model.onnx"}
    write_bundle_json(changed, bundle.model_copy(update={"files": files}))
    with pytest.raises(CheckpointError, match="weights that were judged"):
        open_approved(changed)


def test_activation_maps_add_up_to_the_logits(accepted_bundle: Path) -> None:
    bundle = open_bundle(accepted_bundle)
    assert bundle.classifier.pooled_linear_head
    rows = ActivationMaps(accepted_bundle, bundle)._rows
    side = bundle.classifier.resolution
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    prediction = Predictor(accepted_bundle, bundle).predict(pixels)
    maps = np.einsum("lk,nkhw->nlhw", rows, prediction.features)
    logits = np.log(prediction.probabilities) * bundle.classifier.temperature
    # Up to the layer's bias and the softmax's constant, the mean of a label's map is its logit.
    differences = logits - maps.mean((2, 3))
    differences -= differences.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(differences, differences[:1].repeat(3, 0), atol=1e-3)


def test_an_overlay_is_warm_where_the_features_spoke_for_the_label(accepted_bundle: Path) -> None:
    bundle = open_bundle(accepted_bundle)
    maps = ActivationMaps(accepted_bundle, bundle)
    row = maps._rows[1]
    features = np.zeros((len(row), 4, 4), np.float32)
    features[:, 0, 3] = row  # as strongly for label 1 as can be, in one corner
    with Image.open(io.BytesIO(maps.overlay(np.full((32, 32, 3), 128, np.uint8), features, 1))) as image:
        overlay = np.asarray(image).astype(int)
    assert overlay.shape == (32, 32, 3)
    warm = overlay[..., 0] - overlay[..., 2]
    assert warm[:6, -6:].mean() > 20 > -20 > warm[-6:, :6].mean()


def written(sampler: Sampler, **order: object) -> bytes:
    out = io.BytesIO()
    asked = {"label": "vascular", "n": 20, "seed": 3, "truncation": 1.0, "format": "png", **order}
    drawing = Order.model_validate(asked)
    images = (image for piece in pieces(drawing.n, threads=1) for image in draw(sampler, drawing, piece))
    write_archive(out, sampler, drawing, images, {"bundle": "b"})
    return out.getvalue()


def test_archives_hold_what_was_ordered(accepted_bundle: Path) -> None:
    sampler = Sampler(accepted_bundle, "vascular", threads=1)
    png = written(sampler)
    assert png == written(Sampler(accepted_bundle, "vascular", threads=2))
    assert png != written(sampler, seed=4)
    drawn = sampler.generate(3, 0, 20, 1.0)
    with zipfile.ZipFile(io.BytesIO(png)) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        assert len(manifest["images"]) == 20 and manifest["bundle"] == "b" and manifest["synthetic"] is True
        for entry, pixels in zip(manifest["images"], drawn, strict=True):
            content = archive.read(entry["path"])
            assert hashlib.sha256(content).hexdigest() == entry["sha256"]
            with Image.open(io.BytesIO(content)) as image:
                said = read_provenance(image)
                assert said is not None and (said.label, said.seed, said.index) == ("vascular", 3, entry["index"])
                assert np.array_equal(np.asarray(image), pixels)
    with (
        zipfile.ZipFile(io.BytesIO(written(sampler, format="npz"))) as archive,
        np.load(io.BytesIO(archive.read("images.npz"))) as arrays,
    ):
        assert np.array_equal(arrays["images"], drawn)
        entry = json.loads(archive.read("manifest.json"))["images"][0]
        assert entry["pixels_sha256"] == hashlib.sha256(drawn.tobytes()).hexdigest()
    with zipfile.ZipFile(io.BytesIO(written(sampler, format="jpeg", n=2))) as archive:
        with Image.open(io.BytesIO(archive.read("000001.jpeg"))) as image:
            said = json.loads(image.info["comment"])
            assert np.abs(np.asarray(image).astype(int) - drawn[1]).mean() < 8
        assert said["synthetic"] is True and said["index"] == 1


@pytest.mark.parametrize(
    ("n", "threads", "lengths"),
    [(1, 2, [1]), (6, 2, [4, 2]), (16, 2, [8, 8]), (20, 2, [12, 8]), (40, 1, [16, 16, 8]), (256, 4, [16] * 16)],
)
def test_an_order_has_a_piece_for_each_thread_and_none_is_large(n: int, threads: int, lengths: list[int]) -> None:
    found = pieces(n, threads)
    assert [index for piece in found for index in piece] == list(range(n))
    assert [len(piece) for piece in found] == lengths
    assert all(piece.start % PASS == 0 for piece in found), "images would be drawn twice"


def test_archives_are_the_same_however_many_threads_draw_them(accepted_bundle: Path, tmp_path: Path) -> None:
    def archive(threads: int, form: str) -> bytes:
        settings = Settings(bundle=accepted_bundle, threads=threads)
        order = ImageOrder(label="vascular", n=37, seed=5, format=form)  # type: ignore[arg-type]
        return asyncio.run(Generation(Models(settings), settings, tmp_path).archive(order))

    for form in ("png", "jpeg", "npz"):
        assert archive(1, form) == archive(3, form)


def test_a_small_order_does_not_wait_for_the_whole_of_a_large_one(accepted_bundle: Path, tmp_path: Path) -> None:
    settings = Settings(bundle=accepted_bundle, threads=2)
    generation, ended = Generation(Models(settings), settings, tmp_path), []

    async def ask(n: int) -> None:
        await generation.archive(ImageOrder(label="vascular", n=n))
        ended.append(n)

    async def scenario() -> None:
        await asyncio.gather(ask(256), ask(1))

    asyncio.run(scenario())
    assert ended == [1, 256]


def test_an_archive_that_nobody_waits_for_is_drawn_no_further(accepted_bundle: Path, tmp_path: Path) -> None:
    models, settings = Models(Settings(bundle=accepted_bundle)), Settings()
    generation, sampler = Generation(models, settings, tmp_path), models.sampler("vascular")
    drawn, draws = [], sampler.generate

    def generate(seed: int, first: int, n: int, truncation: float) -> Pixels:
        drawn.append(first)
        return draws(seed, first, n, truncation)

    sampler.generate = generate  # type: ignore[method-assign]

    async def scenario() -> None:
        task = asyncio.create_task(generation.archive(ImageOrder(label="vascular", n=256)))
        while not drawn:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while generation.oldest_s():
            await asyncio.sleep(0.001)

    asyncio.run(scenario())
    assert len(drawn) <= 2 * settings.threads < len(pieces(256, settings.threads))


def test_an_archive_that_cannot_be_written_is_told_and_leaves_nothing(accepted_bundle: Path, tmp_path: Path) -> None:
    models = Models(Settings(bundle=accepted_bundle))

    async def ask(folder: Path) -> object:
        return await Generation(models, Settings(kept_results=2), folder).batch(LargeOrder(label="vascular", n=3))

    with pytest.raises(ApiError, match="no_space"):
        asyncio.run(ask(tmp_path / "no such folder"))
    assert list(tmp_path.iterdir()) == []
    for _ in range(3):
        asyncio.run(ask(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2, "the oldest is deleted"


def test_a_batch_is_refused_before_it_is_begun_and_what_a_task_keeps_names_no_time(
    accepted_bundle: Path, tmp_path: Path
) -> None:
    generation = Generation(Models(Settings(bundle=accepted_bundle)), Settings(max_tasks=1), tmp_path)
    order = LargeOrder(label="vascular", n=300)

    async def scenario() -> list[ApiError]:
        generation.check(order)
        first = asyncio.create_task(generation.batch(order))
        await asyncio.sleep(0)
        errors = []
        for refused in (order, LargeOrder(label="nevus")):
            with pytest.raises(ApiError) as told:
                generation.check(refused)
            errors.append(told.value)
        with pytest.raises(ApiError) as kept:
            await generation.batch(order)
        generation.stop()
        with pytest.raises(ApiError) as dropped:
            await first
        return [*errors, kept.value, dropped.value]

    errors = asyncio.run(scenario())
    assert [error.code for error in errors] == ["overloaded", "no_generator", "overloaded", "overloaded"]
    assert [error.retry_after_s is None for error in errors] == [False, True, True, True]


def test_archives_are_kept_by_their_order_whatever_the_clock_says(accepted_bundle: Path, tmp_path: Path) -> None:
    models = Models(Settings(bundle=accepted_bundle))
    (tmp_path / f".{'a' * 32}.zip").write_bytes(b"a worker died over it")
    (tmp_path / f"{'b' * 32}.zip").write_bytes(b"a worker left it")
    generation = Generation(models, Settings(kept_results=2), tmp_path)
    made = []
    for _ in range(3):
        result = asyncio.run(generation.batch(LargeOrder(label="vascular", n=1)))
        made.append(Path(result.path).name)
        dated = 2e9 - len(made)  # the clock goes back
        os.utime(tmp_path / made[-1], (dated, dated))
    assert {path.name for path in tmp_path.iterdir()} == set(made[1:])


# How it is watched


def test_the_stability_index_is_zero_for_equal_shares_and_grows_with_the_difference() -> None:
    expected = np.array([500.0, 300.0, 200.0])
    assert stability_index(expected, expected) == 0
    near, far = stability_index(np.array([52.0, 29, 19]), expected), stability_index(np.array([5.0, 15, 80]), expected)
    assert 0 < near < 0.02 and far > 1
    assert np.isfinite(stability_index(np.array([0.0, 0, 10]), expected))


def test_drift_sees_other_images_and_not_the_same_ones(accepted_bundle: Path) -> None:
    reference, labels = read_reference(accepted_bundle), open_bundle(accepted_bundle).labels
    assert sum(reference["predicted"].values()) == reference["n_val"]
    drift = Drift(reference, labels, window=400)
    dark = np.zeros((ENOUGH - 1, 8, 8, 3), np.uint8)
    drift.add(dark, np.zeros(len(dark), int), [True] * len(dark))
    assert drift.indices() == {} and drift.flagged_share() is None
    drift.add(dark[:1], np.zeros(1, int), [False])
    assert set(drift.indices()) == {"brightness", "contrast", "red", "green", "blue", "label"}
    assert drift.indices()["brightness"] > 1 and drift.flagged_share() == pytest.approx(1 - 1 / ENOUGH)


@pytest.mark.parametrize(("bins", "n_train"), [(20, 100), (20, 1000), (7, 30)])
def test_a_small_reference_is_not_taken_for_drift(bins: int, n_train: int) -> None:
    """Two samples of one distribution, of which one is small: the alert's limit is 0.2."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(bins, 3.0))
    indices = [beyond_chance(*(rng.multinomial(n, shares).astype(float) for n in (500, n_train))) for _ in range(400)]
    assert np.median(indices) < 0.02 and np.quantile(indices, 0.95) < 0.2
    shifted = rng.multinomial(500, np.roll(np.sort(shares), bins // 2)).astype(float)
    assert beyond_chance(shifted, rng.multinomial(n_train, np.sort(shares)).astype(float)) > 0.2


# Who may ask, and how often


def test_keys_are_found_by_their_hash_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.yaml"
    assert main(["alice", "predict", "generate"]) == 0
    shown = capsys.readouterr()
    path.write_text(shown.out)
    key = shown.err.split("once: ")[1].splitlines()[0]
    assert key not in shown.out
    keys = Keys(path)
    assert keys.find(key) == ("alice", {"predict", "generate"})
    for wrong in ("", key[:-1], key + "x", "alice", yaml.safe_load(shown.out)["alice"]["sha256"]):
        assert keys.find(wrong) is None
    assert main(["alice"]) == 2 and main(["alice", "everything"]) == 2
    for content in ("", "[]", "{}", "alice: {sha256: 12, scopes: [predict]}", "a: {sha256: " + "0" * 64 + "}"):
        path.write_text(content)
        with pytest.raises(ParamsError, match="API key"):
            Keys(path)


def test_a_rate_is_kept_and_fills_again() -> None:
    now = 100.0
    rate = RateLimit(60, 2, lambda: now)
    assert [rate.take("a"), rate.take("a")] == [0, 0]
    assert rate.take("a") == pytest.approx(1)
    assert rate.take("b") == 0
    now = 101.5
    assert rate.take("a") == 0 and rate.take("a") == pytest.approx(0.5)
    now = 1e6
    assert [rate.take("a") for _ in range(3)] == [0, 0, pytest.approx(1)]


def test_settings_come_from_file_and_environment(tmp_path: Path) -> None:
    path = tmp_path / "serving.yaml"
    path.write_text("port: 4000\nmax_batch: 8\n")
    settings = read_settings(
        {"RARESYNTH_SERVING": str(path), "RARESYNTH_SERVING_PORT": "4001", "RARESYNTH_SERVING_BUNDLE": "12"}
    )
    assert (settings.port, settings.max_batch, settings.bundle) == (4001, 8, Path("12"))
    for environment, reason in (
        ({"RARESYNTH_SERVING_PROT": "1"}, "prot"),
        ({"RARESYNTH_SERVING_PORT": "x"}, "port"),
        ({"RARESYNTH_SERVING_HOST": "localhost"}, "IP address"),
        ({"RARESYNTH_SERVING_HOST": "0.0.0.0"}, "API keys are needed"),
        ({"RARESYNTH_SERVING_HOST": "::"}, "API keys are needed"),
        ({"RARESYNTH_SERVING": str(tmp_path / "none")}, "cannot read"),
    ):
        with pytest.raises(ParamsError, match=reason):
            read_settings(environment)
    assert not read_settings({"RARESYNTH_SERVING_HOST": "0.0.0.0", "RARESYNTH_SERVING_KEYS_FILE": "keys"}).local


# How work is shared out


def gather(batcher: Batcher[int, int], items: Sequence[int]) -> list[int | BaseException]:
    async def all_of_them() -> list[int | BaseException]:
        return await asyncio.gather(*(batcher.submit(item) for item in items), return_exceptions=True)

    return asyncio.run(all_of_them())


def test_what_waits_goes_together() -> None:
    told: list[int] = []
    seen: list[list[int]] = []
    entered = threading.Event()

    def run(items: Sequence[int]) -> list[int]:
        seen.append(list(items))
        if items[0] == 0:
            entered.wait(5)
        return [-item for item in items]

    async def scenario(batcher: Batcher[int, int]) -> list[int]:
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(batcher.submit(item)) for item in range(1, 8)]
        await asyncio.sleep(0.05)
        assert told[-1] == 7
        others[2].cancel()  # its client went away
        entered.set()
        return [await first, *(await asyncio.gather(*others, return_exceptions=True))]

    with ThreadPoolExecutor(1) as threads:
        answers = asyncio.run(
            scenario(Batcher(run, threads, max_batch=4, max_waiting=10, parallel=1, tell_waiting=told.append))
        )
    assert seen == [[0], [1, 2, 4, 5], [6, 7]] and told[-1] == 0
    assert (
        answers[:3] == [0, -1, -2]
        and isinstance(answers[3], asyncio.CancelledError)
        and answers[4:] == [-4, -5, -6, -7]
    )


def test_a_second_run_starts_beside_one_under_way_for_half_a_batch() -> None:
    told: list[int] = []
    began: list[list[int]] = []
    go_on = threading.Event()

    def run(items: Sequence[int]) -> list[int]:
        began.append(list(items))
        go_on.wait(5)
        return list(items)

    async def scenario(batcher: Batcher[int, int]) -> list[list[int]]:
        asked = [asyncio.create_task(batcher.submit(0))]
        await asyncio.sleep(0.05)
        for item in (1, 2):
            assert began == [[0]]
            asked.append(asyncio.create_task(batcher.submit(item)))
            await asyncio.sleep(0.05)
        seen = list(began)
        go_on.set()
        await asyncio.gather(*asked)
        return seen

    with ThreadPoolExecutor(2) as threads:
        assert asyncio.run(
            scenario(Batcher(run, threads, max_batch=4, max_waiting=9, parallel=2, tell_waiting=told.append))
        ) == [[0], [1, 2]]


def test_too_many_are_refused_and_a_failed_batch_fails_alone() -> None:
    told: list[int] = []

    def run(items: Sequence[int]) -> list[int]:
        if 0 in items:
            raise RuntimeError("broken")
        return list(items)

    with ThreadPoolExecutor(1) as threads:
        answers = gather(
            Batcher(run, threads, max_batch=2, max_waiting=4, parallel=1, tell_waiting=told.append), range(7)
        )
    assert isinstance(answers[0], RuntimeError)
    assert answers[1:5] == [1, 2, 3, 4]
    assert [error.code for error in answers[5:] if isinstance(error, ApiError)] == ["overloaded"] * 2


def test_threads_tell_how_long_their_oldest_work_is_under_way() -> None:
    now = 100.0
    go_on = threading.Event()
    with Threads(1, "test", lambda: now) as threads:
        assert threads.oldest_s() == 0
        stuck = threads.submit(go_on.wait, 10)
        now = 103.0
        waiting = [threads.submit(int) for _ in range(3)]
        now = 110.0
        assert threads.oldest_s() == 10
        assert waiting[0].cancel() and threads.oldest_s() == 10
        go_on.set()
        assert stuck.result(5) and waiting[2].result(5) == 0
        assert threads.oldest_s() == 0


def test_work_that_no_thread_takes_up_is_told_too() -> None:
    now = 0.0
    go_on = threading.Event()
    with Threads(1, "test", lambda: now) as threads:
        threads.submit(go_on.wait, 10)
        given_up = threads.submit(int)
        now = 60.0
        given_up.cancel()  # as a request that ran out of time does
        later = threads.submit(int)
        now = 61.0
        assert threads.oldest_s() == 61 and not later.done()
        go_on.set()


# The front, before an app that does as it is told


def asked(app: ASGIApp, settings: Settings, method: str, path: str, **options: object) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Front(app, settings), client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **options)  # type: ignore[arg-type]

    return asyncio.run(ask())


def error_of(response: httpx.Response) -> str:
    detail = response.json()["error"]
    assert set(detail) == {"code", "message", "request_id"} and detail["message"]
    assert detail["request_id"] == response.headers["x-request-id"]
    assert CODES[detail["code"]][0] == response.status_code
    return str(detail["code"])


ORDER = {"json": {"label": "a", "n": 1}}


def slow_app(ended: list[str]) -> ASGIApp:
    """Works for long, and notes when it is dropped."""

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(30)
        finally:
            ended.append("dropped")

    return slow


def test_an_answer_that_takes_too_long_is_dropped() -> None:
    ended: list[str] = []
    response = asked(slow_app(ended), Settings(timeout_s=0.05), "POST", "/generate", **ORDER)
    assert error_of(response) == "timeout" and ended == ["dropped"]


def test_a_wall_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = itertools.cycle([-1e9, 0.0, 1e9, 5e8])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    ended: list[str] = []
    response = asked(slow_app(ended), Settings(timeout_s=0.05), "POST", "/generate", **ORDER)
    assert error_of(response) == "timeout" and ended == ["dropped"]

    async def ask_often() -> list[int]:
        front = Front(JSONResponse({}), Settings(requests_per_minute=1, burst=2))
        transport = httpx.ASGITransport(front, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return [(await client.get("/model")).status_code for _ in range(4)]

    assert asyncio.run(ask_often()) == [200, 200, 429, 429]
    with ThreadPoolExecutor(1) as threads:
        batcher = Batcher[int, int](list, threads, max_batch=2, max_waiting=9, parallel=1, tell_waiting=lambda _: None)
        assert gather(batcher, range(5)) == [0, 1, 2, 3, 4]


def test_the_work_for_a_client_that_goes_away_is_dropped() -> None:
    ended: list[str] = []

    async def scenario() -> None:
        messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b'{"label": "a"}'}]

        async def receive() -> dict[str, object]:
            return messages.pop()  # type: ignore[return-value]

        async def send(message: dict[str, object]) -> None:
            ended.append("answered")

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": headers, "server": ("127.0.0.1", 1)}
        await Front(slow_app(ended), Settings())(scope, receive, send)  # type: ignore[arg-type]
        await asyncio.sleep(0)

    asyncio.run(scenario())
    assert ended == ["dropped"]


def test_errors_of_any_kind_come_in_one_format() -> None:
    async def crashing(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("secret")

    response = asked(crashing, Settings(), "POST", "/generate", **ORDER)
    assert error_of(response) == "internal" and "secret" not in response.text
    assert error_of(asked(crashing, Settings(), "GET", "/model")) == "internal"
    for status, code in ((400, "malformed"), (404, "not_found"), (500, "internal"), (503, "not_ready")):
        response = asked(
            JSONResponse({"error": "as BentoML says it"}, status), Settings(), "POST", "/generate", **ORDER
        )
        assert error_of(response) == code
    assert asked(PlainTextResponse("x", 405), Settings(), "GET", "/model").json()["error"]["code"] == "method"
    assert error_of(asked(PlainTextResponse("x"), Settings(), "GET", "/nowhere")) == "not_found"


def test_the_log_has_a_failures_reason_beside_its_request_id(caplog: pytest.LogCaptureFixture) -> None:
    @answered
    async def failing() -> None:
        raise RuntimeError("the reason")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await failing()

    response = asked(app, Settings(), "GET", "/model", headers={"X-Request-ID": "find-me"})
    assert response.json()["error"]["request_id"] == "find-me"
    assert "find-me ends with RuntimeError: the reason" in caplog.messages


def test_what_fails_in_the_front_itself_is_told_in_that_format_too() -> None:
    def broken(order: object) -> None:
        raise RuntimeError("secret")

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Front(JSONResponse({}), Settings(), checks={"/generate": broken}))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post("/generate", **ORDER)

    response = asyncio.run(ask())
    assert error_of(response) == "internal" and "secret" not in response.text


def test_the_time_to_wait_is_never_too_short() -> None:
    told = [ApiError("rate", "wait", seconds).response().headers["retry-after"] for seconds in (0.01, 1, 1.4, 2.5)]
    assert told == ["1", "1", "2", "3"]


def test_ids_are_kept_if_they_are_plain() -> None:
    good = asked(PlainTextResponse("x"), Settings(), "GET", "/model", headers={"X-Request-ID": "run-1.a"})
    assert good.headers["x-request-id"] == "run-1.a"
    bad = asked(PlainTextResponse("x"), Settings(), "GET", "/model", headers={"X-Request-ID": "a b<script>"})
    assert bad.headers["x-request-id"].isalnum() and len(bad.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("url", "host", "served"),
    [
        ("http://127.0.0.1:3000", "127.0.0.1:3000", True),
        ("http://127.0.0.1:3000", "localhost:3000", True),
        ("http://[::1]:3000", "[::1]:3000", True),
        ("http://10.0.0.1", "10.0.0.1", False),
        ("http://10.0.0.1", "127.0.0.1", False),
        ("http://127.0.0.1", "evil.example", False),
        ("http://127.0.0.1", "127.0.0.1.evil.example", False),
        ("http://127.0.0.1", "[", False),
    ],
)
def test_without_keys_only_loopback_is_served(url: str, host: str, served: bool) -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Front(PlainTextResponse("x"), Settings()))
        async with httpx.AsyncClient(transport=transport, base_url=url) as client:
            return await client.get("/model", headers={"Host": host})

    response = asyncio.run(ask())
    assert response.status_code == 200 if served else error_of(response) == "no_key"


@pytest.mark.parametrize("origin", ["http://[", "http://]", "null", "://", "http://evil.example?://localhost", "//[::"])
def test_an_origin_that_is_none_is_refused(origin: str) -> None:
    response = asked(PlainTextResponse("x"), Settings(), "GET", "/model", headers={"Origin": origin})
    assert error_of(response) == "no_key"


def test_the_key_goes_no_further_than_the_front() -> None:
    seen: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(name for name, _ in scope["headers"])
        await PlainTextResponse("x")(scope, receive, send)

    asked(app, Settings(), "GET", "/model", headers={"Authorization": "Bearer secret"})
    assert b"authorization" not in seen and b"host" in seen


def test_what_a_task_does_after_its_answer_has_no_deadline_and_takes_no_place() -> None:
    async def scenario() -> tuple[int, int]:
        gone_on = asyncio.Event()

        async def task(scope: Scope, receive: Receive, send: Send) -> None:
            await JSONResponse({})(scope, receive, send)
            await asyncio.sleep(0.2)
            gone_on.set()

        front = Front(task, Settings(timeout_s=0.05, max_requests=1))
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": headers, "server": ("127.0.0.1", 1)}
        statuses = []

        def client() -> Receive:
            messages: list[dict[str, object]] = [{"type": "http.request", "body": b'{"label": "a"}'}]

            async def receive() -> dict[str, object]:
                if not messages:
                    await asyncio.sleep(30)
                return messages.pop()

            return receive

        async def send(message: dict[str, object]) -> None:
            statuses.append(message.get("status"))

        running = asyncio.create_task(front(scope, client(), send))  # type: ignore[arg-type]
        await asyncio.sleep(0.02)
        await front(scope, client(), send)  # type: ignore[arg-type]
        await running
        return statuses.count(200), gone_on.is_set()

    assert asyncio.run(scenario()) == (2, True)


def test_a_large_answer_goes_in_pieces_and_waits_for_its_client_only_so_long() -> None:
    content = np.random.default_rng(0).bytes(1_000_000)

    async def scenario() -> tuple[list[bytes], list[bytes]]:
        front = Front(Response(content), Settings(timeout_s=0.1, max_requests=1))
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": headers, "server": ("127.0.0.1", 1)}

        def client(taken: list[bytes], takes: int) -> tuple[Receive, Send]:
            messages: list[dict[str, object]] = [{"type": "http.request", "body": b'{"label": "a"}'}]

            async def receive() -> dict[str, object]:
                if not messages:
                    await asyncio.sleep(30)
                return messages.pop()

            async def send(message: MutableMapping[str, Any]) -> None:
                if len(taken) == takes:
                    await asyncio.sleep(30)
                if message["type"] == "http.response.body":
                    taken.append(message["body"])

            return receive, send

        slow: list[bytes] = []
        quick: list[bytes] = []
        async with asyncio.timeout(5):
            await front(dict(scope), *client(slow, 2))
            await front(dict(scope), *client(quick, 100))  # the one place is free again
        return slow, quick

    slow, quick = asyncio.run(scenario())
    assert b"".join(quick) == content and max(map(len, quick)) <= 262_144
    assert slow == quick[:2]


def test_under_overload_the_answer_is_a_503_that_says_when_to_come_back() -> None:
    async def scenario() -> list[httpx.Response]:
        release = asyncio.Event()

        async def busy(scope: Scope, receive: Receive, send: Send) -> None:
            await release.wait()
            await JSONResponse({})(scope, receive, send)

        transport = httpx.ASGITransport(Front(busy, Settings(max_requests=3)))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            asking = [asyncio.create_task(client.post("/generate", **ORDER)) for _ in range(5)]
            await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0.05)
            release.set()
            return [await task for task in asking]

    responses = asyncio.run(scenario())
    assert sorted(response.status_code for response in responses) == [200] * 3 + [503] * 2
    for response in responses:
        if response.status_code == 503:
            assert error_of(response) == "overloaded" and int(response.headers["retry-after"]) >= 1


def test_how_much_may_be_sent_goes_by_the_path_and_not_by_what_the_body_is_called() -> None:
    long = json.dumps({"label": "x" * 20_000}).encode()
    for kind in ("application/json; x=multipart", "multipart/form-data; boundary=x"):
        response = asked(
            JSONResponse({}), Settings(), "POST", "/generate", content=long, headers={"Content-Type": kind}
        )
        assert error_of(response) == "too_large"
    _, body = form(("image", "a.png", bytes(50_000)))
    headers = {"Content-Type": "Multipart/Form-Data; boundary=x"}
    assert asked(JSONResponse({}), Settings(), "POST", "/predict", content=body, headers=headers).status_code == 200


def test_what_clients_alone_took_long_for_is_no_time_of_the_service() -> None:
    def count(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"raresynth_{name}", {"path": "/generate", **labels}) or 0

    async def slow_body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(0.2)
        yield b"}"

    settings = Settings(body_timeout_s=0.1)
    own, other = {"Content-Type": "application/json"}, {"Origin": "http://evil.example"}
    for headers, status in ((own, 408), (own | other, 401)):
        times, told = count("request_seconds_count"), count("requests_total", status=str(status))
        response = asked(JSONResponse({}), settings, "POST", "/generate", content=slow_body(), headers=headers)
        assert response.status_code == status
        assert count("request_seconds_count") == times
        assert count("requests_total", status=str(status)) == told + 1


def test_an_upload_lies_in_memory_once_while_it_is_answered() -> None:
    size, piece = 8_000_000, 65_536
    held: list[int] = []
    head, end = form(("image", "a.png", b"\r\n"))[1].split(b"\r\n\r\n\r\n\r\n")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        await JSONResponse({})(scope, receive, send)

    def client() -> Receive:
        left = iter([head + b"\r\n\r\n", *[piece] * (size // piece), b"\r\n" + end])

        async def receive() -> dict[str, object]:
            part = next(left, None)
            if part is None:
                await asyncio.sleep(30)
            body = bytes(part) if isinstance(part, int) else part
            return {"type": "http.request", "body": body, "more_body": not body or not body.startswith(b"\r\n--x--")}

        return receive

    async def scenario() -> int:
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"multipart/form-data; boundary=x")]
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers, "server": ("127.0.0.1", 1)}
        statuses = []

        async def send(message: MutableMapping[str, Any]) -> None:
            statuses.append(message.get("status"))

        front = Front(app, Settings())
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            await front(scope, client(), send)  # type: ignore[arg-type]
        finally:
            tracemalloc.stop()
        assert statuses[0] == 200
        return held[0] - before

    assert 0.9 * size < asyncio.run(scenario()) < 1.3 * size


def test_bodies_together_may_not_fill_the_memory() -> None:
    async def scenario(came: int) -> list[int]:
        front = Front(JSONResponse({}), Settings(max_buffered_mb=1, max_body_mb=1, body_timeout_s=0.2))
        sent = {"host": "127.0.0.1", "content-type": "multipart/form-data; boundary=x", "content-length": "600000"}
        headers = [(name.encode(), value.encode()) for name, value in sent.items()]
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers, "server": ("127.0.0.1", 1)}
        statuses: list[int] = []

        def client() -> Receive:
            messages: list[dict[str, object]] = [{"type": "http.request", "body": bytes(came), "more_body": True}]

            async def receive() -> dict[str, object]:
                if not messages:
                    await asyncio.sleep(30)
                return messages.pop()

            return receive

        async def send(message: dict[str, object]) -> None:
            if "status" in message:
                statuses.append(int(str(message["status"])))

        await asyncio.gather(*(front(dict(scope), client(), send) for _ in range(2)))  # type: ignore[arg-type]
        await front(dict(scope), client(), send)  # type: ignore[arg-type]
        return statuses

    # The rest of the first body never comes, and the second does not fit beside what came of it; once it is given up,
    # there is room again.
    assert sorted(asyncio.run(scenario(500_000))) == [408, 408, 503]
    assert sorted(asyncio.run(scenario(1000))) == [408] * 3, "what is promised and not sent is in nobody's way"


# What is documented


def test_the_document_covers_every_route_and_only_routes_are_found() -> None:
    document = openapi()
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert told == {(route.method, route.path) for route in ROUTES}
    for route in ROUTES:
        operation = document["paths"][route.path][route.method.lower()]
        content = operation.get("requestBody", {}).get("content", {})
        assert all("example" in kind for kind in content.values())
        for kind in (content, operation["responses"]["200"]["content"]):
            if "example" in (asked := kind.get("application/json", {})):
                schema = {**asked["schema"], "components": document["components"]}
                Draft202012Validator(schema).validate(asked["example"])
    assert find_route("GET", "/generated/" + "a" * 32 + ".zip")[0] is not None
    for path in ("/generated/../bundle.json", "/generated/.x.zip", "/docsXjson", "/predict/", "/generate_batch/cancel"):
        assert find_route("GET", path) == (None, [])


def test_documents_that_anyone_may_ask_for_are_made_once() -> None:
    bodies: list[object] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request"}

    async def send(message: MutableMapping[str, Any]) -> None:
        bodies.append(message.get("body"))

    scope = {"type": "http", "method": "GET", "path": "/docs.json", "headers": []}
    app = pages()
    for _ in range(2):
        asyncio.run(app(dict(scope), receive, send))  # type: ignore[arg-type]
    assert bodies[1] is bodies[3] and json.loads(bodies[1]) == openapi()  # type: ignore[arg-type]
    schema = service.Raresynth.schema()
    assert schema is service.Raresynth.schema() and "/predict" in {route["route"] for route in schema["routes"]}


def test_nothing_of_bentoml_runs_work_where_no_cancellation_reaches_it(tmp_path: Path) -> None:
    program = (
        "from serving.service import Raresynth\n"
        "print(*[middleware.cls.__name__ for middleware in Raresynth.to_asgi()._app.user_middleware])\n"
    )
    variables = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert "ContextMiddleware" in names and "TimeoutMiddleware" not in names


def test_importing_the_service_loads_no_models_and_no_torch() -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'timm', 'pandas', 'sklearn', 'scipy'):\n"
        "    sys.modules[name] = None\n"
        "import serving.service\n"
        "print([name for name in ('onnxruntime', 'safetensors') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
