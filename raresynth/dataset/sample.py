"""The sample data set: dermoscopy-like images that are drawn, not photographed, so that anyone may share them.

`python -m raresynth.dataset.sample DIR [--defects]` writes DIR/metadata.csv and DIR/images/*.jpg. Everything is a
pure function of the constants below: the same bytes on every run.

A pixel is skin seen through two absorbers, melanin and haemoglobin (the two-chromophore model of Tsumura et al.,
"Independent-component analysis of skin color image", JOSA A 16:2169, 1999), so that one and the same lesion looks
right on every skin tone. A skin tone is drawn as an individual typology angle, ITA = atan((L* - 50) / b*) in degrees,
from its Fitzpatrick type's range (Chardon et al., Int. J. Cosmet. Sci. 13:191, 1991; Del Bino and Bernerd,
Br. J. Dermatol. 169:33, 2013). Lengths are in half sides of the image, with the origin in its centre.
"""

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from raresynth.lineage import new_dir, write_text

SEED = 20240501
SIDE = 64
"""Width and height of an image in pixels."""
CLASS_SIZES = {"nevus": 620, "keratosis": 240, "melanoma": 180, "vascular": 240, "dermatofibroma": 120}
"""Images of each class."""
TINY_CLASS, TINY_CLASS_SIZE = "angioma", 6
"""A class of the defective set that is too small to be of use."""
VIEWS_SHARES = (0.62, 0.26, 0.12)
"""Shares of the lesions that were photographed once, twice and three times."""
NEVUS_ATYPIA = (1.7, 3.8)
MELANOMA_ATYPIA = (3.1, 2.2)
"""Beta distributions of how atypical (asymmetric, ragged, variegated) a lesion is; their overlap is what is hard."""
FLAT_KERATOSIS_SHARE = 0.5
"""Share of keratoses that lack cysts and clefts and so resemble a plain nevus."""
PLAIN_SHARE = 0.4
"""Share of nevi and melanomas that lack a pigment network and so resemble a flat keratosis."""
HAIR_RATE = 1.6
"""Mean number of hairs of an image."""

FITZPATRICK_SHARES = {"I": 0.14, "II": 0.24, "III": 0.22, "IV": 0.16, "V": 0.13, "VI": 0.11}
ITA_RANGES = {"I": (55, 64), "II": (41, 55), "III": (28, 41), "IV": (10, 28), "V": (-30, 10), "VI": (-55, -30)}
"""Degrees; the outer two are cut where human skin ends."""
MELANIN = np.array([0.42, 0.72, 1.05])
HAEMOGLOBIN = np.array([0.16, 1.15, 0.92])
"""Optical densities (natural logarithm, linear RGB) of one unit of pigment."""
SCAR = np.array([0.80, 0.66, 0.60])
VEIL = np.array([0.17, 0.21, 0.30])
"""Linear RGB of fibrous tissue and of the blue-white veil of pigment that lies deep."""

COLUMNS = ("image_id", "label", "group", "fitzpatrick", "ita", "view", "hairs")
"""Of metadata.csv. image_id: file name below images/; ita: degrees; view: 1 for a lesion's first photograph."""
PLANTED_DEFECTS = (
    ("images/skin-0017.jpg", "missing"),
    ("images/skin-0058.jpg", "empty"),
    ("images/skin-0101.jpg", "truncated"),
    ("images/skin-0180.jpg", "not_an_image"),
    ("images/skin-0222.jpg", "too_small"),
    ("images/skin-0303.jpg", "too_large"),
    ("images/skin-0404.jpg", "unknown_label"),
    ("images/skin-0505.jpg", "conflicting_label"),
    ("images/skin-1401.jpg", "conflicting_label"),
    ("images/skin-1402.jpg", "exact_duplicate"),
    ("images/skin-1403.jpg", "exact_duplicate"),
    ("images/skin-1404.jpg", "near_duplicate"),
    *((f"images/skin-{number:04d}.jpg", "class_too_small") for number in range(1405, 1411)),
)
"""Path and the reason for which validation must quarantine it, for each defect that `--defects` plants.

Both images of a conflict are listed, since nothing tells which label is right; of duplicates the later one only.
"""

Field = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tissue:
    """What lies in the skin at each pixel: absorbers in units of pigment, the others as opacities from 0 to 1."""

    melanin: Field
    blood: Field
    scar: Field
    veil: Field


@dataclass(frozen=True)
class Tone:
    """A skin colour in CIE L*a*b* (D65)."""

    fitzpatrick: str
    lab: tuple[float, float, float]

    @property
    def ita(self) -> float:
        """Individual typology angle in degrees."""
        return float(np.degrees(np.arctan2(self.lab[0] - 50, self.lab[2])))


@dataclass(frozen=True)
class Sample:
    """An image as JPEG bytes (None: its file is missing) and what is known of it."""

    jpeg: bytes | None
    label: str
    group: str
    tone: Tone
    view: int
    hairs: int


# Fields over the lesion's own coordinates


def _noise(rng: np.random.Generator, x: Field, y: Field, scale: float) -> Field:
    """A smooth random field of mean 0, variance 1 and features of size `scale`."""
    n = 20
    angle, phase = rng.uniform(0, 2 * np.pi, (2, n))
    k = 2 * np.pi / scale * rng.uniform(0.5, 1.3, n)
    # Wave by wave: arrays this small stay in the processor's cache.
    waves = (np.cos(a * x + b * y + c) for a, b, c in zip(k * np.cos(angle), k * np.sin(angle), phase, strict=True))
    return np.asarray(sum(waves) * np.sqrt(2 / n))


def _step(value: Field, softness: float) -> Field:
    """1 where `value` is far below 0, 0 far above."""
    return 0.5 - 0.5 * np.tanh(value / softness)


def _outline(rng: np.random.Generator, x: Field, y: Field, radius: float, lobes: float, notches: float) -> Field:
    """Distance from the centre over the border's, less 1: negative inside, 0 on the border.

    Args:
        lobes: strength of the slow waves around the border, which make it asymmetric.
        notches: strength of its fine displacement, which makes it ragged.
    """
    stretch = np.exp(rng.normal(0, 0.12))
    x, y = x * stretch, y / stretch
    theta = np.arctan2(y, x)
    orders = np.arange(1, 5)[:, None, None]
    wave = (
        lobes * rng.normal(0, 1, (4, 1, 1)) / orders * np.cos(orders * theta + rng.uniform(0, 2 * np.pi, (4, 1, 1)))
    ).sum(0)
    distance: Field = np.hypot(x, y) / (radius * np.exp(np.clip(wave, -0.5, 0.4))) - 1
    return distance + notches * (0.7 * _noise(rng, x, y, 0.45) + 0.5 * _noise(rng, x, y, 0.18))


def _network(rng: np.random.Generator, x: Field, y: Field, spacing: float) -> Field:
    """A pigment network: lines near 1 around holes near 0, a bent honeycomb of three plane waves."""
    bend = 0.35 * spacing
    x = x + bend * _noise(rng, x, y, 6 * spacing)
    y = y + bend * _noise(rng, x, y, 6 * spacing)
    turn = rng.uniform(0, np.pi)
    k = 2 * np.pi / spacing
    waves = sum(np.cos(k * (np.cos(turn + a) * x + np.sin(turn + a) * y)) for a in (0, 2 * np.pi / 3, 4 * np.pi / 3))
    return np.asarray((3 - waves) / 4.5)


def _spots(rng: np.random.Generator, x: Field, y: Field, n: int, reach: float, sizes: tuple[float, float]) -> Field:
    """`n` round spots within `reach` of the centre, 1 inside and 0 outside."""
    radius = reach * np.sqrt(rng.uniform(0, 1, (n, 1, 1)))
    angle = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    size = rng.uniform(*sizes, (n, 1, 1))
    distance = np.hypot(x - radius * np.cos(angle), y - radius * np.sin(angle))
    return np.asarray(_step(distance - size, 0.03).max(0, initial=0))


# Lesions
# Each draws the lesion's parameters and evaluates it at (x, y); the draws never depend on the coordinates, so that
# the same generator gives the same lesion in every view.


def _melanocytic(rng: np.random.Generator, x: Field, y: Field, atypia: float) -> Tissue:
    """A lesion of pigment cells; from a common nevus (atypia 0) to a melanoma with every sign of it (1)."""
    radius = rng.uniform(0.40, 0.58) + 0.10 * atypia
    border = _outline(rng, x, y, radius, lobes=0.04 + 0.30 * atypia, notches=0.03 + 0.20 * atypia)
    inside = _step(border, rng.uniform(0.10, 0.22) * (1 - 0.5 * atypia))
    patches = _noise(rng, x, y, 0.9)
    clumps = _noise(rng, x, y, 0.35)
    density = rng.uniform(1.0, 2.0) * np.exp(0.10 * clumps + (0.12 + 0.42 * atypia) * patches)
    density = density * (1 + rng.uniform(0, 0.5) * np.exp(-4 * (border + 1) ** 2))
    plain = rng.uniform() < PLAIN_SHARE
    lines = rng.uniform(0.2, 0.6) * (1 - 0.5 * atypia) * _network(rng, x, y, rng.uniform(0.15, 0.21))
    density = density * (0.82 + lines * (not plain))
    dots = _spots(rng, x, y, int(rng.integers(3, 13)), 1.05 * radius, (0.02, 0.06)) * (atypia > 0.3)
    veil = _step(rng.uniform(0.3, 1.6) - _noise(rng, x, y, 0.9), 0.9) * inside * np.clip(1.4 * atypia - 0.7, 0, 0.6)
    regression = _step(rng.uniform(0.7, 1.8) - _noise(rng, x, y, 0.7), 0.7) * inside
    return Tissue(
        melanin=inside * (density + 1.8 * dots),
        blood=inside * (rng.uniform(0.05, 0.35) + atypia * 0.45 * np.abs(_noise(rng, x, y, 0.7))),
        scar=regression * np.clip(1.2 * atypia - 0.6, 0, 0.5),
        veil=veil,
    )


def _nevus(rng: np.random.Generator, x: Field, y: Field) -> Tissue:
    return _melanocytic(rng, x, y, rng.beta(*NEVUS_ATYPIA))


def _melanoma(rng: np.random.Generator, x: Field, y: Field) -> Tissue:
    return _melanocytic(rng, x, y, rng.beta(*MELANOMA_ATYPIA))


def _keratosis(rng: np.random.Generator, x: Field, y: Field) -> Tissue:
    """Waxy and stuck on: sharp border, even yellow-brown, milia-like cysts (white), comedo-like openings, clefts."""
    flat = rng.uniform() < FLAT_KERATOSIS_SHARE
    radius = rng.uniform(0.44, 0.68)
    border = _outline(rng, x, y, radius, lobes=0.13, notches=rng.uniform(0.03, 0.10))
    inside = _step(border, 0.08 + 0.09 * flat)
    milia = _spots(rng, x, y, int(rng.integers(4, 16)), 0.85 * radius, (0.025, 0.065)) * (not flat)
    openings = _spots(rng, x, y, int(rng.integers(2, 10)), 0.85 * radius, (0.03, 0.075)) * (not flat)
    clefts = _step(np.abs(_noise(rng, x, y, 0.5)) - 0.12, 0.08) * (not flat)
    density = rng.uniform(0.8, 2.0) * np.exp(0.15 * _noise(rng, x, y, 0.9) + 0.12 * _noise(rng, x, y, 0.3))
    rim = np.exp(-((border + 0.08) ** 2) / 0.01) * (not flat)
    return Tissue(
        melanin=inside * (density + 0.55 * clefts + 0.25 * rim + 1.5 * openings) * (1 - 0.7 * milia),
        blood=inside * rng.uniform(0.0, 0.35),
        scar=inside * np.clip(0.03 + 0.6 * milia, 0, 1),
        veil=np.zeros_like(x),
    )


def _vascular(rng: np.random.Generator, x: Field, y: Field) -> Tissue:
    """Red to purple lacunae, well apart from each other, on a pink ground."""
    radius = rng.uniform(0.36, 0.56)
    border = _outline(rng, x, y, radius, lobes=0.09, notches=0.05)
    inside = _step(border, 0.12)
    lacunae = _spots(rng, x, y, int(rng.integers(6, 15)), 0.8 * radius, (0.09, 0.19)) * _step(border - 0.1, 0.1)
    dark = rng.uniform(0, 1)
    return Tissue(
        melanin=lacunae * 0.9 * dark**2,
        blood=inside * rng.uniform(0.6, 1.0) + lacunae * rng.uniform(0.9, 1.6) * np.exp(0.2 * _noise(rng, x, y, 0.5)),
        scar=np.zeros_like(x),
        veil=lacunae * 0.5 * dark**2,
    )


def _dermatofibroma(rng: np.random.Generator, x: Field, y: Field) -> Tissue:
    """A white scar-like patch within a ring of delicate network that fades into the skin."""
    radius = rng.uniform(0.46, 0.62)
    border = _outline(rng, x, y, radius, lobes=0.06, notches=0.03)
    centre = _outline(rng, x, y, radius * rng.uniform(0.38, 0.55), lobes=0.12, notches=0.10)
    inside = _step(border, rng.uniform(0.2, 0.32))
    patch = _step(centre, 0.3)
    network = _network(rng, x, y, rng.uniform(0.14, 0.19))
    return Tissue(
        melanin=inside * (1 - 0.9 * patch) * rng.uniform(0.55, 1.1) * (0.6 + 0.8 * network),
        blood=inside * (rng.uniform(0.1, 0.4) + 0.25 * patch),
        scar=patch * rng.uniform(0.2, 0.85) * np.exp(0.08 * _noise(rng, x, y, 0.3)),
        veil=np.zeros_like(x),
    )


LESIONS: dict[str, Callable[[np.random.Generator, Field, Field], Tissue]] = {
    "nevus": _nevus,
    "keratosis": _keratosis,
    "melanoma": _melanoma,
    "vascular": _vascular,
    "dermatofibroma": _dermatofibroma,
    TINY_CLASS: _vascular,
}


# Skin, light and camera


def _tone(rng: np.random.Generator) -> Tone:
    """A skin tone: b* and a* peak at intermediate tones, L* follows from b* and the typology angle."""
    fitzpatrick = str(rng.choice(list(FITZPATRICK_SHARES), p=list(FITZPATRICK_SHARES.values())))
    ita = rng.uniform(*ITA_RANGES[fitzpatrick])
    tan = np.exp(-(((ita - 22) / 38) ** 2))
    b = 13.5 + 5.5 * tan + rng.uniform(-1, 1)
    return Tone(fitzpatrick, (50 + b * np.tan(np.radians(ita)), 10.0 + 2.5 * tan + rng.uniform(-2.0, 3.0), b))


def _lab_to_linear(lab: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """CIE L*a*b* (D65) to linear sRGB, each in 0 to 1."""
    fy = (lab[0] + 16) / 116
    f = np.array([fy + lab[1] / 500, fy, fy - lab[2] / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.95047, 1.0, 1.08883)
    matrix = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
    return np.asarray(np.clip((matrix * xyz).sum(1), 0.0, 1.0))


def _to_srgb(linear: Field) -> Field:
    """Gamma-encode linear sRGB (IEC 61966-2-1)."""
    linear = np.clip(linear, 0, 1)
    curve = 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055
    return np.asarray(np.where(linear <= 0.0031308, 12.92 * linear, curve))


def _hairs(rng: np.random.Generator, x: Field, y: Field, n: int) -> Field:
    """Opacity of `n` slightly bent hairs."""
    angle = rng.normal(rng.uniform(0, np.pi), 0.5, (n, 1, 1))
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    distance = np.abs(across - rng.uniform(-0.95, 0.95, (n, 1, 1)) - rng.normal(0, 0.12, (n, 1, 1)) * along**2)
    ends = _step(np.abs(along - rng.uniform(-0.7, 0.7, (n, 1, 1))) - rng.uniform(0.5, 1.2, (n, 1, 1)), 0.05)
    opacity = rng.uniform(0.4, 0.8, (n, 1, 1)) * np.exp(-((distance / rng.uniform(0.014, 0.024, (n, 1, 1))) ** 2))
    return np.asarray((opacity * ends).max(0, initial=0))


def _photograph(rng: np.random.Generator, label: str, tone: Tone, lesion: tuple[int, ...]) -> tuple[bytes, int]:
    """One view of a lesion: JPEG bytes and the number of hairs in it.

    Args:
        rng: draws what differs between views: pose, light, hairs, noise.
        lesion: seed of what does not.
    """
    axis = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
    x, y = np.meshgrid(axis, axis)
    turn, zoom = rng.uniform(0, 2 * np.pi), np.exp(rng.normal(0, 0.06))
    u, v = (x - rng.normal(0, 0.05)) / zoom, (y - rng.normal(0, 0.05)) / zoom
    u, v = np.cos(turn) * u - np.sin(turn) * v, np.sin(turn) * u + np.cos(turn) * v
    tissue = LESIONS[label](np.random.default_rng(lesion), u, v)

    ground = 0.05 * _noise(rng, x, y, 0.8) + 0.03 * _noise(rng, x, y, 0.12)
    density = (tissue.melanin + ground)[..., None] * MELANIN + (tissue.blood + 0.6 * ground)[..., None] * HAEMOGLOBIN
    skin = _lab_to_linear(tone.lab)
    colour = skin * np.exp(-density)
    colour += tissue.scar[..., None] * (0.45 * SCAR + 0.55 * skin - colour)
    colour += tissue.veil[..., None] * (VEIL * (0.4 + skin.mean()) - colour)

    n_hairs = int(rng.poisson(HAIR_RATE))
    hair = np.array([0.020, 0.013, 0.009]) * rng.uniform(0.5, 4.0)
    colour += _hairs(rng, x, y, n_hairs)[..., None] * (hair - colour)

    angle = rng.uniform(0, 2 * np.pi)
    light = rng.normal(1.0, 0.06) + rng.uniform(0, 0.12) * (np.cos(angle) * x + np.sin(angle) * y)
    light = light * (1 - rng.uniform(0.0, 0.16) * (x**2 + y**2))
    if rng.uniform() < 0.25:  # the dermatoscope's round field of view
        light = light * _step(np.hypot(x, y) - rng.uniform(1.12, 1.3), 0.05)
    white = np.exp(rng.normal(0, 0.025, 3))
    pixels = _to_srgb(colour * light[..., None] * white) + rng.normal(0, 0.012, (SIDE, SIDE, 3))
    return _jpeg(np.clip(np.rint(255 * pixels), 0, 255).astype(np.uint8)), n_hairs


def _jpeg(pixels: npt.NDArray[np.uint8], quality: int = 90) -> bytes:
    out = BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue()


# The data set


def draw_class(label: str, size: int, code: int) -> list[Sample]:
    """Draw `size` images of a class: lesion after lesion, each in one to three views.

    Args:
        code: number of the class, which keeps its draws apart from other classes'.
    """
    samples: list[Sample] = []
    lesion = 0
    while len(samples) < size:
        lesion += 1
        key = (SEED, code, lesion)
        rng = np.random.default_rng((*key, 1))
        tone, group = _tone(rng), f"lesion-{code}{lesion:03d}"
        n_views = min(size - len(samples), int(rng.choice(len(VIEWS_SHARES), p=VIEWS_SHARES)) + 1)
        for view in range(1, n_views + 1):
            jpeg, n_hairs = _photograph(np.random.default_rng((*key, 2, view)), label, tone, (*key, 3))
            samples.append(Sample(jpeg, label, group, tone, view, n_hairs))
    return samples


def draw_sample() -> dict[str, Sample]:
    """The clean set by image name, in an order that tells nothing of the labels."""
    samples = [s for code, (label, n) in enumerate(CLASS_SIZES.items(), 1) for s in draw_class(label, n, code)]
    order = np.random.default_rng(SEED).permutation(len(samples))
    return {_name(number): samples[i] for number, i in enumerate(order, 1)}


def _name(number: int) -> str:
    return f"skin-{number:04d}.jpg"


def plant_defects(clean: dict[str, Sample]) -> dict[str, Sample]:
    """The set as a careless collector might deliver it: `clean` with PLANTED_DEFECTS."""
    whole = clean[_name(101)].jpeg or b""
    first, second, third, labelled = (clean[_name(number)] for number in (3, 44, 77, 505))
    tiny = draw_class(TINY_CLASS, TINY_CLASS_SIZE, len(CLASS_SIZES) + 1)
    changed = {
        17: replace(clean[_name(17)], jpeg=None),
        58: replace(clean[_name(58)], jpeg=b""),
        101: replace(clean[_name(101)], jpeg=whole[: len(whole) // 2]),
        180: replace(clean[_name(180)], jpeg=b"The photograph was not found on the server.\n"),
        222: replace(clean[_name(222)], jpeg=_jpeg(np.full((1, 1, 3), 128, np.uint8))),
        303: replace(clean[_name(303)], jpeg=_jpeg(np.full((SIDE, 12_000, 3), 128, np.uint8))),
        404: replace(clean[_name(404)], label=""),
        1401: replace(labelled, label=next(label for label in CLASS_SIZES if label != labelled.label)),
        1402: first,
        1403: replace(second, group="lesion-9001"),
        1404: replace(third, group="lesion-9002", jpeg=_recompress(third.jpeg)),
        **dict(enumerate(tiny, 1405)),
    }
    return clean | {_name(number): sample for number, sample in changed.items()}


def _recompress(jpeg: bytes | None) -> bytes:
    with Image.open(BytesIO(jpeg or b"")) as image:
        return _jpeg(np.asarray(image), quality=95)


def write_sample(samples: dict[str, Sample], out_dir: Path) -> None:
    """Write metadata.csv and images/ into `out_dir`, which is replaced."""
    table = StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    with new_dir(out_dir) as folder:
        (folder / "images").mkdir()
        for name, sample in samples.items():
            tone = sample.tone
            writer.writerow(
                (name, sample.label, sample.group, tone.fitzpatrick, f"{tone.ita:.1f}", sample.view, sample.hairs)
            )
            if sample.jpeg is not None:
                (folder / "images" / name).write_bytes(sample.jpeg)
        write_text(folder / "metadata.csv", table.getvalue())


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m raresynth.dataset.sample", description="Draw the sample data set.")
    parser.add_argument("out_dir", type=Path, metavar="DIR", help="folder to make")
    parser.add_argument("--defects", action="store_true", help="plant the defects of the set's first version")
    arguments = parser.parse_args()
    if arguments.out_dir.exists():
        parser.error(f"{arguments.out_dir} already exists; remove it or name a new folder")
    samples = draw_sample()
    write_sample(plant_defects(samples) if arguments.defects else samples, arguments.out_dir)


if __name__ == "__main__":
    main()
