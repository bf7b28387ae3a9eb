"""Every setting of the service, once: a YAML file, then the environment, which goes before it."""

import ipaddress
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raresynth.errors import ParamsError

FILE = "RARESYNTH_SERVING"
"""Environment variable that names the YAML file."""
SERVER = "RARESYNTH_SERVER"
"""Environment variable that tells a worker its server's process."""
PREFIX = "RARESYNTH_SERVING_"
"""RARESYNTH_SERVING_PORT=3001 sets `port`, and so on for every setting; an empty one counts as not set."""

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0.0)]


class Settings(BaseModel):
    """The service's settings; an unknown or impossible one is refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    bundle: Path = Path("runs/demo/bundle")
    """Folder of the bundle that is served."""
    bundle_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    """SHA-256 of the bundle.json that may be served; empty for any approved bundle."""
    host: str = "127.0.0.1"
    """IP address to listen on; another than loopback needs `keys_file`."""
    port: Annotated[int, Field(ge=1, le=65535)] = 3000
    keys_file: Path | None = None
    """YAML file of API keys (`python -m serving.keys` makes entries); null turns keys off, on loopback alone."""
    work_dir: Path | None = None
    """Folder for finished batches of synthetic images and the server's own files; null for a new temporary one."""

    threads: Count = 2
    """Threads that decode and encode, as many that run the classifier (a batch on one of them, a lone image on all), as
    many that draw images; one for each core."""
    max_batch: Count = 16
    """Images of one run of the classifier at most."""
    max_waiting: Count = 128
    """Images that may wait for the classifier; beyond it the answer is 503."""
    max_requests: Count = 64
    """Requests that may be worked on or wait at once; beyond it the answer is 503."""
    max_tasks: Count = 4
    """Batches of synthetic images that may run or wait at once."""
    kept_results: Count = 4
    """Finished batches that are kept for download; the oldest goes first."""

    max_image_mb: Annotated[float, Field(gt=0, le=256)] = 12.0
    """Size of one uploaded image."""
    max_body_mb: Annotated[float, Field(gt=0, le=1024)] = 48.0
    """Size of one request's body."""
    max_buffered_mb: Annotated[float, Field(gt=0)] = 192.0
    """Bodies of all requests together that may lie in memory; beyond it the answer is 503."""
    max_megapixels: Annotated[float, Field(gt=0, le=178)] = 25.0
    """Pixels of one uploaded image, told by its header before it is decoded."""

    max_connections: Count = 512
    """Open connections, and at most half of the files that the process may open; beyond it those without a request are
    closed, the oldest first."""
    head_timeout_s: Seconds = 10.0
    """Time for a request's first line and headers; then the connection is closed."""
    body_timeout_s: Seconds = 10.0
    """Time for a client to send its body; then the answer is 408."""
    timeout_s: Seconds = 30.0
    """Time for an answer once the body is there; then the work is dropped and the answer is 504. The client has as much
    again to take it. Work that goes on for twice as long makes /readyz fail, for four times as long /livez too."""
    linger_s: Annotated[float, Field(ge=0)] = 0.0
    """Time after SIGTERM in which requests are still taken, each answer closing its connection: as long as it takes
    until nobody is sent here any more; 0 where nothing spreads the requests."""
    drain_s: Count = 20
    """Time for requests to end after that; with `linger_s` below the pod's own grace period."""

    requests_per_minute: Annotated[float, Field(gt=0)] = 600.0
    """Rate that each key may keep up."""
    burst: Count = 100
    """Requests that a key may send at once after a pause."""
    drift_window: Annotated[int, Field(ge=300)] = 500
    """Newest predictions that are held against the training data."""

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the service."""
        return ipaddress.ip_address(self.host).is_loopback

    def results_dir(self) -> Path:
        """The folder for finished batches, made if it is not there."""
        folder = (self.work_dir or Path(tempfile.mkdtemp(prefix="raresynth-"))) / "generated"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings of the file that RARESYNTH_SERVING names, and of the environment.

    Raises:
        ParamsError: a setting is unknown or impossible, the file cannot be read, or keys are off on an open address.
    """
    values: dict[str, Any] = {}
    if name := environment.get(FILE):
        try:
            values = yaml.safe_load(Path(name).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ParamsError(f"cannot read {name} ({' '.join(str(error).split())}); name a YAML file") from error
        if not isinstance(values, dict):
            raise ParamsError(f"{name} holds no settings; write one a line, such as `port: 3000`")
    for variable, text in environment.items():
        if variable.startswith(PREFIX) and text:
            values[variable.removeprefix(PREFIX).lower()] = text
    try:
        settings = Settings.model_validate(values)
        is_open = not settings.local
    except ValidationError as error:
        first = error.errors()[0]
        raise ParamsError(
            f"setting {'.'.join(map(str, first['loc']))}: {first['msg']}; see serving/settings.py"
        ) from error
    except ValueError as error:
        raise ParamsError(f"setting host: {error}; name an IP address, such as 127.0.0.1") from error
    if is_open and settings.keys_file is None:
        raise ParamsError(
            f"setting host: {settings.host} can be reached from other machines, so API keys are needed; "
            "name them with keys_file, or listen on 127.0.0.1"
        )
    return settings
