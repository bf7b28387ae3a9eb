"""What was decided, in plain sentences. Knows neither torch nor pandas, so that a summary is quick."""

from collections.abc import Mapping
from typing import Any

from raresynth.errors import enumerate_words

ACCEPTED, REJECTED, INSUFFICIENT = "accepted", "rejected", "insufficient"


def headline(decisions: Mapping[str, Any]) -> str:
    """The run's outcome in one line.

    Args:
        decisions: the run's decisions.json.
    """
    release, classes = decisions["release"], decisions["classes"]
    if release["decision"] == "approved":
        finding = "The synthetic images help"
    elif release["difference"] is not None:
        finding = "The synthetic images bring no proven gain"
    elif not classes:
        finding = "No class needed synthetic images"
    elif not _with(classes, ACCEPTED):
        finding = "No generator was accepted"
    else:
        finding = "No classifier was trained on the synthetic images"
    return f"{finding}: the arm “{release['arm']}” is released"


def class_outcomes(classes: Mapping[str, Mapping[str, Any]]) -> str:
    """What the gate decided on how many classes, and which, in one sentence."""
    if not classes:
        return "No class had fewer images than the balancing policy asks for, so none were synthesised."
    outcomes = [
        f"{len(labels)} {'was' if len(labels) == 1 else 'were'} {word} ({enumerate_words(labels)})"
        for word, labels in (
            ("accepted", _with(classes, ACCEPTED)),
            ("rejected", _with(classes, REJECTED)),
            ("left undecided for insufficient evidence", _with(classes, INSUFFICIENT)),
        )
        if labels
    ]
    return f"{counted(len(classes), 'class')} needed synthetic images. Of the generators {enumerate_words(outcomes)}."


_TURNED = {
    "all": "Images are mirrored and turned by quarters in training",
    "mirror": "Images are mirrored in training, and never turned upside down or on their side",
    "none": "Images are neither mirrored nor turned in training",
}
_CHANGED = {
    "mirrored": "their mirror images",
    "upside_down": "themselves upside down",
    "half_turn": "themselves turned by half",
    "quarter_turn": "themselves turned by a quarter",
}


def how_turned(found: Mapping[str, Any]) -> str:
    """Which flips and turns the trainings make use of, and why, in one sentence.

    Args:
        found: the run's validation/symmetries.json.
    """
    what = _TURNED[found["symmetries"]]
    if found["given"]:
        return f"{what}, as dataset.symmetries in the params says."
    told = [f"{100 * share:.0f} % from {_CHANGED[change]}" for change, share in found["told"].items()]
    return f"{what}: of the train images the others tell {enumerate_words(told)} (chance tells 50 %)."


def counted(n: int, noun: str) -> str:
    """A number with its noun: "1 image", "2,340 images"."""
    return f"{n:,} {noun if n == 1 else noun + ('es' if noun.endswith('s') else 's')}"


def _with(classes: Mapping[str, Mapping[str, Any]], decision: str) -> list[str]:
    return [label for label, entry in classes.items() if entry["decision"] == decision]
