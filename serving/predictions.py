"""From uploaded bytes to what is answered: decode, classify in batches, say how strange the image is, draw the map."""

import asyncio
import base64
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from raresynth.dataset.images import Pixels
from serving import metrics
from serving.activation import ActivationMaps
from serving.answers import BatchItem, BatchPredictions, ItemError, OutOfDistribution, Prediction, Versions
from serving.batching import Batcher
from serving.errors import ApiError
from serving.models import Models, Verdict
from serving.settings import Settings
from serving.threads import Threads
from serving.uploads import decode_upload

P = ParamSpec("P")
T = TypeVar("T")


class Classification:
    """Answers for uploaded images."""

    def __init__(self, models: Models, settings: Settings) -> None:
        self._models, self._settings = models, settings
        self._threads = Threads(settings.threads, "decode")
        # Runs have threads of their own: queued behind uploads, a batch would lie ready without growing.
        self._runners = Threads(settings.threads, "classify")
        self._batcher: Batcher[Pixels, Verdict] = Batcher(
            models.predict,
            self._runners,
            settings.max_batch,
            settings.max_waiting,
            settings.threads,
            metrics.waiting.set,
        )
        bundle = models.bundle
        self._versions = Versions(bundle=models.version, data_version=bundle.lineage.data_md5)

    def oldest_s(self) -> float:
        """How long the oldest work has been under way, in seconds."""
        return max(self._threads.oldest_s(), self._runners.oldest_s())

    async def predict(self, image: bytes, overlay: bool) -> Prediction:
        """The answer for one uploaded image.

        Raises:
            ApiError: the image is refused, an overlay cannot be had, or too many images wait.
        """
        maps = self._models.maps if overlay else None
        if overlay and maps is None:
            message = "this classifier has no pooled linear head, so there are no activation maps; leave overlay out"
            raise ApiError("malformed", message)
        pixels = await self._in_thread(self._decode, image)
        verdict = await self._batcher.submit(pixels)
        png = await self._in_thread(self._overlay, maps, pixels, verdict) if maps else None
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

    async def _in_thread(self, work: Callable[P, T], *arguments: P.args, **_: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _decode(self, image: bytes) -> Pixels:
        with metrics.timed("decode"):
            return decode_upload(image, self._models.resolution, self._settings)

    def _overlay(self, maps: ActivationMaps, pixels: Pixels, verdict: Verdict) -> bytes:
        with metrics.timed("encode"):
            return maps.overlay(pixels, verdict.features, int(verdict.probabilities.argmax()))

    def _prediction(self, verdict: Verdict, png: bytes | None) -> Prediction:
        labels, threshold = self._models.bundle.labels, self._models.outliers.threshold
        return Prediction(
            label=labels[int(verdict.probabilities.argmax())],
            probabilities={
                label: round(share, 6) for label, share in zip(labels, verdict.probabilities.tolist(), strict=True)
            },
            out_of_distribution=OutOfDistribution(
                score=verdict.strangeness, threshold=threshold, flagged=verdict.strangeness > threshold
            ),
            overlay_png=None if png is None else base64.b64encode(png).decode(),
            versions=self._versions,
        )
