"""All that a run found, read from the folders its stages left."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from raresynth.bundle.contents import Bundle
from raresynth.classifier.evaluation import EvaluationReport
from raresynth.classifier.training import ClassifierReport
from raresynth.config import Params
from raresynth.dataset.expectations import ValidationReport
from raresynth.dataset.manifest import read_manifest
from raresynth.dataset.symmetries import SymmetriesReport, read_symmetries
from raresynth.gan.synthesis import SynthesisReport
from raresynth.gan.training import GanReport
from raresynth.lineage import ReportT, read_report
from raresynth.quality.encoder import EncoderReport
from raresynth.quality.reports import QualityReport


@dataclass(frozen=True)
class Sources:
    """Folders of finished stages.

    Attributes:
        finetune_dirs: label -> folder; a class whose generator was never begun has no report in it.
        synthetic_dirs: label -> folder, of the classes whose images were made.
        synthetic_root: folder that the paths of synthetic images are relative to.
        quality_dirs: label -> folder, of the classes that were measured.
        arm_dirs: arm -> folder of its checkpoint.
        decisions: the run's decisions.json.
    """

    data_dir: Path
    validation_dir: Path
    encoder_dir: Path
    pretrain_dir: Path
    finetune_dirs: Mapping[str, Path]
    synthetic_dirs: Mapping[str, Path]
    synthetic_root: Path
    quality_dirs: Mapping[str, Path]
    gate_dir: Path
    arm_dirs: Mapping[str, Path]
    evaluation_dir: Path
    decisions: Path
    bundle_dir: Path


@dataclass(frozen=True)
class Findings:
    """The reports of a run.

    Attributes:
        quarantine: rows of quarantine.csv: path, label, reason, detail.
        synthetic: label -> manifest of the images made for it.
        n_accepted: label -> number of synthetic images that passed the gate.
        decisions: content of decisions.json.
        predictions: rows of the evaluation's predictions.csv.
    """

    params: Params
    manifest: pd.DataFrame
    validation: ValidationReport
    symmetries: SymmetriesReport
    quarantine: pd.DataFrame
    encoder: EncoderReport
    pretrain: GanReport
    finetune: Mapping[str, GanReport]
    synthetic: Mapping[str, pd.DataFrame]
    synthesis: Mapping[str, SynthesisReport]
    quality: Mapping[str, QualityReport]
    n_accepted: Mapping[str, int]
    decisions: Mapping[str, Any]
    arms: Mapping[str, ClassifierReport]
    evaluation: EvaluationReport
    predictions: pd.DataFrame
    bundle: Bundle

    @property
    def has_groups(self) -> bool:
        """Whether the source says which images are of one lesion or patient; else each is a group by itself."""
        return bool((self.manifest["group"] != self.manifest["image_id"]).any())


def read_findings(sources: Sources, params: Params) -> Findings:
    """Read every report.

    Raises:
        CheckpointError: a report is missing or of another version.
        DataError: the manifest is missing.
    """
    accepted = _read_table(sources.gate_dir / "accepted.csv")["label"].value_counts()
    return Findings(
        params=params,
        manifest=read_manifest(sources.validation_dir / "manifest.csv"),
        validation=read_report(sources.validation_dir / "report.json", ValidationReport),
        symmetries=read_symmetries(sources.validation_dir),
        quarantine=_read_table(sources.validation_dir / "quarantine.csv"),
        encoder=read_report(sources.encoder_dir / "report.json", EncoderReport),
        pretrain=read_report(sources.pretrain_dir / "report.json", GanReport),
        finetune=_read_reports(sources.finetune_dirs, GanReport),
        synthetic={label: _read_table(folder / "manifest.csv") for label, folder in sources.synthetic_dirs.items()},
        synthesis=_read_reports(sources.synthetic_dirs, SynthesisReport),
        quality=_read_reports(sources.quality_dirs, QualityReport),
        n_accepted={str(label): int(n) for label, n in accepted.items()},
        decisions=json.loads(sources.decisions.read_text(encoding="utf-8")),
        arms=_read_reports(sources.arm_dirs, ClassifierReport),
        evaluation=read_report(sources.evaluation_dir / "report.json", EvaluationReport),
        predictions=_read_table(sources.evaluation_dir / "predictions.csv"),
        bundle=read_report(sources.bundle_dir / "bundle.json", Bundle),
    )


def _read_reports(folders: Mapping[str, Path], kind: type[ReportT]) -> dict[str, ReportT]:
    paths = {item: folder / "report.json" for item, folder in folders.items()}
    return {item: read_report(path, kind) for item, path in paths.items() if path.exists()}


def _read_table(path: Path) -> pd.DataFrame:
    text = dict.fromkeys(("path", "label", "arm", "group", "image_id", "detail"), str)
    return pd.read_csv(path, dtype=text, keep_default_na=False)
