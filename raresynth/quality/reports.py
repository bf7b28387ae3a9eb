"""What `measure` finds about one class, as the gate and the report page read it."""

from typing import Literal

from raresynth.lineage import Report


class Distance(Report):
    """FD or KID of the synthetic images to the class's reals, beside what it is for other reals."""

    value: float
    low: float
    high: float
    """95 % interval of `value`."""
    floor: float
    """The same distance between two random halves of the class's reals."""
    zero: float
    """What `value` would be at this number of images if nothing differed: of FD the mean of `floor` and of the same
    distance between halves of the synthetic images; of KID, which has no bias, 0."""
    other_label: str
    other_value: float
    """The same distance from the class's reals to those of the nearest class that is clearly apart from it."""
    other_zero: float
    """What `other_value` would be at its number of images if nothing differed."""
    ratio: float | None
    """(value - zero) / (other_value - other_zero): 0 is as good as reals, 1 is as far off as another class. None where
    the other class cannot be told from this one."""
    ratio_low: float | None
    ratio_high: float | None


class Proportion(Report):
    """Precision, recall, density or coverage, beside its value between two halves of the reals."""

    value: float
    low: float
    high: float
    real_real: float
    ratio: float | None
    """value / real_real."""
    ratio_low: float | None
    ratio_high: float | None


class NearestReal(Report):
    """A synthetic image, its nearest real image of the train split, and how near that is."""

    synthetic: str
    """Path relative to the root of synthetic images."""
    train: str
    """Path relative to the data folder."""
    distance: float
    """Relative to the mean distance of the next five groups: 1 is no nearer than those, 0 is a copy."""


class CopyingControls(Report):
    """Whether the copying check finds copies, and calls nothing a copy that is none."""

    copies_found: float
    """Share of jittered copies of train images under the threshold; 1 is best."""
    n_copies: int
    reals_found: float
    """Share of real images that the generator was not trained on, or of train images held against other groups, under
    it; 0 is best."""
    n_reals: int


class Atypical(Report):
    """Share of the images drawn that the sieve took out as unlike any real: bundles ship the generator without it."""

    share: float
    low: float
    high: float
    """95 % interval of the share."""
    reals_at_most: float
    """What reals themselves may have, at 95 %, since only so many of the train split tell what is typical."""


class Copying(Report):
    """Whether synthetic images repeat images of the train split.

    The share of near copies is that of the images drawn, those included that the sieve took out: bundles ship the
    generator without it. All else is of the images that were kept.
    """

    near_copy_share: float
    low: float
    high: float
    """95 % interval of the share."""
    n_drawn: int
    """Images that the share is of: those measured, and those that were rejected before them."""
    threshold: float
    """Relative distances under it count as near copies."""
    reals: Literal["val", "train"]
    """The reals that relative distances are held against: unseen ones or, where these are of fewer than 20 groups,
    train images, each against the other groups."""
    controls: CopyingControls
    authenticity: float
    """Share of synthetic images farther from their nearest train image than that one is from the other reals."""
    nearer_share: float
    """Of pairs of a synthetic image and one of these reals the share in which the synthetic one lies nearer to the
    train images; 0.5 without copying, 1 where all are copies."""
    nearer_low: float
    nearer_high: float
    """95 % interval of it."""
    nearest: list[NearestReal]


class Fid(Report):
    """FID on pytorch-fid's Inception features, 2048 dimensions."""

    value: float
    n_real: int
    n_fake: int
    floor: float
    """FID between two halves of the reals, `n_floor` images each."""
    value_at_floor: float
    """FID of the fakes at that size: the only figure to hold against `floor`."""
    n_floor: int
    weights_sha256: str


class QualityReport(Report):
    """Every figure of one class, with the images, dimensions and encoder it rests on."""

    label: str
    status: Literal["measured"] = "measured"
    n_real: int
    n_fake: int
    n_compared: int
    """Images a side of FD, precision, recall, density and coverage: these depend on it."""
    n_other_compared: int
    """Images a side of FD to the nearest other class; fewer where that class has fewer."""
    real_splits: Literal["val", "train+val"]
    encoder_sha256: str
    dimensions: int
    fd: Distance
    kid: Distance
    precision: Proportion
    recall: Proportion
    density: Proportion
    coverage: Proportion
    atypical: Atypical
    copying: Copying
    binding_copying: bool
    fid: Fid | None
    doubts: list[str]
    """Why these figures do not suffice to accept the class, however good they are."""
    notes: list[str]


class FailedClass(Report):
    """A class whose images could not be made or measured, and why."""

    label: str
    status: Literal["failed"] = "failed"
    reason: str
