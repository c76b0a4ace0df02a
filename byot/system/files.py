"""Files that are never seen half written, and the small JSON records kept in them."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from byot.system.paths import REPLACED


def write_json(path: Path, record: Any) -> None:
    """Write a record in one piece. NaN and infinity become null."""
    write_text(path, json.dumps(_finite(record), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in one piece."""
    write_whole(path, [text.encode()])


def write_output(path: Path, text: str) -> None:
    """Write what a command was asked to make. Raises ValueError, in one sentence, where the system refuses it."""
    with refusals_at(path):
        write_text(path, text)


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file that is never seen half written: to a temporary name, each part as it comes, flushed, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def set_aside(folder: Path) -> Path:
    """Move a folder that is to be made anew to replaced/NAME-TIME beside it, and return that. Nothing is deleted."""
    aside = folder.parent / REPLACED / f"{folder.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    aside.parent.mkdir(exist_ok=True)
    return folder.rename(aside)


@contextmanager
def errors_in(place: Path | str) -> Iterator[None]:
    """Put the name of the file, or of the place in it, before what is wrong there."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


@contextmanager
def refusals_at(place: Path | str) -> Iterator[None]:
    """Turn what the system refuses, as on a full disk, into a ValueError of one sentence."""
    try:
        yield
    except OSError as error:
        raise ValueError(describe_refusal(error, place)) from error


def describe_refusal(error: OSError, place: Path | str) -> str:
    """Say what the system refused: the file that the error names, else `place`, and why."""
    return f"{error.filename or place} cannot be read or written ({error.strerror or error})"


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


class UnreadableError(ValueError):
    """A file is not there or damaged; one whole but with other contents than expected raises a plain ValueError."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UnreadableError, in one sentence, if there is none at `path` or it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:  # too deeply nested
        raise UnreadableError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise UnreadableError(f"{path} does not hold a JSON object")
    return record


def write_json_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a .jsonl file in one piece."""
    write_text(path, "".join(json.dumps(_finite(record)) + "\n" for record in records))


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append one record to a .jsonl file and flush it to the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(record)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the records of a .jsonl file, none if there is no file. Damaged lines are left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        with suppress(ValueError, RecursionError):  # torn by a crash in the middle of writing
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON has no name for, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
