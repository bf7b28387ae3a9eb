"""The results of a finished run as Markdown tables: `python -m benchmarks.results OUT`."""

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the run")
    out = parser.parse_args().out
    decisions = json.loads((out / "decisions.json").read_text())
    print_quality(out, decisions["classes"])
    print_arms(json.loads((out / "evaluation" / "report.json").read_text()))
    print(" ".join(decisions["release"]["reasons"]))


def print_quality(out: Path, classes: dict[str, Any]) -> None:
    """One row a class: figures with their 95 % intervals, and the gate's decision."""
    names = ("class", "reals", "synthetic", "FD ratio", "KID ratio", "coverage ratio", "recall ratio", "near copies")
    print(f"| {' | '.join(names)} | decision |")
    print("|---|---|---|---|---|---|---|---|---|")
    for label, entry in classes.items():
        path = out / "quality" / label / "report.json"
        if not path.exists():
            print(f"| {label} | | | | | | | | {entry['decision']}: {entry['reasons'][0]} |")
            continue
        report = json.loads(path.read_text())
        cells = [
            f"{report['n_real']} ({report['real_splits']})",
            f"{report['n_fake']:,}",
            *(ratio(report[name]) for name in ("fd", "kid", "coverage", "recall")),
            f"{100 * report['copying']['near_copy_share']:.1f} %",
            entry["decision"],
        ]
        print(f"| {label} | {' | '.join(cells)} |")
    print()


def ratio(figure: dict[str, Any]) -> str:
    if figure["ratio"] is None:
        return "not to be told"
    if figure["ratio_low"] is None:
        return f"{figure['ratio']:.2f} (no bounds)"
    return f"{figure['ratio']:.2f} ({figure['ratio_low']:.2f} to {figure['ratio_high']:.2f})"


def print_arms(evaluation: dict[str, Any]) -> None:
    """One row an arm; percentages with 95 % bootstrap intervals by group."""
    print(
        "| arm | balanced accuracy, val | balanced accuracy, test | accuracy, test | macro F1, test | macro AUC, test |"
    )
    print("|---|---|---|---|---|---|")
    for arm in evaluation["arms"]:
        if arm["status"] == "skipped":
            print(f"| {arm['arm']} | not trained: {arm['reason']} | | | | |")
            continue
        test = [estimate(arm["test"][name]) for name in ("balanced_accuracy", "accuracy", "macro_f1", "macro_auc")]
        print(f"| {arm['arm']} | {100 * arm['val']['balanced_accuracy']:.1f} | {' | '.join(test)} |")
    print()


def estimate(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return "undefined"
    return f"{100 * figure['value']:.1f} ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"


if __name__ == "__main__":
    main()
