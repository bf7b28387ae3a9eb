"""The report page and the summary: all that a run found, on one page that needs nothing beside it."""

import base64
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raresynth import flow, lineage
from raresynth.errors import CheckpointError, DataError, enumerate_words
from raresynth.quality.controls import Control, EncoderControls
from raresynth.report.charts import UNIT, Axis, Line, line_chart
from raresynth.report.findings import Findings, Sources, read_findings
from raresynth.report.grids import GAP, read_tiles, sheet
from raresynth.report.page import Pictures, compose, distribution, draw_pictures, quarantine_examples, render
from raresynth.report.summary import images_used, summarize
from raresynth.report.words import class_outcomes, counted, headline

VOID = {"meta", "img", "br"}
SECTIONS = ["decisions", "images", "gallery", "quality", "classifiers", "predictions", "training", "limits", "lineage"]
DIFFERENCE = {"value": 0.02, "low": -0.01, "high": 0.05}


class Page(HTMLParser):
    """Elements of a page, which must all be closed in their order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> at line {self.getpos()[0]} closes another element"

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)


def sources_of(run: flow.Run) -> Sources:
    def folders(stage: str) -> dict[str, Path]:
        records = {item: flow.read_record(run.store, stage, item) for item in flow.items(run, flow.STAGES[stage].each)}
        return {item: run.store / record.output for item, record in records.items()}

    return Sources(
        data_dir=run.data_dir,
        validation_dir=folders("validate")[flow.ALL],
        encoder_dir=folders("train-encoder")[flow.ALL],
        pretrain_dir=folders("pretrain")[flow.ALL],
        finetune_dirs=folders("finetune"),
        synthetic_dirs=folders("synthesize"),
        synthetic_root=run.store / "synthetic",
        quality_dirs=folders("measure"),
        gate_dir=folders("gate")[flow.ALL],
        arm_dirs=folders("train-classifier"),
        evaluation_dir=folders("evaluate")[flow.ALL],
        decisions=run.store / "decisions.json",
        bundle_dir=folders("package")[flow.ALL],
    )


@pytest.fixture(scope="module")
def html(tiny_run: flow.Run) -> str:
    return (tiny_run.store / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def findings(tiny_run: flow.Run) -> Findings:
    return read_findings(sources_of(tiny_run), tiny_run.params)


@pytest.fixture(scope="module")
def pictures(tiny_run: flow.Run, findings: Findings) -> Pictures:
    return draw_pictures(findings, tiny_run.data_dir, tiny_run.store / "synthetic")


def test_page_is_well_formed_and_holds_every_section(html: str) -> None:
    page = Page(html)
    assert [attributes["id"] for attributes in page.all("section")] == SECTIONS
    assert [attributes["href"] for attributes in page.all("a")] == [f"#{section}" for section in SECTIONS]
    assert [tag for tag, _ in page.elements if tag in {"h1", "h2"}] == ["h1"] + ["h2"] * len(SECTIONS)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_page_needs_nothing_beside_it(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|@import|url\(", html)
    assert len(html) < 3_000_000


def test_every_image_has_a_text_and_every_chart_a_title(html: str) -> None:
    page = Page(html)
    assert all(attributes["alt"] for attributes in page.all("img"))
    charts = [attributes for attributes in page.all("svg") if "aria-hidden" not in attributes]
    assert charts and all(attributes["role"] == "img" for attributes in charts)
    assert len(list(page.all("title"))) == len(charts) + 1
    assert all(attributes.get("scope") for attributes in page.all("th"))


def test_page_tells_decisions_reasons_and_quarantine(html: str, tiny_run: flow.Run) -> None:
    text = Page(html).text
    decisions = json.loads((tiny_run.store / "decisions.json").read_text())
    assert headline(decisions) in text
    assert decisions["classes"]
    for label, entry in decisions["classes"].items():
        assert label in text and entry["decision"] in text
        assert all(" ".join(reason.split()) in text for reason in entry["reasons"])
    assert all(reason in text for reason in decisions["release"]["reasons"])
    for reason in ("missing", "empty", "exact duplicate", "class too small"):
        assert reason in text
    assert "images/skin-001.jpg" in text and "angioma" in text


def test_page_names_where_everything_comes_from(html: str, findings: Findings) -> None:
    lineage = findings.bundle.lineage
    text = Page(html).text
    hashes = [findings.encoder.encoder_sha256, lineage.data_md5, lineage.manifest_sha256, lineage.validation_sha256]
    hashes += [findings.bundle.classifier.weights_sha256, *lineage.parents.values(), *findings.bundle.files.values()]
    assert all(digest in text for digest in hashes)
    assert "pretrain_kimg: 0.4" in text


def test_rendered_again_it_is_equal_to_the_byte(html: str, tiny_run: flow.Run, tmp_path: Path) -> None:
    render(sources_of(tiny_run), tiny_run.params, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_page_holds_neither_times_nor_places_of_the_machine(html: str, tiny_run: flow.Run) -> None:
    log = json.loads((tiny_run.store / "run.json").read_text())
    assert log["run_id"] not in html
    assert str(tiny_run.store) not in html and str(tiny_run.data_dir) not in html
    assert not any(stage["started"] in html for stage in log["stages"].values())


def test_a_class_whose_generator_collapsed_has_reals_and_the_reason(findings: Findings, pictures: Pictures) -> None:
    label, reason = "vascular", "training collapsed: d_loss is not a finite number at step 7"
    failed = findings.finetune[label].model_copy(
        update={"status": "collapsed", "reason": reason, "collapsed_step": 7, "weights_sha256": None}
    )
    entry = {"label": label, "decision": "rejected", "reasons": [reason]}
    others = {name: of for name, of in findings.synthetic.items() if name != label}
    broken = replace(
        findings,
        finetune={**findings.finetune, label: failed},
        synthetic=others,
        quality={name: of for name, of in findings.quality.items() if name != label},
        decisions={**findings.decisions, "classes": {**findings.decisions["classes"], label: entry}},
    )
    gallery = replace(pictures.galleries[label], synthetic=None, pairs=())
    page = Page(compose(broken, replace(pictures, galleries={**pictures.galleries, label: gallery})))
    assert f"There are none: {reason}" in page.text
    assert f"Generator of {label}: {reason}" in page.text
    assert "collapsed at step 7" in page.text
    assert f"Synthetic images of {label}" not in {attributes["alt"] for attributes in page.all("img")}


def test_a_run_in_which_no_class_needed_images(findings: Findings) -> None:
    empty = replace(findings, finetune={}, synthetic={}, quality={}, decisions={**findings.decisions, "classes": {}})
    text = Page(compose(empty, Pictures({}, ()))).text
    assert "No class needed synthetic images" in text
    assert "No images were synthesised." in text
    assert "There were no synthetic images to measure." in text


def test_a_skipped_arm_is_named_with_its_reason(html: str) -> None:
    text = Page(html).text
    assert "skipped: no synthetic image was accepted by the class gate" in text
    assert "There is nothing to compare" in text


def test_both_arms_are_compared_where_both_were_trained(findings: Findings, pictures: Pictures) -> None:
    real = findings.evaluation.arms[0]
    estimate = real.test["accuracy"].model_copy(update=DIFFERENCE)
    predictions = findings.predictions.assign(arm="real+synthetic")
    decisions = json.loads(json.dumps(findings.decisions))
    decisions["release"] |= {"decision": "approved", "arm": "real+synthetic", "difference": DIFFERENCE}
    both = replace(
        findings,
        decisions=decisions,
        predictions=pd.concat([findings.predictions, predictions]),
        evaluation=findings.evaluation.model_copy(
            update={
                "arms": [real, real.model_copy(update={"arm": "real+synthetic"})],
                "differences": dict.fromkeys(real.test, estimate),
            }
        ),
    )
    page = Page(compose(both, pictures))
    text = page.text
    assert "The synthetic images help: the arm “real+synthetic” is released" in text
    assert "+2.0" in text and "−1.0 to +5.0" in text
    assert "ROC on test: real+synthetic" in text
    assert {"Confusion matrix of real", "Confusion matrix of real+synthetic"} <= {
        attributes.get("aria-label") for attributes in page.all("div")
    }


def test_controls_of_the_encoder_are_shown_where_there_are_any(findings: Findings, pictures: Pictures) -> None:
    control = Control(strengths=[0.0, 2.5], fd=[1.25, 8.5], spearman=1.0, effect=0.3)
    controls = EncoderControls(
        blur=control,
        noise=control,
        jpeg=control,
        dropped_modes=control,
        neighbour_accuracy=0.625,
        pixel_neighbour_accuracy=0.5,
    )
    for of, there, gone in (
        (controls, "62.5 % of the time by these features", "too small to show that the encoder"),
        (None, "too small to show that the encoder", "of the time by these features"),
    ):
        encoder = findings.encoder.model_copy(update={"controls": of})
        text = Page(compose(replace(findings, encoder=encoder), pictures)).text
        assert there in text and gone not in text
        assert ("100 − quality" in text) == (of is not None)


def test_text_from_data_is_escaped(findings: Findings, pictures: Pictures) -> None:
    row = {"path": "<script>x</script>.jpg", "label": "a&b", "reason": "missing", "detail": "<b>gone</b>"}
    page = Page(compose(replace(findings, quarantine=pd.DataFrame([row])), pictures))
    assert "<script>x</script>.jpg" in page.text
    assert "script" not in {tag for tag, _ in page.elements}


def test_distribution_counts_what_was_made_and_accepted(findings: Findings) -> None:
    rows = distribution(replace(findings, n_accepted={"vascular": 5}))
    assert [row.label for row in rows] == ["nevus", "keratosis", "vascular"]
    assert [(row.made, row.accepted) for row in rows] == [(0, 0), (32, 0), (32, 5)]


def test_quarantine_examples_are_few_and_the_commonest_reason_comes_first() -> None:
    rows = pd.DataFrame({"path": list("abcdef"), "reason": ["empty", *["missing"] * 5], "detail": ""})
    examples = quarantine_examples(rows)
    assert list(examples) == ["missing", "empty"]
    assert examples["missing"][0] == 5
    assert [row.path for row in examples["missing"][1]] == ["b", "c", "d"]


def test_a_missing_report_is_a_sentence_that_names_the_cure(tiny_run: flow.Run, tmp_path: Path) -> None:
    sources = replace(sources_of(tiny_run), encoder_dir=tmp_path)
    with pytest.raises(CheckpointError, match="run the stage that writes it first"):
        read_findings(sources, tiny_run.params)


def test_summary_tells_decisions_arms_and_places(tiny_run: flow.Run) -> None:
    text = summarize(tiny_run.store)
    decisions = json.loads((tiny_run.store / "decisions.json").read_text())
    for label, entry in decisions["classes"].items():
        assert f"- {label} {entry['decision']}: " in text
    assert "- real: balanced accuracy " in text
    assert "- real+synthetic: skipped, " in text
    for place in ("report.html", "decisions.json", "bundle"):
        assert str(tiny_run.store / place) in text
    assert re.search(r"all tasks took \d+ min \d\d s", text)
    assert 8 <= len(text.splitlines()) <= 25


def test_summary_gives_the_limit_that_was_missed(tiny_run: flow.Run, tmp_path: Path) -> None:
    for name in ("decisions.json", "evaluation/report.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(tiny_run.store / name, tmp_path / name)
    decisions = json.loads((tmp_path / "decisions.json").read_text())
    reasons = ["FD ratio 0.1, limit at most 0.3: met", "a note", "coverage ratio 0.1, limit at least 0.7: missed"]
    decisions["classes"] = {
        "rare": {"decision": "rejected", "reasons": reasons},
        "rarer": {"decision": "accepted", "reasons": reasons[:2]},
    }
    (tmp_path / "decisions.json").write_text(json.dumps(decisions))
    text = summarize(tmp_path)
    assert "- rare rejected: coverage ratio 0.1" in text
    assert "- rarer accepted: FD ratio 0.1" in text
    assert "all tasks took" not in text


def test_summary_tells_what_became_of_the_images(tmp_path: Path) -> None:
    def said(n_kept: int, dropped: dict[str, str], empty: list[str]) -> list[str]:
        lineage.write_json(
            tmp_path / "validation" / "report.json", {"n_rows": 1340, "n_kept": n_kept, "dropped_classes": dropped}
        )
        lineage.write_json(tmp_path / "manifest" / "report.json", {"empty_classes": empty})
        lineage.write_json(
            tmp_path / "validation" / "symmetries.json",
            {"symmetries": "mirror", "given": bool(empty), "told": {"mirrored": 0.524, "half_turn": 0.996}},
        )
        return images_used(tmp_path)

    assert images_used(tmp_path) == []
    turned = "- images are mirrored in training, and never turned upside down or on their side"
    assert said(1340, {}, []) == [
        "- images: 1,340 of 1,340 rows used",
        f"{turned}: of the train images the others tell 100 % from themselves turned by half and 52 % from their "
        "mirror images (chance tells 50 %)",
    ]
    assert said(1329, {"SCC three": "3 usable images", "one": "1 usable images"}, ["UNK", "VASC"]) == [
        "- images: 1,329 of 1,340 rows used, 11 in quarantine; "
        "classes dropped: SCC three (3 usable images), one (1 usable images); classes without an image: UNK, VASC",
        f"{turned}, as dataset.symmetries in the params says",
    ]


def test_summary_of_an_unfinished_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="run the flow to its end first"):
        summarize(tmp_path)


def test_summary_loads_neither_torch_nor_pandas() -> None:
    code = "import sys, raresynth.report.summary; print({'torch', 'pandas', 'numpy', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("decision", "difference", "classes", "begin"),
    [
        ("approved", DIFFERENCE, {"a": "accepted"}, "The synthetic images help"),
        ("rejected", DIFFERENCE, {"a": "accepted"}, "The synthetic images bring no proven gain"),
        ("rejected", None, {}, "No class needed synthetic images"),
        ("rejected", None, {"a": "rejected", "b": "insufficient"}, "No generator was accepted"),
        ("rejected", None, {"a": "accepted"}, "No classifier was trained on the synthetic images"),
    ],
)
def test_headline(decision: str, difference: dict[str, float] | None, classes: dict[str, str], begin: str) -> None:
    release = {"decision": decision, "difference": difference, "arm": "real"}
    entries = {label: {"decision": of} for label, of in classes.items()}
    assert headline({"release": release, "classes": entries}) == f"{begin}: the arm “real” is released"


def test_words() -> None:
    outcomes = {"a": "accepted", "b": "rejected", "c": "accepted", "d": "insufficient"}
    assert class_outcomes({label: {"decision": of} for label, of in outcomes.items()}) == (
        "4 classes needed synthetic images. Of the generators 2 were accepted (a and c), 1 was rejected (b) and 1 was "
        "left undecided for insufficient evidence (d)."
    )
    assert enumerate_words([]) == "none"
    assert enumerate_words(["a", "b", "c"]) == "a, b and c"
    assert (counted(1, "class"), counted(2000, "class"), counted(0, "row")) == ("1 class", "2,000 classes", "0 rows")


def test_axis_has_round_ticks_around_all_values() -> None:
    axis = Axis.over([0.03, 0.97])
    assert axis.ticks == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert (axis.share(0.25), axis.share(-5), axis.share(5)) == (0.25, 0.0, 1.0)
    for values in ([3.0], [-0.001, 0.002], [0.0, 1e6], [-7.0, -6.5]):
        axis = Axis.over(values)
        assert axis.low <= min(values) < axis.high and max(values) <= axis.high
        assert 2 <= len(axis.ticks) <= 8


def test_chart_leaves_out_what_is_not_finite_and_lines_without_points() -> None:
    lines = [Line("good", [0, 1, 2, 3], [1.0, math.nan, 3.0, math.inf]), Line("gone", [0], [math.nan])]
    svg = str(line_chart("Loss <1>", lines, "steps", "loss"))
    assert "nan" not in svg and "inf" not in svg and "gone" not in svg
    assert "Loss &lt;1&gt;" in svg and "good ends at 3" in svg
    assert svg.count("<circle") == 2
    assert line_chart("Nothing", lines[1:], "steps", "loss") == ""


def test_chart_places_values_by_its_axes() -> None:
    svg = str(line_chart("Corners", [Line("l", [0, 1], [0, 1])], "x", "y", UNIT, UNIT, "chance"))
    corners = re.search(r'<line class="diagonal" x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"', svg)
    points = re.search(r'<polyline class="series-0" points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', svg)
    assert corners and points and corners.groups() == points.groups()
    assert "chance" in svg


def test_sheet_holds_the_tiles_row_by_row() -> None:
    tiles = [np.full((16, 16, 3), value, np.uint8) for value in (0, 120, 250)]
    image = Image.open(BytesIO(_decode(sheet(tiles, 2)))).convert("RGBA")
    assert image.size == (2 * 16 + GAP, 2 * 16 + GAP)
    step = 16 + GAP
    middles = [image.getpixel((x + 8, y + 8)) for x, y in ((0, 0), (step, 0), (0, step))]
    assert all(
        abs(pixel[0] - value) < 6 and pixel[3] == 255 for pixel, value in zip(middles, (0, 120, 250), strict=True)
    )
    assert image.getpixel((step + 8, step + 8))[3] == 0
    assert Image.open(BytesIO(_decode(sheet(tiles[:1], 4)))).size == (16, 16)


def test_tiles_are_read_at_the_networks_resolution(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    assert [tile.shape for tile in read_tiles(tmp_path, ["a.png"], 64)] == [(64, 64, 3)]
    assert read_tiles(tmp_path, ["a.png"], 256)[0].shape == (128, 128, 3)
    with pytest.raises(DataError):
        read_tiles(tmp_path, ["missing.png"], 64)


def _decode(uri: str) -> bytes:
    return base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
