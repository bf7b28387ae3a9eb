"""The end of a run in words, for people who look at the graph."""

from pathlib import Path

from kfp import dsl

from raresynth.report.summary import summarize


def write_outcome(store: str, summary: dsl.Markdown) -> None:
    """Every class's decision and the release, as Markdown."""
    _write(summary, summarize(Path(store)))


def write_release(store: str, note: dsl.Markdown) -> None:
    """What is released, and that synthetic images are part of what it was trained on."""
    _write(note, f"The classifier trained with synthetic images is released: `{Path(store).name}/bundle`.\n")


def _write(artifact: dsl.Markdown, text: str) -> None:
    path = Path(artifact.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
