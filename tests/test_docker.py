"""The images' recipe, and what the built images hold and can do."""

import json
import re
import subprocess
import sys
import time
import tomllib
import uuid
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths
from PIL import Image

from raresynth.lineage import sha256_file

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
TRAIN, SERVE = f"raresynth-train:{VERSION}", f"raresynth-serve:{VERSION}"
UID = 10001
SERVE_LIMIT = 600_000_000
"""Bytes that the serve image may have."""
HOST = re.compile(r"https?://|\b[\w-]+(\.[\w-]+)*\.(org|com|net|io|dev|internal)\b")
LABEL = "vascular"

both = pytest.mark.parametrize("image", [TRAIN, SERVE])


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "docker" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    "file", [".dockerignore", *(f"docker/{name}" for name in ("Dockerfile", "build", "raresynth"))]
)
def test_no_host_is_named(file: str) -> None:
    assert HOST.search((ROOT / file).read_text()) is None


def test_every_image_runs_as_a_number() -> None:
    stages = re.split(r"^FROM .* AS ", DOCKERFILE, flags=re.MULTILINE)[1:]
    users = {stage.split()[0]: re.findall(r"^USER (.*)$", stage, re.MULTILINE) for stage in stages}
    assert users == {"installer": [], "runtime": [], "train": [f"{UID}:{UID}"], "serve": [f"{UID}:{UID}"]}


def test_what_is_installed_is_checked_against_its_hash() -> None:
    commands = re.findall(r"bin/pip .*?install (.*?)(?:\n[^ ]|;|&&)", DOCKERFILE, re.DOTALL)
    assert len(commands) == 2
    assert all("--require-hashes" in command and "--no-cache-dir" in command for command in commands)


def test_only_what_an_image_holds_goes_to_the_builder(tmp_path: Path) -> None:
    copied = re.findall(r"^COPY (?:--\S+ )?(.+) \S+$", DOCKERFILE, re.MULTILINE)
    kept = {*copied, "requirements/train.txt", "requirements/serve.txt"}
    left_out = {"data", "runs", ".git", ".venv", ".env", ".dvc", "sample-remote", "tests", "raresynth/gan/__pycache__"}
    for name in kept | left_out:
        file = tmp_path / name if (ROOT / name).is_file() else tmp_path / name / "file"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    sent = {Path(name) for name in exclude_paths(str(tmp_path), lines) if (tmp_path / name).is_file()}
    assert sent == {Path(name) if (ROOT / name).is_file() else Path(name, "file") for name in kept}


def docker(*arguments: object) -> str:
    done = subprocess.run(["docker", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def inspect(image: str, what: str) -> str:
    return docker("image", "inspect", "--format", what, image)


def run(image: str, *command: object, mounts: dict[Path, str] | None = None) -> str:
    """What a command prints as the cluster would run it: nothing writable but /tmp and volumes, no capability."""
    volumes = [part for path, place in (mounts or {}).items() for part in ("--volume", f"{path}:{place}")]
    locked = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
    return docker("run", "--rm", "--network", "none", *locked, *volumes, image, *command)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A folder that a container may write to."""
    folder = tmp_path / "volume"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@pytest.mark.container
@both
def test_an_image_tells_its_user_version_and_revision(image: str) -> None:
    assert run(image, "id", "-u") == str(UID)
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    name = "org.opencontainers.image"
    revision = inspect(image, f'{{{{index .Config.Labels "{name}.revision"}}}}')
    assert revision.removesuffix("-dirty") == head.stdout.strip(), "build the images anew: docker/build train serve"
    assert inspect(image, f'{{{{index .Config.Labels "{name}.version"}}}}') == VERSION
    told = "from raresynth import __version__, lineage; print(__version__, *lineage.git_state(lineage.PACKAGE_DIR))"
    assert run(image, "python3", "-c", told) == f"{VERSION} {head.stdout.strip()} {revision.endswith('-dirty')}"


@pytest.mark.container
@both
def test_the_commands_help_is_shown(image: str) -> None:
    assert "build-manifest" in run(image, "raresynth", "--help")


@pytest.mark.container
def test_told_nothing_train_shows_its_help_and_serve_asks_for_keys() -> None:
    assert "build-manifest" in run(TRAIN)
    done = subprocess.run(["docker", "run", "--rm", "--network", "none", SERVE], capture_output=True, check=False)
    assert done.returncode == 2 and b"API keys are needed" in done.stderr


@pytest.mark.container
@both
def test_an_image_keeps_nothing_of_its_making(image: str) -> None:
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    assert HOST.search(history) is None
    unwanted = r"-name pip.conf -o -name .netrc -o -name .cache -o -path '/run/secrets/*' -o -path '/tmp/*'"
    open_to_all = r"-perm -0002 \( -type f -o -type d ! -perm -1000 \)"
    search = f"find / -xdev \\( {unwanted} -o {open_to_all} \\) -print"
    assert docker("run", "--rm", "--user", "0:0", "--network", "none", image, "sh", "-c", search) == ""
    no_installer = "import importlib.util; print(importlib.util.find_spec('pip'))"
    assert run(image, "python3", "-c", no_installer) == "None"


@pytest.mark.container
def test_serve_is_small_and_has_no_torch() -> None:
    assert int(inspect(SERVE, "{{.Size}}")) <= SERVE_LIMIT
    absent = "import importlib.util; print([m for m in ('torch', 'kfp', 'dvc') if importlib.util.find_spec(m)])"
    assert run(SERVE, "python3", "-c", absent) == "[]"
    run(SERVE, "python3", "-c", "import bentoml, onnxruntime, prometheus_client")


@pytest.mark.container
def test_train_has_what_the_flow_needs() -> None:
    run(TRAIN, "python3", "-c", "import kfp, kfp.kubernetes, dvc, dvc_gs, dvc_s3, torch, torchvision, timm, onnxscript")
    version = "cd /tmp && dvc init --no-scm -q && mkdir data && echo 1 >data/1 && dvc add -q data && cat data.dvc"
    assert "nfiles: 1" in run(TRAIN, "sh", "-c", version)


@pytest.mark.container
def test_train_writes_the_manifest_that_this_machine_writes(
    sample_data: Path, sample_manifest: Path, volume: Path
) -> None:
    (volume / "params.yaml").write_text("seed: 0\n")
    mounts = {sample_data: "/data:ro", volume: "/volume"}
    place = ("--data", "/data", "--params", "/volume/params.yaml", "--out", "/volume/run")
    run(TRAIN, "raresynth", "build-manifest", *place, mounts=mounts)
    (written,) = (volume / "run").rglob("manifest.csv")
    assert sha256_file(written) == sha256_file(sample_manifest)
    assert "validate: " in run(TRAIN, "raresynth", "validate", *place, mounts=mounts)


@pytest.mark.container
def test_train_reads_repositories_of_other_owners(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", "--bare", tmp_path / "repository.git"], check=True)
    mounts = {tmp_path / "repository.git": "/repository.git:ro"}
    run(TRAIN, "git", "clone", "--quiet", "/repository.git", "/tmp/clone", mounts=mounts)


@pytest.mark.container
def test_serve_works_with_a_bundle(accepted_bundle: Path, volume: Path, tmp_path: Path) -> None:
    from raresynth.bundle.predictor import predict_folder
    from raresynth.bundle.sampler import generate_folder

    mounts = {accepted_bundle: "/bundle:ro", volume: "/volume"}
    generate = ("generate", "--bundle", "/bundle", "--label", LABEL, "--n", 3, "--out", "/volume/new")
    run(SERVE, "raresynth", *generate, mounts=mounts)
    generate_folder(accepted_bundle, LABEL, 3, 0, None, tmp_path / "new")
    for name in ("000000.png", "000001.png", "000002.png"):
        with Image.open(volume / "new" / name) as there, Image.open(tmp_path / "new" / name) as here:
            assert there.tobytes() == here.tobytes()
    predict = ("predict", "--bundle", "/bundle", "--images", "/volume/new", "--out", "/volume/predictions.csv")
    run(SERVE, "raresynth", *predict, mounts=mounts)
    predict_folder(accepted_bundle, tmp_path / "new", tmp_path / "predictions.csv")
    assert (volume / "predictions.csv").read_text() == (tmp_path / "predictions.csv").read_text()


@pytest.mark.container
def test_serve_is_healthy_only_while_a_service_is_ready() -> None:
    name = f"raresynth-test-{uuid.uuid4().hex}"
    often = ("--health-interval", "1s", "--health-retries", 1, "--health-start-period", "1s")

    def waits_for(status: str) -> None:
        deadline = time.monotonic() + 60
        while (now := json.loads(docker("inspect", "--format", "{{json .State.Health.Status}}", name))) != status:
            assert time.monotonic() < deadline, f"{now} instead of {status}"
            time.sleep(0.5)

    docker("run", "--detach", "--rm", "--name", name, "--network", "none", *often, SERVE, "sleep", "600")
    try:
        waits_for("unhealthy")
        ready = "mkdir /tmp/www && touch /tmp/www/readyz && exec python3 -m http.server 3000 --directory /tmp/www"
        docker("exec", "--detach", name, "sh", "-c", ready)
        waits_for("healthy")
    finally:
        docker("rm", "--force", name)
