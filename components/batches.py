"""New images from an approved bundle: made, audited, shown, and published as a data version of their own."""

from kfp import dsl

from components.artifacts import write_text
from components.inputs import check_name
from components.task import batch_dir, batches_of, check_code, errors_as_sentences, run_dir
from raresynth.audit.synthetic import Generators, audit_batch
from raresynth.bundle.contents import open_bundle
from raresynth.bundle.sampler import generate_folder
from raresynth.dataset.manifest import read_synthetic
from raresynth.errors import CheckpointError
from raresynth.report.grids import LARGEST_TILE, read_tiles, sheet
from raresynth.versions.publish import publish_data

SHOWN = 64
"""Images of a batch that its page shows, in rows of 8."""


def classes_to_make(run: str, classes: list[str], name: str, code: str) -> list[str]:
    """The classes that were asked for, or all with an accepted generator.

    Raises:
        SystemExit: the run has no whole bundle, or a class has no accepted generator.
    """
    with errors_as_sentences():
        check_code(code)
        check_name(name)
        bundle = open_bundle(run_dir(run) / "bundle")
        if not bundle.generators:
            raise CheckpointError(bundle.no_generators)
        for label in classes:
            bundle.generator(label)
    return classes or list(bundle.generators)


def make_batch(label: str, run: str, name: str, n: int, seed: int, truncation: float, page: dsl.HTML) -> None:
    """Images 0 .. n - 1 of a seed in the batch's folder; a folder with these is only audited.

    Args:
        truncation: standard deviation of the latents; 0 for that of the images that the gate judged.

    Raises:
        SystemExit: they cannot be made, or the folder holds other images.
    """
    bundle, folder = run_dir(run) / "bundle", batch_dir(name) / label
    with errors_as_sentences():
        truncation = truncation or open_bundle(bundle).generator(label).truncation
        if not folder.exists():
            generate_folder(bundle, label, n, seed, truncation, folder)
        manifest = read_synthetic(folder / "manifest.csv", "generate")
        if len(manifest) != n or set(manifest["seed"]) != {seed} or set(manifest["truncation"]) != {truncation}:
            raise CheckpointError(f"{folder} holds other images of {label}; choose another name for this batch")
        broken = audit_batch(folder, Generators(bundle)).broken()
        if broken:
            raise CheckpointError(f"{folder} is no batch of {bundle}: {broken[0][1].what}: {broken[0][1].detail}")
        tiles = read_tiles(folder, manifest["path"][:SHOWN], LARGEST_TILE)
    write_text(page, f'<h1>{n} synthetic images of {label}</h1><img src="{sheet(tiles, 8)}">')


def publish(name: str, run: str, repository: str, branch: str, path: str, published: dsl.Dataset) -> None:
    """Push all batches of a name and commit their pointers; the artifact names the version.

    Raises:
        SystemExit: a batch is not what its bundle's generator makes, or the repository does not take it.
    """
    with errors_as_sentences():
        report = publish_data(run_dir(run) / "bundle", batches_of(name), repository, branch, path)
    published.metadata.update(report.model_dump(mode="json"))
    write_text(published, report.model_dump_json(indent=2))
