"""Where a pipeline's tasks run: image, resources, volume, user and secrets, from the params' section `cluster`."""

from collections.abc import Callable
from decimal import Decimal

from kfp import dsl, kubernetes

from components.task import VOLUME
from raresynth.config import ClusterConfig, ParamsFile, Resources

Graph = dsl.base_component.BaseComponent
Place = Callable[..., dsl.PipelineTask]
"""Component, inputs by name -> a task of it in the pipeline that is being built, settled where it runs."""

USER = 10001
"""Numeric user and group of every task; the images are made for it."""
DATA_SECRET, GIT_SECRET = "/var/run/secrets/data", "/var/run/secrets/git"
"""Where the two tasks that leave the cluster see the files of their secrets."""
GIT_HELPER = f'!f() {{ [ "$1" != get ] || git credential-store --file={GIT_SECRET}/.git-credentials get; }}; f'
"""Reads git's credentials from the secret, and never tries to write them there."""

_TRAINING = {
    "train-encoder",
    "pretrain",
    "finetune",
    "draw",
    "synthesize",
    "synthesize-majority",
    "measure",
    "train-classifier",
    "evaluate",
}
_WITHOUT_GPU = {"measure"}
_NEVER_CACHED = {"fetch-data", "open-bundle", "generate", "publish-data"} | {
    *("finetune", "draw", "synthesize", "measure"),
    *("gate", "report"),
}
"""Tasks whose inputs do not name all that they read: a branch moves on, a bundle is replaced; a class that an error
ended is tried again, and the gate sees its result on the volume. The report, the last one, finds out where the volume
no longer holds what the cache says. A stage that is finished there costs a look at its record."""


def anywhere(component: Graph, /, **inputs) -> dsl.PipelineTask:
    """For a machine that runs all tasks itself."""
    return component(**inputs)


def on_cluster(params: ParamsFile, gpu: bool) -> Place:
    """For Kubernetes.

    Args:
        gpu: whether tasks that train are given GPUs; the SDK cannot leave that to the run.
    """
    cluster, ranks = params.cluster, params.compute.ranks

    def place(component: Graph, /, **inputs) -> dsl.PipelineTask:
        task, name = component(**inputs), component.name
        training, processes = name in _TRAINING, ranks if name == "pretrain" else 1
        task.set_container_image(cluster.image)
        task.set_display_name(name.replace("-", " ").capitalize())
        kubernetes.add_pod_label(task, "raresynth/stage", name)
        kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
        kubernetes.mount_pvc(task, pvc_name=cluster.volume_claim, mount_path=str(VOLUME))
        if name in _NEVER_CACHED:
            task.set_caching_options(False)
        _set_resources(task, cluster.training if training else cluster.light, processes)
        if gpu and training and name not in _WITHOUT_GPU:
            _give_gpus(task, cluster, processes)
        if name in {"fetch-data", "publish-data"}:
            _give_secrets(task, cluster, cluster.git_read_secret if name == "fetch-data" else cluster.git_write_secret)
        return task

    return place


def _set_resources(task: dsl.PipelineTask, resources: Resources, processes: int) -> None:
    cpu, memory = _times(resources.cpu, processes), _times(resources.memory, processes)
    task.set_cpu_request(cpu).set_cpu_limit(cpu)
    task.set_memory_request(memory).set_memory_limit(memory)
    kubernetes.empty_dir_mount(
        task,
        volume_name="shm",
        mount_path="/dev/shm",  # noqa: S108
        medium="Memory",
        size_limit=_times(resources.shared_memory, processes),
    )


def _times(quantity: str, n: int) -> str:
    number = quantity.rstrip("mkKMGTi")
    return f"{Decimal(number) * n}{quantity.removeprefix(number)}"


def _give_gpus(task: dsl.PipelineTask, cluster: ClusterConfig, processes: int) -> None:
    gpu = cluster.gpu
    task.set_accelerator_type(gpu.type).set_accelerator_limit(gpu.count * processes)
    kubernetes.add_pod_label(task, "raresynth/gpu", "true")
    for key, value in gpu.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in gpu.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump(exclude_none=True))


def _give_secrets(task: dsl.PipelineTask, cluster: ClusterConfig, git_secret: str) -> None:
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")
    kubernetes.use_secret_as_env(task, cluster.data_secret, {key: key for key in keys}, optional=True)
    kubernetes.use_secret_as_volume(task, cluster.data_secret, mount_path=DATA_SECRET, optional=True)
    kubernetes.use_secret_as_volume(task, git_secret, mount_path=GIT_SECRET, optional=True)
    task.set_env_variable("GOOGLE_APPLICATION_CREDENTIALS", f"{DATA_SECRET}/gcs.json")
    for name, value in (("COUNT", "1"), ("KEY_0", "credential.helper"), ("VALUE_0", GIT_HELPER)):
        task.set_env_variable(f"GIT_CONFIG_{name}", value)
