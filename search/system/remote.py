"""Keeps a folder's records in an object store: push() puts one there, pull() makes the folder a copy of what is there.

URL/NAME has under the same names what the folder NAME has on one machine, and beside it state/driver.json, the lease.
The driver's own folder is a copy without checkpoints. The driver pulls it when it starts, pushes each record as soon as
it is written, before anything that depends on it is done, and pulls a run's folder when that run ends. A worker works
in a temporary folder of its node: it fetches what the store has of its run and puts each checkpoint, then the other
files, there before it reports an epoch. An object appears whole, under its last name, or not at all.

No object can be locked: whoever wrote the lease last drives. A driver that has lost it ends within half a minute, or
before its next write.
"""

import errno
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from byot.system.files import read_json, write_json
from byot.system.lock import LOCK_FILE, LockedError, lock_folder

SCHEMES = ("s3", "gs", "gcs")
# Options that a URL gets unless it has them: small objects in one request instead of three; a minute of Google's
# repeated requests instead of 15.
OPTIONS = {"s3": "allow_delayed_open=true", "gs": "retry_limit_seconds=60", "gcs": "retry_limit_seconds=60"}
# Names of URL options whose values must not be in the commands and messages that are printed.
SECRET = re.compile("secret|token|passw|credential|key|sas|sig", re.IGNORECASE)
CHECKPOINTS = "checkpoints"
LEASE = "state/driver.json"
COPY_OF = "copy-of.json"  # in the driver's folder alone: the place of which it is a copy
NUM_THREADS = 16  # fetch small objects side by side
LOOK_EVERY_S = 30.0  # at the lease
ANSWER_TIMEOUT_S = 150.0  # of a store when it is first asked: Google's client tries for a minute
WORKING = "byot-run-"  # how the names of temporary working folders begin
ABANDONED_S = 60.0  # after this time a working folder is locked if it is in use

Save = Callable[[], None]


class TakenOverError(OSError):
    """Another driver has taken the lease."""


# ---------------------------------------------------------------- a bucket


class Bucket(NamedTuple):
    """A folder in an object store. What the store refuses is an OSError with a sentence and the object's place.

    It travels to workers, where it connects with the credentials that are found there.
    """

    url: str
    below: str = ""

    def __truediv__(self, name: str) -> "Bucket":
        return Bucket(self.url, f"{self.below}/{name}".strip("/"))

    def __str__(self) -> str:
        """The place without what the URL says of the connection."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}/{self.below}".rstrip("/")

    @contextmanager
    def _opened(self, name: str = "") -> Iterator[tuple[Any, str]]:
        """Yield pyarrow's file system and an object's path; give each refusal an errno, a sentence and a place."""
        from pyarrow import ArrowException

        try:
            files, root = _connect(self.url)
            yield files, "/".join(filter(None, (root, self.below, name)))
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self / name)) from error
        except (OSError, ArrowException) as error:
            raise OSError(errno.EIO, " ".join(str(error).split()), str(self / name)) from error

    def files(self) -> list[str]:
        """List all that lies in this folder and below, by names relative to it; nothing if there is no such folder."""
        from pyarrow.fs import FileSelector

        with self._opened() as (files, root):
            found = files.get_file_info(FileSelector(root, allow_not_found=True, recursive=True))
        names = [info.path.removeprefix(f"{root}/") for info in found if info.is_file]
        return [name for name in names if not {"..", "/"} & set(PurePosixPath(name).parts)]  # a key may be any text

    def read(self, name: str) -> bytes:
        with self._opened(name) as (files, path), files.open_input_file(path) as stream:
            data: bytes = stream.read()
        return data

    def write(self, name: str, data: bytes) -> None:
        with self._opened(name) as (files, path):
            stream = files.open_output_stream(path, compression=None)
            stream.write(data)  # in one piece: a stream that is closed halfway, as `with` would, is an object as well
            stream.close()

    def remove(self, name: str) -> None:
        with self._opened(name) as (files, path), suppress(FileNotFoundError):
            files.delete_file(path)

    def move(self, name: str, target: str) -> None:
        with self._opened(name) as (files, path):
            files.move(path, path.removesuffix(name) + target)

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Copy objects into a folder, under the same names; those that are not there any more are left out."""

        def fetch_one(name: str) -> None:
            with suppress(FileNotFoundError):
                data = self.read(name)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)

        with ThreadPoolExecutor(NUM_THREADS) as threads:
            list(threads.map(fetch_one, names))


@cache
def _connect(url: str) -> tuple[Any, str]:
    """Return pyarrow's file system of a URL and the path that the URL names in it."""
    from pyarrow.fs import FileSystem

    option = OPTIONS.get(urlsplit(url).scheme, "")
    if option and option.partition("=")[0] not in url:
        url += f"{'&' if '?' in url else '?'}{option}"
    files, root = FileSystem.from_uri(url)
    return files, root.rstrip("/")


def open_bucket(url: str) -> Bucket:
    """Return the place a --storage-path names. Raises ValueError where nothing can be kept there."""
    try:
        parts = urlsplit(url)
        has_secret = parts.password is not None or any(SECRET.search(name) for name, _ in parse_qsl(parts.query, True))
    except ValueError as error:
        raise ValueError(f"--storage-path {url.partition('?')[0]} is not a URL ({error})") from error
    if has_secret:  # it would be in every command and message that is printed
        raise ValueError("--storage-path must have no secret in it: credentials come from the environment")
    if parts.scheme not in SCHEMES:
        raise ValueError(
            f"--storage-path must be a folder or the URL of an object store ({', '.join(SCHEMES)}), not {parts.scheme}://"
        )
    if not parts.netloc or parts.fragment or ".." in PurePosixPath(parts.path).parts:
        raise ValueError(f"--storage-path {url} must be like {parts.scheme}://BUCKET/FOLDER")
    bucket = Bucket(url)
    told: list[str] = []

    def look() -> None:
        try:
            with bucket._opened() as (files, root):
                told.append("" if files.get_file_info(root.split("/")[0]).type else "there is no such bucket")
        except OSError as error:
            told.append(str(error.strerror))

    thread = Thread(target=look, daemon=True)  # a store that says nothing can be waited for, and Ctrl-C ends that
    thread.start()
    thread.join(ANSWER_TIMEOUT_S)
    trouble = told[0] if told else f"it did not answer within {ANSWER_TIMEOUT_S:.0f} s"
    if trouble:
        raise ValueError(f"--storage-path {bucket} cannot be used: {trouble}")
    return bucket


def is_checkpoint(name: str) -> bool:
    return CHECKPOINTS in PurePosixPath(name).parts


# ---------------------------------------------------------------- the driver's side


class Store:
    """Where a folder's records are kept: in a bucket, or in the folder itself; then most methods do nothing."""

    def __init__(self, folder: Path, bucket: Bucket | None = None, records: tuple[str, ...] = ()) -> None:
        """`records` names what the bucket keeps of the folder: files and folders in it. Without the first it is empty.

        `bucket` has the folder under the folder's own name.
        """
        self.folder = folder
        self.bucket = None if bucket is None else bucket / folder.name
        self.records = records
        self._driver = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now().isoformat()}
        self._next_look_at = 0.0  # on the monotonic clock

    def __str__(self) -> str:
        return str(self.bucket or self.folder)

    def place(self, folder: Path) -> Bucket | None:
        """Return where a folder in this one is kept."""
        return None if self.bucket is None else self.bucket / folder.relative_to(self.folder).as_posix()

    def push(self, path: Path) -> None:
        """Keep a record that has been written. Raises TakenOverError where another driver has the lease."""
        if self.bucket is not None:
            self.check_lease()
            self.bucket.write(path.relative_to(self.folder).as_posix(), path.read_bytes())

    def pull_run(self, folder: Path) -> None:
        """Copy what a run has written, without its checkpoints, into its folder."""
        if (place := self.place(folder)) is not None:
            place.fetch([name for name in place.files() if not is_checkpoint(name)], folder)

    def pull(self) -> None:
        """Make the folder a copy of the bucket's.

        Raises ValueError for a folder that is no such copy, or whose original is gone.
        """
        if self.bucket is None:
            return
        here = [path for path in self.folder.iterdir() if path.name != LOCK_FILE]
        if here and copied_from(self.folder) != str(self):
            raise ValueError(f"{self.folder} is no copy of {self}: give another --name or --outputs, or put it there")
        names = self.bucket.files()
        if self.records[0] in names:
            self._mark()
            for name in self.records:
                shutil.rmtree(self.folder / name, ignore_errors=True)
                with suppress(FileNotFoundError, IsADirectoryError):
                    (self.folder / name).unlink()
            self.bucket.fetch([name for name in names if self._is_record(name)], self.folder)
        elif (self.folder / self.records[0]).exists():
            raise ValueError(f"{self} has no {self.records[0]} any more, {self.folder} has a copy: put it back there")

    def _is_record(self, name: str) -> bool:
        passing = is_checkpoint(name) or name == LEASE or name.endswith(".tmp")
        return PurePosixPath(name).parts[0] in self.records and not passing

    def _mark(self) -> None:
        write_json(self.folder / COPY_OF, {"place": str(self)})

    def rename(self, folder: Path, target: Path) -> None:
        """Rename a folder in this one, and what is kept of it."""
        folder.rename(target)
        if (old := self.place(folder)) is not None and (new := self.place(target)) is not None:
            for name in old.files():
                Bucket(old.url).move(f"{old.below}/{name}", f"{new.below}/{name}")

    def drop_checkpoints(self, folder: Path) -> None:
        """Remove the checkpoints of a run that will not go on."""
        for path in [*folder.rglob(CHECKPOINTS)]:
            shutil.rmtree(path, ignore_errors=True)
        if (place := self.place(folder)) is not None:
            for name in filter(is_checkpoint, place.files()):
                place.remove(name)

    # ------------------------------------------------------------ the lease

    @contextmanager
    def lease(self) -> Iterator[str]:
        """Take the lease; yields a sentence if the driver before did not give it back. Raises OSError."""
        if self.bucket is None:
            yield ""
            return
        before = self._read_lease()
        self._mark()
        self.bucket.write(LEASE, json.dumps(self._driver).encode())
        who = f"on {before.get('host')} (process {before.get('pid')})"
        try:
            yield f"{self} was left by its driver {who} without a word; if that still runs, it ends now" * bool(before)
        finally:
            with suppress(OSError):  # an unreachable store is told otherwise
                if self._read_lease() == self._driver:
                    self.bucket.remove(LEASE)

    def check_lease(self) -> None:
        """Raise TakenOverError where another driver has the lease by now."""
        if self.bucket is not None and (found := self._read_lease()) != self._driver:
            host = found.get("host", "another machine")
            raise TakenOverError(errno.EBUSY, f"the driver on {host} goes on with it", str(self))

    def watch_lease(self) -> None:
        """Check the lease, at most once in LOOK_EVERY_S seconds; a store that does not answer says nothing about it."""
        if time.monotonic() >= self._next_look_at:
            self._next_look_at = time.monotonic() + LOOK_EVERY_S
            try:
                self.check_lease()
            except OSError as error:
                if isinstance(error, TakenOverError):
                    raise

    def _read_lease(self) -> dict[str, Any]:
        """Return what the last driver wrote; nothing where it is gone, or no driver writes such."""
        assert self.bucket is not None
        try:
            found = json.loads(self.bucket.read(LEASE))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def set_aside(self, *, leftovers: bool = False) -> str:
        """Move what the bucket has to replaced/NAME-TIME beside it; returns that place, nothing if nothing was there.

        The first record is moved first: what a kill leaves behind is then no search, and the next start sets it aside.
        With `leftovers` only such a rest is moved.
        """
        if self.bucket is None:
            return ""
        names = [name for name in self.bucket.files() if name != LEASE]
        if not names or (leftovers and self.records[0] in names):
            return ""
        around = Bucket(self.bucket.url)
        target = f"replaced/{self.folder.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
        for name in sorted(names, key=lambda name: name != self.records[0]):
            self.check_lease()
            around.move(f"{self.bucket.below}/{name}", f"{target}/{name}")
        return str(around / target)


def copied_from(folder: Path) -> str:
    """Return the place in an object store of which this folder is a copy; nothing if it is none."""
    path = folder / COPY_OF
    return str(read_json(path).get("place")) if path.is_file() else ""


# ---------------------------------------------------------------- a worker's side


@contextmanager
def working_folder(folder: Path, store: Store) -> Iterator[tuple[Path, Save]]:
    """Yield where a run does its work, and what it calls when it has written what is to last.

    That is its folder itself; where it is kept in a bucket, a temporary one with what is kept there.
    """
    place = store.place(folder)
    if place is None:
        yield folder, lambda: None
        return
    _remove_abandoned()
    with (
        tempfile.TemporaryDirectory(prefix=WORKING, ignore_cleanup_errors=True) as temporary,
        lock_folder(Path(temporary)),
    ):
        here = Path(temporary) / "run"
        here.mkdir()
        place.fetch(place.files(), here)
        known = _stamps(here)

        def save() -> None:
            nonlocal known
            store.check_lease()  # the old driver's worker may not have heard yet that it was taken over
            found = _stamps(here)
            gone = known.keys() - found.keys()
            if not all(map(is_checkpoint, gone)):  # no run removes a record: something else does
                raise FileNotFoundError(errno.ENOENT, "something has removed its files", str(here))
            new = [name for name, stamp in found.items() if known.get(name) != stamp]
            for name in sorted(new, key=lambda name: not is_checkpoint(name)):
                place.write(name, (here / name).read_bytes())
            for name in gone:
                place.remove(name)
            known = found

        yield here, save


def _remove_abandoned() -> None:
    """Remove the working folders of workers that were killed on this node: nobody holds their locks."""
    for folder in Path(tempfile.gettempdir()).glob(f"{WORKING}*"):
        with suppress(OSError, LockedError):  # another user's, at work, or where nothing says whether it is
            if time.time() - folder.stat().st_mtime > ABANDONED_S:
                with lock_folder(folder, has_to_lock=True):
                    shutil.rmtree(folder)


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return of each file that is not hidden what changes when it is written, by name."""
    found = {}
    for path in folder.rglob("[!.]*"):
        if path.is_file():
            status = path.stat()
            found[path.relative_to(folder).as_posix()] = (status.st_mtime_ns, status.st_size)
    return found


def try_bucket(place: Bucket) -> str:
    """Return what is wrong, seen from here, with reading and writing in a bucket; nothing if nothing is."""
    name = f"state/{socket.gethostname()}-{os.getpid()}.tmp"
    try:
        place.write(name, b"")
        place.remove(name)
        place.read(LEASE)  # another store than the driver's has none
    except OSError as error:
        return str(error.strerror)
    return ""
