"""Classifies pictures of any size with a trained network that stops at the first exit that is sure enough.

B batch, K exits shallow to deep, S = image size of the network in pixels.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from byot.batches import mean_and_std, normalise
from byot.config import NUM_CLASSIFIERS
from byot.exits import ExitRule, exit_alone, load_rule, predict_early
from byot.image_files import read_square, to_square
from byot.model import fold_batch_norms
from byot.runs import SavedRun, class_names, load_network
from byot.trainer import EVAL_BATCH_SIZE, choose_device

Picture = Path | str | Image.Image
# By this rule the fourth exit, which every network has, answers for every image.
DEEPEST_ALONE = ExitRule((1.0,) * NUM_CLASSIFIERS, exit_alone(NUM_CLASSIFIERS - 1, NUM_CLASSIFIERS))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer for one image."""

    name: str  # of the most probable class
    probability: float
    exit: int  # that answered: 1 to 4
    ms: float  # the network's time for the image's batch, divided by the images in it
    top: tuple[tuple[str, float], ...]  # the most probable classes and their probabilities


class Predictor:
    """A trained network with the names of its classes and its rule for stopping early, in float32."""

    def __init__(self, saved: SavedRun, device: str = "auto") -> None:
        self.device = choose_device(device)
        model, normalisation = load_network(saved)
        self.model = fold_batch_norms(model).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.mean, self.std = mean_and_std(normalisation, self.device)
        self.class_names = class_names(saved)
        self.image_size = saved.config.image_size
        self.batch_size = EVAL_BATCH_SIZE[self.device.type]
        rule = load_rule(saved.folder)
        self.stops_early = rule is not None
        self.rule = DEEPEST_ALONE if rule is None else rule
        self.answer(np.zeros((1, self.image_size, self.image_size, 3), np.uint8))  # the first time takes twice as long

    def predict(self, images: Picture | Sequence[Picture] | np.ndarray, top: int = 5) -> list[Prediction]:
        """Classify image files, PIL images, or an array uint8 [N, H, W, 3].

        Raises ValueError for a file that is no image, for an array of other numbers, and for a `top` below 1.
        """
        if top < 1:
            raise ValueError(f"top must be at least 1, not {top}")
        if isinstance(images, Picture):
            images = [images]
        if isinstance(images, np.ndarray) and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3):
            raise ValueError(f"images must be uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}")
        predictions = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            predictions += self.answer(np.stack([to_pixels(image, self.image_size) for image in batch]), top)
        return predictions

    def answer(self, pixels: np.ndarray, top: int = 5) -> list[Prediction]:
        """Classify one batch of the network's own image size, uint8 [B, S, S, 3]."""
        started = time.perf_counter()
        images = normalise(torch.from_numpy(pixels).to(self.device), self.mean, self.std)
        logits, exits = predict_early(self.model, images, self.rule)
        temperatures = torch.tensor(self.rule.temperatures, device=self.device)
        probabilities = (logits / temperatures[exits, None]).softmax(dim=1)
        best = probabilities.topk(min(top, len(self.class_names)))
        rows = zip(best.values.tolist(), best.indices.tolist(), exits.tolist(), strict=True)
        ms = (time.perf_counter() - started) * 1000 / len(pixels)
        predictions = []
        for values, classes, exit_index in rows:
            named = tuple((self.class_names[c], value) for c, value in zip(classes, values, strict=True))
            name, probability = named[0]
            predictions.append(Prediction(name=name, probability=probability, exit=exit_index + 1, ms=ms, top=named))
        return predictions


def to_pixels(image: Picture | np.ndarray, size: int) -> np.ndarray:
    """Make the square in the middle of a picture an array uint8 [size, size, 3].

    Turned as its EXIF says, the first frame of several, on white where it is transparent. A picture of that size
    already keeps its pixels. Raises ValueError, in one sentence, for a file that is no PNG, JPEG or WebP.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return to_square(image, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow says of odd files that it can read
        return read_square(Path(image), size)
