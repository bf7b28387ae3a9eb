"""Work divided into shards gives the very bytes of work that is not."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from test_run import contents, finish, start

from raresynth import cli, flow, lineage
from raresynth.config import ComputeConfig, DatasetConfig, Params, ValidationConfig
from raresynth.dataset.expectations import validate
from raresynth.dataset.importers import build_manifest, find_files
from raresynth.dataset.probe import Seen
from raresynth.dataset.sample import draw_sample, write_sample
from raresynth.dataset.shards import number_and_count, probe_shard, read_shards, shard_md5, shard_names
from raresynth.errors import CheckpointError, DataError, ParamsError

CONFIG = ValidationConfig(min_images=3, min_images_per_split=1)


@pytest.fixture(scope="module")
def broken_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample data with every kind of defect, among them copies that lie in different shards."""
    samples = draw_sample()
    names = sorted(samples)
    first, last = names[0], names[-1]
    jpeg = samples[first].jpeg
    assert jpeg is not None
    samples[names[1]] = replace(samples[names[1]], jpeg=None)
    samples[names[40]] = replace(samples[names[40]], jpeg=b"")
    samples[names[80]] = replace(samples[names[80]], jpeg=jpeg[: len(jpeg) // 2])
    samples[names[120]] = replace(samples[names[120]], jpeg=b'not an image, "quoted"\r\n')
    samples[last] = samples[first]
    folder = tmp_path_factory.mktemp("broken") / "data"
    write_sample(samples, folder)
    (folder / "notes.txt").write_text("no image")
    return folder


def probed(data: Path, n: int, out: Path) -> dict[str, Seen]:
    for shard in shard_names(n):
        probe_shard(data, shard, out / shard, CONFIG)
    return read_shards(out / shard for shard in shard_names(n))


def both(data: Path, out: Path, seen: dict[str, Seen]) -> dict[str, str]:
    build_manifest(data, out / "manifest", DatasetConfig(), 0, seen)
    validate(data, out / "manifest" / "manifest.csv", out / "validation", CONFIG, seen)
    return contents(out)


@pytest.fixture(scope="module")
def undivided(broken_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return both(broken_data, tmp_path_factory.mktemp("undivided"), {})


@pytest.mark.parametrize("n", [2, 7])
def test_manifest_and_quarantine_are_the_same_bytes(
    broken_data: Path, undivided: dict[str, str], tmp_path: Path, n: int
) -> None:
    seen = probed(broken_data, n, tmp_path / "probed")
    assert set(seen) == set(find_files(broken_data).images)
    assert both(broken_data, tmp_path / "out", seen) == undivided
    with (tmp_path / "out" / "validation" / "quarantine.csv").open() as file:
        found = {row["reason"] for row in csv.DictReader(file)}
    assert found >= {"missing", "empty", "truncated", "not_an_image", "exact_duplicate"}


def test_a_link_to_nowhere_is_missing_with_shards_too(broken_data: Path, tmp_path: Path) -> None:
    """As DataLad leaves what was not fetched."""
    data = tmp_path / "data"
    shutil.copytree(broken_data, data)
    image = data / find_files(data).images[5]
    image.unlink()
    image.symlink_to("nowhere")
    undivided = both(data, tmp_path / "undivided", {})
    assert both(data, tmp_path / "out", probed(data, 2, tmp_path / "probed")) == undivided
    quarantined = (tmp_path / "out" / "validation" / "quarantine.csv").read_text().splitlines()
    assert any(image.name in row and "missing" in row for row in quarantined)


def test_what_the_shards_have_read_is_not_read_again(
    broken_data: Path, undivided: dict[str, str], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(broken_data, data)
    seen = probed(data, 2, tmp_path / "probed")
    for name in seen:
        (data / name).write_bytes(b"gone")
    assert both(data, tmp_path / "out", seen) == undivided


def test_a_file_that_no_shard_has_read_is_read(broken_data: Path, undivided: dict[str, str], tmp_path: Path) -> None:
    seen = probed(broken_data, 2, tmp_path / "probed")
    half = dict(list(seen.items())[::2])
    assert both(broken_data, tmp_path / "out", half) == undivided


@pytest.mark.parametrize("n", [2, 5, 1000])
def test_shards_are_equal_parts_that_hold_each_file_once(broken_data: Path, n: int) -> None:
    images = find_files(broken_data).images
    shards = [images[i * len(images) // n : (i + 1) * len(images) // n] for i in range(n)]
    assert [path for shard in shards for path in shard] == list(images)
    sizes = {len(shard) for shard in shards}
    assert max(sizes) - min(sizes) <= 1
    md5 = [shard_md5(broken_data, shard) for shard in shard_names(n)[:3]]
    assert md5 == [lineage.dvc_list_md5({p: lineage.md5_file(broken_data / p) for p in shard}) for shard in shards[:3]]


def test_names_of_shards() -> None:
    assert shard_names(1) == []
    assert shard_names(3) == ["1-of-3", "2-of-3", "3-of-3"]
    assert [number_and_count(name) for name in shard_names(3)] == [(0, 3), (1, 3), (2, 3)]
    for odd in ("0-of-3", "4-of-3", "x-of-3", "3", "", "1-of-"):
        with pytest.raises(ParamsError, match="write 1-of-4 for the first of four"):
            number_and_count(odd)


def test_a_table_keeps_all_that_was_seen(broken_data: Path, tmp_path: Path) -> None:
    seen = probed(broken_data, 2, tmp_path)
    for name, file in seen.items():
        assert file.md5 == lineage.md5_file(broken_data / name)
        assert file.facts.sha256 == lineage.sha256_file(broken_data / name)
        assert (file.probe.defect is None) == (len(file.probe.phash) == 32)


@pytest.mark.parametrize(
    "text", ["", "path,md5\n", None, "path,md5,sha256,width,height,defect,detail,phash\na,b,c,x,1,,,\n"]
)
def test_a_damaged_table_is_refused(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "1-of-2").mkdir()
    if text is not None:
        (tmp_path / "1-of-2" / "files.csv").write_text(text)
    if text in {"", "path,md5\n"}:  # no row is lost unseen: the files that it lacks are read
        assert read_shards([tmp_path / "1-of-2"]) == {}
    else:
        with pytest.raises(CheckpointError, match="run the stage probe again"):
            read_shards([tmp_path / "1-of-2"])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        probe_shard(tmp_path / "nowhere", "1-of-2", tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()


def test_the_folders_hash_is_put_together_from_the_shards(broken_data: Path, tmp_path: Path) -> None:
    run = flow.Run(broken_data, tmp_path / "run", Params(compute=ComputeConfig(shards=3, parallel_tasks=1)))
    flow.execute_all("probe", run)
    record = flow.execute("build-manifest", run)
    assert record.source == lineage.dvc_dir_md5(broken_data)
    assert set(record.inputs) == {f"probe/{shard}" for shard in shard_names(3)}
    (broken_data / "notes.txt").write_text("changed")
    assert flow.execute("build-manifest", run).source == lineage.dvc_dir_md5(broken_data) != record.source


def test_a_changed_image_makes_its_shard_alone_run_again(broken_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(broken_data, data)
    run = flow.Run(data, tmp_path / "run", Params(compute=ComputeConfig(shards=3, parallel_tasks=1)))
    before = {record.item: record.digest for record in flow.execute_all("probe", run)}
    changed = data / find_files(data).images[0]
    changed.write_bytes(changed.read_bytes() + b"\0")
    after = {record.item: record.digest for record in flow.execute_all("probe", run)}
    assert {item for item in before if before[item] != after[item]} == {"1-of-3"}


def test_stages_in_shards_want_their_shards_first(tiny_data: Path, tmp_path: Path) -> None:
    run = flow.Run(tiny_data, tmp_path / "run", Params(compute=ComputeConfig(shards=2)))
    with pytest.raises(CheckpointError, match="stage probe has not been run"):
        flow.execute("build-manifest", run)


def test_without_shards_their_stages_leave_an_empty_folder_for_dvc(tiny_run: flow.Run) -> None:
    for stage in ("probe", "draw"):
        assert list((tiny_run.store / "stages" / stage).iterdir()) == []


@pytest.mark.slow
def test_a_run_in_shards_leaves_what_one_without_leaves(tiny_run: flow.Run, tmp_path: Path) -> None:
    """Started in a copy of the finished run: what still has the same inputs, bit by bit, is not repeated."""
    params = tmp_path / "params.yaml"
    values = tiny_run.params.model_dump(mode="json")
    values["compute"] |= {"shards": 3, "parallel_tasks": 2}
    params.write_text(yaml.safe_dump(values))
    out = tmp_path / "out"
    shutil.copytree(tiny_run.store, out)
    times = json.loads((out / "run.json").read_text())["stages"]
    finish(start(tiny_run.data_dir, params, out))
    repeated = {
        name for name, time in json.loads((out / "run.json").read_text())["stages"].items() if times.get(name) != time
    }
    labels = flow.items(tiny_run, "label")
    drawn = {f"draw/{label}/{shard}" for label in labels for shard in shard_names(3)}
    assert repeated - {"package", "report"} == {
        *(f"probe/{shard}" for shard in shard_names(3)),
        *("build-manifest", "validate"),
        *(f"synthesize/{label}" for label in labels),
        *drawn,
    }
    before, after = contents(tiny_run.store), contents(out)
    kept = ("manifest/", "validation/", "synthetic/", "quality/", "gate/", "evaluation/", "decisions.json")
    assert {n: d for n, d in after.items() if n.startswith(kept)} == {
        n: d for n, d in before.items() if n.startswith(kept)
    }


def test_the_command_line_runs_all_shards_or_one_and_says_when_there_are_none(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "params.yaml").write_text("compute: {shards: 2, parallel_tasks: 1}")
    place = ["--data", str(tiny_data), "--params", str(tmp_path / "params.yaml"), "--out", str(tmp_path / "out")]
    assert cli.main(["probe", *place, "--shard", "2-of-2"]) == 0
    assert capsys.readouterr().out == f"probe 2-of-2: done -> {tmp_path}/out/probed/2-of-2\n"
    assert cli.main(["probe", *place, "--shard", "3-of-4"]) == 2
    assert "choose from 1-of-2, 2-of-2" in capsys.readouterr().err
    (tmp_path / "params.yaml").write_text("compute: {shards: 1}")
    assert cli.main(["probe", *place]) == 0
    assert capsys.readouterr().out == "probe: nothing to do, compute.shards is 1\n"
    assert cli.main(["probe", *place, "--shard", "1-of-2"]) == 2
    assert "has no '1-of-2' in this run; it has nothing to do" in capsys.readouterr().err
