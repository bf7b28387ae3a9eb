"""The Pipelines API of a cluster, through kfp's client; every way in which it can fail is one sentence."""

import contextlib
import io
import ipaddress
import json
import os
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kfp
import urllib3
from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH
from kfp.client.client import KF_PIPELINES_ENDPOINT_ENV
from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials
from kfp_server_api import ApiException

from pipelines.arguments import Package
from raresynth.errors import RaresynthError

FINAL_STATES = {"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"}

_FIRST_POLL_S, _LAST_POLL_S = 0.5, 15.0
_PATIENCE = 12
"""Failures in a row after which a run is no longer waited for: about two minutes."""
_TIMEOUT_S = (5, 30)
"""To connect, and to answer, at first contact."""
_NOT_THE_API = "is it the address of the Pipelines API, and are you logged in?"
_ADVICE = {
    200: _NOT_THE_API,
    401: "name the file of a valid token in KF_PIPELINES_SA_TOKEN_PATH",
    403: "ask for the right to do this, or name your own namespace with --namespace",
    404: _NOT_THE_API,
    409: "someone submitted it in the same moment; submit again",
}


class ClusterError(RaresynthError):
    """The Pipelines API cannot be used, or does not do what is asked."""


class Unavailable(ClusterError):
    """The Pipelines API cannot be reached, or is broken; this may pass."""


def endpoint(host: str | None, plain_http: bool) -> str:
    """The API's URL, as given or as in kfp's variable.

    Raises:
        ClusterError: there is none, it is no URL, or it would carry a token unencrypted over a network.
    """
    host = host or os.environ.get(KF_PIPELINES_ENDPOINT_ENV)
    if not host:
        raise ClusterError(
            f"no cluster is named; give the URL of its Pipelines API with --host or in {KF_PIPELINES_ENDPOINT_ENV}, "
            "such as http://localhost:8080 for a kubectl port-forward"
        )
    try:
        url = urllib3.util.parse_url(host)
    except urllib3.exceptions.LocationParseError:
        url = urllib3.util.Url()
    if url.scheme not in {"http", "https"} or not url.host:
        raise ClusterError(f"{host} is no URL; write https://NAME, or http://localhost:PORT for a port-forward")
    if url.scheme == "http" and not plain_http and not _stays_inside(url.host.strip("[]")):
        raise ClusterError(
            f"{host} would carry tokens and arguments unencrypted; use https, or a kubectl port-forward, "
            "or accept that with --plain-http"
        )
    return host.rstrip("/")


def _stays_inside(name: str) -> bool:
    """Whether requests to a host stay on this machine or in the cluster's own network."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith((".svc", ".svc.cluster.local"))


class _Client(kfp.Client):
    """Asks once whether the API is there; kfp itself asks five times, and logs a traceback each time."""

    def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
        health, _, headers = self._healthz_api.healthz_service_get_healthz_with_http_info(_request_timeout=_TIMEOUT_S)
        if not headers.get("Content-Type", "").startswith("application/json"):
            raise ApiException(status=200, reason="with something else than JSON")
        return health


class Cluster:
    """The API at `host`, for one user or, in an installation that keeps users apart, for one namespace.

    It logs in by kfp's own means: the token in the file that KF_PIPELINES_SA_TOKEN_PATH names (in a pod, the one that
    is mounted for Pipelines), or what else kfp reads from its variables and its context file.
    SSL_CERT_FILE names the certificate authority of a private host.

    Raises:
        ClusterError: by every method, and at once where the API is not there or a namespace is needed.
    """

    def __init__(self, host: str, namespace: str | None) -> None:
        self.host = host
        token = os.environ.get(KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH)
        known = KF_PIPELINES_SA_TOKEN_ENV in os.environ or Path(token).exists()
        with self._explained(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # kfp's, that it needs Pipelines 2
            self._client = _Client(
                host=host,
                credentials=ServiceAccountTokenVolumeCredentials(token) if known else None,
                ssl_ca_cert=os.environ.get("SSL_CERT_FILE"),
            )
            several_users = self._client.get_kfp_healthz().multi_user
        self.namespace = namespace or self._client.get_user_namespace() or None
        if several_users and self.namespace is None:
            raise ClusterError(f"{host} keeps its users apart; name your namespace with --namespace")

    def pipeline(self, package: Package) -> str:
        """The id of the pipeline of the package's name, which is made where there is none."""
        with self._explained():
            try:
                pipelines = self._client.pipelines
                named = {} if self.namespace is None else {"namespace": self.namespace}
                return pipelines.pipeline_service_get_pipeline_by_name(package.name, **named).pipeline_id
            except ApiException as error:
                if error.status != 404:
                    raise
            # Not upload_pipeline, whose first version would have the pipeline's name for its own.
            new = self._client.api_models.V2beta1Pipeline(
                name=package.name, display_name=package.name, description=package.description, namespace=self.namespace
            )
            return pipelines.pipeline_service_create_pipeline(new).pipeline_id

    def version(self, pipeline_id: str, package: Package, cache: bool) -> tuple[str, str, bool]:
        """The package's version of a pipeline, which is uploaded where it is not there yet.

        A run of a version takes its caching from there; so a package without caching is a version of its own.

        Returns:
            its id, its name, and whether it is new.
        """
        name = package.version if cache else f"{package.version}-uncached"
        equals = {"operation": "EQUALS", "key": "display_name", "string_value": name}
        with self._explained(), tempfile.TemporaryDirectory(prefix="raresynth-") as folder:
            listed = self._client.list_pipeline_versions(pipeline_id, filter=json.dumps({"predicates": [equals]}))
            if listed.pipeline_versions:
                return listed.pipeline_versions[0].pipeline_version_id, name, False
            path = package.path
            if not cache:
                path = Path(folder) / package.path.name
                path.write_text(package.uncached(), encoding="utf-8")
            with _silent():
                made = self._client.upload_pipeline_version(str(path), name, pipeline_id=pipeline_id)
        return made.pipeline_version_id, name, True

    def start(self, experiment: str, **run: Any) -> Any:
        """Start a run, in an experiment that is made where there is none; returns it as the API does.

        Args:
            experiment: its name.
            run: what `kfp.Client.run_pipeline` takes.
        """
        with self._explained(), _silent():
            found = self._client.create_experiment(experiment, namespace=self.namespace)
            return self._client.run_pipeline(found.experiment_id, **run)

    def follow(self, run_id: str, tell: Callable[[str], None]) -> Any:
        """Wait for a run's end, and tell of each new state; returns the run as the API does.

        kfp's own waiting has no end for a run that is cancelled, and none of its patience with a restarted server.
        """
        state, failures, pause = None, 0, _FIRST_POLL_S
        while state not in FINAL_STATES:
            time.sleep(pause)
            pause = min(pause * 1.5, _LAST_POLL_S)
            try:
                with self._explained():
                    run = self._client.get_run(run_id)
                    if run.run_id != run_id:
                        raise ApiException(status=200, reason="with something else than the run")
            except Unavailable:
                failures += 1
                if failures > _PATIENCE:
                    raise
                continue
            failures = 0
            if run.state not in {None, state}:
                state = run.state
                tell(state)
        return run

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say in one sentence what failed in talking to the API."""
        try:
            yield
        except ApiException as error:
            sentence = f"{self.host} answered {error.status} {error.reason}{_told(error.body)}"
            if error.status >= 500:
                raise Unavailable(f"{sentence}; look into the log of the API's server, or try again later") from error
            advice = _ADVICE.get(error.status, "correct what it names")
            raise ClusterError(f"{sentence}; {advice}") from error
        except urllib3.exceptions.MaxRetryError as error:
            cause = str(error.reason).split(": ", 1)[-1]
            if isinstance(error.reason, urllib3.exceptions.SSLError):
                raise ClusterError(
                    f"cannot trust {self.host}: {cause}; name the file of its certificate authority in SSL_CERT_FILE"
                ) from error
            raise Unavailable(
                f"cannot reach {self.host}: {cause}; check the address, and that a port-forward still runs"
            ) from error
        except urllib3.exceptions.HTTPError as error:
            raise Unavailable(
                f"the connection to {self.host} broke ({error}); what was asked last may have been done: look at the UI"
            ) from error


def _told(body: str | None) -> str:
    """What the API said of a failure, in brackets; nothing where it said nothing of use."""
    try:
        answer = json.loads(body or "")
        told = answer.get("message") or answer["error_message"]  # the latter where a package was uploaded
    except (ValueError, AttributeError, LookupError):
        return ""
    return f" ({textwrap.shorten(str(told), 300)})"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep kfp's printed links off the console."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
