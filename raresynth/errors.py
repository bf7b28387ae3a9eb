"""What can go wrong for a user. Every message says what is wrong, where, and what to do."""


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
    """A loss stopped being a number.

    Attributes:
        step: optimizer step (counted from 1) at which it happened.
        loss: name of the first loss that was not finite.
    """

    def __init__(self, step: int, loss: str) -> None:
        super().__init__(f"training collapsed: {loss} is not a finite number at step {step}")
        self.step = step
        self.loss = loss
