"""Every knob, once: one typed model a stage, read from a params file.

`params.yaml` at the top of the repository holds the defaults' only other copy, the one that people
edit; `tests/test_config.py` keeps the two equal. An unknown or out-of-range knob is an error that names it.
"""

from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raresynth.errors import ParamsError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveCount = Annotated[int, Field(ge=1)]
Resolution = Literal[32, 64, 128, 256]
Symmetries = Literal["all", "mirror", "none"]
"""What may be done to an image that leaves it as likely: the eight flips and quarter turns, mirroring left and right
alone, or nothing."""
Cores = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?m?$")]
"""A Kubernetes quantity of CPU, such as 500m or 2."""
Bytes = Annotated[str, Field(pattern=r"^[0-9]+(Ki|[MGT]i?)?$")]
"""A Kubernetes quantity of memory, such as 512Mi or 16Gi; KFP takes whole numbers only."""


class Config(BaseModel):
    """Base of all sections: frozen, and unknown knobs are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ComputeConfig(Config):
    """Where and how the heavy stages run. None of it changes what a stage is asked to do."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveCount = 1
    """CPU threads of one task. Small networks gain little from a second, and lose tenfold where its core is busy."""
    parallel_tasks: PositiveCount = 2
    """Classes or arms that run at once, each in a process of its own."""
    checkpoint_every_s: Positive = 30.0
    """Seconds between training checkpoints; a killed run loses at most this much work."""
    shards: PositiveCount = 1
    """Tasks among which reading the images, and drawing those of a class, are divided; the results are the same."""
    ranks: PositiveCount = 1
    """Processes that share each batch of `pretrain`, one a GPU where there are GPUs: raresynth/gan/ranks.py. A compiled
    package gives its `pretrain` what so many need; its runs cannot choose another number."""


class SplitShares(Config):
    train: Share = 0.7
    val: Share = 0.15
    test: Share = 0.15

    @model_validator(mode="after")
    def _sum_to_one(self) -> "SplitShares":
        if abs(self.train + self.val + self.test - 1.0) > 1e-6 or min(self.train, self.val, self.test) <= 0:
            raise ValueError("train, val and test must each be above 0 and add up to 1")
        return self


class CsvColumns(Config):
    """How to read a folder of images with a CSV file."""

    file: str
    """CSV path, relative to the data folder."""
    image: str
    """Column with the image's path or name (extension optional)."""
    label: str
    group: str | None = None
    label_separator: str | None = None
    images_dir: str = "."


class DatasetConfig(Config):
    layout: Literal["auto", "ham10000", "isic", "folders", "csv"] = "auto"
    csv: CsvColumns | None = None
    """Needed by layout `csv` only."""
    splits: SplitShares = SplitShares()
    symmetries: Literal["auto"] | Symmetries = "auto"
    """Whether the images have an up and a left, for all trainings; auto: `validate` looks (dataset/symmetries.py)."""

    @model_validator(mode="after")
    def _csv_named(self) -> "DatasetConfig":
        if self.layout == "csv" and self.csv is None:
            raise ValueError("layout csv needs the section dataset.csv with file, image and label")
        return self


class ValidationConfig(Config):
    min_side: PositiveCount = 32
    max_side: PositiveCount = 10_000
    min_images: PositiveCount = 20
    """A class with fewer usable images is dropped by name."""
    min_images_per_split: PositiveCount = 2
    near_duplicate_bits: Annotated[int, Field(ge=0, le=256)] = 24
    """Most bits of 256 in which the perceptual hashes of near duplicates differ."""


class EncoderConfig(Config):
    resolution: Resolution = 32
    width: PositiveCount = 32
    steps: PositiveCount = 300
    batch_size: Annotated[int, Field(ge=8)] = 128
    learning_rate: Positive = 1e-3
    dimensions: PositiveCount = 32
    """Principal components kept of the frozen features."""


class GanConfig(Config):
    """The generative adversarial network; knobs left at null take the preset's value.

    A knob below a preset's name is that preset's own, and refused with another.
    """

    preset: Literal["raresynth", "stgan-lite", "dcgan-base"] = "raresynth"
    resolution: Resolution = 32
    latent_dim: PositiveCount = 128
    pretrain_kimg: Positive = 30.0
    finetune_kimg: Positive = 4.0
    ema_half_life_kimg: Positive = 2.0
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of the networks' arithmetic; losses, penalties and weights are always fp32."""
    augmentation: Literal["none", "paper", "dermoscopy"] = "dermoscopy"
    """What the discriminator sees images through: the seed paper's policy, or one with shifts instead of rotations."""
    width: PositiveCount | None = None
    """Channels of the widest-resolution layer; deeper layers double it, up to 8 times."""
    batch_size: PositiveCount | None = None
    learning_rate: Positive | None = None
    betas: tuple[Decay, Decay] | None = None

    # raresynth
    gradient_penalty: NotNegative | None = None
    """Weight gamma of R1 + R2, halved."""
    annealing: tuple[Share, Share] | None = None
    """Parts of pre-training at which the class signal begins to come in, and is there in full."""
    augmentation_target: Share | None = None
    """Confidence of the discriminator that augmentation is strengthened or weakened to hold; 0 switches it off."""
    class_power: Share | None = None
    """A class of n images is drawn with weight n^(1 - this): 0 draws images equally, 1 classes."""
    snapshots: PositiveCount | None = None
    """Looks at the KID over a training, evenly spread; the best snapshot is kept."""

    # stgan-lite, dcgan-base
    barlow_alpha: NotNegative | None = None
    """Weight of the Barlow Twins loss per feature in fine-tuning (equation 4); 0 switches it off."""
    barlow_lambda: Positive | None = None
    generator_conv: Literal["depthwise", "dense"] | None = None
    discriminator: Literal["patch", "scalar"] | None = None
    barlow: Literal["pooled", "full"] | None = None
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] | None = None
    noise_std: NotNegative | None = None
    freeze_d: Count | None = None
    """Discriminator blocks frozen while fine-tuning, counted from the image side."""
    wrap_batches: bool | None = None
    """Fill a last, short batch from the next epoch; without it the batch stays short."""
    memory_limit_mb: PositiveCount | None = None
    """Largest cross-correlation matrix that the full Barlow loss may hold."""

    @model_validator(mode="after")
    def _annealing_in_order(self) -> "GanConfig":
        if self.annealing is not None and self.annealing[0] > self.annealing[1]:
            raise ValueError("annealing must name the part at which it begins, then that at which it ends")
        return self


class BalanceConfig(Config):
    """How many images to synthesise for each class."""

    policy: Literal["max", "min_share", "fixed", "ratio"] = "max"
    share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """min_share: each class becomes at least this part of the balanced train split."""
    count: PositiveCount = 500
    """fixed: this many for each class below the largest."""
    ratio: Positive = 1.0
    """ratio: this many synthetic images for each real one, for each class below the largest."""
    max_per_class: Count = 0
    """Most synthetic images to balance one class; 0 sets no limit."""
    classes: tuple[str, ...] = ()
    """Only these classes get images; where none is named, each class that the policy asks images for."""


class SynthesisConfig(Config):
    seed: Seed = 0
    truncation: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Standard deviation of the latents; less gives more typical images and less variety."""
    typical_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.99
    """Images farther from the train reals than this share of these are from each other are rejected; 1 rejects none."""
    near_copy_distance: Share = 0.5
    """Images nearer to a train image than this part of the distance to the next ones are rejected; 0 rejects none."""
    min_images: PositiveCount = 300
    """A class is judged by at least so many images, of which the first are used if fewer balance it."""


class QualityConfig(Config):
    min_held_out: PositiveCount = 50
    """With held-out reals of fewer groups (lesions, patients) a class is measured against train + val reals."""
    max_images: Annotated[int, Field(ge=24)] = 2000
    """Most images a side that enter a figure."""
    real_splits: Annotated[int, Field(ge=10)] = 100
    """Random real-real splits behind a floor."""
    inception: str = "none"
    """pytorch-fid's Inception weights: auto, none, or the path of a local file."""


class GateConfig(Config):
    """Limits of the class gate; calibrated in tests/test_gate.py, see docs in quality/gate.py."""

    fd_ratio: Positive = 0.5
    kid_ratio: Positive = 0.5
    coverage_ratio: Share = 0.6
    recall_ratio: Share = 0.4
    control_correlation: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.8
    """Least rank correlation of FD, on the run's encoder, with how much worse reals are made: below it nothing is
    accepted. One swap of neighbouring steps leaves 0.9 or more."""
    near_copy_distance: Share = 0.5
    """A near copy lies nearer to a train image than this part of the distance to the next ones."""
    atypical_share: Share = 0.1
    """Of the images drawn, the most that may be unlike any real, as `synthesis.typical_share` tells."""
    near_copy_share: Share = 0.025
    nearer_share: Share = 0.7
    """Of pairs of a synthetic and an unseen real image, in how many at most the synthetic one may lie nearer to the
    train images."""


class ClassifierConfig(Config):
    model: str = "resnet10t"
    """Any timm model name."""
    weights: str = "scratch"
    """pretrained (as timm fetches them), scratch, or the path of a local safetensors file."""
    resolution: Annotated[int, Field(ge=32)] = 32
    steps: PositiveCount = 150
    batch_size: Annotated[int, Field(ge=2)] = 64
    learning_rate: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of the training steps' arithmetic; weights, losses and predictions are always fp32."""
    synthetic_share: Share = 0.5
    """Part of a class's draws that real+synthetic takes from its synthetic images, where it has any."""
    arms: tuple[
        Literal[
            "real", "real+strong-augmentation", "real+weights", "real+balanced-sampling", "real+synthetic", "synthetic"
        ],
        ...,
    ] = ("real", "real+strong-augmentation", "real+weights", "real+balanced-sampling", "real+synthetic", "synthetic")
    """Strong augmentation and synthetic images come with balanced sampling too, since it helps every rare class. The
    arm `synthetic` sees no real image; it measures the generators and is never shipped."""

    @model_validator(mode="after")
    def _has_real_arm(self) -> "ClassifierConfig":
        if not any(arm not in {"real+synthetic", "synthetic"} for arm in self.arms) or len(set(self.arms)) != len(
            self.arms
        ):
            raise ValueError("classifier.arms must be distinct and hold at least one arm trained on real images only")
        return self


class ReleaseConfig(Config):
    """Rule of the release gate: the paired difference real+synthetic minus the best real arm."""

    metric: Literal["balanced_accuracy", "accuracy", "macro_f1", "macro_auc"] = "balanced_accuracy"
    min_difference: float = 0.0
    """The lower 95 % bound of the difference must be above this."""
    bootstrap_samples: Annotated[int, Field(ge=100)] = 10_000


class Params(Config):
    """All sections of a params file."""

    seed: Seed = 0
    compute: ComputeConfig = ComputeConfig()
    dataset: DatasetConfig = DatasetConfig()
    validation: ValidationConfig = ValidationConfig()
    encoder: EncoderConfig = EncoderConfig()
    gan: GanConfig = GanConfig()
    balance: BalanceConfig = BalanceConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    quality: QualityConfig = QualityConfig()
    gate: GateConfig = GateConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    release: ReleaseConfig = ReleaseConfig()

    @model_validator(mode="after")
    def _sieve_within_the_gate(self) -> "Params":
        """What the sieve takes out counts at the gate."""
        if self.synthesis.near_copy_distance > self.gate.near_copy_distance:
            raise ValueError(
                "synthesis.near_copy_distance must not be above gate.near_copy_distance, or reals would count as copies"
            )
        if 1 - self.synthesis.typical_share > self.gate.atypical_share + 1e-9:  # as 1 - 0.99 is above 0.01
            raise ValueError(
                "gate.atypical_share must not be under 1 - synthesis.typical_share, the least that reals have"
            )
        return self


class Resources(Config):
    """What one kind of task asks a node for, `pretrain` for each of its ranks; Kubernetes quantities."""

    cpu: Cores
    memory: Bytes
    shared_memory: Bytes
    """Size of /dev/shm, which counts as memory."""


class Toleration(Config):
    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] = "NoSchedule"


class GpuConfig(Config):
    """Added to training tasks in the packages for GPU clusters."""

    type: str = "nvidia.com/gpu"
    count: PositiveCount = 1
    """Of a task, and of each rank of `pretrain`."""
    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = (Toleration(key="nvidia.com/gpu"),)


class ClusterConfig(Config):
    """Where the pipeline's tasks run. Read when a package is compiled; it changes no result, and no task sees it."""

    image: str = "raresynth-train:0.1.0"
    """Image of every task."""
    volume_claim: str = "raresynth-store"
    """Claim of the volume, shared by all tasks, that holds images, checkpoints and results."""
    data_secret: str = "raresynth-data"  # noqa: S105
    """Kubernetes secret with the credentials of the DVC remote, as environment variables."""
    git_read_secret: str = "raresynth-git-read"  # noqa: S105
    git_write_secret: str = "raresynth-git-write"  # noqa: S105
    """Kubernetes secrets with a file .git-credentials; the second is given to the one task that commits."""
    light: Resources = Resources(cpu="1", memory="4Gi", shared_memory="256Mi")
    """Tasks that list, check, decide and write."""
    training: Resources = Resources(cpu="4", memory="16Gi", shared_memory="2Gi")
    """Tasks that train, synthesise and measure."""
    gpu: GpuConfig = GpuConfig()


class ParamsFile(Params):
    """A params file as people write it: the knobs of a run, and the cluster that its packages are compiled for."""

    cluster: ClusterConfig = ClusterConfig()


def load_params(path: Path) -> Params:
    """Read and check a params file for a run; sections and knobs left out take their defaults.

    Raises:
        ParamsError: the file is missing, no YAML, or holds an unknown or impossible knob.
    """
    return _params_of(load_params_file(path))


def load_params_file(path: Path) -> ParamsFile:
    """Read and check all of a params file, the cluster too.

    Raises:
        ParamsError: as of `load_params`.
    """
    return _check(_read(path), str(path))


def preset_names() -> list[str]:
    """The params files that come with the library: `demo` is params.yaml, the others lie in params/."""
    return ["demo", *sorted(path.stem for path in (_TOP / "params").glob("*.yaml"))]


def choose_params(preset: str, *overrides: dict[str, Any]) -> Params:
    """A preset with some knobs changed.

    Args:
        overrides: section -> knob -> value, as in a params file; the later ones go before the earlier ones.

    Raises:
        ParamsError: there is no such preset, or an override is unknown or impossible.
    """
    if preset not in preset_names():
        raise ParamsError(f"there is no preset {preset!r}; choose from {', '.join(preset_names())}")
    raw = _read(_TOP / "params.yaml" if preset == "demo" else _TOP / "params" / f"{preset}.yaml")
    return _params_of(_check(reduce(_merge, overrides, raw), f"preset {preset} with its overrides"))


_TOP = Path(__file__).parents[1]


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = below | above
    for name in below.keys() & above.keys():
        if isinstance(below[name], dict) and isinstance(above[name], dict):
            both[name] = _merge(below[name], above[name])
    return both


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParamsError(f"cannot read the params file {path}: {error.strerror}; name an existing file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path} is not valid YAML ({' '.join(str(error).split())}); correct that line") from error
    if raw is not None and not isinstance(raw, dict):
        raise ParamsError(f"{path} must hold sections such as 'gan:' with knobs below them")
    return _filled(raw or {}, ParamsFile)


def _filled(raw: dict[str, Any], section: type[Config]) -> dict[str, Any]:
    """Empty sections, whose knobs are all commented out, as such: YAML reads them as null."""
    filled = dict(raw)
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type(Config)) and isinstance(below := raw.get(name, 0), dict | None):
            filled[name] = _filled(below or {}, field.annotation)
    return filled


def _check(raw: dict[str, Any], where: str) -> ParamsFile:
    try:
        return ParamsFile.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'params'}: "
            + (_unknown(item["loc"]) if item["type"] == "extra_forbidden" else f"{item['msg']} (got {item['input']!r})")
            for item in error.errors()
        )
        raise ParamsError(f"{where}: {problems}; see params.yaml for the knobs and their ranges") from error


def _unknown(place: tuple[int | str, ...]) -> str:
    """What is said of a knob that does not exist: the known one beside it that is spelt most like it, if any is."""
    section: type[Config] = ParamsFile
    for part in place[:-1]:
        if part in section.model_fields:  # else the number of an entry in a list
            kind = section.model_fields[str(part)].annotation
            section = next(one for one in (kind, *get_args(kind)) if isinstance(one, type(Config)))
    close = get_close_matches(str(place[-1]), section.model_fields, n=1)
    return "there is no such knob" + (f"; did you mean {close[0]}?" if close else "")


def _params_of(file: ParamsFile) -> Params:
    return Params(**{name: getattr(file, name) for name in Params.model_fields})
