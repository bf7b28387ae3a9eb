"""From a bundle back to the raw images: everything that was changed on the way is found and named."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from raresynth import cli, flow
from raresynth.audit.findings import Link
from raresynth.audit.walk import Subject, audit
from raresynth.bundle.contents import Bundle, write_bundle_json
from raresynth.errors import DataError, ParamsError
from raresynth.gan.png import Provenance, encode_png
from raresynth.lineage import read_report, sha256_file


@pytest.fixture
def bundle(tiny_run: flow.Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run.store / "bundle", tmp_path / "bundle"))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def rewrite(bundle: Path, change: Callable[[dict], None], file: str = "bundle.json") -> None:
    """Change a file as somebody would who knows how bundles are written: all hashes in the bundle fit afterwards."""
    content = json.loads((bundle / file).read_text())
    change(content)
    (bundle / file).write_text(json.dumps(content))
    described = read_report(bundle / "bundle.json", Bundle)
    files = {name: sha256_file(bundle / name) for name in described.files}
    write_bundle_json(bundle, described.model_copy(update={"files": files}))


def complaints(link: Link) -> str:
    return "\n".join(f"{name}: {check.what}: {check.detail}" for name, check in link.broken())


def test_an_honest_bundle_is_whole(bundle: Path, tiny_run: flow.Run) -> None:
    link = audit(Subject(bundle, data=tiny_run.data_dir))
    assert link.broken() == []
    said = [check.what for below in link.made_from for check in below.checks]
    for stage in ("build-manifest/all: done", "pretrain/all: done", "gate/all: done", "finetune/vascular: done"):
        assert stage in said
    again = [check.what for check in _images(link).checks if check.status == "ok"]
    assert "validate runs again" in again
    assert any(what.startswith("build-manifest leaves the same") for what in again)


def _images(link: Link) -> Link:
    (stages,) = (below for below in link.made_from if " stages, " in below.name)
    return stages.made_from[-1]


def test_a_flipped_bit_in_any_file_is_found_and_named(bundle: Path, tmp_path: Path) -> None:
    files = [path.relative_to(bundle) for path in sorted(bundle.rglob("*")) if path.is_file()]
    assert len(files) > 8
    for file in files:
        changed = Path(shutil.copytree(bundle, tmp_path / "changed"))
        flip_a_bit(changed / file)
        assert file.name in complaints(audit(Subject(changed))), file
        shutil.rmtree(changed)


def test_a_file_too_many_or_too_few_is_named(bundle: Path) -> None:
    (bundle / "lineage" / "evaluation.json").unlink()
    (bundle / "added.txt").write_text("?")
    said = complaints(audit(Subject(bundle)))
    assert "lineage/evaluation.json: is missing" in said
    assert "added.txt: is not named" in said


def test_a_forged_decision_is_found(bundle: Path) -> None:
    def accept(content: dict) -> None:
        content["decisions"]["classes"]["vascular"]["decision"] = "accepted"

    before = json.loads((bundle / "bundle.json").read_text())["decisions"]["classes"]["vascular"]["decision"]
    assert before != "accepted"
    rewrite(bundle, accept)
    said = complaints(audit(Subject(bundle)))
    assert f"vascular: accepted: its figures say {before}" in said
    assert "its generators are the accepted ones: they are others" in said


def test_forged_figures_are_found(bundle: Path) -> None:
    rewrite(bundle, lambda report: report["kid"].update(value=0.0), "lineage/quality/vascular.json")
    assert "its figures are not those that measure/vascular left" in complaints(audit(Subject(bundle)))


def test_a_forged_release_is_found(bundle: Path) -> None:
    rewrite(bundle, lambda content: content["decisions"]["release"].update(decision="approved"))
    assert "evaluate said otherwise" in complaints(audit(Subject(bundle)))


def test_other_params_are_found(bundle: Path) -> None:
    rewrite(bundle, lambda content: content["lineage"]["params"]["gan"].update(pretrain_kimg=1000.0))
    assert "pretrain/all: done: its inputs, params or code are not those of its key" in complaints(
        audit(Subject(bundle))
    )


def test_a_bundle_from_before_a_knob_was_added_is_whole(bundle: Path) -> None:
    params = json.loads((bundle / "bundle.json").read_text())["lineage"]["params"]
    del params["balance"]["classes"]

    def as_it_was_then(records: list) -> None:
        for record in records:
            values = [record[name] for name in ("stage", "item", "inputs", "source")]
            record["key"] = flow.key_of(*values, params, record["weights"], record["code"])

    rewrite(bundle, as_it_was_then, "lineage/records.json")
    assert "synthesize/vascular: done: its inputs, params" in complaints(audit(Subject(bundle)))
    rewrite(bundle, lambda content: content["lineage"].update(params=params))
    assert not audit(Subject(bundle)).broken()


@pytest.mark.parametrize("same_gate", [True, False])
def test_a_bundle_from_before_a_knob_was_removed_is_checked_as_far_as_it_goes(
    bundle: Path, tiny_run: flow.Run, same_gate: bool
) -> None:
    params = json.loads((bundle / "bundle.json").read_text())["lineage"]["params"]
    params["gan"]["gone"] = 1

    def as_it_was_then(records: list) -> None:
        for record in records:
            record["code"] = record["code"] if same_gate else "0" * 64
            values = [record[name] for name in ("stage", "item", "inputs", "source")]
            record["key"] = flow.key_of(*values, params, record["weights"], record["code"])

    rewrite(bundle, as_it_was_then, "lineage/records.json")
    rewrite(bundle, lambda content: content["lineage"].update(params=params))
    link = audit(Subject(bundle, data=tiny_run.data_dir))
    assert not link.broken(), complaints(link)
    (said,) = (check for check in link.checks if check.what == "params")
    assert said.status == "unchecked" and "gan.gone" in said.detail
    decisions = next(below for below in link.made_from if below.name == "decisions")
    assert [check.status for check in decisions.checks[:2]] == ["ok", "unchecked"]
    label = next(iter(json.loads((bundle / "bundle.json").read_text())["decisions"]["classes"]))
    rewrite(bundle, lambda content: content["decisions"]["classes"][label].update(reasons=["forged"]))
    assert "decisions: are those that gate left: they are others" in complaints(audit(Subject(bundle)))
    flip_a_bit(bundle / "classifier" / "weights.safetensors")
    assert "weights.safetensors: was changed" in complaints(audit(Subject(bundle)))


def test_weights_that_the_auditor_has_not_do_not_keep_the_manifest_from_being_made_again(
    bundle: Path, tiny_run: flow.Run
) -> None:
    rewrite(
        bundle, lambda content: content["lineage"]["params"]["classifier"].update(weights="elsewhere/x.safetensors")
    )
    again = _images(audit(Subject(bundle, data=tiny_run.data_dir))).checks
    assert [check.status for check in again if "runs again" in check.what] == ["ok", "ok"]


def test_what_the_gate_left_cannot_be_taken_out_of_a_bundle(bundle: Path) -> None:
    (bundle / "lineage" / "gate.json").unlink()
    described = read_report(bundle / "bundle.json", Bundle)
    files = {name: digest for name, digest in described.files.items() if name != "lineage/gate.json"}
    write_bundle_json(bundle, described.model_copy(update={"files": files}))
    assert "are those that gate left: lineage/gate.json is missing" in complaints(audit(Subject(bundle)))


def test_a_changed_record_is_found(bundle: Path) -> None:
    def change(records: list) -> None:
        (record,) = (record for record in records if record["stage"] == "pretrain")
        record["files"] = dict.fromkeys(record["files"], "0" * 64)

    rewrite(bundle, change, "lineage/records.json")
    assert "finetune/vascular: done: pretrain/all, which it read, left something else" in complaints(
        audit(Subject(bundle))
    )


def test_a_changed_raw_image_is_found_and_named(bundle: Path, tiny_run: flow.Run, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_run.data_dir, tmp_path / "data"))
    image = next(path for path in sorted(data.rglob("*.jpg")) if path.stat().st_size > 1000 and "020" in path.name)
    digest = sha256_file(image)
    flip_a_bit(image)
    said = complaints(audit(Subject(bundle, data=data)))
    assert "raw images have this hash" in said
    assert f"image {digest}" in said
    assert image.name in said


def test_what_is_known_of_an_image(bundle: Path, tiny_run: flow.Run, tmp_path: Path) -> None:
    image = sorted(tiny_run.data_dir.rglob("skin-020.jpg"))[0]
    said = [check.detail for check in audit(Subject(bundle, image=image, data=tiny_run.data_dir)).checks]
    assert "holds it as" in said[0]
    assert " image of nevus" in said[1]
    assert "none is written in it" in said[2]
    other = tmp_path / "other.png"
    Image.new("RGB", (40, 40)).save(other)
    said = [check.detail for check in audit(Subject(bundle, image=other, data=tiny_run.data_dir)).checks]
    assert said[0] == "does not hold it"
    assert "not among the images" in said[1]


def test_a_synthetic_image_is_made_again(tiny_run: flow.Run, accepted_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "drawn"
    arguments = ["--label", "vascular", "--n", "9", "--seed", "3", "--out", str(out)]
    assert cli.main(["generate", "--bundle", str(accepted_bundle), *arguments]) == 0
    link = audit(Subject(accepted_bundle, image=out / "000008.png"))
    assert link.broken() == []
    (made,) = link.made_from
    assert "vascular, seed 3, index 8" in made.name
    assert [check.status for check in made.checks] == ["ok"]

    forged = out / "forged.png"
    with Image.open(out / "000008.png") as image:
        provenance = Provenance(image.info["generator"], "vascular", 3, 7)
        forged.write_bytes(encode_png(np.asarray(image), provenance))
    said = complaints(audit(Subject(accepted_bundle, image=forged)))
    assert "the generator makes another image of seed 3, index 7" in said


def test_a_batch_is_made_again(accepted_bundle: Path, tiny_run: flow.Run, tmp_path: Path) -> None:
    out = tmp_path / "drawn"
    arguments = ["--label", "vascular", "--n", "20", "--seed", "5", "--out", str(out)]
    assert cli.main(["generate", "--bundle", str(accepted_bundle), *arguments]) == 0
    for batch in (out, tiny_run.store / "synthetic" / "vascular"):
        link = audit(Subject(accepted_bundle, batch=batch))
        assert [check for name, check in link.broken() if name == link.name] == []
        assert link.made_from[0].name.startswith("bundle")
    flip_a_bit(out / "000003.png")
    shutil.copyfile(out / "000004.png", out / "copy.png")
    shutil.copyfile(out / "000006.png", out / "000005.png")
    table = (out / "manifest.csv").read_text().splitlines()
    table[6] = table[6].replace(table[6].split(",")[7], sha256_file(out / "000005.png"))
    (out / "manifest.csv").write_text("\n".join(table) + "\n")
    said = complaints(audit(Subject(accepted_bundle, batch=out)))
    assert "000003.png: was changed" in said
    assert "000005.png: says another origin" in said
    assert "copy.png: is not in manifest.csv" in said


def test_a_damaged_batch_is_told_image_by_image(accepted_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "drawn"
    arguments = ["--label", "vascular", "--n", "20", "--seed", "5", "--out", str(out)]
    assert cli.main(["generate", "--bundle", str(accepted_bundle), *arguments]) == 0
    whole = (out / "manifest.csv").read_text()
    (out / "000000.png").unlink()
    own = [check.what for check in audit(Subject(accepted_bundle, batch=out)).checks if check.status == "broken"]
    assert own[:-1] == ["000000.png"]
    cut = (out / "000001.png").read_bytes()[:400]
    (out / "000001.png").write_bytes(cut)
    lines = whole.splitlines()
    lines[2] = lines[2].replace(lines[2].split(",")[7], sha256_file(out / "000001.png"))
    lines[3] = lines[3].replace(",5,2,", ",-5,2,")
    (out / "manifest.csv").write_text("\n".join(lines))
    said = complaints(audit(Subject(accepted_bundle, batch=out)))
    assert "000001.png: its pixels cannot be read" in said
    assert "000002.png: its row in manifest.csv names no generator, seed" in said
    for damaged in (whole.encode()[:-3] + b"\xff", whole.encode() + b'"'):
        (out / "manifest.csv").write_bytes(damaged)
        with pytest.raises(DataError, match="cannot read the synthetic images' manifest"):
            audit(Subject(accepted_bundle, batch=out))


def test_an_image_that_would_end_the_audit_has_no_provenance(accepted_bundle: Path, tmp_path: Path) -> None:
    pixels, text = np.zeros((8, 8, 3), np.uint8), PngInfo()
    text.add_text("generator", "x" * 2_000_000, zip=True)
    long, forged = tmp_path / "long.png", tmp_path / "forged.png"
    Image.fromarray(pixels).save(long, pnginfo=text)
    forged.write_bytes(encode_png(pixels, Provenance("0" * 64, "vascular", -1, 2**70)))
    for image in (long, forged):
        said = audit(Subject(accepted_bundle, image=image)).checks[-1]
        assert said.what == "provenance" and "none is written in it" in said.detail


class Repository:
    """A git repository of images, their versions in a DVC remote of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.remote, self.data = folder / "repository", folder / "remote", folder / "repository" / "data"
        self.data.mkdir(parents=True)
        self.git("init", "-q", "-b", "main")
        self.dvc("init", "-q")

    def git(self, *arguments: str) -> None:
        self._run("git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments)

    def dvc(self, *arguments: str) -> None:
        self._run(sys.executable, "-m", "dvc", *arguments)

    def _run(self, *command: str) -> None:
        environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True, env=environment)

    def add_remote(self, name: str, *options: str) -> None:
        self.dvc("remote", "add", "-q", "-d", *options, name, str(self.remote))

    def commit(self, message: str, colour: str = "") -> None:
        """Commit and push the images, with a new one of a colour where one is named."""
        if colour:
            Image.new("RGB", (8, 8), colour).save(self.data / f"{colour}.png")
        self.dvc("add", "-q", "data")
        self.dvc("push", "-q")
        self.git("add", ".")
        self.git("commit", "-qm", message)


def test_a_repository_with_two_versions(bundle: Path, tiny_run: flow.Run, tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.add_remote("local")
    shutil.copytree(tiny_run.data_dir, repository.data, dirs_exist_ok=True)
    repository.commit("first")
    repository.commit("second", "red")

    link = audit(Subject(bundle, repo=str(repository.folder)))
    assert link.broken() == []
    assert any("data since commit" in check.detail for check in link.checks)
    new = Subject(image=repository.data / "red.png", repo=str(repository.folder))
    assert [check.detail for check in audit(new).checks[:2]] == ["does not hold it", "holds it as red.png"]

    data_md5 = read_report(bundle / "bundle.json", Bundle).lineage.data_md5
    (repository.remote / "files" / "md5" / data_md5[:2] / data_md5[2:]).unlink()
    with pytest.raises(DataError, match="pull"):
        audit(Subject(bundle, repo=str(repository.folder)))
    assert [check.status for check in audit(new).checks[:2]] == ["unchecked", "ok"]


def test_versions_from_before_the_remote_and_of_a_branch_that_is_gone(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.add_remote("mine", "--local")  # which nobody else sees
    repository.commit("first", "red")
    repository.git("checkout", "-q", "-b", "side")
    repository.commit("on a branch", "blue")
    image = Path(shutil.move(repository.data / "blue.png", tmp_path))
    repository.commit("taken back")
    repository.git("checkout", "-q", "main")
    repository.git("merge", "-q", "--no-ff", "-m", "merged", "side")
    repository.git("branch", "-q", "-d", "side")
    repository.add_remote("local")
    repository.commit("with a remote")
    checks = audit(Subject(image=image, repo=str(repository.folder))).checks
    assert [check.detail for check in checks[:2]] == ["does not hold it", "holds it as blue.png"]


def test_the_command_line(bundle: Path, tiny_run: flow.Run, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["audit", "--bundle", str(bundle), "--data", str(tiny_run.data_dir)]
    assert cli.main(arguments) == 0
    assert "data version" in capsys.readouterr().out
    flip_a_bit(bundle / "reference.json")
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--json"])
    assert end.value.code == cli.EXIT_BROKEN
    printed = capsys.readouterr()
    assert json.loads(printed.out)["made_from"]
    assert "broken: bundle" in printed.err
    assert "reference.json: was changed" in printed.err


def test_what_cannot_be_audited_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="name it with --bundle"):
        audit(Subject())
    with pytest.raises(DataError, match="does not exist"):
        audit(Subject(tmp_path / "none"))
    with pytest.raises(DataError, match="git repository"):
        audit(Subject(image=tmp_path / "none.png", repo=str(tmp_path / "nowhere")))
