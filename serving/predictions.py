"""From uploaded bytes to what is answered: decode, classify in batches, say how strange the image is, draw the map."""

import asyncio
import base64
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

from pydantic import BaseModel, Field

from raresynth.dataset.images import Pixels
from serving import metrics
from serving.batching import Batcher
from serving.errors import ApiError
from serving.models import Models, Verdict
from serving.settings import Settings
from serving.uploads import decode_upload


class Versions(BaseModel):
    """What answered."""

    bundle: str
    """SHA-256 of bundle.json."""
    data_version: str
    """`.dir` hash of the images that the models were made from."""


class OutOfDistribution(BaseModel):
    """How unlike the training images an image is."""

    score: float
    """Squared Mahalanobis distance of its features to the training images'."""
    threshold: float
    """95 % of the validation images stay under it."""
    flagged: bool
    """Whether the score lies above the threshold: then the probabilities mean little."""


class Prediction(BaseModel):
    """The answer for one image."""

    label: str
    probabilities: dict[str, float]
    """Calibrated; they add up to 1."""
    out_of_distribution: OutOfDistribution
    overlay_png: Annotated[str | None, Field(description="Base64 PNG, where asked for")] = None
    """Class activation map of the label over the image; null unless asked for."""
    versions: Versions


class ItemError(BaseModel):
    """Why one image of several has no prediction."""

    code: str
    message: str


class BatchItem(BaseModel):
    """The answer for one image of several: a prediction or an error."""

    index: int
    prediction: Prediction | None = None
    error: ItemError | None = None


class BatchPredictions(BaseModel):
    """The answer for several images, in their order."""

    items: list[BatchItem]


class Classification:
    """Answers for uploaded images."""

    def __init__(self, models: Models, settings: Settings, threads: ThreadPoolExecutor) -> None:
        self._models, self._settings, self._threads = models, settings, threads
        self.batcher: Batcher[Pixels, Verdict] = Batcher(
            models.predict, threads, settings.max_batch, settings.max_waiting, settings.threads
        )
        bundle = models.bundle
        self._versions = Versions(bundle=models.version, data_version=bundle.lineage.data_md5)

    async def predict(self, image: bytes, overlay: bool) -> Prediction:
        """The answer for one uploaded image.

        Raises:
            ApiError: the image is refused, an overlay cannot be had, or too many images wait.
        """
        if overlay and self._models.maps is None:
            message = "this classifier has no pooled linear head, so there are no activation maps; leave overlay out"
            raise ApiError("malformed", message)
        pixels = await self._in_thread(self._decode, image)
        answer = self.batcher.submit(pixels)
        metrics.waiting.set(self.batcher.waiting)
        verdict = await answer
        png = await self._in_thread(self._overlay, pixels, verdict) if overlay else None
        return self._prediction(verdict, png)

    async def predict_batch(self, images: Sequence[bytes], overlay: bool) -> BatchPredictions:
        """The answers for several uploaded images; those that are refused spoil no other.

        Raises:
            ApiError: none could be taken because too many wait.
        """
        answers = await asyncio.gather(*(self._item(index, image, overlay) for index, image in enumerate(images)))
        if all(item.error and item.error.code == "overloaded" for item in answers):
            raise ApiError("overloaded", "too many images wait already; try again", 1)
        return BatchPredictions(items=answers)

    async def _item(self, index: int, image: bytes, overlay: bool) -> BatchItem:
        try:
            return BatchItem(index=index, prediction=await self.predict(image, overlay))
        except ApiError as error:
            metrics.rejected.labels(error.code).inc()
            return BatchItem(index=index, error=ItemError(code=error.code, message=error.message))

    async def _in_thread(self, work, *arguments):  # type: ignore[no-untyped-def]
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _decode(self, image: bytes) -> Pixels:
        with metrics.timed("decode"):
            return decode_upload(image, self._models.resolution, self._settings)

    def _overlay(self, pixels: Pixels, verdict: Verdict) -> bytes:
        assert self._models.maps is not None
        with metrics.timed("encode"):
            return self._models.maps.overlay(pixels, verdict.features, int(verdict.probabilities.argmax()))

    def _prediction(self, verdict: Verdict, png: bytes | None) -> Prediction:
        labels, threshold = self._models.bundle.labels, self._models.outliers.threshold
        return Prediction(
            label=labels[int(verdict.probabilities.argmax())],
            probabilities=dict(zip(labels, verdict.probabilities.tolist(), strict=True)),
            out_of_distribution=OutOfDistribution(
                score=verdict.strangeness, threshold=threshold, flagged=verdict.strangeness > threshold
            ),
            overlay_png=None if png is None else base64.b64encode(png).decode(),
            versions=self._versions,
        )
