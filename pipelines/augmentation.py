"""The flow as a KFP graph: the same stages and edges as dvc.yaml, classes and arms as loops.

Loops stand in nested pipelines: a task after a loop then waits for all of it, also where the loop is empty.
Results of a loop travel through `store`; kfp's Collected fails where a loop has no iterations.
"""

from typing import List  # noqa: UP035

from kfp import dsl

from components import stages


def build(parallel_tasks: int) -> dsl.base_component.BaseComponent:
    """The pipeline; how many iterations of a loop run at once is fixed here, as KFP wants it.

    Args:
        parallel_tasks: iterations of a loop that may run at the same time.
    """

    @dsl.pipeline(name="class-generators", description="A generator a class, its images, and how good they are.")
    def class_generators(
        labels: List[str],  # noqa: UP006
        data: str,
        params: str,
        store: str,
        validation: dsl.Input[dsl.Artifact],
        encoder: dsl.Input[dsl.Artifact],
        universal: dsl.Input[dsl.Artifact],
    ):
        with dsl.ParallelFor(labels, parallelism=parallel_tasks) as label:
            generator = stages.finetune(
                label=label,
                data=data,
                params=params,
                store=store,
                validation=validation,
                encoder=encoder,
                universal=universal,
            )
            synthetic = stages.synthesize(
                label=label,
                data=data,
                params=params,
                store=store,
                validation=validation,
                encoder=encoder,
                generator=generator.outputs["record"],
            )
            stages.measure(
                label=label,
                data=data,
                params=params,
                store=store,
                validation=validation,
                encoder=encoder,
                synthetic=synthetic.outputs["record"],
            )

    @dsl.pipeline(name="classifier-arms", description="The same classifier, trained in each of the arms.")
    def classifier_arms(
        arms: List[str],  # noqa: UP006
        data: str,
        params: str,
        store: str,
        validation: dsl.Input[dsl.Artifact],
        decisions: dsl.Input[dsl.Artifact],
    ):
        with dsl.ParallelFor(arms, parallelism=parallel_tasks) as arm:
            stages.train_classifier(
                arm=arm, data=data, params=params, store=store, validation=validation, decisions=decisions
            )

    @dsl.pipeline(
        name="raresynth-augmentation",
        description="An imbalanced image set in; gated generators, an approved classifier and a report out.",
    )
    def augmentation(data: str, params: str, store: str):
        """Take an imbalanced image set to gated generators and an approved classifier.

        Args:
            data: Folder of the images, as the tasks see it.
            params: Content of a params file as JSON.
            store: Folder that keeps checkpoints and results; a run with the same folder goes on.
        """
        where = {"data": data, "params": params, "store": store}
        manifest = stages.build_manifest(**where)
        checked = stages.validate(**where, manifest=manifest.outputs["record"])
        validation = checked.outputs["record"]
        encoder = stages.train_encoder(**where, validation=validation).outputs["record"]
        universal = stages.pretrain(**where, validation=validation, encoder=encoder).outputs["record"]
        classes = class_generators(
            labels=checked.outputs["Output"], **where, validation=validation, encoder=encoder, universal=universal
        )
        majority = stages.synthesize_majority(**where, validation=validation, universal=universal).outputs["record"]
        gated = stages.gate(**where, validation=validation, majority=majority).after(classes)
        decisions = gated.outputs["record"]
        arms = classifier_arms(arms=gated.outputs["Output"], **where, validation=validation, decisions=decisions)
        evaluated = stages.evaluate(**where, validation=validation, decisions=decisions).after(arms)
        evaluation = evaluated.outputs["record"]
        bundle = stages.package(
            **where, validation=validation, encoder=encoder, decisions=decisions, evaluation=evaluation
        ).after(classes, arms)
        page = stages.report(
            **where,
            validation=validation,
            encoder=encoder,
            universal=universal,
            decisions=decisions,
            evaluation=evaluation,
            bundle=bundle.outputs["record"],
        ).after(classes, arms)
        stages.outcome(store=store, page=page.outputs["page"])
        with dsl.If(evaluated.outputs["Output"] == "real+synthetic", name="synthetic-arm-approved"):
            stages.release_synthetic(store=store, bundle=bundle.outputs["record"])

    return augmentation
