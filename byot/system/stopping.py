"""Why training stops before its last epoch: a signal (the step at hand is still finished and saved) or an error."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(Exception):
    """Training was asked to stop by a signal; its state is saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class TrainingError(RuntimeError):
    """Training cannot go on, and doing it again would end the same; one sentence says why and what would help."""


class DivergedError(TrainingError):
    """The loss became NaN or infinite; the weights are of no use any more."""


class OutOfMemoryError(TrainingError):
    """The device has not enough memory for the model, a batch and what else is on it."""


@contextmanager
def catch_stop_signals() -> Iterator[Callable[[], int]]:
    """Note the first signal to stop instead of obeying it; a second one acts as ever.

    Yields a function that returns the signal's number, 0 as long as there was none.
    """
    received = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number
        restore()

    def restore() -> None:
        for stop_signal, handler in before.items():
            signal.signal(stop_signal, handler)

    before = {stop_signal: signal.getsignal(stop_signal) for stop_signal in STOP_SIGNALS}
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, note)
    try:
        yield lambda: received
    finally:
        restore()
