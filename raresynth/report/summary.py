"""A finished run in a few lines, for terminals and graphs. Reads JSON alone, so that it costs nothing."""

import json
from pathlib import Path
from typing import Any

from raresynth.errors import CheckpointError
from raresynth.report.words import ACCEPTED, headline, how_turned


def summarize(store: Path) -> str:
    """Markdown that reads well as plain text too.

    Raises:
        CheckpointError: the run in `store` has not been evaluated.
    """
    decisions, evaluation = _read(store / "decisions.json"), _read(store / "evaluation" / "report.json")
    lines = [
        f"# {headline(decisions)}",
        "",
        *images_used(store),
        "",
        *_classes(decisions["classes"]),
        "",
        *_arms(evaluation),
        "",
    ]
    lines += [*decisions["release"]["reasons"], ""]
    lines += [f"- {name}: {store / place}" for name, place in _PLACES.items() if (store / place).exists()]
    return "\n".join([*lines, *_cost(store / "run.json"), ""])


def images_used(store: Path) -> list[str]:
    """What became of the images and classes of the source, and how trainings turn them; none before `validate`."""
    path = store / "validation" / "report.json"
    if not path.exists():
        return []
    validation, manifest = _read(path), _read(store / "manifest" / "report.json")
    n_rows, n_kept = validation["n_rows"], validation["n_kept"]
    parts = [f"{n_kept:,} of {n_rows:,} rows used"]
    if n_kept < n_rows:
        parts[0] += f", {n_rows - n_kept:,} in quarantine"
    if dropped := validation["dropped_classes"]:
        parts.append("classes dropped: " + ", ".join(f"{label} ({reason})" for label, reason in dropped.items()))
    if empty := manifest["empty_classes"]:
        parts.append(f"classes without an image: {', '.join(empty)}")
    turned = how_turned(_read(store / "validation" / "symmetries.json"))
    return [f"- images: {'; '.join(parts)}", f"- {turned[0].lower()}{turned[1:].removesuffix('.')}"]


_PLACES = {"report": "report.html", "decisions": "decisions.json", "bundle": "bundle"}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; run the flow to its end first") from error


def _classes(classes: dict[str, Any]) -> list[str]:
    if not classes:
        return ["No class needed synthetic images."]
    return [f"- {label} {entry['decision']}: {_telling(entry)}" for label, entry in classes.items()]


def _telling(entry: dict[str, Any]) -> str:
    """The reason that decided: a limit that was missed, else one that was not met for certain."""
    if entry["decision"] == ACCEPTED:
        return str(entry["reasons"][0])
    return str(min(entry["reasons"], key=lambda reason: (not reason.endswith(": missed"), reason.endswith(": met"))))


def _arms(evaluation: dict[str, Any]) -> list[str]:
    lines = []
    for arm in evaluation["arms"]:
        if arm["status"] == "skipped":
            lines.append(f"- {arm['arm']}: skipped, {arm['reason']}")
            continue
        test = arm["test"]["balanced_accuracy"]
        interval = "" if test["low"] is None else f" ({100 * test['low']:.1f} to {100 * test['high']:.1f})"
        lines.append(
            f"- {arm['arm']}: balanced accuracy {100 * arm['val']['balanced_accuracy']:.1f} % on val, "
            f"{100 * test['value']:.1f} %{interval} on test"
        )
    return lines


def _cost(log: Path) -> list[str]:
    stages = _read(log).get("stages", {}) if log.exists() else {}
    if not stages:
        return []
    minutes, seconds = divmod(round(sum(stage["seconds"] for stage in stages.values())), 60)
    peak = max(stage["peak_memory_mb"] for stage in stages.values())
    return [f"- all tasks took {minutes} min {seconds:02d} s, added up, and at most {peak:,} MB of memory each"]
