"""The flow as a KFP graph: the same stages and edges as dvc.yaml, classes and arms as loops.

Loops stand in nested pipelines: a task after a loop then waits for all of it, also where the loop is empty.
Results of a loop travel through `store`; kfp's Collected fails where a loop has no iterations.
"""

from typing import List  # noqa: UP035

from kfp import dsl

from components import entry, stages
from pipelines.placement import Graph, Place, anywhere
from raresynth.config import ComputeConfig
from raresynth.lineage import code_hash


class Flow:
    """The stages, wired; where their tasks run is settled by `place`.

    Args:
        parallel_tasks: iterations of a loop that may run at the same time; KFP wants it fixed when it compiles.
    """

    def __init__(self, parallel_tasks: int, place: Place) -> None:
        self.place = place
        self.probes = self._probes(parallel_tasks)
        self.drawings = self._drawings(parallel_tasks)
        self.class_generators = self._class_generators(parallel_tasks)
        self.classifier_arms = self._classifier_arms(parallel_tasks)

    def _probes(self, parallel_tasks: int) -> Graph:
        @dsl.pipeline(name="probes", description="The images' files, read in shards; none where one task reads all.")
        def probes(shards: List[str], data: str, params: str, store: str, code: str):  # noqa: UP006
            with dsl.ParallelFor(shards, parallelism=parallel_tasks) as shard:
                self.place(stages.probe, shard=shard, data=data, params=params, store=store, code=code)

        return probes

    def _drawings(self, parallel_tasks: int) -> Graph:
        @dsl.pipeline(name="drawings", description="A class's images, drawn in shards; none where one task draws all.")
        def drawings(
            shards: List[str],  # noqa: UP006
            label: str,
            data: str,
            params: str,
            store: str,
            code: str,
            validation: dsl.Input[dsl.Artifact],
            encoder: dsl.Input[dsl.Artifact],
            generator: dsl.Input[dsl.Artifact],
        ):
            with dsl.ParallelFor(shards, parallelism=parallel_tasks) as shard:
                where = {"label": label, "data": data, "params": params, "store": store, "code": code}
                checked = {"validation": validation, "encoder": encoder}
                self.place(stages.draw, shard=shard, **where, **checked, generator=generator)

        return drawings

    def _class_generators(self, parallel_tasks: int) -> Graph:
        @dsl.pipeline(name="class-generators", description="A generator a class, its images, and how good they are.")
        def class_generators(
            labels: List[str],  # noqa: UP006
            shards: List[str],  # noqa: UP006
            data: str,
            params: str,
            store: str,
            code: str,
            validation: dsl.Input[dsl.Artifact],
            encoder: dsl.Input[dsl.Artifact],
            universal: dsl.Input[dsl.Artifact],
        ):
            with dsl.ParallelFor(labels, parallelism=parallel_tasks) as label:
                where = {"label": label, "data": data, "params": params, "store": store, "code": code}
                checked = {"validation": validation, "encoder": encoder}
                generator = self.place(stages.finetune, **where, **checked, universal=universal).outputs["record"]
                drawn = self.drawings(shards=shards, **where, **checked, generator=generator)
                synthetic = self.place(stages.synthesize, **where, **checked, generator=generator).after(drawn)
                self.place(stages.measure, **where, **checked, synthetic=synthetic.outputs["record"])

        return class_generators

    def _classifier_arms(self, parallel_tasks: int) -> Graph:
        @dsl.pipeline(name="classifier-arms", description="The same classifier, trained in each of the arms.")
        def classifier_arms(
            arms: List[str],  # noqa: UP006
            data: str,
            params: str,
            store: str,
            code: str,
            validation: dsl.Input[dsl.Artifact],
            decisions: dsl.Input[dsl.Artifact],
        ):
            with dsl.ParallelFor(arms, parallelism=parallel_tasks) as arm:
                where = {"arm": arm, "data": data, "params": params, "store": store, "code": code}
                self.place(stages.train_classifier, **where, validation=validation, decisions=decisions)

        return classifier_arms

    def wire(self, shards: object, where: dict[str, object]) -> None:
        """Add all stages to the pipeline that is being built.

        Args:
            shards: names of the shards, a list that may be empty.
            where: data, params, store and code, as every stage takes them.
        """
        probes = self.probes(shards=shards, **where)
        listed = self.place(stages.build_manifest, **where).after(probes).outputs["record"]
        checked = self.place(stages.validate, **where, manifest=listed).after(probes)
        validation = checked.outputs["record"]
        encoder = self.place(stages.train_encoder, **where, validation=validation).outputs["record"]
        universal = self.place(stages.pretrain, **where, validation=validation, encoder=encoder).outputs["record"]
        measured = {"validation": validation, "encoder": encoder}
        labels = checked.outputs["Output"]
        classes = self.class_generators(labels=labels, shards=shards, **where, **measured, universal=universal)
        majority = self.place(stages.synthesize_majority, **where, validation=validation, universal=universal)
        gated = self.place(stages.gate, **where, validation=validation, majority=majority.outputs["record"]).after(
            classes
        )
        decisions = gated.outputs["record"]
        arms = self.classifier_arms(arms=gated.outputs["Output"], **where, validation=validation, decisions=decisions)
        evaluated = self.place(stages.evaluate, **where, validation=validation, decisions=decisions).after(arms)
        judged = {**measured, "decisions": decisions, "evaluation": evaluated.outputs["record"]}
        bundle = self.place(stages.package, **where, **judged, manifest=listed).after(classes, arms).outputs["record"]
        self.place(stages.report, **where, **judged, universal=universal, bundle=bundle).after(classes, arms)
        with dsl.If(evaluated.outputs["Output"] == "real+synthetic", name="synthetic-arm-approved"):
            self.place(stages.release_synthetic, store=where["store"], bundle=bundle)


def build_local(parallel_tasks: int) -> Graph:
    """The flow over a folder of this machine, with params that have been read already."""
    flow = Flow(parallel_tasks, anywhere)

    @dsl.pipeline(name="raresynth-run")
    def local(shards: List[str], data: str, params: str, store: str, code: str):  # noqa: UP006
        flow.wire(shards, {"data": data, "params": params, "store": store, "code": code})

    return local


def build(compute: ComputeConfig, place: Place) -> Graph:
    """The pipeline `augmentation`: inputs from a form, images by their DVC version, then the flow."""
    flow = Flow(compute.parallel_tasks, place)
    code = code_hash("")

    @dsl.pipeline(
        name="raresynth-augmentation",
        display_name="raresynth: augmentation",
        description="An imbalanced image set in; gated generators, an approved classifier and a report out.",
    )
    def augmentation(
        repository: str,
        revision: str = "main",
        path: str = "data",
        preset: str = "demo",
        resolution: int = 0,
        classes: List[str] = [],  # noqa: B006, UP006
        overrides: str = "{}",
        name: str = "augmentation",
    ):
        """Take an imbalanced image set to gated generators and an approved classifier.

        Args:
            repository: Git repository whose images DVC keeps, as git clones it.
            revision: Branch, tag or commit of it. The run notes the commit and the images' hash.
            path: Folder of the images in the repository.
            preset: Params to start from: demo, ham10000-cpu, ham10000-gpu, paper or smoke.
            resolution: Side in pixels of what is made and classified: 32, 64, 128 or 256. 0 keeps the preset's.
            classes: Classes to make images of, as a JSON list. With none, each class that the preset's policy asks for.
            overrides: Other knobs as JSON, section by section as in params.yaml. They go before the preset.
            name: Name of the run's folder on the volume. A run of the same name goes on where the last one stopped.
        """
        outcome = flow.place(entry.write_outcome, store=name)
        with dsl.ExitHandler(outcome, name="flow"):
            params = flow.place(
                entry.choose_params,
                preset=preset,
                resolution=resolution,
                classes=classes,
                overrides=overrides,
                name=name,
                code=code,
                ranks=compute.ranks,
            )
            chosen = params.outputs["Output"]
            shards = flow.place(entry.plan_shards, params=chosen).outputs["Output"]
            images = flow.place(entry.fetch_data, repository=repository, revision=revision, path=path).after(params)
            flow.wire(shards, {"data": images.outputs["Output"], "params": chosen, "store": name, "code": code})

    return augmentation
