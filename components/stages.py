"""The stages as KFP components: imports and one call each.

Every stage leaves its files in `store` (a folder or mounted volume) and hands its record on as an artifact. What else
its result depends on enters the cache key with `data` (a folder that bears its `.dir` hash), `params` (JSON) and `code`
(the library's hash).
"""

from typing import List  # noqa: UP035

from kfp import dsl

from components.base import component


@component
def probe(shard: str, data: str, params: str, store: str, code: str, record: dsl.Output[dsl.Artifact]):
    """Read and decode one shard of the images' files."""
    from components.task import run

    run("probe", data, params, store, code, record.path, {}, shard)


@component
def build_manifest(data: str, params: str, store: str, code: str, record: dsl.Output[dsl.Artifact]):
    """List the images, their labels and groups, and split them."""
    from components.task import run

    run("build-manifest", data, params, store, code, record.path, {})


@component
def validate(
    data: str, params: str, store: str, code: str, manifest: dsl.Input[dsl.Artifact], record: dsl.Output[dsl.Artifact]
) -> List[str]:  # noqa: UP006
    """Check every image, quarantine what is bad; returns the classes to synthesise."""
    from components.task import items_after

    return items_after("label", "validate", data, params, store, code, record.path, {"build-manifest": manifest.path})


@component
def train_encoder(
    data: str, params: str, store: str, code: str, validation: dsl.Input[dsl.Artifact], record: dsl.Output[dsl.Artifact]
):
    """Train the encoder that every measurement uses."""
    from components.task import run

    run("train-encoder", data, params, store, code, record.path, {"validate": validation.path})


@component
def pretrain(
    data: str,
    params: str,
    store: str,
    code: str,
    validation: dsl.Input[dsl.Artifact],
    encoder: dsl.Input[dsl.Artifact],
    record: dsl.Output[dsl.Artifact],
):
    """Train the universal generator on all train images."""
    from components.task import run

    run(
        "pretrain", data, params, store, code, record.path, {"validate": validation.path, "train-encoder": encoder.path}
    )


@component
def finetune(
    label: str,
    data: str,
    params: str,
    store: str,
    code: str,
    validation: dsl.Input[dsl.Artifact],
    encoder: dsl.Input[dsl.Artifact],
    universal: dsl.Input[dsl.Artifact],
    record: dsl.Output[dsl.Artifact],
):
    """Fine-tune the universal generator for one class."""
    from components.task import run

    run(
        "finetune",
        data,
        params,
        store,
        code,
        record.path,
        {"validate": validation.path, "train-encoder": encoder.path, "pretrain": universal.path},
        label,
    )


@component
def draw(
    label: str,
    shard: str,
    data: str,
    params: str,
    store: str,
    code: str,
    validation: dsl.Input[dsl.Artifact],
    encoder: dsl.Input[dsl.Artifact],
    generator: dsl.Input[dsl.Artifact],
    record: dsl.Output[dsl.Artifact],
):
    """Draw one shard of the images that balance a class."""
    from components.task import run
    from raresynth.dataset.shards import part_name

    run(
        "draw",
        data,
        params,
        store,
        code,
        record.path,
        {"validate": validation.path, "train-encoder": encoder.path, "finetune": generator.path},
        part_name(label, shard),
    )


@component
def synthesize(
    label: str,
    data: str,
    params: str,
    store: str,
    code: str,
    validation: dsl.Input[dsl.Artifact],
    encoder: dsl.Input[dsl.Artifact],
    generator: dsl.Input[dsl.Artifact],
    record: dsl.Output[dsl.Artifact],
):
    """Make the images that balance one class."""
    from components.task import run

    run(
        "synthesize",
        data,
        params,
        store,
        code,
        record.path,
        {"validate": validation.path, "train-encoder": encoder.path, "finetune": generator.path},
        label,
    )


@component
def synthesize_majority(
    data: str,
    params: str,
    store: str,
    code: str,
    validation: dsl.Input[dsl.Artifact],
    universal: dsl.Input[dsl.Artifact],
    record: dsl.Output[dsl.Artifact],
):
    """Make images of the other classes, for the classifier that sees no real ones."""
    from components.task import run

    run(
        "synthesize-majority",
        data,
        params,
        store,
        code,
        record.path,
        {"validate": validation.path, "pretrain": universal.path},
    )


@component
def measure(
    label: str,
    data: str,
    params: str,
    store: str,
    code: str,
    validation: dsl.Input[dsl.Artifact],
    encoder: dsl.Input[dsl.Artifact],
    synthetic: dsl.Input[dsl.Artifact],
    record: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Measure one class's synthetic images."""
    from components.artifacts import log_quality
    from components.task import run

    log_quality(
        run(
            "measure",
            data,
            params,
            store,
            code,
            record.path,
            {"validate": validation.path, "train-encoder": encoder.path, "synthesize": synthetic.path},
            label,
        ),
        label,
        metrics,
    )


@component
def gate(
    data: str,
    params: str,
    store: str,
    code: str,
    validation: dsl.Input[dsl.Artifact],
    majority: dsl.Input[dsl.Artifact],
    record: dsl.Output[dsl.Artifact],
) -> List[str]:  # noqa: UP006
    """Decide for each class whether its images may be used; returns the classifier's arms."""
    from components.task import items_after

    return items_after(
        "arm",
        "gate",
        data,
        params,
        store,
        code,
        record.path,
        {"validate": validation.path, "synthesize-majority": majority.path},
    )


@component
def train_classifier(
    arm: str,
    data: str,
    params: str,
    store: str,
    code: str,
    validation: dsl.Input[dsl.Artifact],
    decisions: dsl.Input[dsl.Artifact],
    record: dsl.Output[dsl.Artifact],
):
    """Train the classifier of one arm."""
    from components.task import run

    run(
        "train-classifier",
        data,
        params,
        store,
        code,
        record.path,
        {"validate": validation.path, "gate": decisions.path},
        arm,
    )


@component
def evaluate(
    data: str,
    params: str,
    store: str,
    code: str,
    validation: dsl.Input[dsl.Artifact],
    decisions: dsl.Input[dsl.Artifact],
    record: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    classification: dsl.Output[dsl.ClassificationMetrics],
) -> str:
    """Score the arms on the real test split; returns the arm to release."""
    from components.artifacts import log_evaluation
    from components.task import run

    return log_evaluation(
        run("evaluate", data, params, store, code, record.path, {"validate": validation.path, "gate": decisions.path}),
        metrics,
        classification,
    )


@component
def package(
    data: str,
    params: str,
    store: str,
    code: str,
    manifest: dsl.Input[dsl.Artifact],
    validation: dsl.Input[dsl.Artifact],
    encoder: dsl.Input[dsl.Artifact],
    decisions: dsl.Input[dsl.Artifact],
    evaluation: dsl.Input[dsl.Artifact],
    record: dsl.Output[dsl.Artifact],
):
    """Bundle the accepted generators and the approved classifier."""
    from components.task import run

    run(
        "package",
        data,
        params,
        store,
        code,
        record.path,
        {
            "build-manifest": manifest.path,
            "validate": validation.path,
            "train-encoder": encoder.path,
            "gate": decisions.path,
            "evaluate": evaluation.path,
        },
    )


@component
def report(
    data: str,
    params: str,
    store: str,
    code: str,
    validation: dsl.Input[dsl.Artifact],
    encoder: dsl.Input[dsl.Artifact],
    universal: dsl.Input[dsl.Artifact],
    decisions: dsl.Input[dsl.Artifact],
    evaluation: dsl.Input[dsl.Artifact],
    bundle: dsl.Input[dsl.Artifact],
    record: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
):
    """Write the page that a person reads."""
    from components.artifacts import copy_page
    from components.task import run

    copy_page(
        run(
            "report",
            data,
            params,
            store,
            code,
            record.path,
            {
                "validate": validation.path,
                "train-encoder": encoder.path,
                "pretrain": universal.path,
                "gate": decisions.path,
                "evaluate": evaluation.path,
                "package": bundle.path,
            },
        ),
        page,
    )


@component
def release_synthetic(store: str, bundle: dsl.Input[dsl.Artifact], note: dsl.Output[dsl.Markdown]):
    """Taken only where synthetic images demonstrably helped: says so beside the run."""
    from components.outcome import write_release

    write_release(store, note)
