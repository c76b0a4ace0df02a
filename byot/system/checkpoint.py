"""Checkpoints that are plain data, appear whole or not at all, and show when they are damaged.

A checkpoint is one file, `epoch-0012.pt` after twelve epochs or `epoch-0012-step-000100.pt` a hundred steps later,
written to a temporary name, flushed to the disk and renamed. It is what torch.save writes, a zip archive, with the
SHA-256 of it all as the archive's comment, so torch.load reads it as well.
"""

import hashlib
import io
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from byot.system.files import remove_leftovers, write_whole

COMMENT_LENGTH = hashlib.sha256().digest_size * 2  # in hexadecimal
NO_COMMENT = (0).to_bytes(2, "little")  # a zip archive ends with its comment's length and the comment
KEEP = 2  # checkpoints kept in a run's folder: the last one and the one before, should the last be damaged


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) so that `path` is never half written."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    archive = buffer.getbuffer()
    assert archive[-2:] == NO_COMMENT
    write_whole(path, archive[:-2], _comment(archive))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code it may carry.

    Raises ValueError if it is damaged; OSError and MemoryError say nothing of it, the next time it may be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"there is no checkpoint {path}") from error
    except IsADirectoryError as error:
        raise ValueError(f"the checkpoint {path} cannot be read ({error.strerror})") from error
    archive = data[: -COMMENT_LENGTH - 2] + NO_COMMENT
    if data[-COMMENT_LENGTH - 2 :] != _comment(archive):
        raise ValueError(f"the checkpoint {path} is damaged, or was not written by this project")
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as records:  # torch.save compresses nothing: one that grows is a trap
            grows = sum(record.file_size for record in records.infolist()) > len(archive)
        state = None if grows else torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:  # reading what was crafted raises whatever it was crafted to raise
        if is_out_of_memory(error):
            raise
        raise ValueError(f"the checkpoint {path} holds other than plain data and is not loaded") from error
    if not isinstance(state, dict):
        raise ValueError(f"the checkpoint {path} was not written by this project")
    return state


def _comment(archive: bytes | memoryview) -> bytes:
    return COMMENT_LENGTH.to_bytes(2, "little") + hashlib.sha256(archive).hexdigest().encode()


def checkpoint_path(folder: Path, epoch: int, step: int = 0) -> Path:
    """Where the state after so many epochs and steps of the next one is kept."""
    return folder / (f"epoch-{epoch:04d}-step-{step:06d}.pt" if step else f"epoch-{epoch:04d}.pt")


def checkpoint_position(path: Path) -> tuple[int, int]:
    """The epochs and steps in a checkpoint's name; (-1, 0) for a name that has none."""
    match = re.fullmatch(r"epoch-(\d+)(?:-step-(\d+))?", path.stem, re.ASCII)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first. Files that somebody named otherwise are none."""
    found = [path for path in folder.glob("epoch-*.pt") if checkpoint_position(path) >= (0, 0)]
    return sorted(found, key=checkpoint_position, reverse=True)


def load_latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, or None where there is none. Warns of each damaged one it passes over."""
    for path in list_checkpoints(folder):
        try:
            return path, load_checkpoint(path)
        except ValueError as error:
            warnings.warn(f"{error}; going back to the one before", stacklevel=2)
    return None


def pass_over_newer(folder: Path, epoch: int, step: int) -> None:
    """Rename to left-… the checkpoints of later positions: damaged ones, and those that a run going back will redo."""
    for path in list_checkpoints(folder):
        if checkpoint_position(path) > (epoch, step):
            path.rename(path.with_name(f"left-{path.name}"))


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python found too little memory, on whatever device."""
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in said or "not enough memory" in said)
    )


def remove_old_checkpoints(folder: Path) -> None:
    """Remove all but the last two, and what processes killed while writing have left."""
    for path in list_checkpoints(folder)[KEEP:]:
        path.unlink(missing_ok=True)
    remove_leftovers(folder)
