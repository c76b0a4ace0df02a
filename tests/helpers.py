"""Runs command lines, writes small data files, and compares folders and states for the tests."""

import hashlib
import html
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

from byot.config import DATASETS, TrainConfig
from byot.data import LABEL_COLUMNS, LabelledImages, Split, load_images, take
from byot.system.checkpoint import checkpoint_path, save_checkpoint
from byot.trainer import Trainer

PROJECT = Path(__file__).resolve().parents[1]
Call = Callable[..., tuple[int, str, str]]
Works = Callable[..., str]
ParquetMaker = Callable[..., Path]
Refuse = Callable[..., None]  # of the program, its arguments as a tuple, and words its sentence must have
Refused = Callable[..., None]
# Images leave at three exits by it, and nobody asks the third.
EXIT_RULE = {"temperatures": (0.7, 1.3, 0.9, 1.1), "thresholds": (0.4, 0.3, 2.0, 0.0)}
TIMES = {"elapsed_s", "images_per_s"}


def command_environment(**variables: str) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("BYOT_OUTPUTS", "PYTHONPATH")}
    return environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables


def command_line(script: str, *arguments: object, python: Sequence[str] = ()) -> list[str]:
    return [sys.executable, *python, str(PROJECT / script), *map(str, arguments)]


def run_command(
    arguments: Sequence[object],
    *,
    cwd: Path,
    script: str = "byot/train.py",
    python: Sequence[str] = (),
    before: Sequence[str] = (),
    code: int = 0,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run an entry script in a process of its own from another folder, as a user would, and check its exit code.

    `python` are options of the interpreter, `before` is a command that is to run it.
    """
    done = run_process([*before, *command_line(script, *arguments, python=python)], cwd, variables)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def start_command(
    arguments: Sequence[object],
    *,
    cwd: Path,
    script: str,
    before: Sequence[str] = (),
    output: Any = subprocess.PIPE,
    **variables: str,
) -> subprocess.Popen[str]:
    """Start an entry script as `run_command` runs it, in a process group of its own, as from a terminal."""
    command, environment = [*before, *command_line(script, *arguments)], command_environment(**variables)
    streams: dict[str, Any] = {"stdout": output, "stderr": output, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **streams)


def run_process(
    command: Sequence[str], cwd: Path, variables: dict[str, str], timeout_s: float = 900
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with these variables in its environment, and keep what it prints."""
    environment = command_environment(**variables)
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )


class FakeTerminal(io.StringIO):
    """Keeps what is written to it as a terminal would; with an error, fails as one that has gone away."""

    def __init__(self, error: OSError | None = None) -> None:
        super().__init__()
        self.error = error

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


def text_of(page: str) -> str:
    """Take the words of an HTML page."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def picture_of(folder: Path) -> dict[str, str]:
    """Map every path under a folder to a digest of its content: the same before and after if nothing was written."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def assert_one_sentence(stderr: str, *words: str) -> None:
    """Check that it is one line, without a traceback, that has these words."""
    assert stderr.count("\n") == 1, stderr
    assert stderr.endswith("\n")
    assert "Traceback" not in stderr
    for word in words:
        assert word in stderr


def encode_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def random_pixels(num_images: int, size: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_images, size, size, 3), dtype=np.uint8)


def few_digits(number: int, split: Split = "train") -> LabelledImages:
    return take(load_images("digits", None, split), np.arange(number))


def write_parquet(
    path: Path,
    num_images: int = 4,
    *,
    dataset: str = "cifar100",
    images: Sequence[bytes | None] | None = None,
    labels: Sequence[Any] | None = None,
) -> Path:
    """Write one file in the Hugging Face layout: `img` as struct{bytes, path} of PNG bytes, and a column of labels."""
    if images is None:
        images = [encode_png(pixels) for pixels in random_pixels(num_images, seed=len(path.name))]
    if labels is None:
        labels = [i % DATASETS[dataset].num_classes for i in range(len(images))]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    cells = pyarrow.array([{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)], type=kind)
    table = pyarrow.table({"img": cells, LABEL_COLUMNS[dataset]: pyarrow.array(labels)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)
    return path


def assert_same_state(found: Any, expected: Any, where: str = "state") -> None:
    """Check that two nests of dicts, lists, tensors and numbers are equal to the last bit, but for the time it took."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected.keys() - TIMES:
            assert_same_state(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same_state(a, b, f"{where}[{i}]")
    else:
        assert found == expected, where


def save_digits_run(folder: Path, **settings: Any) -> Path:
    """Train a small network on some of the digits and save it as a run's last checkpoint."""
    settings = {"recipe": "reference", "width": 4, "epochs": 2, "batch_size": 32, **settings}
    trainer = Trainer(TrainConfig(dataset="digits", device="cpu", **settings), few_digits(640))
    list(trainer)
    save_checkpoint(checkpoint_path(folder / "checkpoints", trainer.epoch), trainer.state_dict())
    return folder
