"""The service's page in a real browser, as people use it: by mouse, by keyboard alone, by ear, on a phone."""

import base64
import hashlib
import io
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
import yaml
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright
from serving_images import encoded
from serving_process import ROOT, Served, serving

from raresynth import flow
from raresynth.lineage import sha256_file

LABEL = "vascular"
HOSTILE = """<img src=x onerror="document.title='broken'"> &amp; </script> """ + "keratosis" * 8
CHROMIUM = shutil.which("chromium")
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
WATCH = """
window.blobs = {};
window.shift = 0;
const create = URL.createObjectURL;
URL.createObjectURL = (blob) => { const url = create(blob); blobs[url] = blob; return url; };
const add = (entry) => { shift += entry.hadRecentInput ? 0 : entry.value; };
new PerformanceObserver((list) => list.getEntries().forEach(add)).observe({ type: "layout-shift", buffered: true });
"""
"""Before the page's own script: what it holds as blobs, and how far its content jumped without anyone's doing."""
STYLE = (ROOT / "serving" / "page" / "page.css").read_text()

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium (Debian's package of that name)")


@dataclass
class Seen:
    """What a browser did beside showing the page."""

    errors: list[str] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append((request.method, request.url)))


def rename_label(bundle: Path, old: str, new: str) -> None:
    """Give a class of a bundle without a generator another name, wherever it stands."""
    content = json.loads((bundle / "bundle.json").read_text().replace(json.dumps(old), json.dumps(new)))
    for path in [bundle / name for name in content["files"] if name.endswith(".json")]:
        path.write_text(path.read_text().replace(json.dumps(old), json.dumps(new)))
    content["files"] = {name: sha256_file(bundle / name) for name in content["files"]}
    (bundle / "bundle.json").write_text(json.dumps(content))
    (bundle / "bundle.sha256").write_text(f"{sha256_file(bundle / 'bundle.json')}  bundle.json\n")


@pytest.fixture(scope="module")
def served(accepted_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page")
    bundle = shutil.copytree(accepted_bundle, folder / "bundle")
    rename_label(bundle, "keratosis", HOSTILE)
    keys = {
        name: {"sha256": hashlib.sha256(f"key-of-{name}".encode()).hexdigest(), "scopes": scopes}
        for name, scopes in {"all": ["predict", "generate"], "predictor": ["predict"]}.items()
    }
    (folder / "keys.yaml").write_text(yaml.safe_dump(keys))
    settings = {"bundle": bundle, "keys_file": folder / "keys.yaml", "max_image_mb": 1, "burst": 1000}
    with serving(folder / "log", **settings) as service:
        yield service


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    headers = {"Authorization": "Bearer key-of-all"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS.split())
        yield browser
        browser.close()


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(10_000)
    context.add_init_script(WATCH)
    yield context
    context.close()


@pytest.fixture
def locked(context: BrowserContext, served: Served, seen: Seen) -> Iterator[Page]:
    """The page as it opens, before a key was given; nothing untoward may have happened by the end."""
    page = context.new_page()
    seen.watch(page)
    page.goto(served.url)
    expect(page.get_by_label("API key", exact=True)).to_be_visible()
    yield page
    # The browser itself tells of each answer that is an error.
    assert [error for error in seen.errors if not error.startswith("Failed to load resource")] == []
    assert {url for _, url in seen.requests if not url.startswith((f"{served.url}/", "blob:"))} == set()
    assert page.evaluate("shift") < 0.01
    assert page.title() == "raresynth"


@pytest.fixture
def page(locked: Page) -> Page:
    """The page with a key that may do all."""
    enter_key(locked, "key-of-all")
    expect(locked.get_by_role("radio", name=LABEL)).to_be_checked()
    return locked


def enter_key(page: Page, key: str) -> None:
    page.get_by_label("API key", exact=True).fill(key)
    page.get_by_role("button", name="Use this key").click()


def tab_to(page: Page, wanted: Locator) -> None:
    """Go on by the tab key until an element has the focus, and can be seen to have it."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if wanted.evaluate("element => element === document.activeElement"):
            outlined = wanted.evaluate(
                "element => [element, element.closest('label'), element.nextElementSibling]"
                ".some((part) => part && getComputedStyle(part).outlineStyle !== 'none')"
            )
            assert outlined, "the focus cannot be seen"
            return
    raise AssertionError("the tab key does not lead there")


def blob(image: Locator, attribute: str = "src") -> bytes:
    """The bytes behind an image or a link of the page."""
    read = "async (element, name) => [...new Uint8Array(await blobs[element[name]].arrayBuffer())]"
    return bytes(image.evaluate(read, attribute))


def choose(page: Page, files: dict[str, bytes]) -> None:
    payloads = [{"name": name, "mimeType": "image/jpeg", "buffer": content} for name, content in files.items()]
    page.get_by_label("Choose images").set_input_files(payloads)


def percent(share: float) -> str:
    return f"{(100 * Decimal(repr(share))).quantize(Decimal('0.1'), ROUND_HALF_UP)}%"


def article(page: Page, name: str) -> Locator:
    return page.get_by_role("article").filter(has=page.get_by_role("heading", name=name, exact=True))


def draw(page: Page, n: int) -> None:
    page.get_by_role("spinbutton", name="Images").fill(str(n))
    page.get_by_role("button", name="Draw images").click()
    expect(page.get_by_role("link", name="Download zip")).to_be_visible()


# Synthetic images


def test_a_batch_is_drawn_by_keyboard_alone_and_is_the_services(
    locked: Page, served: Served, client: httpx.Client, seen: Seen, tmp_path: Path
) -> None:
    page = locked
    tab_to(page, page.get_by_label("API key", exact=True))
    page.keyboard.type("key-of-all\n")
    tab_to(page, page.get_by_role("radio", name=LABEL))
    for name, value in {"Images": "5", "Truncation": "0.7", "Seed": "3"}.items():
        tab_to(page, page.get_by_role("spinbutton", name=name))
        page.keyboard.press("Control+A")
        page.keyboard.type(value)
    tab_to(page, page.get_by_role("button", name="Draw images"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("status").filter(has_text="5 images drawn")).to_be_visible()
    tab_to(page, link := page.get_by_role("link", name="Download zip"))
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    download.value.save_as(saved := tmp_path / "saved.zip")
    direct = client.post("/generate", json={"label": LABEL, "n": 5, "seed": 3, "truncation": 0.7}).content
    assert saved.read_bytes() == direct == blob(link, "href")
    with zipfile.ZipFile(io.BytesIO(direct)) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        for entry in manifest["images"]:
            image = page.get_by_role("img", name=f"synthetic {LABEL}, seed 3, image {entry['index']}", exact=True)
            expect(image).to_have_js_property("naturalWidth", 32)
            assert blob(image) == archive.read(entry["path"])
    for lineage in (manifest["generator"], manifest["data_version"], manifest["bundle"]):
        expect(page.get_by_role("definition").filter(has_text=lineage).first).to_be_visible()
    assert [url for method, url in seen.requests if method == "POST"] == [f"{served.url}/generate"]


def test_a_new_order_takes_the_place_of_the_one_before(page: Page) -> None:
    page.get_by_role("spinbutton", name="Images").fill("256")
    for _ in range(3):
        page.get_by_role("button", name="New seed").click()
        page.get_by_role("button", name="Draw images").click()
    expect(page.get_by_role("status").filter(has_text="256 images drawn")).to_be_visible()
    seed = page.get_by_role("spinbutton", name="Seed").input_value()
    expect(page.get_by_role("img", name=f"synthetic {LABEL}, seed {seed}, image")).to_have_count(256)
    expect(page.locator("#tiles img[src]")).to_have_count(256)
    expect(page.get_by_text(f"synthetic {LABEL}seed {seed}, image 255")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_text([""] * page.get_by_role("alert").count())


def test_a_class_without_a_generator_stands_there_with_the_reason(page: Page) -> None:
    refused = page.get_by_role("radio", name=HOSTILE.strip())
    expect(refused).to_be_disabled()
    expect(page.locator(".option").filter(has=refused)).to_contain_text("no generator: rejected. made so by a test")
    expect(page.get_by_role("radio", name=LABEL)).to_be_enabled()


# Predictions


def test_predictions_are_the_services_and_what_it_refuses_stands_in_its_words(
    page: Page, served: Served, client: httpx.Client, tiny_run: flow.Run
) -> None:
    learned = tiny_run.data_dir / "images" / "skin-020.jpg"
    files = {"learned.jpg": learned.read_bytes(), "other.jpg": encoded(seed=1), "another.jpg": encoded(seed=2)}
    answers = {
        name: client.post("/predict", files={"image": (name, content)}).json() for name, content in files.items()
    }
    choose(page, {"note.txt": b"no image", **files})
    expect(page.get_by_role("status").filter(has_text="3 images predicted, 1 failed.")).to_be_visible()
    for name, answer in answers.items():
        shown = article(page, name)
        shares = sorted(answer["probabilities"].items(), key=lambda item: -item[1])
        bars = shown.get_by_role("list", name="Calibrated probabilities").get_by_role("listitem")
        expect(bars).to_have_text([f"{' '.join(label.split())}{percent(share)}" for label, share in shares])
        likeness = answer["out_of_distribution"]
        assert likeness["flagged"] == (name != "learned.jpg")
        expect(shown).to_contain_text("Unlike the training" if likeness["flagged"] else "Not flagged as unlike")
        expect(shown).to_contain_text(re.compile(r"score [\d.,]+, threshold [\d.,]+[.]"))
        expect(shown.get_by_role("img", name=f"preview of {name}")).to_be_visible()
    alert = article(page, "note.txt").get_by_role("alert")
    expect(alert).to_contain_text("the file is no JPEG, PNG or WebP image; send one of these")
    request = alert.inner_text().rpartition("request ")[2]
    assert f"{request} all /predict 415" in served.log.read_text()


def test_a_heat_map_can_be_laid_over_the_image(page: Page, client: httpx.Client) -> None:
    content = encoded(seed=2)
    choose(page, {"a.jpg": content})
    answer = client.post("/predict", files={"image": ("a.jpg", content)}, data={"overlay": "true"}).json()
    overlay = article(page, "a.jpg").locator(".overlay")
    expect(overlay).to_be_hidden()
    page.get_by_role("checkbox", name="Show heat maps").focus()
    page.keyboard.press("Space")
    expect(page.get_by_role("img", name=f"heat map of what spoke for {answer['label']} in a.jpg")).to_be_visible()
    assert blob(overlay) == base64.b64decode(answer["overlay_png"])


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_images_can_be_dropped_and_pasted(page: Page, event: str) -> None:
    files = page.evaluate_handle(
        """(content) => {
          const files = new DataTransfer();
          const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
          for (let i = 0; i < 34; i++) files.items.add(new File([bytes], `${i}.jpg`));
          return files;
        }""",
        base64.b64encode(encoded()).decode(),
    )
    if event == "drop":
        page.dispatch_event("main", "drop", {"dataTransfer": files})
    else:
        page.evaluate(
            "(clipboardData) => document.dispatchEvent(new ClipboardEvent('paste', { clipboardData }))", files
        )
    expect(page.get_by_role("status").filter(has_text="32 images predicted.")).to_be_visible()
    expect(page.get_by_role("article")).to_have_count(32)
    expect(page.get_by_role("alert").filter(has_text="of 34 images the first 32 are taken")).to_be_visible()


def test_a_service_that_cannot_be_reached_is_told(page: Page) -> None:
    page.context.set_offline(True)
    page.get_by_role("button", name="Draw images").click()
    expect(page.get_by_role("alert").filter(has_text="no answer came")).to_be_visible()
    expect(page.get_by_role("link", name="Download zip")).to_be_hidden()


# API keys


def test_a_key_is_asked_for_and_kept_nowhere(locked: Page, served: Served) -> None:
    expect(locked.get_by_role("button", name="Draw images")).to_be_hidden()
    enter_key(locked, "key-of-nobody")
    expect(locked.get_by_role("status").filter(has_text="does not know this key")).to_be_visible()
    expect(locked.get_by_role("alert").filter(has_text="send an API key")).to_contain_text("request ")
    enter_key(locked, "key-of-all")
    expect(locked.get_by_role("button", name="Draw images")).to_be_visible()
    expect(locked.get_by_role("alert").filter(has_text="send an API key")).to_be_hidden()
    kept = locked.evaluate(
        "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href, history.state])"
    )
    assert "key-of" not in kept and "key-of" not in locked.content()
    assert locked.get_by_label("API key", exact=True).input_value() == ""
    assert "key-of" not in served.log.read_text()
    locked.get_by_role("button", name="Forget the key").click()
    expect(locked.get_by_role("button", name="Draw images")).to_be_hidden()


def test_a_key_without_the_scope_is_told_so(locked: Page) -> None:
    enter_key(locked, "key-of-predictor")
    locked.get_by_role("button", name="Draw images").click()
    expect(locked.get_by_role("alert").filter(has_text="this key may not generate")).to_contain_text("request ")
    choose(locked, {"a.jpg": encoded()})
    expect(locked.get_by_role("status").filter(has_text="1 image predicted.")).to_be_visible()


# The card


def test_the_card_is_told_in_full(page: Page, client: httpx.Client) -> None:
    card = client.get("/model").json()
    region = page.get_by_role("region", name="Model card")
    expect(region).to_contain_text("It is no medical device")
    for text in (card["intended_use"], *card["limits"], card["bundle"], card["data"]["data_version"]):
        expect(region).to_contain_text(text)
    rows = region.get_by_role("region", name="Classes").get_by_role("row")
    names = [" ".join(label.split()) for label in card["labels"]]
    expect(rows.get_by_role("rowheader")).to_have_text(names)
    counted = card["data"]["validation"]["classes"][LABEL]
    expect(rows.filter(has_text=LABEL)).to_contain_text("{train} / {val} / {test}".format(**counted))
    balanced = card["classifier"]["test"]["balanced_accuracy"]["value"]
    expect(region.get_by_role("row", name="balanced accuracy")).to_contain_text(percent(balanced))
    region.locator("summary").filter(has_text=LABEL).click()
    figures = region.get_by_role("region", name=f"Figures of {LABEL}").get_by_role("row")
    fd = card["generators"][LABEL]["quality"]["fd"]
    expect(figures.filter(has_text="FD")).to_contain_text(fd["other_label"].strip())
    for decision in card["decisions"]["classes"].values():
        assert all(reason in region.inner_html() for reason in decision["reasons"])


# For everyone


def test_what_stands_on_the_page_has_names_and_an_order(page: Page) -> None:
    draw(page, 2)
    choose(page, {"a.jpg": encoded()})
    expect(page.get_by_role("status").filter(has_text="1 image predicted.")).to_be_visible()
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        node
        for node in nodes
        if not node["ignored"] and any(p["name"] == "focusable" and p["value"]["value"] for p in node["properties"])
    ]
    roles = {node["role"]["value"] for node in focusable}
    assert {"radio", "spinbutton", "button", "link", "checkbox", "textbox", "DisclosureTriangle"} <= roles
    assert [node["role"] for node in focusable if not node.get("name", {}).get("value")] == []
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        expect(page.get_by_role(landmark)).to_have_count(1)
    levels = [int(tag[1]) for tag in page.locator("h1, h2, h3, h4").evaluate_all("all => all.map((e) => e.tagName)")]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("width", [320, 390])
def test_it_fits_a_phone(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    draw(page, 3)
    choose(page, {"a-name-without-any-place-to-break-it-that-a-phone-camera-might-have-given-it.jpg": encoded()})
    expect(page.get_by_role("status").filter(has_text="1 image predicted.")).to_be_visible()
    page.locator("summary").filter(has_text=LABEL).click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    sizes = (
        page.locator("main, header")
        .locator("a, button, input, summary")
        .evaluate_all(
            """all => all.filter((element) => element.checkVisibility()).map((element) => {
          const { width, height } = (element.closest("label") ?? element).getBoundingClientRect();
          return [element.outerHTML, width, height];
        })"""
        )
    )
    assert len(sizes) > 12
    assert [size for size in sizes if min(size[1:]) < 43.9] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_told_from_its_ground(scheme: str) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): #(\w{6})", light if scheme == "light" else dark))

    def luminance(name: str) -> float:
        channels = [int(colours[name][i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    texts = [(text, ground) for text in ("ink", "muted", "accent") for ground in ("ground", "surface", "tint")]
    pairs = [(name, f"{name}-ground") for name in ("good", "bad", "open")] + [
        ("muted", "rule"),
        ("on-accent", "accent"),
    ]
    assert {pair: contrast(*pair) for pair in [*texts, *pairs] if contrast(*pair) < 4.5} == {}
    assert min(contrast("edge", "surface"), contrast("edge", "ground")) >= 3


# How it is delivered


def test_the_pages_files_are_known_by_their_content(served: Served) -> None:
    with httpx.Client(base_url=served.url) as anyone:
        for path, kind in (("/", "html"), ("/page.css", "css"), ("/page.js", "javascript"), ("/icon.svg", "svg+xml")):
            got, asked = anyone.get(path), anyone.head(path)
            assert got.status_code == asked.status_code == 200 and asked.content == b""
            assert got.headers["content-type"].partition(";")[0].endswith(f"/{kind}")
            assert got.headers["etag"] == asked.headers["etag"] and got.headers["cache-control"] == "no-cache"
            again = anyone.get(path, headers={"If-None-Match": got.headers["etag"]})
            assert again.status_code == 304 and again.content == b""
            policy = got.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "data:" not in policy
        assert anyone.get("/docs.json").headers["cache-control"] == "no-store"


@pytest.mark.slow
def test_a_bundle_without_keys_generators_or_maps_says_so(
    accepted_bundle: Path, browser: Browser, tmp_path: Path
) -> None:
    bundle = shutil.copytree(accepted_bundle, tmp_path / "bundle")
    content = json.loads((bundle / "bundle.json").read_text())
    content |= {"generators": {}, "no_generators": "no generator was accepted."}
    content["classifier"]["pooled_linear_head"] = False
    (bundle / "bundle.json").write_text(json.dumps(content))
    (bundle / "bundle.sha256").write_text(f"{sha256_file(bundle / 'bundle.json')}  bundle.json\n")
    with serving(tmp_path / "log", bundle=bundle) as service:
        page = browser.new_page()
        page.goto(service.url)
        expect(page.get_by_role("status").filter(has_text="No generator was accepted")).to_be_visible()
        expect(page.get_by_role("button", name="Draw images")).to_be_disabled()
        expect(page.get_by_label("API key", exact=True)).to_be_hidden()
        expect(page.get_by_role("checkbox", name="Show heat maps")).to_be_disabled()
        expect(page.get_by_text("Heat maps are off: the classifier has no pooled linear head").first).to_be_visible()
        choose(page, {"a.jpg": encoded()})
        expect(page.get_by_role("status").filter(has_text="1 image predicted.")).to_be_visible()
        page.close()
