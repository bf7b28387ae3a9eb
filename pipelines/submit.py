"""Upload a compiled package and start a run of it: `python -m pipelines.submit REQUEST`, where REQUEST is JSON."""

import json
import logging
import os
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kfp.client.client import KF_PIPELINES_UI_ENDPOINT_ENV

from pipelines.arguments import read_arguments, read_package
from pipelines.cluster import Cluster, endpoint
from raresynth.errors import RaresynthError, describe


@dataclass(frozen=True)
class Request:
    """What `raresynth submit` was asked for; names left out get those of the pipeline."""

    package: str
    arguments: list[str]
    service_account: str
    host: str | None = None
    plain_http: bool = False
    namespace: str | None = None
    experiment: str | None = None
    run: str | None = None
    cache: bool = True
    wait: bool = False


def main() -> int:
    """Submit; returns the exit code (1: the run that was waited for did not succeed, 2: an error to cure)."""
    logging.disable(logging.ERROR)  # what kfp and urllib3 log of a failure is said in one sentence here
    try:
        return submit(Request(**json.loads(sys.argv[1])))
    except (RaresynthError, OSError) as refused:
        print(f"raresynth: {describe(refused)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("raresynth: interrupted; a run that was started goes on in the cluster", file=sys.stderr)
        return 130


def submit(request: Request) -> int:
    """Check all that can be checked here, upload what the cluster lacks, start a run, and follow it if asked to.

    Returns:
        the exit code.

    Raises:
        PackageError: the package cannot be used.
        ArgumentsError: the arguments do not fit it.
        ClusterError: the Pipelines API cannot be used, or refuses.
    """
    package = read_package(Path(request.package))
    arguments = read_arguments(package, request.arguments)
    host = endpoint(request.host, request.plain_http)
    cluster = Cluster(host, request.namespace)
    pipeline_id = cluster.pipeline(package)
    version_id, version, is_new = cluster.version(pipeline_id, package, request.cache)
    print(f"pipeline {package.name}: version {version} {'uploaded' if is_new else 'is there already'}", flush=True)
    run = cluster.start(
        request.experiment or package.name,
        job_name=request.run or f"{package.name} {datetime.now():%Y-%m-%d %H-%M-%S}",
        params=arguments,
        pipeline_id=pipeline_id,
        version_id=version_id,
        service_account=request.service_account,
    )
    page = f"{os.environ.get(KF_PIPELINES_UI_ENDPOINT_ENV, host)}/#/runs/details/{run.run_id}"
    print(f"run {run.display_name} ({run.run_id}) -> {page}", flush=True)
    return _outcome(cluster.follow(run.run_id, _tell), page) if request.wait else 0


def _tell(state: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {state}", flush=True)


def _outcome(run: Any, page: str) -> int:
    if run.state == "SUCCEEDED":
        return 0
    tasks = (run.run_details and run.run_details.task_details) or []
    failed = sorted({task.display_name for task in tasks if task.state == "FAILED"})
    why = [run.error.message] if run.error and run.error.message else []
    why += [f"failed tasks: {', '.join(failed)}"] if failed else []
    print(f"raresynth: the run ended {run.state}{' (' + '; '.join(why) + ')' if why else ''}: {page}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
