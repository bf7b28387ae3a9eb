"""New images from an approved bundle as a KFP graph: a loop over classes, then, if wanted, one data version of all."""

from typing import List  # noqa: UP035

from kfp import dsl

from components import entry
from pipelines.placement import Graph, Place
from raresynth.lineage import code_hash


def build(parallel_tasks: int, place: Place) -> Graph:
    """The pipeline `synthesis`.

    Args:
        parallel_tasks: classes whose images are made at the same time.
    """
    code = code_hash("")

    @dsl.pipeline(name="batches", description="Images of each class.")
    def batches(labels: List[str], run: str, name: str, n: int, seed: int, truncation: float):  # noqa: UP006
        with dsl.ParallelFor(labels, parallelism=parallel_tasks) as label:
            place(entry.generate, label=label, run=run, name=name, n=n, seed=seed, truncation=truncation)

    @dsl.pipeline(
        name="raresynth-synthesis",
        display_name="raresynth: synthesis",
        description="New images of rare classes from an approved bundle, each with its origin written in it.",
    )
    def synthesis(
        run: str = "augmentation",
        classes: List[str] = [],  # noqa: B006, UP006
        n: int = 100,
        seed: int = 0,
        truncation: float = 0.0,
        name: str = "synthesis",
        repository: str = "",
        branch: str = "main",
        path: str = "synthetic",
    ):
        """Make new images from an approved bundle.

        Args:
            run: Name of the augmentation run whose bundle makes the images.
            classes: Classes to make images of, as a JSON list. With none, each class with an accepted generator.
            n: Images of each class.
            seed: Images of the same seed, number and truncation are the same bytes.
            truncation: Spread of the latents, above 0 and at most 1. 0 keeps that of the images that the gate judged.
            name: Name of the batches' folder on the volume.
            repository: Git repository to publish the images in as a DVC version. With none, they stay on the volume.
            branch: Branch of it that gets the commit.
            path: Folder of the images in the repository.
        """
        outcome = place(entry.write_batch_outcome, name=name)
        with dsl.ExitHandler(outcome, name="batches"):
            labels = place(entry.open_bundle, run=run, classes=classes, name=name, code=code)
            made = batches(labels=labels.output, run=run, name=name, n=n, seed=seed, truncation=truncation)
            with dsl.If(repository != "", name="publish"):
                place(entry.publish_data, name=name, run=run, repository=repository, branch=branch, path=path).after(
                    made
                )

    return synthesis
