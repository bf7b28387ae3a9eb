// The page: reads the card, draws batches, shows predictions. It keeps nothing but what is on the screen and the API
// key, and what comes from the service only ever becomes text or an image's pixels, never markup.

const MAX_FILES = 32;
const AT_ONCE = 4; // uploads under way: enough to fill the service's batches, and far below its limits
const BARS = 8; // probabilities in sight; the rest of a long list is folded away

const $ = (id) => document.getElementById(id);
let key = "";
let card = null;

/** An element with properties and children; strings become text. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Asking the service

class Refused extends Error {
  constructor(message, { code = "", requestId = "", retryAfter = "" } = {}) {
    super(message);
    Object.assign(this, { code, requestId, retryAfter });
  }
}

/** The service's answer; throws Refused with its words, or AbortError. */
async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("no answer came: the service cannot be reached, or it broke off because a file is too large");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const { code, message = `the answer was ${response.status} ${response.statusText}` } = body.error ?? {};
  const said = response.headers;
  throw new Refused(message, { code, requestId: said.get("X-Request-ID"), retryAfter: said.get("Retry-After") });
}

/** Show an error in an alert, or clear it. */
function tell(alert, error = null) {
  alert.replaceChildren();
  if (error === null) return;
  alert.append(error.message + (error.retryAfter ? ` (again in ${error.retryAfter} s)` : ""));
  if (error.requestId) alert.append(make("small", {}, `request ${error.requestId}`));
  if (!(error instanceof Refused)) console.error(error);
}

// Numbers and words

const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const thousandths = new Intl.NumberFormat("en", { minimumFractionDigits: 3, maximumFractionDigits: 3 });
const percents = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const counts = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const kilobytes = (bytes) => `${Math.max(1, Math.round(bytes / 1000)).toLocaleString("en")} kB`;
const short = (value) => number.format(value);
const decimal = (value) => thousandths.format(value);
const percent = (share) => percents.format(share);
const words = (name) => name.replaceAll("_", " ").replace(/auc|f1/, (letters) => letters.toUpperCase());

/** A figure and, beneath it, its 95 % interval. */
function figure(value, low, high, as = short) {
  if (value === null || value === undefined) return ["cannot be told"];
  return [as(value), make("small", {}, `${as(low)} to ${as(high)}`)];
}

function badge(decision) {
  return make("span", { className: `badge ${decision}` }, decision);
}

// The API key

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = $("key").value;
  if (await open()) {
    $("key").value = "";
    $("forget").hidden = false;
    $("key-status").textContent = "The key is in use.";
  }
});
$("forget").addEventListener("click", () => location.reload());

/** Read the card and show what it allows; without a key that fits, ask for one. Whether it could be read. */
async function open() {
  tell($("card-alert"));
  tell($("key-alert"));
  const asked = key !== "";
  try {
    card = await (await ask("model")).json();
  } catch (error) {
    const needsKey = error.code === "no_key";
    if (needsKey) key = "";
    $("access").hidden = !needsKey && !asked;
    $("work").hidden = true;
    const missing = asked ? "The service does not know this key." : "This service answers to those who have a key.";
    $("key-status").textContent = needsKey ? missing : "";
    if (!needsKey || asked) tell(needsKey ? $("key-alert") : $("card-alert"), error);
    return false;
  }
  $("work").hidden = false;
  offerClasses();
  offerHeatMaps();
  $("card-content").replaceChildren(...cardParts());
  return true;
}

// Synthetic images

function offerClasses() {
  const accepted = Object.keys(card.generators);
  const refused = card.labels.filter((label) => !accepted.includes(label));
  $("options").replaceChildren(...accepted.map(acceptedOption), ...refused.map(refusedOption));
  $("truncation").placeholder = card.generators[accepted[0]]?.truncation ?? "";
  const none = accepted.length === 0;
  for (const control of $("order").elements) control.disabled ||= none;
  $("no-batch").hidden ||= none;
  $("order-status").textContent = none ? "No generator was accepted; the reasons stand beside each class." : "";
}

function acceptedOption(label, position) {
  const radio = make("input", { type: "radio", name: "label", value: label, required: true, checked: position === 0 });
  const real = card.data.validation.classes?.[label]?.train;
  const option = make("label", { className: "option" }, radio, make("span", {}, label));
  if (real !== undefined) option.append(make("small", {}, `learned from ${counts(real, "training image")}`));
  return option;
}

function refusedOption(label) {
  const radio = make("input", { type: "radio", name: "label", value: label, disabled: true });
  return make("label", { className: "option" }, radio, make("span", {}, label), make("small", {}, whyRefused(label)));
}

function whyRefused(label) {
  const judged = card.decisions.classes[label];
  if (!judged) return "no generator: the class needed no synthetic images";
  const unmet = judged.reasons.filter((reason) => !reason.endsWith(": met"));
  return `no generator: ${judged.decision}. ${unmet.join("; ")}`;
}

$("order").addEventListener("change", (event) => {
  if (event.target.name === "label") $("truncation").placeholder = card.generators[event.target.value].truncation;
});
$("new-seed").addEventListener("click", () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
});
$("order").addEventListener("submit", (event) => {
  event.preventDefault();
  draw({
    label: new FormData($("order")).get("label"),
    n: $("n").valueAsNumber,
    seed: $("seed").valueAsNumber,
    truncation: $("truncation").value ? $("truncation").valueAsNumber : null,
    format: "png",
  });
});

let drawing = new AbortController();
let shown = []; // object URLs of the batch in sight

/** Order a batch and show the very bytes that the download gives; a new order breaks off the one before. */
async function draw(order) {
  drawing.abort();
  drawing = new AbortController();
  const { signal } = drawing;
  tell($("order-alert"));
  $("order-status").textContent = `Drawing ${counts(order.n, "image")} of ${order.label}…`;
  const frames = reserve(order);
  try {
    const headers = { "Content-Type": "application/json" };
    const response = await ask("generate", { method: "POST", headers, body: JSON.stringify(order), signal });
    showBatch(order, frames, await response.arrayBuffer());
  } catch (error) {
    if (signal.aborted) return;
    $("batch").hidden = true;
    $("no-batch").hidden = false;
    $("order-status").textContent = "";
    tell($("order-alert"), error);
  }
}

/** Put up the frames of a batch, still empty, so that nothing moves when the images come. */
function reserve({ label, n, seed }) {
  shown.forEach(URL.revokeObjectURL);
  shown = [];
  $("batch-title").textContent = `${counts(n, "synthetic image")} of ${label}`;
  $("lineage").replaceChildren(...lineage({}));
  $("download").removeAttribute("href");
  const frames = Array.from({ length: n }, () => make("div", { className: "picture" }));
  $("tiles").replaceChildren(...frames.map((frame, index) => tile(frame, label, seed, index)));
  $("batch").ariaBusy = "true";
  $("batch").hidden = false;
  $("no-batch").hidden = true;
  return frames;
}

function tile(frame, label, seed, index) {
  const title = make("span", {}, `synthetic ${label}`);
  const caption = make("figcaption", { ariaHidden: "true" }, title, `seed ${seed}, image ${index}`); // the alt says it
  return make("li", {}, make("figure", {}, frame, caption));
}

function showBatch(order, frames, archive) {
  const files = readArchive(archive);
  const manifest = JSON.parse(new TextDecoder().decode(files.get("manifest.json")));
  for (const { index, path } of manifest.images) {
    const alt = `synthetic ${order.label}, seed ${order.seed}, image ${index}`;
    frames[index].append(make("img", { alt, src: address([files.get(path)], "image/png") }));
  }
  $("lineage").replaceChildren(...lineage(manifest));
  $("download").href = address([archive], "application/zip");
  $("download").download = `synthetic-${order.label}-${order.seed}.zip`;
  $("download").textContent = `Download zip (${kilobytes(archive.byteLength)})`;
  $("batch").ariaBusy = "false";
  const drawn = counts(order.n, "image");
  $("order-status").textContent = `${drawn} drawn; the zip holds these very files and their manifest.`;
}

function address(content, type) {
  shown.push(URL.createObjectURL(new Blob(content, { type })));
  return shown.at(-1);
}

function lineage({ seed, truncation, generator, bundle, data_version: data, commit }) {
  const hash = (value) => (value ? make("code", {}, value) : "");
  return facts([
    ["Seed", seed ?? ""],
    ["Truncation", truncation ?? ""],
    ["Generator", hash(generator)],
    ["Data version", hash(data)],
    ["Bundle", hash(bundle)],
    ["Code", hash(commit)],
  ]);
}

/** Files of a zip archive as the service writes it, not compressed: name -> bytes. */
function readArchive(archive) {
  const view = new DataView(archive);
  const expect = (offset, signature) => {
    if (offset >= 0 && view.getUint32(offset, true) === signature) return offset;
    throw new Refused("the archive arrived damaged; draw it again");
  };
  const end = expect(view.byteLength - 22, 0x06054b50);
  const files = new Map();
  let at = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    expect(at, 0x02014b50);
    const nameLength = view.getUint16(at + 28, true);
    const name = new TextDecoder().decode(new Uint8Array(archive, at + 46, nameLength));
    const local = expect(view.getUint32(at + 42, true), 0x04034b50);
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    files.set(name, new Uint8Array(archive, start, view.getUint32(at + 24, true)));
    at += 46 + nameLength + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
  }
  return files;
}

// Predictions

function offerHeatMaps() {
  const maps = card.classifier.activation_maps;
  const meaning = "Red: what spoke most for the label. It shows what moved the classifier, not where a disease is.";
  $("heat").disabled = maps !== "on";
  $("heat-hint").textContent = maps === "on" ? meaning : `Heat maps are ${maps}.`;
}

function showHeat() {
  for (const overlay of document.querySelectorAll(".overlay")) overlay.hidden = !$("heat").checked;
}

$("heat").addEventListener("change", showHeat);
$("files").addEventListener("change", () => {
  predictAll([...$("files").files]);
  $("files").value = ""; // so that the same file can be chosen again
});
document.addEventListener("paste", (event) => predictAll([...event.clipboardData.files]));
document.addEventListener("dragover", (event) => {
  event.preventDefault(); // a file that misses the field must not replace the page
  $("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) $("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  predictAll([...event.dataTransfer.files]);
});

let predicting = new AbortController();

/** Ask for each image on its own, a few at a time: each shows as soon as it is there, and none spoils another. */
async function predictAll(files) {
  if (files.length === 0 || card === null) return;
  predicting.abort();
  predicting = new AbortController();
  const { signal } = predicting;
  const waiting = files.slice(0, MAX_FILES).map((file) => ({ file, article: reservePrediction(file) }));
  const total = waiting.length;
  let predicted = 0;
  const tooMany = new Refused(`of ${files.length} images the first ${total} are taken; choose the others afterwards`);
  tell($("predict-alert"), files.length > total ? tooMany : null);
  $("no-predictions").hidden = true;
  document.querySelectorAll("#predictions img").forEach((image) => URL.revokeObjectURL(image.src));
  $("predictions").replaceChildren(...waiting.map(({ article }) => article));
  $("predict-status").textContent = `Asking about ${counts(total, "image")}…`;
  const work = async () => {
    for (let next; (next = waiting.shift()) && !signal.aborted; ) if (await predictOne(next, signal)) predicted++;
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  if (signal.aborted) return;
  const failed = predicted < total ? `, ${total - predicted} failed` : "";
  $("predict-status").textContent = `${counts(predicted, "image")} predicted${failed}.`;
}

function reservePrediction(file) {
  const preview = make("img", { alt: `preview of ${file.name}`, src: URL.createObjectURL(file) });
  preview.addEventListener("error", () => preview.remove());
  const picture = make("div", { className: "picture" }, preview);
  const body = make("div", { className: "body" }, make("h3", {}, file.name));
  return make("article", { className: "prediction", ariaBusy: "true" }, picture, body);
}

/** Whether there is a prediction. */
async function predictOne({ file, article }, signal) {
  const form = new FormData();
  form.append("image", file);
  form.append("overlay", card.classifier.activation_maps === "on");
  const body = article.querySelector(".body");
  try {
    const answer = await (await ask("predict", { method: "POST", body: form, signal })).json();
    showPrediction(article, file.name, answer);
  } catch (error) {
    if (signal.aborted) return false;
    const alert = make("p", { className: "alert", role: "alert" });
    body.append(alert);
    tell(alert, error);
    return false;
  } finally {
    article.ariaBusy = "false";
  }
  return true;
}

function showPrediction(article, name, { label, probabilities, out_of_distribution: likeness, overlay_png: overlay }) {
  article.classList.toggle("flagged", likeness.flagged);
  article.querySelector(".body").append(
    make("p", { className: "verdict" }, `${label} ${percent(probabilities[label])}`),
    describeLikeness(likeness),
  );
  article.append(shares(Object.entries(probabilities).sort(([, one], [, other]) => other - one)));
  if (overlay === null) return;
  const bytes = Uint8Array.from(atob(overlay), (character) => character.charCodeAt(0));
  const source = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
  const alt = `heat map of what spoke for ${label} in ${name}`;
  article.querySelector(".picture").append(make("img", { className: "overlay", alt, src: source }));
  showHeat();
}

function describeLikeness({ score, threshold, flagged }) {
  const figures = `score ${short(score)}, threshold ${short(threshold)}`;
  if (flagged) {
    return make("p", { className: "note" }, `Unlike the training images: ${figures}. Do not trust this prediction.`);
  }
  return make("p", { className: "likeness" }, `Not flagged as unlike the training images: ${figures}.`);
}

function shares(sorted) {
  const bars = (some, label) => make("ol", { className: "bars", ariaLabel: label }, ...some.map(bar));
  const all = make("div", { className: "shares" }, bars(sorted.slice(0, BARS), "Calibrated probabilities"));
  if (sorted.length > BARS) {
    const title = make("summary", {}, counts(sorted.length - BARS, "more label"));
    all.append(make("details", {}, title, bars(sorted.slice(BARS), "Further probabilities")));
  }
  return all;
}

function bar([label, share]) {
  const filled = make("i");
  filled.style.width = `${100 * share}%`;
  const meter = make("span", { className: "meter", ariaHidden: "true" }, filled);
  return make("li", {}, make("span", {}, label), make("span", { className: "share" }, percent(share)), meter);
}

// The model card

function cardParts() {
  return [
    make("div", { className: "columns-of-text" }, purpose(), limits()),
    make("h3", {}, "What is served"),
    make("dl", { className: "facts" }, ...served()),
    make("h3", {}, "Classes"),
    classTable(),
    make("h3", {}, "Classifier on test images"),
    ...classifierParts(),
    make("h3", {}, "Generators and what the gate decided"),
    ...Object.values(card.decisions.classes).map(decision),
    make("h3", {}, "Data"),
    make("dl", { className: "facts" }, ...data()),
  ];
}

function purpose() {
  return make("div", {}, make("h3", {}, "Intended use"), make("p", {}, card.intended_use));
}

function limits() {
  return make("div", {}, make("h3", {}, "Limits"), list(card.limits));
}

function list(texts) {
  return make("ul", {}, ...texts.map((text) => make("li", {}, text)));
}

function facts(pairs) {
  return pairs.map(([name, ...values]) => make("div", {}, make("dt", {}, name), make("dd", {}, ...values)));
}

function served() {
  const { model, arm, resolution, preprocessing, temperature, activation_maps: maps } = card.classifier;
  const { threshold, score, accepted_share_of_validation_images: share } = card.out_of_distribution;
  const calm = make("small", {}, `${score}; ${percent(share)} of the validation images lie under it`);
  return facts([
    ["Classifier", `${model} at ${resolution} × ${resolution}`, make("small", {}, preprocessing)],
    ["Trained as", arm, make("small", {}, `probabilities calibrated at temperature ${short(temperature)}`)],
    ["Generators", Object.keys(card.generators).join(", ") || "none"],
    ["Heat maps", maps],
    ["Unlike the training images above", short(threshold), calm],
    ["Bundle", make("code", {}, card.bundle)],
  ]);
}

/** A table in a region of its own, which scrolls where the screen is narrow. */
function table(name, head, rows) {
  const cells = ([first, ...rest]) =>
    make("tr", {}, make("th", { scope: "row" }, first), ...rest.map((cell) => make("td", {}, ...[cell].flat())));
  const columns = head.map((title) => make("th", { scope: "col" }, title));
  const body = make("tbody", {}, ...rows.map(cells));
  const content = make("table", {}, make("thead", {}, make("tr", {}, ...columns)), body);
  return make("div", { className: "scroll", role: "region", ariaLabel: name, tabIndex: 0 }, content);
}

function classTable() {
  const figures = card.classifier.classes ?? {};
  const row = (label) => {
    const { train, val, test } = card.data.validation.classes?.[label] ?? {};
    const measured = ["recall", "auc", "f1"].map((name) => {
      const { value, low, high } = figures[label]?.[name] ?? {};
      return value === undefined ? "–" : figure(value, low, high, name === "recall" ? percent : decimal);
    });
    const judged = card.decisions.classes[label];
    const images = [train, val, test].map((n) => n ?? "–").join(" / ");
    return [label, images, ...measured, judged ? badge(judged.decision) : "not needed"];
  };
  const head = ["Class", "Images: train / val / test", "Recall on test", "AUC", "F1", "Generator"];
  return table("Classes", head, card.labels.map(row));
}

function classifierParts() {
  const { arm, decision: released, reasons } = card.decisions.release;
  const outcome = ["Release of the classifier trained with synthetic images: ", badge(released), ` ${arm} is served. `];
  const parts = [make("p", {}, ...outcome, reasons.join(" "))];
  if (!card.classifier.test) return parts;
  const shares = ["accuracy", "balanced_accuracy", "calibration_error"];
  const rows = Object.entries(card.classifier.test).map(([name, { value, low, high }]) => {
    const as = shares.includes(name) ? percent : decimal;
    return [words(name), as(value), `${as(low)} to ${as(high)}`];
  });
  return [...parts, table("Classifier on test images", ["Figure", "Value", "95 % interval"], rows)];
}

function decision({ label, decision: decided, reasons }) {
  const quality = card.generators[label]?.quality;
  const within = make("div", { className: "within" }, list(reasons));
  if (quality) within.append(...generatorFigures(quality));
  return make("details", {}, make("summary", {}, label, " ", badge(decided)), within);
}

function generatorFigures(quality) {
  const { label, n_real: reals, n_fake: fakes, real_splits: splits, copying, fid } = quality;
  const ratio = (measured) => figure(measured.ratio, measured.ratio_low, measured.ratio_high);
  const distance = (name, measured) => {
    const other = [short(measured.other_value), make("small", {}, measured.other_label)];
    return [name, figure(measured.value, measured.low, measured.high), short(measured.floor), other, ratio(measured)];
  };
  const proportion = (name) => {
    const measured = quality[name];
    const value = figure(measured.value, measured.low, measured.high);
    return [name, value, short(measured.real_real), "–", ratio(measured)];
  };
  const { atypical } = quality; // reports of older versions do not tell
  const nearer = figure(copying.nearer_share, copying.nearer_low, copying.nearer_high, percent);
  const rows = [
    distance("FD", quality.fd),
    distance("KID", quality.kid),
    ...["coverage", "density", "precision", "recall"].map(proportion),
    ...(atypical ? [["atypical", figure(atypical.share, atypical.low, atypical.high, percent), "–", "–", "–"]] : []),
    ["near copies", figure(copying.near_copy_share, copying.low, copying.high, percent), "–", "–", "–"],
    [copying.reals === "train" ? "nearer than train images to one another" : "nearer than unseen reals", nearer, "–", "–", "–"],
    ["authenticity", percent(copying.authenticity), "–", "–", "–"],
  ];
  if (fid) rows.push(["FID", short(fid.value), `${short(fid.floor)} (${fid.n_floor} images)`, "–", "–"]);
  const head = ["Figure", "Synthetic images", "Between halves of the reals", "Nearest other class", "Ratio"];
  const basis = `${counts(fakes, "synthetic image")} against ${counts(reals, "real image")} (${splits})`;
  const meaning =
    "Ratio of FD and KID: 0 is as good as reals, 1 as far off as another class; of the others: 1 is as good as reals.";
  const hint = make("p", { className: "hint" }, `${basis}. Beneath a figure stands its 95 % interval. ${meaning}`);
  return [table(`Figures of ${label}`, head, rows), hint];
}

function data() {
  const { data_version: version, manifest_sha256: manifest, validation } = card.data;
  const { code_commit: commit, code_dirty: dirty } = card.data;
  const dropped = Object.keys(validation.dropped_classes ?? {});
  const passed = validation.passed ? "passed" : "not passed";
  const left = dropped.length ? `left out as too small: ${dropped.join(", ")}` : "no class was left out";
  return facts([
    ["Validation", passed, make("small", {}, left)],
    ["Data version", make("code", {}, version)],
    ["Manifest", make("code", {}, manifest)],
    ["Code", make("code", {}, commit ?? "unknown"), make("small", {}, dirty ? "with changes not committed" : "")],
  ]);
}

open();
