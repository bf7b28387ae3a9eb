"""Proof that an encoder sees what it should: FD must rise as images get worse, neighbours must share labels."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from raresynth.dataset.images import Pixels, resized
from raresynth.lineage import Report
from raresynth.quality.distances import frechet_distance

CLUSTERS = 8
MIN_HELD_OUT = 20
MAX_IMAGES = 2000
"""Most images of a split that enter."""
LEAST_EFFECT = 0.05
"""Of trained encoders the least effect is 0.13 to 0.49; blur has one of 0.001 to 0.03 on thumbnails of 2 x 2 pixels."""
MODES_SIDE = 32
"""Side in pixels of the images that are put into clusters."""

FeatureFunction = Callable[[Pixels], npt.NDArray[np.float32]]


class Control(Report):
    """FD of worsened held-out images to the same images as they are.

    Not to the train images: which of few images are held out would then count for more than what was done to them.
    """

    strengths: list[float]
    fd: list[float]
    spearman: float
    """Rank correlation of the two; 1 where FD rises with every step."""
    effect: float
    """FD at the strongest step as a part of the features' own scatter, the trace of their covariance."""


class EncoderControls(Report):
    """What an encoder can tell apart, measured on the val split."""

    blur: Control
    """Gaussian blur, standard deviation in pixels."""
    noise: Control
    """Gaussian noise, standard deviation in grey levels."""
    jpeg: Control
    """JPEG compression, 100 - quality."""
    dropped_modes: Control
    """Of 8 clusters of the held-out pixels, how many are missing."""
    neighbour_accuracy: float
    """Balanced accuracy of giving a val image the label of its nearest train image, by features."""
    pixel_neighbour_accuracy: float
    """The same by raw pixels."""

    @property
    def named(self) -> dict[str, Control]:
        """Each control by what makes the images worse, as it is called in sentences."""
        return {
            "blur": self.blur,
            "noise": self.noise,
            "JPEG compression": self.jpeg,
            "missing modes": self.dropped_modes,
        }


def check_encoder(
    features: FeatureFunction,
    train: Pixels,
    train_labels: npt.NDArray[np.str_],
    held_out: Pixels,
    held_out_labels: npt.NDArray[np.str_],
    seed: int,
) -> EncoderControls | None:
    """Measure the controls on uint8 images (N, S, S, 3), or None with fewer than 20 held-out images."""
    if len(held_out) < MIN_HELD_OUT:
        return None
    rng = np.random.default_rng([seed, 1])
    chosen = rng.permutation(len(train))[:MAX_IMAGES]
    train, train_labels = np.asarray(train[chosen]), train_labels[chosen]
    held = np.sort(rng.permutation(len(held_out))[:MAX_IMAGES])
    held_out, held_out_labels = np.asarray(held_out[held]), held_out_labels[held]
    unharmed = features(held_out)
    scatter = float(unharmed.var(0, ddof=1).sum())

    def control(strengths: list[float], worsen: Callable[[float], Pixels]) -> Control:
        from scipy.stats import spearmanr

        fd = [frechet_distance(unharmed, features(worsen(strength))) for strength in strengths]
        # Rounded, so that a perfect rise is 1, and not less by the last bit.
        spearman = round(float(spearmanr(strengths, fd).statistic), 12)
        return Control(strengths=strengths, fd=fd, spearman=spearman, effect=fd[-1] / scatter if scatter else 0.0)

    modes = _clusters(held_out, seed)
    return EncoderControls(
        blur=control([0.0, 0.5, 1.0, 1.5, 2.0, 3.0], lambda sigma: blurred(held_out, sigma)),
        noise=control([0.0, 4.0, 8.0, 16.0, 32.0, 64.0], lambda sigma: noised(held_out, sigma, seed)),
        jpeg=control([0.0, 20.0, 40.0, 60.0, 80.0, 95.0], lambda loss: compressed(held_out, loss)),
        dropped_modes=control([0.0, 2.0, 4.0, 6.0, 7.0], lambda n: _without_modes(held_out, modes, int(n), seed)),
        neighbour_accuracy=neighbour_accuracy(features(train), train_labels, unharmed, held_out_labels),
        pixel_neighbour_accuracy=neighbour_accuracy(_flat(train), train_labels, _flat(held_out), held_out_labels),
    )


def blurred(images: Pixels, sigma: float) -> Pixels:
    """Images under a Gaussian blur of `sigma` pixels."""
    return np.stack([np.asarray(Image.fromarray(i).filter(ImageFilter.GaussianBlur(sigma))) for i in images])


def noised(images: Pixels, sigma: float, seed: int) -> Pixels:
    """Images with Gaussian noise of `sigma` grey levels."""
    rng = np.random.default_rng([seed, 2])
    # One by one: noise has eight times the bytes of an image.
    noisy = [np.clip(np.rint(i + rng.normal(0, sigma, i.shape)), 0, 255).astype(np.uint8) for i in images]
    return np.stack(noisy)


def jittered(images: Pixels, rng: np.random.Generator) -> Pixels:
    """Copies as a generator might make them: turned, mirrored, shifted by up to 2 pixels, recoloured and noisy."""
    copies = []
    for image in images:
        padded = Image.fromarray(np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect"))
        left, top = rng.uniform(0, 4, 2)
        shifted = padded.transform(
            image.shape[1::-1], Image.Transform.AFFINE, (1, 0, left, 0, 1, top), Image.Resampling.BICUBIC
        )
        copy = np.rot90(np.asarray(shifted), int(rng.integers(4))).astype(float)
        copy = copy[:, ::-1] if rng.random() < 0.5 else copy
        copy = copy * rng.uniform(0.9, 1.1) + rng.uniform(-12, 12) + rng.normal(0, 4, copy.shape)
        copies.append(np.clip(copy + rng.uniform(-6, 6, 3), 0, 255).astype(np.uint8))
    return np.stack(copies)


def compressed(images: Pixels, loss: float) -> Pixels:
    """Images after JPEG of quality 100 - loss; 0 leaves them as they are."""
    return np.stack([_jpeg(image, round(100 - loss)) for image in images]) if loss else images


def _jpeg(image: Pixels, quality: int) -> Pixels:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer), dtype=np.uint8)


def _clusters(images: Pixels, seed: int) -> npt.NDArray[np.int64]:
    """Cluster of each image by its raw pixels, the largest cluster numbered 0."""
    from sklearn.cluster import KMeans

    small = resized(images, min(MODES_SIDE, images.shape[1]))
    found = KMeans(CLUSTERS, n_init=1, random_state=seed % 2**32).fit_predict(_flat(small))
    rank = np.argsort(np.argsort(-np.bincount(found, minlength=CLUSTERS), kind="stable"), kind="stable")
    return np.asarray(rank[found], dtype=np.int64)


def _without_modes(images: Pixels, modes: npt.NDArray[np.int64], n: int, seed: int) -> Pixels:
    """As many images as before, drawn from all but the n smallest clusters."""
    left = np.flatnonzero(modes < CLUSTERS - n)
    extra = np.random.default_rng([seed, 3]).choice(left, len(images) - len(left))
    drawn: Pixels = images[np.concatenate([left, extra])]
    return drawn


def _flat(images: Pixels) -> npt.NDArray[np.float32]:
    return images.reshape(len(images), -1).astype(np.float32)


def neighbour_accuracy(
    train: npt.NDArray[np.float32],
    train_labels: npt.NDArray[np.str_],
    held_out: npt.NDArray[np.float32],
    held_out_labels: npt.NDArray[np.str_],
) -> float:
    """Balanced accuracy of the 1-nearest-neighbour rule."""
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.neighbors import KNeighborsClassifier

    nearest = KNeighborsClassifier(1, algorithm="brute").fit(train, train_labels)
    return float(balanced_accuracy_score(held_out_labels, nearest.predict(held_out)))
