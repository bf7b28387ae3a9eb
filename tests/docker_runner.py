"""Run a pipeline through kfp's Docker runner: `python tests/docker_runner.py PIPELINE ARGUMENTS VOLUME REPOSITORY`.

PIPELINE is augmentation or synthesis, ARGUMENTS its inputs as JSON; VOLUME is seen by the tasks as /store, and the
git repository at its own path. The containers run as on a cluster: no root, no capability, nothing writable
but /tmp and the volume. They have no network at all.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from docker.types import Mount
from kfp import local
from kfp.local import docker_task_handler

import docker
from pipelines import augmentation, synthesis
from pipelines.placement import USER, on_cluster
from raresynth.config import ParamsFile


def run_and_wait(
    client: docker.DockerClient, image: str, command: list[str], volumes: dict[str, Any], **arguments: Any
) -> int:
    """Exit status of a container, which is removed only after it has been read.

    kfp's own function lets Docker remove the container as it ends, and takes one that is gone already for a success:
    a task that fails fast may then count as done.
    """
    container = client.containers.run(image=image, command=command, volumes=volumes, detach=True, **arguments)
    try:
        for line in container.logs(stream=True):
            print(line.decode(errors="replace"), end="")
        return int(container.wait()["StatusCode"])
    finally:
        container.remove(force=True)


def main() -> None:
    name, arguments, volume, repository = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
    os.umask(0)  # what kfp makes here, tasks of another user fill
    docker_task_handler.run_docker_container = run_and_wait
    with tempfile.TemporaryDirectory(prefix="raresynth-") as root:
        Path(root).chmod(0o777)
        runner = local.DockerRunner(
            user=f"{USER}:{USER}",
            read_only=True,
            tmpfs={"/tmp": ""},
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            network_mode="none",
            mounts=[Mount("/store", volume, type="bind"), Mount(repository, repository, type="bind")],
        )
        local.init(runner, pipeline_root=root)
        params = ParamsFile()
        place = on_cluster(params, gpu=False)
        pipelines = {
            "augmentation": augmentation.build(params.compute, place),
            "synthesis": synthesis.build(params.compute.parallel_tasks, place),
        }
        pipelines[name](**arguments)


if __name__ == "__main__":
    main()
