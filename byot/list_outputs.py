"""List the searches and runs that are kept, the one written to last first.

  byot list                  state, model, width, data set, epochs, result, size on disk, when it was written to last
  byot list --format json    the same for programs; or csv

States: running; finished; interrupted (the same command goes on with it); killed (a search that ended without
recording it; it goes on too); damaged (its records cannot be read). The result of a search is its best single run,
that of a run its test accuracy. Reads files only.
"""

import csv
import json
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from byot.config import TrainConfig
from byot.search_files import (
    ROLE_SETTINGS,
    format_parameter,
    format_value,
    is_number,
    load_confirmation,
    load_search,
    unit,
)
from byot.system.files import errors_in, read_json
from byot.system.flags import Parser, one_line, one_sentence_errors
from byot.system.lock import LOCK_FILE, is_locked
from byot.system.paths import REPLACED, outputs_folder

Kind = Literal["search", "run"]
FOLDERS: dict[Kind, str] = {"search": "searches", "run": "runs"}
LOSS_WEIGHTS = tuple(ROLE_SETTINGS["reference"])
WIDTH = 80  # characters of a line


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A search or a run; what is not known of it is None."""

    kind: Kind
    name: str
    state: str
    model: str | None = None
    width: int | None = None
    dataset: str | None = None
    epochs: int | None = None
    alpha: float | None = None  # of a run, as the two below
    temperature: float | None = None
    beta: float | None = None
    metric: str | None = None
    value: float | None = None
    bytes: int = 0
    modified: str = ""  # ISO 8601, local time
    folder: str = ""
    error: str = ""  # what is damaged


def build_parser() -> Parser:
    parser = Parser(prog="byot list", description=__doc__)
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="what to print")
    parser.add_argument("--outputs", metavar="DIR", help="where runs and searches are kept (default: outputs/)")
    return parser


def kept_folders(outputs: Path) -> Iterator[tuple[Kind, Path]]:
    """Find the folders of searches and runs; an empty one, of a command that was refused, is passed over."""
    for kind, name in FOLDERS.items():
        for folder in sorted((outputs / name).glob("[!.]*")):
            if folder.is_dir() and folder.name != REPLACED:
                names = {path.name for path in folder.iterdir()}
                if names - {LOCK_FILE} or is_locked(folder):
                    yield kind, folder


def read_entry(kind: Kind, folder: Path) -> Entry:
    """Read what a folder holds. Nothing in it makes this fail."""
    known: dict[str, Any]
    try:
        known = _read_search(folder) if kind == "search" else _read_run(folder)
    except (OSError, ValueError) as error:
        known = {"state": "damaged", "error": str(error)}
    if is_locked(folder):
        known |= {"state": "running", "error": ""}  # its records may not be written yet
    size, written = measure(folder)
    when = datetime.fromtimestamp(written).isoformat(" ", "seconds")
    return Entry(kind=kind, name=folder.name, bytes=size, modified=when, folder=str(folder), **known)


def _what(config: TrainConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("model", "width", "dataset", "epochs")}


def _read_search(folder: Path) -> dict[str, Any]:
    search, confirmation = load_search(folder), load_confirmation(folder)
    known = _what(search.config) | {"state": search.status, "metric": search.metric}
    if search.status == "running":
        known["state"] = "killed"  # unless its lock is held
    elif confirmation is not None and confirmation.status != "finished":
        known["state"] = "interrupted"
    if (folder / "best.json").is_file():
        known["value"] = _take_number(folder / "best.json", "value")
    return known


def _read_run(folder: Path) -> dict[str, Any]:
    record = read_json(folder / "config.json")
    with errors_in(folder / "config.json"):
        config = TrainConfig.from_dict(record)
        weights = {name: getattr(config, name) for name in LOSS_WEIGHTS}
        known = _what(config) | weights | {"metric": "test_accuracy"}
    if not (folder / "result.json").is_file():
        return known | {"state": "interrupted"}
    return known | {"state": "finished", "value": _take_number(folder / "result.json", "test_accuracy")}


def _take_number(path: Path, name: str) -> float:
    value: Any = read_json(path).get(name)
    if not is_number(value):
        raise ValueError(f"{path} has no number as {name}")
    return float(value)


def measure(path: Path) -> tuple[int, float]:
    """Add up the bytes of a file or folder, and find when one was last written, in seconds since 1970."""
    size, written = 0, 0.0
    inside = [Path(place, name) for place, _, names in os.walk(path) for name in names]
    for file in inside if path.is_dir() else [path]:
        with suppress(OSError):  # removed meanwhile
            found = file.lstat()
            size += found.st_size
            if file.name != LOCK_FILE:
                written = max(written, found.st_mtime)
    return size, written


def format_bytes(size: float) -> str:
    for name in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {name}"
        size /= 1000
    return f"{size:.1f} GB"


def to_table(entries: list[Entry]) -> str:
    """Write two lines an entry: its name, which may be long, and below it what is known of it."""
    from byot.console import fold, text_table

    rows = []
    for one in entries:
        what = "" if one.model is None else f"{one.model} w{one.width} {one.dataset} e{one.epochs}"
        value = "" if one.value is None else format_value(str(one.metric), one.value)
        percent = " %" if value and unit(str(one.metric)) == "%" else ""
        rows.append((f"  {one.state}", what, value + percent, format_bytes(one.bytes), one.modified[:16]))
    header, *lines = text_table(("  state", "what", "result", "size", "last written"), rows, num_text=2).split("\n")
    text = [header]
    for one, line in zip(entries, lines, strict=True):
        weights = [f"{name} {format_parameter(getattr(one, name))}" for name in LOSS_WEIGHTS if one.alpha is not None]
        text += ["  ".join((f"{one.kind} {one.name}", *weights)), line]
        if one.error:
            why = one_line(one.error.replace(f"{one.folder}/", ""))
            text.append(textwrap.fill(why, WIDTH, initial_indent="    ", subsequent_indent="    "))
    return fold("\n".join(text))


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("byot list"):
        outputs = outputs_folder(arguments.outputs, only_read=True)
        entries = [read_entry(kind, folder) for kind, folder in kept_folders(outputs)]
    entries.sort(key=lambda one: one.modified, reverse=True)
    if arguments.format == "json":
        print(json.dumps([asdict(one) for one in entries], indent=2))
    elif arguments.format == "csv":
        writer = csv.DictWriter(sys.stdout, list(Entry.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(one) for one in entries)
    elif entries:
        print(to_table(entries))
        print(f"\n{len(entries)} in {outputs}: {format_bytes(sum(one.bytes for one in entries))}")
    else:
        print(f"no search and no run is in {outputs}")


if __name__ == "__main__":
    main()
