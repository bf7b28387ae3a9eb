"""The Great Expectations suite over a manifest, and its Data Docs, equal to the byte for equal data."""

import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from raresynth.config import ValidationConfig
from raresynth.dataset.manifest import SPLITS, count_classes
from raresynth.dataset.probe import Probe
from raresynth.lineage import Report, sha256_json

NAME = "manifest"
RUN_TIME = datetime(1970, 1, 1, tzinfo=UTC)
"""Data Docs need a time; a real one would make equal runs differ."""
CLOCK = re.compile(r"\?d=\d{8}T\d{6}\.\d+Z|(?<=>)\d{8}T\d{6}\.\d+Z(?=<)")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
LOCAL_TIME = re.compile(r"(?:1969-12-31|1970-01-01)[T ]\d\d:\d\d:\d\d(?:Z| [^\s'<]+)")
"""RUN_TIME as the pages show it, in the machine's time zone."""
WEB_LOGO = re.compile(r"https://great-expectations-web-assets\.[\w.-]+/[\w-]+\.png")

Severity = Literal["critical", "warning", "info"]


class Outcome(Report):
    """How an expectation fared on one table."""

    success: bool
    unexpected: int
    """Rows that break the expectation; 0 or 1 for one over the whole table."""


class ExpectationResult(Report):
    """One expectation over the manifest as found and as cleaned."""

    expectation: str
    column: str
    demand: str
    """The expectation in words."""
    severity: Severity
    found: Outcome
    cleaned: Outcome


def derive_columns(rows: pd.DataFrame, probes: Sequence[Probe], near_duplicate_of: "pd.Series[str]") -> pd.DataFrame:
    """The table that the suite looks at: Great Expectations has no GROUP BY on pandas, so groups are counted here.

    Args:
        rows: manifest; its index points into `probes`.
        near_duplicate_of: description of the other image, for the rows that have one.
    """
    splits = count_classes(rows)
    bytes_of = rows["sha256"].where(rows["sha256"] != "", rows["path"])
    labels = rows["label"].where(rows["label"] != "")
    return pd.DataFrame(
        {
            "image_id": rows["image_id"],
            "path": rows["path"],
            "label": labels,
            "split": rows["split"],
            "file": pd.Series([probes[index].defect or "sound" for index in rows.index], index=rows.index, dtype=str),
            "rows_with_same_bytes": bytes_of.map(bytes_of.value_counts()),
            "labels_of_same_bytes": labels.groupby(bytes_of).transform("nunique").where(labels.notna()),
            "near_duplicate_of": near_duplicate_of.reindex(rows.index),
            "splits_of_group": rows.groupby("group")["split"].transform("nunique"),
            "images_of_class": labels.map({label: sum(counts.values()) for label, counts in splits.items()}),
            "fewest_images_of_class_in_a_split": labels.map({label: min(n.values()) for label, n in splits.items()}),
        }
    )


def run_suite(
    tables: Mapping[Literal["found", "cleaned"], pd.DataFrame], config: ValidationConfig, docs_dir: Path
) -> tuple[tuple[ExpectationResult, ...], str]:
    """Run the suite on tables made by `derive_columns` and write the Data Docs.

    Returns:
        the results, and the suite's SHA-256.
    """
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    context.add_data_docs_site(
        "docs",
        {
            "class_name": "SiteBuilder",
            "show_how_to_buttons": False,
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs_dir.resolve())},
        },
    )
    suite = context.suites.add(gx.ExpectationSuite(NAME, expectations=_expectations(config)))
    source = context.data_sources.add_pandas("images")
    outcomes = {}
    for name, table in tables.items():
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
        result = definition.run(
            batch_parameters={"dataframe": table},
            result_format={"result_format": "SUMMARY", "unexpected_index_column_names": ["path"]},
            run_id=gx.RunIdentifier(run_name=name, run_time=RUN_TIME),
        )
        # Results come in an order of their own.
        outcomes[name] = {_key(item["expectation_config"]): _outcome(item) for item in result.to_json_dict()["results"]}
    context.build_data_docs()
    _make_reproducible(docs_dir)
    configurations = [expectation.configuration.to_json_dict() for expectation in _expectations(config)]
    results = tuple(
        ExpectationResult(
            expectation=configuration["type"],
            column=configuration["kwargs"]["column"],
            demand=configuration["notes"],
            severity=configuration["severity"],
            found=outcomes["found"][_key(configuration)],
            cleaned=outcomes["cleaned"][_key(configuration)],
        )
        for configuration in configurations
    )
    return results, sha256_json(configurations)


def _expectations(config: ValidationConfig) -> list[Any]:
    from great_expectations import expectations as gxe

    def file_is_not(*defects: str, notes: str) -> Any:
        return gxe.ExpectColumnValuesToNotBeInSet(
            column="file", value_set=list(defects), notes=notes, severity="warning"
        )

    def is_one(column: str, notes: str, severity: Severity = "warning") -> Any:
        return gxe.ExpectColumnValuesToBeInSet(column=column, value_set=[1], notes=notes, severity=severity)

    def at_least(column: str, n: int, notes: str) -> Any:
        return gxe.ExpectColumnValuesToBeBetween(column=column, min_value=n, notes=notes, severity="warning")

    return [
        gxe.ExpectColumnValuesToBeUnique(column="image_id", notes="an image_id names one image", severity="critical"),
        is_one("splits_of_group", "all images of a group are in one split", "critical"),
        gxe.ExpectColumnValuesToBeInSet(
            column="split", value_set=list(SPLITS), notes="the split is train, val or test", severity="critical"
        ),
        gxe.ExpectColumnUniqueValueCountToBeBetween(
            column="label", min_value=2, notes="there are two classes or more", severity="critical"
        ),
        file_is_not("missing", notes="the file exists"),
        file_is_not("empty", notes="the file has bytes"),
        file_is_not("not_an_image", "truncated", notes="the file is an image that can be decoded to its end"),
        file_is_not(
            "too_small", "too_large", notes=f"sides are from {config.min_side} to {config.max_side} pixels long"
        ),
        file_is_not("too_dark", notes="a grey image of 16 bits uses more than 12 of them"),
        gxe.ExpectColumnValuesToNotBeNull(column="label", notes="the image has a label", severity="warning"),
        is_one("labels_of_same_bytes", "the same bytes have one label"),
        is_one("rows_with_same_bytes", "no two rows have the same bytes"),
        gxe.ExpectColumnValuesToBeNull(
            column="near_duplicate_of",
            notes=f"no image of another group differs in {config.near_duplicate_bits} of 256 hash bits or fewer",
            severity="warning",
        ),
        at_least("images_of_class", config.min_images, "a class has min_images images or more"),
        at_least(
            "fewest_images_of_class_in_a_split",
            config.min_images_per_split,
            "a class has min_images_per_split images or more in each split",
        ),
    ]


def _key(configuration: Mapping[str, Any]) -> str:
    kwargs = {name: value for name, value in configuration["kwargs"].items() if name != "batch_id"}
    return sha256_json([configuration["type"], kwargs])


def _outcome(result: Mapping[str, Any]) -> Outcome:
    if result["exception_info"].get("raised_exception"):
        raise RuntimeError(f"Great Expectations failed: {result['exception_info']['exception_message']}")
    return Outcome(
        success=result["success"], unexpected=result["result"].get("unexpected_count", int(not result["success"]))
    )


def _make_reproducible(docs_dir: Path) -> None:
    """Take out of the pages what differs between equal runs, and images that would be fetched from the web."""
    for page in docs_dir.rglob("*.html"):
        up = "../" * (len(page.relative_to(docs_dir).parts) - 1)
        text = LOCAL_TIME.sub("not recorded", CLOCK.sub("", page.read_text(encoding="utf-8")))
        text = WEB_LOGO.sub(f"{up}static/images/logo-long.png", text)
        for number, uuid in enumerate(dict.fromkeys(UUID.findall(text))):
            text = text.replace(uuid, f"id-{number}")
        page.write_text(text, encoding="utf-8")
    for tutorial in docs_dir.rglob("*.gif"):
        tutorial.unlink()
