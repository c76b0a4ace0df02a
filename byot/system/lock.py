"""A folder's lock, for one process at a time. It is the operating system's and ends with the process that holds it."""

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".lock"
LOOK_S = 0.5  # longer than another process holds a lock only to see whether it is free
WORKER_WAIT_S = 120.0  # until a worker of a killed search has noticed and ended
NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # some network file systems have none


class LockedError(ValueError):
    """Another process holds the lock."""


@contextmanager
def lock_folder(folder: Path, wait_s: float = LOOK_S, *, has_to_lock: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing. An unused new folder is removed.

    Raises LockedError if another process still holds the lock after `wait_s` seconds. On a file system without locks
    it warns and goes on, or raises OSError if it has to lock.
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
        if made and folder.exists() and {path.name for path in folder.iterdir()} <= {LOCK_FILE}:
            (folder / LOCK_FILE).unlink(missing_ok=True)
            with suppress(OSError):  # another process has written to a folder above meanwhile
                for path in made:
                    path.rmdir()
        lock.release()


def is_locked(folder: Path) -> bool:
    """Check whether a process holds the lock of a folder. Nothing is written; where it cannot be found out, False."""
    if not os.path.isfile(folder / LOCK_FILE):  # noqa: PTH113 (Path.is_file raises where it may not look)
        return False
    try:
        with lock_folder(folder, wait_s=0, has_to_lock=True):
            return False
    except LockedError:
        return True
    except OSError:
        return False
