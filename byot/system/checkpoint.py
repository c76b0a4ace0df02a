"""Checkpoints that are plain data, appear whole or not at all, and show when they are damaged.

A checkpoint is one file, `epoch-0012.pt` after twelve epochs or `epoch-0012-step-000100.pt` a hundred steps later,
written to a temporary name, flushed to the disk and renamed. It is what torch.save writes, a zip archive, with the
SHA-256 of it all as the archive's comment, so torch.load reads it as well.
"""

import hashlib
import io
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from byot.system.files import remove_leftovers, write_whole

COMMENT_LENGTH = hashlib.sha256().digest_size * 2  # in hexadecimal
NO_COMMENT = (0).to_bytes(2, "little")  # a zip archive ends with its comment's length and the comment
KEEP = 2  # checkpoints kept in a run's folder: the last one and the one before, should the last be damaged


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors, numbers, strings, and lists and dicts of them, so that `path` is never half written."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    archive = buffer.getbuffer()
    assert archive[-2:] == NO_COMMENT
    write_whole(path, [archive[:-2], _comment(archive)])


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code it may carry.

    Raises ValueError if it is damaged. OSError and MemoryError are transient and propagate.
    """
    data = path.read_bytes()
    archive = data[: -COMMENT_LENGTH - 2] + NO_COMMENT
    if data[-COMMENT_LENGTH - 2 :] != _comment(archive):
        raise ValueError(f"the checkpoint {path} is damaged, or was not written by this project")
    try:
        state = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what is no plain data
        if is_out_of_memory(error):
            raise
        raise ValueError(f"the checkpoint {path} holds other than plain data and is not loaded") from error
    if not isinstance(state, dict):
        raise ValueError(f"the checkpoint {path} was not written by this project")
    return state


def _comment(archive: bytes | memoryview) -> bytes:
    return COMMENT_LENGTH.to_bytes(2, "little") + hashlib.sha256(archive).hexdigest().encode()


def checkpoint_path(folder: Path, epoch: int, step: int = 0) -> Path:
    """Name the file of the state after so many epochs, and so many steps of the next one."""
    return folder / (f"epoch-{epoch:04d}-step-{step:06d}.pt" if step else f"epoch-{epoch:04d}.pt")


def checkpoint_position(path: Path) -> tuple[int, int]:
    """Read the epochs and steps from a checkpoint's name; (-1, 0) for a name that has none."""
    match = re.fullmatch(r"epoch-(\d+)(?:-step-(\d+))?", path.stem, re.ASCII)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, newest first, without files that somebody named otherwise."""
    found = [path for path in folder.glob("epoch-*.pt") if checkpoint_position(path) >= (0, 0)]
    return sorted(found, key=checkpoint_position, reverse=True)


def load_latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Load the newest checkpoint that is whole; None where there is none. Warns of each damaged one."""
    for path in list_checkpoints(folder):
        try:
            return path, load_checkpoint(path)
        except (ValueError, FileNotFoundError, IsADirectoryError) as error:
            warnings.warn(f"{error}; going back to the one before", stacklevel=2)
    return None


def set_aside_newer(folder: Path, epoch: int, step: int) -> None:
    """Rename to left-… the checkpoints of later epochs and steps: a run that goes on from here makes them again."""
    for path in list_checkpoints(folder):
        if checkpoint_position(path) > (epoch, step):
            path.rename(path.with_name(f"left-{path.name}"))


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether torch or Python ran out of memory, on whatever device."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in words)
    )


def remove_old_checkpoints(folder: Path) -> None:
    """Remove all checkpoints but the last two, and the temporary files of processes that were killed."""
    for path in list_checkpoints(folder)[KEEP:]:
        path.unlink(missing_ok=True)
    remove_leftovers(folder)
