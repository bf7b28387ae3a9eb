"""What the routes answer."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field


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


class BatchResult(BaseModel):
    """What a finished /generate_batch left."""

    path: str
    """Where the archive can be fetched."""
    sha256: str
    n_bytes: int
    n: int
    label: str


class TaskStatus(BaseModel):
    """Where a task stands."""

    task_id: str
    status: Literal["in_progress", "completed", "failed"]
    created_at: str | None = None
    executed_at: str | None = None
