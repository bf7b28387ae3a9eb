"""How training asks what its images are worth. `quality` knows; `gan` does not import it."""

from typing import Protocol

from raresynth.gan.png import Pixels


class Judge(Protocol):
    """Compares images of a class with its reals, in the encoder's features."""

    def kid(self, label: str, images: Pixels) -> float | None:
        """KID of the images to the class's reals, or None where there are too few of these."""

    def gain(self, label: str, images: Pixels, others: Pixels) -> tuple[float, float]:
        """How much lower the images' KID is than the others', and that difference's standard error."""
