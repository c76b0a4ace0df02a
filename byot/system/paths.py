"""Where the project keeps its files, and checks of paths and names that a person typed."""

import os
import re
from pathlib import Path

_CODE = Path(__file__).resolve().parents[2]  # a checkout, or where packages are installed
IS_CHECKOUT = (_CODE / "pyproject.toml").is_file()
# Installed, the folder that the command was started in: the environment tells it to Ray's workers, which run in others.
PROJECT_ROOT = _CODE if IS_CHECKOUT else Path(os.environ.setdefault("BYOT_PROJECT_ROOT", str(Path.cwd())))
REPLACED = "replaced"  # beside runs and searches: where --fresh moves them
SHIPPED_NETWORKS = _CODE / "results" / "networks"  # of a checkout
SHIPPED_FOLDER = _CODE / ("results/best" if IS_CHECKOUT else "byot/shipped")


def check_name(name: str) -> str:
    """Raise ValueError for a run or search name that is not one plain folder name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise ValueError(
            f"a name is made of at most 128 letters, digits, '.', '_' and '-', and begins with one of the first two, "
            f"not {name!r}"
        )
    if name == REPLACED:
        raise ValueError(f"the folder {REPLACED} is for what --fresh moves away; give another name")
    return name


def absolute_path(given: str | Path) -> Path:
    """Make a path as typed absolute: Ray's workers run in other folders. There need be nothing at it yet.

    Raises ValueError for what can be no path here: empty text, an unknown ~user, a name that is too long.
    """
    text = str(given)
    if not text:
        raise ValueError("a path must not be empty")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"a path cannot have a NUL or bytes that are not UTF-8 in it, as {text!r} has")
    try:
        path = Path(os.path.realpath(Path(text).expanduser()))
        path.stat()
    except RuntimeError as error:
        raise ValueError(f"{text} names the home of a user who is not known here") from error
    except (FileNotFoundError, NotADirectoryError):
        pass  # it may be made later; whoever reads it says that it is not there
    except OSError as error:
        raise ValueError(f"{text} cannot be read or written ({error.strerror})") from error
    return path


def outputs_folder(given: str | None, *, only_read: bool = False) -> Path:
    """Find where runs, searches and reports go: `--outputs`, else $BYOT_OUTPUTS, else outputs/ in PROJECT_ROOT.

    Raises ValueError where nothing can be written; if it is only read, where it is not a folder.
    """
    folder = default_outputs() if given is None else absolute_path(given)
    if not only_read:
        return check_writable(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    return folder


def default_outputs() -> Path:
    return absolute_path(os.environ.get("BYOT_OUTPUTS") or PROJECT_ROOT / "outputs")


def cache_folder() -> Path:
    """Find the folder of files that are slow to make and may be deleted.

    It is $BYOT_CACHE, else data/cache in the project's root, else, where that cannot be written, the user's own cache.
    """
    if given := os.environ.get("BYOT_CACHE"):
        return absolute_path(given)
    try:
        return check_writable(PROJECT_ROOT / "data" / "cache")
    except ValueError:
        return absolute_path(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "byot")


def check_writable(given: str | Path) -> Path:
    """Make a folder's path absolute. Raises ValueError unless it can be written to, or be made."""
    folder = absolute_path(given)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"nothing can be written to {folder}: {existing} is not a folder that may be written to")
    return folder


def check_writable_file(given: str | Path) -> Path:
    """Make the path of a file to be written absolute. Raises ValueError where it cannot be written."""
    path = absolute_path(given)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file to write to")
    check_writable(path.parent)
    return path
