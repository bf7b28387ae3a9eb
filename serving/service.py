"""The BentoML service: its routes and nothing else."""

import gc
import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import bentoml
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from bentoml.validators import ContentType
from starlette.responses import Response
from starlette.types import ASGIApp

from raresynth.errors import RaresynthError, describe
from serving.answers import BatchPredictions, BatchResult, Prediction
from serving.approval import open_approved
from serving.connections import install
from serving.drain import Drain
from serving.errors import answered, log
from serving.front import Checks, Front
from serving.keys import Keys
from serving.metrics import hold_space
from serving.pages import pages
from serving.requests import Image, Images, LargeOrder, Order
from serving.settings import SERVER, read_settings

Zip = Annotated[Path, ContentType("application/zip")]
READ_ONLY = pages()
DRAIN = Drain()
CHECKS: Checks = {}


@contextmanager
def _or_never_again() -> Iterator[None]:
    """End the whole service, which would else start one worker after another: its parent had checked this."""
    try:
        yield
    except RaresynthError as error:
        if parent := os.environ.get(SERVER):
            log.error("cannot serve any more: %s", describe(error))
            os.kill(int(parent), signal.SIGTERM)
        raise


class Guarded(bentoml.Service):
    """A service behind its `Front`."""

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        """The app that BentoML's worker runs."""
        settings = read_settings()
        install()
        hold_space()
        app = super().to_asgi(is_main)
        # It runs the work as a task of its own, which no cancellation reaches; the deadline is the front's.
        app.user_middleware = [one for one in app.user_middleware if one.cls is not TimeoutMiddleware]
        with _or_never_again():
            return Front(app, settings, drain=DRAIN, checks=CHECKS)

    def schema(self) -> dict[str, Any]:
        """What /schema.json answers."""
        return self._schema

    @cached_property
    def _schema(self) -> dict[str, Any]:
        return dict(super().schema())


@bentoml.service(
    name="raresynth",
    service_class=Guarded,
    workers=1,  # one a pod, so that its limits and counts hold; more are more pods
    logging={"access": {"enabled": False}},  # the front logs, by request id
    tracing={"excluded_urls": [".*"]},  # nothing collects the spans, and four a request cost more than the front does
)
@bentoml.asgi_app(READ_ONLY, path="/")
class Raresynth:
    """Approved generators and the approved classifier of one bundle."""

    def __init__(self) -> None:
        from serving.card import model_card
        from serving.generation import Generation
        from serving.models import Models
        from serving.predictions import Classification

        settings = read_settings()
        with _or_never_again():
            models = Models(settings)
        READ_ONLY.state.card = model_card(models, settings.bundle)
        READ_ONLY.state.results_dir = settings.results_dir()
        self._timeout_s = settings.timeout_s
        self._classification = Classification(models, settings)
        self._generation = Generation(models, settings, READ_ONLY.state.results_dir)
        DRAIN.at_once(self._generation.stop)  # the batches that nobody will be able to fetch
        CHECKS["/generate_batch/submit"] = self._generation.check  # BentoML answers before it begins a task
        # All that is loaded stays: the collector, which looked it through, held up everyone for a tenth of a second.
        gc.collect()
        gc.freeze()

    @bentoml.on_deployment
    @staticmethod
    def refuse_what_cannot_be_served() -> None:
        """Before there is a worker that would die of it."""
        settings = read_settings()
        open_approved(settings.bundle, settings.bundle_sha256)
        if settings.keys_file:
            Keys(settings.keys_file)

    @bentoml.on_startup
    def forget_lost_tasks(self) -> None:
        """What a worker that died was at would be `in_progress` for ever."""
        with closing(sqlite3.connect(Path(os.environ["BENTOML_HOME"]) / "task_result.db")) as tasks, tasks:
            tasks.execute("DELETE FROM result WHERE status = 'in_progress'")

    async def __is_ready__(self) -> bool:
        """What waits longer was given up by all clients; then whoever asks next would wait in vain too."""
        return self._oldest_s() < 2 * self._timeout_s

    async def __is_alive__(self) -> bool:
        """A thread cannot be ended from outside: one that never comes back takes a new process."""
        return self._oldest_s() < 4 * self._timeout_s

    def _oldest_s(self) -> float:
        return max(self._classification.oldest_s(), self._generation.oldest_s())

    @bentoml.api(input_spec=Image)
    @answered
    async def predict(self, image: bytes, overlay: bool = False) -> Prediction:
        """Label, calibrated probabilities and strangeness of one image."""
        return await self._classification.predict(image, overlay)

    @bentoml.api(input_spec=Images)
    @answered
    async def predict_batch(self, images: list[bytes], overlay: bool = False) -> BatchPredictions:
        """The same for several images; one that is refused spoils no other."""
        return await self._classification.predict_batch(images, overlay)

    @bentoml.api(input_spec=Order)
    @answered
    async def generate(self, **order: Any) -> Zip:
        """Zip of synthetic images with manifest.json; equal orders give equal bytes."""
        archive = await self._generation.archive(Order(**order))
        disposition = f'attachment; filename="synthetic-{order["seed"]}.zip"'
        return Response(archive, 200, {"Content-Disposition": disposition}, "application/zip")  # type: ignore[return-value]

    @bentoml.task(input_spec=LargeOrder)
    @answered
    async def generate_batch(self, **order: Any) -> BatchResult:
        """Up to 10,000 images, as an archive to be fetched."""
        return await self._generation.batch(LargeOrder(**order))
