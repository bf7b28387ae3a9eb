"""Data versions are fetched and published whole, from real git repositories and real DVC remotes, or not at all."""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import CGIHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from known import GENEROUS
from ports import free_port

from raresynth import flow
from raresynth.audit.walk import Subject, audit
from raresynth.bundle.sampler import generate_folder
from raresynth.config import Params
from raresynth.errors import DataError, ParamsError
from raresynth.lineage import dvc_dir_md5
from raresynth.versions.fetch import FetchReport, fetch_data
from raresynth.versions.publish import publish_data
from raresynth.versions.repository import without_credentials

FIRST = {"images/ä 1.jpg": b"one", "images/2.jpg": b"two", "metadata.csv": b"image,dx\n"}
SECOND = {**FIRST, "images/3.jpg": b"three"}
NOWHERE = "0" * 32


@pytest.fixture(scope="module", autouse=True)
def as_in_a_container() -> Iterator[pytest.MonkeyPatch]:
    """No settings of whoever runs the tests, and a HOME that cannot be written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", "/proc/nowhere")
        for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR"):
            patch.delenv(name, raising=False)
        patch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
        patch.setenv("DVC_SYSTEM_CONFIG_DIR", "/proc/nowhere")
        patch.setenv("DVC_NO_ANALYTICS", "1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield patch


@dataclass
class Origin:
    """A bare repository, and a clone in which somebody works."""

    folder: Path
    remote: str
    """URL of the DVC remote, as .dvc/config has it."""

    def __post_init__(self) -> None:
        self.bare, self.work = self.folder / "bare.git", self.folder / "work"
        self.work.mkdir(parents=True)
        self.git("init", "--quiet", "--bare", "--initial-branch=main", str(self.bare))
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("remote", "add", "origin", str(self.bare))
        self.git("config", "user.name", "somebody")
        self.git("config", "user.email", "somebody@example.org")

    @property
    def url(self) -> str:
        return f"file://{self.bare}"

    def run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.work, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def git(self, *arguments: str) -> str:
        return self.run("git", *arguments)

    def write(self, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            (self.work / name).parent.mkdir(parents=True, exist_ok=True)
            (self.work / name).write_bytes(content)

    def commit(self, message: str) -> str:
        self.git("add", ".")
        self.git("commit", "--quiet", "--message", message)
        self.git("tag", message)
        self.git("push", "--quiet", "--tags", "origin", "main")
        return self.git("rev-parse", "HEAD")

    def add_dvc(self) -> None:
        config = f"[core]\n    remote = store\n['remote \"store\"']\n    url = {self.remote}\n"
        self.write({".dvc/config": config.encode(), ".dvc/.gitignore": b"/tmp\n/cache\n/config.local\n"})

    def add_data(self, files: dict[str, bytes], message: str) -> str:
        self.write({f"data/{name}": content for name, content in files.items()})
        self.run(sys.executable, "-P", "-m", "dvc", "add", "data")
        self.run(sys.executable, "-P", "-m", "dvc", "push", "data")
        return self.commit(message)


def with_pointer(folder: Path, remote: str) -> Origin:
    """A repository with a data version whose content was never pushed."""
    origin = Origin(folder, remote)
    origin.add_dvc()
    pointer = f"outs:\n- md5: {NOWHERE}.dir\n  path: data\n".encode()
    origin.write({"data.dvc": pointer, "docs/readme.md": b"kept by git"})
    origin.commit("first")
    return origin


def complaint(repository: str, revision: str, path: str, into: Path) -> str:
    """What is said where nothing can be fetched; nothing is left behind."""
    with pytest.raises(DataError) as error:
        fetch_data(repository, revision, path, into)
    assert [path.name for path in into.iterdir()] == [".lock"]
    return str(error.value)


# What needs git alone


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    origin = with_pointer(tmp_path / "origin", "/nowhere")
    commit = origin.git("rev-parse", "HEAD")[:12]
    into = tmp_path / "into"
    assert f"{origin.url} has no branch, tag or commit 'mian'" in complaint(origin.url, "mian", "data", into)
    assert "has no branch, tag or commit '--all'" in complaint(origin.url, "--all", "data", into)
    said = complaint(origin.url, "main", "dat", into)
    assert f"DVC keeps no folder dat at commit {commit} of {origin.url}; the folders that DVC keeps there: data" in said
    assert "git itself, not DVC, keeps docs at commit" in complaint(origin.url, "first", "docs", into)
    assert f"cannot clone {tmp_path / 'none'}" in complaint(str(tmp_path / "none"), "main", "data", into)
    assert "cannot clone http://127.0.0.1:1/x.git" in complaint("http://127.0.0.1:1/x.git", "main", "data", into)


def test_a_repository_without_dvc_is_named(tmp_path: Path) -> None:
    origin = Origin(tmp_path / "origin", "")
    origin.write({"data/1.jpg": b"kept by git", "more.dvc": b"outs:\n- md5: 1.dir\n  path: more\n"})
    origin.commit("first")
    said = complaint(origin.url, "main", "data", tmp_path / "into")
    assert "git itself, not DVC, keeps data" in said
    assert "has no .dvc/config" in complaint(origin.url, "main", "more", tmp_path / "into")
    origin.write({"more.dvc": b"<<<<<<< HEAD\n"})
    origin.commit("second")
    assert "more.dvc at commit" in complaint(origin.url, "main", "more", tmp_path / "into")


def test_a_relative_remote_outside_the_repository_is_refused(tmp_path: Path) -> None:
    origin = with_pointer(tmp_path / "origin", "../../store")
    said = complaint(origin.url, "main", "data", tmp_path / "into")
    assert "the DVC remote ../../store in .dvc/config" in said


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret@host:8/x.git", "https://host:8/x.git"),
        ("https://token@host/x.git", "https://host/x.git"),
        ("https://user:p@ss@host/x.git", "https://host/x.git"),
        ("ssh://git@host/x.git", "ssh://git@host/x.git"),
        ("ssh://git:secret@host/x.git", "ssh://git@host/x.git"),
        ("git@host:x.git", "git@host:x.git"),
        ("/srv/x@y.git", "/srv/x@y.git"),
        ("file:///srv/x.git", "file:///srv/x.git"),
    ],
)
def test_credentials_are_left_out_of_urls(url: str, shown: str) -> None:
    assert without_credentials(url) == shown


def test_a_password_is_not_shown_where_the_url_cannot_be_read(tmp_path: Path) -> None:
    said = complaint("https://user:sec/ret@host/x.git", "main", "data", tmp_path)
    assert "cannot be read" in said
    assert "ret" not in said.replace("secret", "")
    assert "user" not in said


class GitOverHTTP(CGIHTTPRequestHandler):
    """git's own HTTP server, behind a password."""

    root: Path

    def is_cgi(self) -> bool:
        self.cgi_info = ("", self.path.lstrip("/"))
        return True

    def run_cgi(self) -> None:
        if self.headers["Authorization"] != "Basic " + base64.b64encode(b"user:p@ss").decode():
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.end_headers()
            return
        path, _, query = self.path.partition("?")
        environment = os.environ | {
            "GIT_PROJECT_ROOT": str(self.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "REMOTE_USER": "user",
        }
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        done = subprocess.run(["git", "http-backend"], input=body, env=environment, capture_output=True, check=True)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.send_response(int(headers.pop("Status", "200").split()[0]))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Host and port of a server of the repositories in a folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (GitOverHTTP,), {"root": folder})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_password_reaches_git_and_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin, into = with_pointer(tmp_path / "origin", "/nowhere"), tmp_path / "into"
    with serving(origin.folder) as host:
        place = f"{host}/bare.git"
        assert f"cannot clone http://{place} (" in complaint(f"http://user:wrong@{place}", "main", "data", into)
        said = complaint(f"http://user:p%40ss@{place}", "main", "dat", into)
        assert f"of http://{place}; the folders that DVC keeps there: data" in said
        # The same from a file, as a secret is mounted.
        (tmp_path / "credentials").write_text(f"http://user:p%40ss@{host}\n")
        monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
        monkeypatch.setenv("GIT_CONFIG_KEY_0", "credential.helper")
        monkeypatch.setenv("GIT_CONFIG_VALUE_0", f"store --file={tmp_path / 'credentials'}")
        assert "keeps there: data" in complaint(f"http://{place}", "main", "dat", into)


def hanging_fetch(into: Path) -> "subprocess.Popen[bytes]":
    """A fetch that has made its clone's folder and waits for an answer, in a process group of its own."""
    before = set(into.glob(".clone-*"))
    command = [sys.executable, "-P", "-m", "raresynth.cli", "fetch-data", "--repo", "ssh://host/x.git", "--rev", "main"]
    silent = os.environ | {"GIT_SSH_COMMAND": "sleep 600 #"}
    process = subprocess.Popen([*command, "--to", into], env=silent, start_new_session=True)
    while not set(into.glob(".clone-*")) - before:
        assert process.poll() is None
        time.sleep(0.05)
    return process


def kill(process: "subprocess.Popen[bytes]") -> None:
    """End a process and those that it started, as the end of a container does."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_fetch_is_cleaned_up_after_and_a_living_one_left_alone(tmp_path: Path) -> None:
    origin, into = with_pointer(tmp_path / "origin", "/nowhere"), tmp_path / "into"
    kill(hanging_fetch(into))
    (left,) = into.glob(".clone-*")
    living = hanging_fetch(into)
    (used,) = into.glob(".clone-*")
    assert used != left
    with pytest.raises(DataError, match="keeps no folder dat"):
        fetch_data(origin.url, "main", "dat", into)
    assert list(into.glob(".clone-*")) == [used]
    kill(living)
    assert used.is_dir()
    complaint(origin.url, "main", "dat", into)


# What needs DVC and a remote


@pytest.fixture(scope="module")
def s3(as_in_a_container: pytest.MonkeyPatch) -> Iterator[None]:
    """An S3 server of its own with one bucket, `images`."""
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = (re.search(r"Running on (http://\S+)", line) for line in server.stderr)
        as_in_a_container.setenv("AWS_ENDPOINT_URL", next(found[1] for found in said if found))
        threading.Thread(target=server.stderr.read, daemon=True).start()  # lest its log fills the pipe
        boto3.client("s3").create_bucket(Bucket="images")
        yield
        server.terminate()


def with_two_versions(folder: Path, remote: str) -> Origin:
    origin = Origin(folder, remote)
    origin.add_dvc()
    origin.add_data(FIRST, "first")
    origin.add_data(SECOND, "second")
    return origin


@pytest.fixture(scope="module")
def in_folder(tmp_path_factory: pytest.TempPathFactory) -> Origin:
    """Two versions of a small image set, their content in another folder."""
    folder = tmp_path_factory.mktemp("in_folder")
    return with_two_versions(folder, str(folder / "store"))


@pytest.fixture(scope="module")
def in_s3(s3: None, tmp_path_factory: pytest.TempPathFactory) -> Origin:
    """Two versions of a small image set, their content on an S3 server."""
    return with_two_versions(tmp_path_factory.mktemp("in_s3"), "s3://images/store")


@pytest.fixture(scope="module")
def gcs(as_in_a_container: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that speaks Google Cloud Storage's protocol, with one bucket, `images`."""
    port = free_port()
    emulator = Path(sys.executable).with_name("gcp-storage-emulator")
    command = [emulator, "start", "--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket=images"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        as_in_a_container.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None
            time.sleep(0.05)
        yield
        server.terminate()


@pytest.fixture(scope="module")
def in_gcs(gcs: None, tmp_path_factory: pytest.TempPathFactory) -> Origin:
    """Two versions of a small image set, their content in Google Cloud Storage's stand-in."""
    return with_two_versions(tmp_path_factory.mktemp("in_gcs"), "gs://images/store")


@pytest.fixture(scope="module")
def in_git(tmp_path_factory: pytest.TempPathFactory) -> Origin:
    """An image set whose content git keeps too: the DVC remote lies in the repository."""
    origin = Origin(tmp_path_factory.mktemp("in_git"), "../store")
    origin.add_dvc()
    origin.add_data(FIRST, "first")
    return origin


class Content:
    """One file on the S3 server, changed for the time of a block."""

    def __init__(self, md5: str) -> None:
        self.s3, self.key = boto3.client("s3"), f"store/files/md5/{md5[:2]}/{md5[2:]}"

    def __enter__(self) -> "Content":
        self.kept = self.s3.get_object(Bucket="images", Key=self.key)["Body"].read()
        return self

    def put(self, content: bytes) -> None:
        self.s3.put_object(Bucket="images", Key=self.key, Body=content)

    def delete(self) -> None:
        self.s3.delete_object(Bucket="images", Key=self.key)

    def __exit__(self, *_: object) -> None:
        self.put(self.kept)


def content_of(report: FetchReport) -> dict[str, bytes]:
    folder = Path(report.folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("remote", ["in_folder", "in_s3", "in_gcs"])
def test_each_revision_arrives_whole(remote: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    origin: Origin = request.getfixturevalue(remote)
    for revision, files in (("first", FIRST), ("main", SECOND)):
        report = fetch_data(origin.url, revision, "data/", tmp_path / "store")
        assert content_of(report) == files
        assert report.commit == origin.git("rev-parse", revision)
        assert f"md5: {report.md5}\n" in origin.git("show", f"{revision}:data.dvc")
        assert report.md5 == dvc_dir_md5(Path(report.folder))
        assert (report.n_files, report.n_bytes) == (len(files), sum(map(len, files.values())))
        assert json.loads(Path(report.folder + ".json").read_text()) == report.model_dump()
    assert len(list((tmp_path / "store").iterdir())) == 5  # with its lock


@pytest.mark.slow
def test_a_folder_is_fetched_once_and_again_where_it_was_damaged(in_folder: Origin, tmp_path: Path) -> None:
    """Three at once, two of them in processes of their own; then one, with nothing to fetch from."""
    command = ["fetch-data", "--repo", in_folder.url, "--rev", "first", "--to", str(tmp_path / "store")]
    others = [start(*command) for _ in range(2)]
    report = fetch_data(in_folder.url, "first", "data", tmp_path / "store")
    assert all(f"{report.md5} of commit {report.commit}, 3 files" in finish(other) for other in others)
    assert len(list((tmp_path / "store").iterdir())) == 3  # with its lock

    damaged = Path(report.folder) / "images" / "2.jpg"
    damaged.unlink()
    damaged.write_bytes(b"twO")
    assert content_of(fetch_data(in_folder.url, "first", "data", tmp_path / "store")) == FIRST

    Path(in_folder.remote).rename(tmp_path / "gone")
    try:
        assert fetch_data(in_folder.url, report.commit[:10], "data", tmp_path / "store").folder == report.folder
    finally:
        (tmp_path / "gone").rename(in_folder.remote)


def start(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-P", "-m", "raresynth.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> str:
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out


@pytest.mark.slow
def test_damage_in_the_remote_is_found_and_named(in_s3: Origin, tmp_path: Path) -> None:
    version = fetch_data(in_s3.url, "main", "data", tmp_path / "good")
    image = hashlib.md5(SECOND["images/2.jpg"]).hexdigest()
    with Content(image) as content:
        content.put(b"twO")
        said = complaint(in_s3.url, "main", "data", tmp_path / "store")
        assert re.search(rf"with the hash \w+\.dir, not {version.md5}: images/2.jpg changed there", said)
        content.delete()
        said = complaint(in_s3.url, "main", "data", tmp_path / "store")
        assert f"cannot get data of commit {version.commit[:12]} from the DVC remote of {in_s3.url} (" in said
        assert image in said
    with Content(version.md5) as content:
        content.put(content.kept.replace(b"3.jpg", b"4.jpg"))
        assert "its list was changed there" in complaint(in_s3.url, "main", "data", tmp_path / "store")


@pytest.mark.slow
def test_a_report_holds_no_password(in_folder: Origin, tmp_path: Path) -> None:
    with serving(in_folder.folder) as place:
        report = fetch_data(f"http://user:p%40ss@{place}/bare.git", "first", "data", tmp_path / "store")
    assert report.repository == f"http://{place}/bare.git"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"p%40ss" in path.read_bytes()]


@pytest.mark.slow
def test_an_s3_server_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = with_pointer(tmp_path / "origin", "s3://images/store")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    said = complaint(origin.url, "main", "data", tmp_path / "into")
    assert 'Could not connect to the endpoint URL: "http://127.0.0.1:1/' in said


def test_dvc_knows_google_cloud_storage() -> None:
    """No server of it runs here: that the files of a GCS remote arrive is not tested."""
    from dvc.fs import get_fs_cls

    assert get_fs_cls({"url": "gs://images/store"}).protocol == "gs"


# Publishing


@pytest.fixture(scope="module")
def approved(tiny_run: flow.Run, tmp_path_factory: pytest.TempPathFactory) -> flow.Run:
    """The tiny run with more training, so that its encoder tells the classes apart, and next to no limits."""
    params = tiny_run.params.model_dump()
    params["encoder"] |= {"steps": 800, "width": 16}
    params["gan"] |= {"pretrain_kimg": 2.0, "finetune_kimg": 0.5}
    params["gate"] |= GENEROUS
    store = shutil.copytree(tiny_run.store, tmp_path_factory.mktemp("approved") / "store")
    run = flow.Run(tiny_run.data_dir, Path(store), Params.model_validate(params))
    for stage in list(flow.STAGES)[: list(flow.STAGES).index("package") + 1]:
        flow.execute_all(stage, run)
    return run


@pytest.fixture(scope="module")
def generated(approved: flow.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images drawn with the approved bundle."""
    out = tmp_path_factory.mktemp("generated") / "batch"
    generate_folder(approved.store / "bundle", "vascular", 5, 7, None, out)
    return out


def refusal(bundle: Path, batch: Path, repository: str = "/nowhere", path: str = "synthetic") -> str:
    with pytest.raises((DataError, ParamsError)) as error:
        publish_data(bundle, [batch], repository, "main", path)
    return str(error.value)


def test_what_was_not_accepted_is_refused(tiny_run: flow.Run, accepted_bundle: Path, tmp_path: Path) -> None:
    bundle, batch = tiny_run.store / "bundle", tiny_run.store / "synthetic" / "keratosis"
    said = refusal(bundle, batch)
    assert f"{batch} is not approved (keratosis/images/000000.png: the bundle has no generator" in said
    assert "for 'keratosis': its class was rejected" in said
    assert "lists no synthetic images: it has no generator" in refusal(bundle, tiny_run.store / "manifest")
    # A bundle that says it accepted a class which it did not.
    generate_folder(accepted_bundle, "vascular", 2, 0, None, tmp_path / "batch")
    assert f"{accepted_bundle} is not approved (" in refusal(accepted_bundle, tmp_path / "batch")


@pytest.mark.parametrize("path", ["/synthetic", "../synthetic", ".", ""])
def test_a_path_outside_the_repository_is_refused(tmp_path: Path, path: str) -> None:
    assert f"--path {path} is no folder in the repository" in refusal(tmp_path, tmp_path, path=path)


@pytest.mark.slow
def test_images_that_the_gate_did_not_judge_are_refused(approved: flow.Run, generated: Path, tmp_path: Path) -> None:
    bundle = approved.store / "bundle"
    generate_folder(bundle, "vascular", 2, 7, 0.5, tmp_path / "typical")
    assert "it was drawn with truncation 0.5, and the gate judged images of truncation 1" in refusal(
        bundle, tmp_path / "typical"
    )
    changed = Path(shutil.copytree(generated, tmp_path / "changed"))
    shutil.copyfile(changed / "000001.png", changed / "000002.png")
    assert "is not approved (000002.png: was changed)" in refusal(bundle, changed)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    rows = [(folder / "manifest.csv").read_text().splitlines() for folder in (generated, tmp_path / "typical")]
    (mixed / "manifest.csv").write_text("\n".join([*rows[0][:2], rows[1][1].replace(",000000.png", ",other.png")]))
    shutil.copyfile(generated / "000000.png", mixed / "000000.png")
    shutil.copyfile(tmp_path / "typical" / "000000.png", mixed / "other.png")
    assert "holds images of several classes, seeds or truncations" in refusal(bundle, mixed)


MEET = """#!/bin/sh
echo >> pushes
for _ in $(seq 1200); do [ $(wc -l < pushes) -ge 2 ] && exit 0; sleep 0.1; done
"""
"""Hook of the repository: no push goes on before a second one has come, so that both come from the same head."""


@pytest.mark.slow
@pytest.mark.parametrize("remote", ["in_s3", "in_gcs", "in_git"])
def test_two_who_publish_at_once(
    remote: str, approved: flow.Run, generated: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Both sets are there in the end, and either can be audited; the real images stay what they were."""
    origin: Origin = request.getfixturevalue(remote)
    data, before = origin.git("rev-parse", "HEAD:data.dvc"), origin.git("rev-parse", "HEAD")
    hook = origin.bare / "hooks" / "pre-receive"
    hook.write_text(MEET)
    hook.chmod(0o755)
    batches = [generated, approved.store / "synthetic" / "vascular"]
    common = ["--bundle", str(approved.store / "bundle"), "--repo", origin.url]
    processes = [start("publish-data", *common, "--batch", str(batch)) for batch in batches]
    said = [finish(process) for process in processes]
    assert len((origin.bare / "pushes").read_text()) == 3  # the slower one came a second time
    hook.unlink()

    origin.git("fetch", "--quiet", "origin")
    commits = origin.git("log", "--reverse", "--format=%H", f"{before}..origin/main").split()
    assert sorted(re.search(r"of commit (\w+)", text)[1] for text in said) == sorted(commits)
    assert origin.git("rev-parse", "origin/main:data.dvc") == data
    first, last = (fetch_data(origin.url, commit, "synthetic", tmp_path / "store") for commit in commits)
    assert (first.n_files, last.n_files) in ((6, 39), (33, 39))
    for text, batch in zip(said, batches, strict=True):
        published = Path(last.folder, re.search(r"-> synthetic/(.+)", text)[1], "vascular")
        assert (published / "manifest.csv").read_bytes() == (batch / "manifest.csv").read_bytes()
        assert audit(Subject(approved.store / "bundle", published)).broken() == []

    again = publish_data(approved.store / "bundle", batches, origin.url, "main", "synthetic")
    assert (again.n_new, again.commit, again.md5) == (0, commits[1], last.md5)


@pytest.mark.slow
def test_a_folder_of_other_files_is_no_place_for_synthetic_images(
    approved: flow.Run, generated: Path, in_folder: Origin
) -> None:
    bundle = approved.store / "bundle"
    said = refusal(bundle, generated, in_folder.url, "data")
    assert "data of" in said
    assert "holds images/" in said
    assert "data/new and data of" in refusal(bundle, generated, in_folder.url, "data/new")
    hook = in_folder.bare / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    said = refusal(bundle, generated, in_folder.url)
    hook.unlink()
    assert "takes no commit on main ([remote rejected] HEAD -> main (pre-receive hook declined))" in said
    with pytest.raises(DataError, match="cannot read the branch trunk"):
        publish_data(bundle, [generated], in_folder.url, "trunk", "synthetic")
