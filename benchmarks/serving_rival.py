"""The same classifier behind FastAPI and torch, as one would write it who cares for speed.

Uploads are decoded in threads; while the network runs, what comes in waits and goes into its next run together;
inference_mode, channels_last, as many threads as asked for, and on demand torch.compile. No keys, limits or metrics.
Settings come from the environment, since uvicorn's workers import the module: BUNDLE, THREADS, COMPILED.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, UploadFile
from pydantic import BaseModel

from raresynth.bundle.contents import open_bundle, read_reference
from raresynth.bundle.predictor import preprocess
from raresynth.bundle.reference import pooled, strangeness
from raresynth.classifier import network
from raresynth.dataset.images import Pixels, decode_image

MAX_BATCH = 16


class Prediction(BaseModel):
    """As the other service answers, without the versions."""

    label: str
    probabilities: dict[str, float]
    score: float
    flagged: bool


class Model:
    """The classifier and its batches."""

    def __init__(self, folder: Path, threads: int, compiled: bool) -> None:
        torch.set_num_threads(threads)
        self.bundle = open_bundle(folder)
        reference = read_reference(folder)
        self._mean = np.array(reference["features"]["mean"])
        self._precision = np.array(reference["features"]["precision"])
        self._threshold = reference["strangeness"]["q95"]
        classifier, _ = network.load(folder / "classifier")
        graph: Any = network.WithFeatureMap(classifier).eval().to(memory_format=torch.channels_last)
        self._graph = torch.compile(graph, dynamic=True) if compiled else graph
        self._decoders = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        self._runner = ThreadPoolExecutor(1)
        self._waiting: asyncio.Queue[tuple[Pixels, asyncio.Future[Prediction]]] = asyncio.Queue()
        for n in (1, 2, MAX_BATCH):
            self._run([np.zeros((self.resolution, self.resolution, 3), np.uint8)] * n)

    @property
    def resolution(self) -> int:
        return self.bundle.classifier.resolution

    async def predict(self, content: bytes) -> Prediction:
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(self._decoders, decode_image, content, self.resolution)
        answer: asyncio.Future[Prediction] = loop.create_future()
        self._waiting.put_nowait((pixels, answer))
        return await answer

    async def serve(self) -> None:
        """Run batches for ever."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < MAX_BATCH and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            images = [pixels for pixels, _ in batch]
            answers = await asyncio.get_running_loop().run_in_executor(self._runner, self._run, images)
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)

    def _run(self, images: list[Pixels]) -> list[Prediction]:
        inputs = torch.from_numpy(preprocess(np.stack(images))).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            logits, features = self._graph(inputs)
            probabilities = torch.softmax(logits / self.bundle.classifier.temperature, dim=1).tolist()
        scores = strangeness(pooled(features.numpy()), self._mean, self._precision)
        return [self._prediction(row, float(score)) for row, score in zip(probabilities, scores, strict=True)]

    def _prediction(self, probabilities: list[float], score: float) -> Prediction:
        labels = self.bundle.labels
        return Prediction(
            label=labels[int(np.argmax(probabilities))],
            probabilities=dict(zip(labels, probabilities, strict=True)),
            score=score,
            flagged=score > self._threshold,
        )


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    model = Model(Path(os.environ["BUNDLE"]), int(os.environ["THREADS"]), os.environ["COMPILED"] == "1")
    app.state.model = model
    running = asyncio.create_task(model.serve())
    yield
    running.cancel()


app = FastAPI(lifespan=lifespan)


@app.get("/readyz")
async def readyz() -> str:
    return "ready"


@app.post("/predict")
async def predict(image: UploadFile) -> Prediction:
    model: Model = app.state.model
    return await model.predict(await image.read())
