"""What can go wrong for a user. Every message says what is wrong, where, and what to do."""

from collections.abc import Sequence


class RaresynthError(Exception):
    """An error that a user can cause and cure; shown as one sentence, exit code 2."""


class ParamsError(RaresynthError):
    """A params file holds an unknown or impossible knob."""


class DataError(RaresynthError):
    """The images or their metadata cannot be used as they are."""


class TooFewImages(DataError):
    """A class has too few images, real or synthetic, to be measured; other classes go on."""


class CheckpointError(RaresynthError):
    """A checkpoint, weights file or bundle is missing, damaged or of another kind."""


class MemoryLimitError(RaresynthError):
    """A configuration would need more memory than the limit in params allows."""


class TrainingCollapse(RaresynthError):
    """A loss stopped being a number, or a weight did.

    Attributes:
        step: optimizer step (counted from 1) at which it happened.
        loss: name of the first loss that was not finite, or of the weights.
    """

    def __init__(self, step: int, loss: str, advice: str = "") -> None:
        super().__init__(step, loss, advice)  # all of them, so that it can be sent from one process to another
        self.step = step
        self.loss = loss
        self.advice = advice

    def __str__(self) -> str:
        return f"training collapsed: {self.loss} is not a finite number at step {self.step}" + (
            f"; {self.advice}" if self.advice else ""
        )


INTERRUPTED = "interrupted; the same command goes on from here"
"""What is said on Ctrl-C."""


def describe(error: RaresynthError | OSError) -> str:
    """What a user can cure, as one sentence."""
    if isinstance(error, RaresynthError):
        return str(error)
    where = f" {error.filename}" if error.filename else ""
    return f"cannot read or write{where}: {error.strerror or error}; check the path, its permissions and the free space"


def enumerate_words(words: Sequence[str]) -> str:
    """Words joined as in a sentence: "a, b and c"."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part) if words else "none"
