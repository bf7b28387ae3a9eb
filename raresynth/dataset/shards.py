"""Shards: equal parts of the images' files, each read by a task of its own, where `compute.shards` asks for it.

What a shard tells of its files is what `build_manifest` and `validate` would find themselves, so that their results are
the same bytes; what concerns all images (splits, duplicates) they do after the shards, over all of them.
"""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from raresynth.config import ValidationConfig
from raresynth.dataset.importers import find_files
from raresynth.dataset.probe import Facts, Probe, Seen, probe_files, read_facts
from raresynth.errors import CheckpointError, DataError, ParamsError
from raresynth.lineage import dvc_list_md5, md5_file, new_dir

FILES = "files.csv"
COLUMNS = ("path", "md5", "sha256", "width", "height", "defect", "detail", "phash")


def shard_names(n: int) -> list[str]:
    """What the shards are called: 1-of-4 to 4-of-4. One shard is none."""
    return [f"{number}-of-{n}" for number in range(1, n + 1)] if n > 1 else []


def number_and_count(shard: str) -> tuple[int, int]:
    """Number of a shard, from 0, and how many there are.

    Raises:
        ParamsError: this is no shard's name.
    """
    number, _, count = shard.partition("-of-")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ParamsError(f"{shard!r} names no shard; write 1-of-4 for the first of four")
    return int(number) - 1, int(count)


def part_name(label: str, shard: str) -> str:
    """What a shard of one class is called: df/1-of-4."""
    return f"{label}/{shard}"


def label_and_shard(part: str) -> tuple[str, str]:
    """What the name of a part is made of."""
    label, _, shard = part.rpartition("/")
    return label, shard


def shard_md5(data_dir: Path, shard: str) -> str:
    """The `.dir` hash that DVC would give to a folder of the shard's files alone."""
    return dvc_list_md5({path: md5_file(data_dir / path) for path in _paths(data_dir, shard)})


def probe_shard(data_dir: Path, shard: str, out_dir: Path, config: ValidationConfig) -> None:
    """Read and decode the shard's files, and write files.csv: a row for each.

    Raises:
        DataError: the folder is missing, or a file cannot be read.
    """
    names = _paths(data_dir, shard)
    paths = [data_dir / name for name in names]
    facts = list(read_facts(paths))
    probes = list(probe_files(paths, config.min_side, config.max_side))
    with new_dir(out_dir) as folder, (folder / FILES).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, path, found, probe in zip(names, paths, facts, probes, strict=True):
            row = (name, md5_file(path), *found, probe.defect or "", probe.detail, probe.phash.hex())
            writer.writerow(row)


def read_shards(folders: Iterable[Path]) -> dict[str, Seen]:
    """What the shards tell, by path relative to the images' folder.

    Raises:
        CheckpointError: a shard's table is missing or damaged.
    """
    return {name: seen for folder in folders for name, seen in _read(folder / FILES)}


def _read(path: Path) -> Iterator[tuple[str, Seen]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                facts = Facts(row["sha256"], int(row["width"]), int(row["height"]))
                probe = Probe(row["defect"] or None, row["detail"], bytes.fromhex(row["phash"]))  # type: ignore[arg-type]
                yield row["path"], Seen(row["md5"], facts, probe)
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); run the stage probe again") from error


def _paths(data_dir: Path, shard: str) -> list[str]:
    if not data_dir.is_dir():
        raise DataError(f"the data folder {data_dir} does not exist; name a folder of images")
    number, count = number_and_count(shard)
    # A link to nowhere is no file; the manifest says that it is missing.
    images = [name for name in find_files(data_dir).images if (data_dir / name).is_file()]
    return images[number * len(images) // count : (number + 1) * len(images) // count]
