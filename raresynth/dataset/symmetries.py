"""Whether the images have an up and a left: which mirror images and turns map them to images as likely as themselves.

Dermoscopy has neither, so all eight symmetries of the square may augment it; an X-ray of the chest has both an up and a
heart on one side. Trained on turned X-rays a generator draws turned ones, and an encoder that is taught to overlook
turns does not see it. So `validate` looks: if the mean of the others tells an image from its turned self, as nearest
mean classifier on the signs of 256 low frequencies (the perceptual hash), then turning leads out of the data.
benchmarks/README.md has what this finds in four sources.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from raresynth.config import Symmetries
from raresynth.dataset.probe import HASH_SIDE
from raresynth.lineage import Report, read_report

Change = Literal["mirrored", "upside_down", "quarter_turn", "half_turn"]

TOLD = 0.8
"""Part of the images told from their changed selves, with 95 % confidence, from which on a change is no symmetry.

Chance tells half; in photographs of lesions, lit more often from here than from there, up to three quarters are."""
FOLDS = 5
FILE = "symmetries.json"


class SymmetriesReport(Report):
    """Which symmetries the trainings may use, and why."""

    symmetries: Symmetries
    given: bool
    """The params name them; else they were found."""
    n_images: int
    told: dict[Change, float]
    """Part of the images that are nearer to the mean of the others as they are than when changed so."""


def find_symmetries(
    hashes: Sequence[bytes], groups: Sequence[str], given: Literal["auto"] | Symmetries = "auto"
) -> SymmetriesReport:
    """Look whether images can be told from their mirror images and turns.

    Args:
        hashes: perceptual hashes of 32 bytes (`probe.Probe`), one an image.
        groups: images of one group (a lesion, a patient) are never told by the mean of each other.
        given: what the params say; "auto" to go by what is found.
    """
    signs = signs_of(hashes)
    folds = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1] % FOLDS
    told: dict[Change, int] = {change: _told(signs, changed(signs, change), folds) for change in get_args(Change)}
    is_symmetry = {change: not _surely_told(n, len(signs)) for change, n in told.items()}
    found: Symmetries = "all" if all(is_symmetry.values()) else "mirror" if is_symmetry["mirrored"] else "none"
    return SymmetriesReport(
        symmetries=found if given == "auto" else given,
        given=given != "auto",
        n_images=len(signs),
        told={change: round(n / max(1, len(signs)), 4) for change, n in told.items()},
    )


def read_symmetries(folder: Path) -> SymmetriesReport:
    """What `validate` left in its folder.

    Raises:
        CheckpointError: there is no such report.
    """
    return read_report(folder / FILE, SymmetriesReport)


def signs_of(hashes: Sequence[bytes]) -> npt.NDArray[np.float32]:
    """(N, 16, 16): of cosines down the image and across it, whether each is above the median, about 0, as 1 or -1."""
    bits = np.unpackbits(np.frombuffer(b"".join(hashes), dtype=np.uint8)).reshape(-1, HASH_SIDE, HASH_SIDE)
    signs = bits.astype(np.float32) * 2 - 1
    signs[:, 0, 0] = 0  # the brightness, which no change alters
    return signs


def changed(signs: npt.NDArray[np.float32], change: Change) -> npt.NDArray[np.float32]:
    """The signs of the changed images: odd cosines change theirs, and a turn by 90 degrees transposes besides."""
    odd = np.where(np.arange(HASH_SIDE) % 2, np.float32(-1), np.float32(1))
    across, down = odd[None, :], odd[:, None]
    match change:
        case "mirrored":
            return signs * across
        case "upside_down":
            return signs * down
        case "half_turn":
            return signs * across * down
        case "quarter_turn":
            return signs.transpose(0, 2, 1) * across


def _told(signs: npt.NDArray[np.float32], turned: npt.NDArray[np.float32], folds: npt.NDArray[np.intp]) -> int:
    """How many images are nearer to the mean of the other folds' images than to that of these turned."""
    n = 0
    for fold in range(FOLDS):
        mine, others = folds == fold, folds != fold
        if not mine.any() or not others.any():
            continue
        towards = signs[others].mean(0) - turned[others].mean(0)
        scores = (signs[mine] * towards).sum((1, 2))
        n += int((scores > 0).sum())
    return n


def _surely_told(n: int, of: int) -> bool:
    from scipy.stats import binomtest

    return of > 0 and bool(binomtest(n, of).proportion_ci(method="wilson").low > TOLD)
