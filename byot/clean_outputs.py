"""Remove what is no longer needed of searches and runs.

  byot clean                  what --fresh replaced, damaged or outdated checkpoints, files of killed writers, and the
                              records that Ray makes anew
  byot clean --checkpoints    also the checkpoints of finished runs, which evaluate, predict and export need, and those
                              of trials that ended

Says what it would remove and asks. Without a terminal it only says it, unless --yes is given. What a process is using
is left alone, and so is everything that a symbolic link leads to.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from byot.list_outputs import FOLDERS, REPLACED, format_bytes, kept_folders, measure, read_entry
from byot.search_files import read_trials
from byot.system.files import describe_refusal
from byot.system.flags import Parser, one_line, one_sentence_errors, tell
from byot.system.lock import LOCK_FILE, is_locked, lock_folder
from byot.system.paths import outputs_folder

ENDED = ("completed", "stopped")  # a failed trial can be tried again, from its checkpoint


class Item(NamedTuple):
    """A file or folder that may be removed."""

    path: Path
    why: str


def build_parser() -> Parser:
    parser = Parser(prog="byot clean", description=__doc__)
    parser.add_argument("--checkpoints", action="store_true", help="also checkpoints of what has finished")
    parser.add_argument("--yes", action="store_true", help="remove without asking")
    parser.add_argument("--outputs", metavar="DIR", help="where runs and searches are kept (default: outputs/)")
    return parser


def list_owners(outputs: Path) -> list[tuple[str, Path]]:
    """List the folders in which something may be removed, each with its kind: search, run or replaced."""
    replaced = [(REPLACED, path) for name in FOLDERS.values() for path in sorted((outputs / name / REPLACED).glob("*"))]
    return [*replaced, *kept_folders(outputs)]


def find_removable(kind: str, folder: Path, checkpoints: bool) -> list[Item]:
    """List what may be removed in a folder that no process is using."""
    if kind == REPLACED:
        return _without_links([Item(folder, "replaced by --fresh")])
    items = []
    if kind == "search":
        items.append(Item(folder / "ray", "Ray's own records"))
    if checkpoints and read_entry("search" if kind == "search" else "run", folder).state != "damaged":
        if kind == "search":
            ended = [trial.trial_id for trial in read_trials(folder / "trials.csv") if trial.status in ENDED]
            found = [path for name in ended for path in sorted((folder / "trials" / name).rglob("checkpoints"))]
            items += [Item(path, "of a trial that ended") for path in found]
        elif (folder / "result.json").is_file():
            items.append(Item(folder / "checkpoints", "of a finished run"))
    items += [Item(path, "of a killed writer") for path in sorted(folder.rglob(".*.tmp"))]
    items += [Item(path, "damaged or outdated") for path in sorted(folder.rglob("left-*.pt"))]
    whole = [item.path for item in items if item.path.is_dir()]
    return _without_links([item for item in items if not any(other in item.path.parents for other in whole)])


def _without_links(items: list[Item]) -> list[Item]:
    """Keep what is there and reached through no symbolic link: the rest may lie outside of the outputs."""
    return [item for item in items if item.path.exists() and item.path.resolve() == item.path]


def locked_folders(folder: Path) -> list[Path]:
    """List this folder and those below it that have a lock file, held or not."""
    return [path.parent for path in (folder / LOCK_FILE, *folder.glob("*/**/" + LOCK_FILE)) if path.is_file()]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold all locks of a folder. Raises LockedError where another process holds one."""
    with ExitStack() as held:
        for place in dict.fromkeys([folder, *locked_folders(folder)]):
            held.enter_context(lock_folder(place, has_to_lock=True))
        yield


def remove(kind: str, folder: Path, shown: list[Item], checkpoints: bool) -> None:
    """Remove what was shown and, now that nobody else can change the folder, may still be removed."""
    if not folder.is_dir():
        folder.unlink()
        return
    with locked(folder):
        for item in set(shown).intersection(find_removable(kind, folder, checkpoints)):
            if item.path.is_dir():
                shutil.rmtree(item.path)
            else:
                item.path.unlink()


def ask(question: str) -> bool:
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("byot clean"):
        outputs = outputs_folder(arguments.outputs)
        plan, in_use = {}, []
        for kind, folder in list_owners(outputs):
            if any(map(is_locked, locked_folders(folder))):
                in_use.append(folder)
                continue
            try:
                items = find_removable(kind, folder, arguments.checkpoints)
            except ValueError as error:
                tell("byot clean", one_line(str(error)))
                continue
            if items:
                plan[kind, folder] = items
        rows = [(measure(item.path)[0], item) for items in plan.values() for item in items]
        for size, item in rows:
            print(f"{format_bytes(size):>7}  {one_line(str(item.path.relative_to(outputs)))}  ({item.why})")
        for folder in in_use:
            print(f" in use  {one_line(str(folder.relative_to(outputs)))}  (left alone)")
        if not rows:
            print(f"nothing to remove in {outputs}")
            return
        total = format_bytes(sum(size for size, _ in rows))
        if not (arguments.yes or sys.stdin.isatty()):
            print(f"{total} in {outputs} can be removed: --yes does it")
            return
        if not (arguments.yes or ask(f"remove these {total} in {outputs}?")):
            print("nothing was removed")
            return
    failed = False
    for (kind, folder), items in plan.items():
        try:
            remove(kind, folder, items, arguments.checkpoints)
        except (OSError, ValueError) as error:
            failed = True
            tell("byot clean", describe_refusal(error, folder) if isinstance(error, OSError) else str(error))
    if failed:
        raise SystemExit(1)
    print(f"removed {total}")


if __name__ == "__main__":
    main()
