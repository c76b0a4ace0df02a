"""Checkpoints that are plain data, appear whole or not at all, and show when they are damaged.

A checkpoint is one file, `epoch-0012.pt`, written to a temporary name, flushed to the disk and renamed. Its zip
container carries a CRC-32 of every record, so truncation and flipped bits are found without a second file.
"""

import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

KEEP = 2  # checkpoints kept in a run's folder: the last one and the one before, should the last be damaged


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) so that `path` is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code it may carry. Raises ValueError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checkpoint {path} is damaged: its checksums do not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"there is no checkpoint {path}") from error
    except (OSError, RuntimeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"the checkpoint {path} is damaged or is not one") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"the checkpoint {path} holds more than plain data and is not loaded") from error
    if not isinstance(state, dict):
        raise ValueError(f"the checkpoint {path} was not written by this project")
    return state


def epoch_checkpoint(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch:04d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted(folder.glob("epoch-*.pt"), reverse=True)


def load_latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, or None where there is none. Warns of each damaged one it passes over."""
    for path in list_checkpoints(folder):
        try:
            return path, load_checkpoint(path)
        except ValueError as error:
            warnings.warn(f"{error}; going back to the one before", stacklevel=2)
    return None


def remove_old_checkpoints(folder: Path) -> None:
    for path in list_checkpoints(folder)[KEEP:]:
        path.unlink(missing_ok=True)
