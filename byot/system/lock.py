"""One process at a time in a folder: the lock is the operating system's and ends with the process that holds it."""

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".lock"
WORKER_WAIT_S = 120.0  # for a worker of a search that was killed, until it has noticed
NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # some network file systems have none


class LockedError(ValueError):
    """Another process holds the lock."""


@contextmanager
def lock_folder(folder: Path, wait_s: float = 0, *, has_to_lock: bool = False) -> Iterator[None]:
    """Make the folder if it is missing and hold its lock. Of one in which nothing was then written nothing is left.

    Raises LockedError if another process still holds the lock after `wait_s` seconds. Where no file can be locked it
    only warns, or raises OSError if it has to lock.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # deepest first
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE, fallback_to_soft=False)  # a soft lock would outlive its process
    try:
        lock.acquire(timeout=wait_s)
    except Timeout as error:
        raise LockedError(f"another process is writing to {folder}; wait for it or stop it first") from error
    except OSError as error:
        if has_to_lock or error.errno not in NO_LOCKS_HERE:
            raise
        warnings.warn(f"{folder} lies where no file can be locked: run one process at a time there", stacklevel=3)
    try:
        yield
    finally:
        if made and folder.exists() and [path.name for path in folder.iterdir()] in ([LOCK_FILE], []):
            (folder / LOCK_FILE).unlink(missing_ok=True)
            for path in made:
                if any(path.iterdir()):
                    break
                path.rmdir()
        lock.release()
