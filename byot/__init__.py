"""Be Your Own Teacher (Zhang et al., ICCV 2019): the method and its trainer."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing it imports torch
    from byot.predictor import Predictor


def load(run: Path | str, device: str = "auto") -> "Predictor":
    """Load the trained network of a run's folder or of a checkpoint file, to predict with.

    Raises ValueError where there is none, or no such device.
    """
    from byot.predictor import Predictor
    from byot.runs import find_run

    return Predictor(find_run(run), device)
