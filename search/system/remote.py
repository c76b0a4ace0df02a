"""A search that is kept in an object store: what counts is there, and here is a copy of its records.

URL/NAME has under the same names what outputs/searches/NAME has on one machine (search/records.py), and beside it
state/driver.json, which says what drives the search. The driver's own folder is a copy without checkpoints, made anew
when a search goes on; each record is put into the store as soon as it is written, before anything that depends on it
is done. A trial works in a temporary folder of its node: what the store has of it is fetched first, each checkpoint and
then metrics.jsonl is put there before the epoch is reported. An object appears whole, under its last name, or not at
all. No object can be locked: whoever writes state/driver.json last drives the search, and any other driver ends within
half a minute, or when it is about to write.
"""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from byot.system.files import read_json, write_json
from byot.system.lock import LOCK_FILE, LockedError, lock_folder

SCHEMES = ("s3", "gs", "gcs")
# Unless the URL says otherwise. Small objects in one request, which else take three; Google's repeats for 15 minutes.
OPTIONS = {"s3": "allow_delayed_open=true", "gs": "retry_limit_seconds=60", "gcs": "retry_limit_seconds=60"}
# What may be in the name of an option whose value must not be in every command and message that is printed.
SECRET = re.compile("secret|token|passw|credential|key|sas|sig", re.IGNORECASE)
ANSWER_TIMEOUT_S = 150  # for a store to say whether a bucket is there
# In a process of its own, which can be ended: pyarrow's clients repeat what is not answered, one step after another.
LOOK = """
import sys
try:
    from pyarrow.fs import FileSystem
    files, root = FileSystem.from_uri(sys.argv[1])
    sys.exit("there is no such bucket" if files.get_file_info(root.split("/")[0]).type.name == "NotFound" else 0)
except Exception as error:
    sys.exit(" ".join(str(error).split()))
"""
CHECKPOINTS = "checkpoints"
DRIVER = "state/driver.json"
REPLACING = "state/replacing.json"  # while what the store has of a search is set aside: to where
LEFTOVER = ".tmp"  # how the name ends of what a node writes to see whether it can
COPY_OF = "copy-of.json"  # in the driver's folder alone: the place of which it is a copy
RECORDS = ("search.json", "trials.csv", "best.json", "warm_start.json", "confirmation.json")
FOLDERS = ("state", "trials", "confirmation")
NUM_THREADS = 16  # that fetch small objects side by side
LOOK_EVERY_S = 30.0  # by a driver at whether it still drives
READ_ATTEMPTS = 3  # of a trial's folder from which a worker that is about to end still removes an old checkpoint
TEMPORARY = "byot-run-"  # how the names of working folders begin
ABANDONED_S = 60.0  # by when a working folder is locked if it is in use

Save = Callable[[], None]


def is_url(place: str | None) -> bool:
    return place is not None and "://" in place


class TakenOverError(OSError):
    """Another driver goes on with this search."""


class Owner(NamedTuple):
    """A driver and the search that it drives."""

    search: str  # its folder below the URL's
    driver: dict[str, Any]  # as it stands in the store


class Bucket:
    """A folder in an object store. What the store refuses is an OSError with a sentence and the object's place.

    It travels to workers as its URL and connects when it is first used, with the credentials that are found there.
    """

    def __init__(self, url: str, below: str = "", owner: "Owner | None" = None) -> None:
        """`owner` is the driver for which workers write here."""
        self.url = url
        self.below = below
        self.owner = owner

    def __reduce__(self) -> tuple[Any, ...]:
        return Bucket, (self.url, self.below, self.owner)

    def __truediv__(self, name: str) -> "Bucket":
        return Bucket(self.url, f"{self.below}/{name}".lstrip("/"), self.owner)

    def check_owner(self) -> None:
        """Raise TakenOverError if another driver has the search by now."""
        if self.owner is None:
            return
        search = Bucket(self.url, self.owner.search)
        found = search.read_object(DRIVER)
        if found != self.owner.driver:
            host = found.get("host", "another machine")
            raise TakenOverError(errno.EBUSY, f"the driver on {host} goes on with this search", str(search))

    def __str__(self) -> str:
        """The place without what the URL says of the connection."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}/{self.below}".rstrip("/")

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system of pyarrow's and the folder's path in it."""
        from pyarrow.fs import FileSystem

        files, root = FileSystem.from_uri(with_options(self.url))
        return files, f"{root.rstrip('/')}/{self.below}".rstrip("/")

    @contextmanager
    def _refusals(self, name: str = "") -> Iterator[None]:
        """Give what pyarrow raises, whatever it is, an errno, one sentence and a place."""
        from pyarrow import ArrowException

        place = f"{self}/{name}".rstrip("/")
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place) from error
        except (OSError, ArrowException) as error:
            raise OSError(errno.EIO, " ".join(str(error).split()), place) from error

    def check(self) -> None:
        """Raise ValueError, in one sentence, unless the URL is one of a bucket that answers."""
        command = [sys.executable, "-c", LOOK, with_options(self.url)]
        try:
            looked = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=ANSWER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            trouble = f"it did not answer within {ANSWER_TIMEOUT_S} s"
        else:
            trouble = looked.stderr.strip() if looked.returncode == 1 else ""
            if looked.returncode not in (0, 1):
                trouble = f"its client ended with code {looked.returncode}"
        if trouble:
            raise ValueError(f"--storage-path {self} cannot be used: {trouble}")

    def files(self) -> list[str]:
        """The names, relative to this folder, of all that lies in it and below; none where there is no such folder."""
        from pyarrow.fs import FileSelector, FileType

        with self._refusals():
            files, root = self._opened
            found = files.get_file_info(FileSelector(root, allow_not_found=True, recursive=True))
        names = [info.path.removeprefix(f"{root}/") for info in found if info.type == FileType.File]
        return [name for name in names if ".." not in PurePosixPath(name).parts]  # a key may be any text

    def folders(self) -> list[str]:
        """The names of the folders in this one."""
        from pyarrow.fs import FileSelector, FileType

        with self._refusals():
            files, root = self._opened
            found = files.get_file_info(FileSelector(root, allow_not_found=True))
        return [info.base_name for info in found if info.type == FileType.Directory]

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError where there is no such object."""
        with self._refusals(name):
            files, root = self._opened
            with files.open_input_file(f"{root}/{name}") as stream:
                data: bytes = stream.read()
        return data

    def read_object(self, name: str) -> dict[str, Any]:
        """A JSON object; empty where there is none or it is damaged."""
        try:
            found = json.loads(self.read(name))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, name: str, data: bytes) -> None:
        with self._refusals(name):
            files, root = self._opened
            stream = files.open_output_stream(f"{root}/{name}", compression=None)
            stream.write(data)  # in one piece: a stream that is closed halfway, as `with` would, is an object as well
            stream.close()

    def remove(self, name: str) -> None:
        with self._refusals(name), suppress(FileNotFoundError):
            files, root = self._opened
            files.delete_file(f"{root}/{name}")

    def move(self, name: str, target: str) -> None:
        with self._refusals(name):
            files, root = self._opened
            files.move(f"{root}/{name}", f"{root}/{target}")

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Copy objects into a folder, under the same names."""

        def fetch_one(name: str) -> None:
            data = self.read(name)
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

        with ThreadPoolExecutor(NUM_THREADS) as threads:
            list(threads.map(fetch_one, names))


def with_options(url: str) -> str:
    """The URL with what pyarrow is told of every store of its kind."""
    option = OPTIONS.get(urlsplit(url).scheme, "")
    if not option or option.partition("=")[0] in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}{option}"


def open_bucket(url: str) -> Bucket:
    """The place a --storage-path names. Raises ValueError, in one sentence, where that is none to keep a search in."""
    try:
        parts = urlsplit(url)
        has_password = parts.password is not None
    except ValueError as error:
        raise ValueError(f"--storage-path {url.partition('?')[0]} is not a URL ({error})") from error
    if any(SECRET.search(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True)):
        raise ValueError("--storage-path must have no secret in its query: credentials come from the environment")
    if parts.scheme not in SCHEMES:
        raise ValueError(
            f"--storage-path must be a folder or the URL of an object store ({', '.join(SCHEMES)}), not {parts.scheme}://"
        )
    if has_password:  # it would be in every command and message that is printed
        raise ValueError("--storage-path must have no password in it: credentials come from the environment")
    if not parts.netloc or parts.fragment or ".." in PurePosixPath(parts.path).parts:
        raise ValueError(f"--storage-path {url} must be like {parts.scheme}://BUCKET/FOLDER")
    bucket = Bucket(url)
    bucket.check()
    return bucket


def is_checkpoint(name: str) -> bool:
    return CHECKPOINTS in PurePosixPath(name).parts


def is_record(name: str) -> bool:
    """Whether an object is one of those that the driver's folder has a copy of."""
    parts = PurePosixPath(name).parts
    passing = is_checkpoint(name) or name in (DRIVER, REPLACING) or name.endswith(LEFTOVER)
    return not passing and (parts[0] in FOLDERS or name in RECORDS)


class Kept:
    """Where a search is kept: in its folder itself, so that nothing is left to do."""

    bucket: Bucket | None = None

    def place(self, folder: Path) -> Bucket | None:
        """Where a trial's or a run's folder is kept; None: where it is."""
        return None

    def put(self, path: Path) -> None:
        """Keep a record that has been written."""

    def look(self) -> None:
        """To be called often. Raises TakenOverError once another driver goes on with the search."""

    def fetch_run(self, folder: Path) -> None:
        """Bring what a trial or a run wrote, but for its checkpoints."""

    def drop_checkpoints(self, folder: Path) -> None:
        """Remove the checkpoints of a trial that will not go on."""

    def rename(self, folder: Path, target: Path) -> None:
        """Follow the renaming of a trial's folder."""


class KeptInBucket(Kept):
    """In an object store; `folder` is the driver's copy, whose lock it holds."""

    def __init__(self, bucket: Bucket, folder: Path) -> None:
        self._driver = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now().isoformat()}
        search = (bucket / folder.name).below
        self.bucket: Bucket = Bucket(bucket.url, search, Owner(search, self._driver))
        self.folder = folder
        self._next_look_at = 0.0  # on the monotonic clock

    def place(self, folder: Path) -> Bucket:
        return self.bucket / self._name(folder)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    # ------------------------------------------------------------ as a search begins and ends

    def fetch(self) -> None:
        """Make the folder a copy of what the store has. Raises ValueError for a folder that is no such copy."""
        held = [path for path in self.folder.iterdir() if path.name != LOCK_FILE]
        if held and copied_from(self.folder) != str(self.bucket):
            raise ValueError(
                f"{self.folder} is no copy of {self.bucket}: give another --name or --outputs, or put it there"
            )
        there = self.bucket.files()
        if REPLACING in there:  # what is still there is of a search that was to be replaced
            self._clear()
            return
        names = [name for name in there if is_record(name)]
        if not names:
            if any((self.folder / name).exists() for name in ("search.json", "trials")):
                raise ValueError(f"{self.bucket} holds no search any more, {self.folder} has a copy: put it back there")
            return
        self._clear()
        self._mark()
        self.bucket.fetch(names, self.folder)

    def _clear(self) -> None:
        for name in FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in RECORDS:
            (self.folder / name).unlink(missing_ok=True)

    def _mark(self) -> None:
        write_json(self.folder / COPY_OF, {"place": str(self.bucket)})

    def take_over(self) -> str:
        """Become what drives the search; returns a sentence where another had not ended. Raises OSError.

        Where that was about to set the search aside, it is done now.
        """
        before = self.bucket.read_object(DRIVER)
        self._mark()
        self.bucket.write(DRIVER, json.dumps(self._driver).encode())
        if REPLACING in self.bucket.files():
            self._finish_setting_aside()
        if not before:
            return ""
        return (
            f"{self.bucket} was left by its driver on {before.get('host')} (process {before.get('pid')}) without a "
            "word; if that still runs, it ends now"
        )

    def let_go(self) -> None:
        """Say that nothing drives the search any more. An unreachable store is told otherwise."""
        with suppress(OSError):
            if self.bucket.read_object(DRIVER) == self._driver:
                self.bucket.remove(DRIVER)

    def set_aside(self) -> str:
        """Move what the store has to replaced/NAME-TIME beside it, first what makes it a search; returns the place."""
        if all(name == DRIVER for name in self.bucket.files()):
            return ""
        target = f"replaced/{self.folder.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.bucket.write(REPLACING, json.dumps({"target": target}).encode())
        return self._finish_setting_aside()

    def _finish_setting_aside(self) -> str:
        """Do what is left of it, whoever began it."""
        target = str(self.bucket.read_object(REPLACING).get("target"))
        around = Bucket(self.bucket.url, "")
        names = [name for name in self.bucket.files() if name not in (DRIVER, REPLACING)]
        for name in sorted(names, key=lambda name: PurePosixPath(name).name != "search.json"):
            self.bucket.check_owner()
            around.move(f"{self.folder.name}/{name}", f"{target}/{name}")
        self.bucket.remove(REPLACING)
        return str(around / target)

    # ------------------------------------------------------------ as it goes on

    def look(self) -> None:
        if time.monotonic() >= self._next_look_at:
            try:
                self.bucket.check_owner()
            except TakenOverError:
                raise
            except OSError:
                pass  # a store that stays away is told when something is to be put there
            self._next_look_at = time.monotonic() + LOOK_EVERY_S

    def put(self, path: Path) -> None:
        self.bucket.check_owner()
        self.bucket.write(self._name(path), path.read_bytes())

    def fetch_run(self, folder: Path) -> None:
        place = self.place(folder)
        place.fetch([name for name in place.files() if not is_checkpoint(name) and name != "trial.json"], folder)

    def drop_checkpoints(self, folder: Path) -> None:
        place = self.place(folder)
        for name in place.files():
            if is_checkpoint(name):
                place.remove(name)

    def rename(self, folder: Path, target: Path) -> None:
        for name in self.place(folder).files():
            self.bucket.move(f"{self._name(folder)}/{name}", f"{self._name(target)}/{name}")


def copied_from(folder: Path) -> str:
    """The place in an object store of which this folder is a copy; empty for none."""
    path = folder / COPY_OF
    return str(read_json(path).get("place")) if path.is_file() else ""


# ---------------------------------------------------------------- on a node


@contextmanager
def working_folder(folder: Path, place: Bucket | None) -> Iterator[tuple[Path, Save]]:
    """Where a trial or run does its work, and what it calls when it has written what is to last.

    That is its folder itself; where it is kept in an object store, a temporary one with what is kept there.
    """
    if place is None:
        yield folder, lambda: None
        return
    _remove_abandoned()
    with (
        tempfile.TemporaryDirectory(prefix=TEMPORARY, ignore_cleanup_errors=True) as temporary,
        lock_folder(Path(temporary)),
    ):
        here = Path(temporary) / "run"
        here.mkdir()
        _fetch_all(place, here)
        known = _stamps(here)

        def save() -> None:
            place.check_owner()  # the old driver's worker may not have heard yet that it was taken over
            found = _stamps(here)
            gone = known.keys() - found.keys()
            for name in gone:
                if not is_checkpoint(name):  # no trial removes a record: something else does
                    raise FileNotFoundError(errno.ENOENT, "something has removed it", str(here / name))
            new = [name for name, stamp in found.items() if known.get(name) != stamp]
            for name in sorted(new, key=lambda name: not is_checkpoint(name)):
                place.write(name, (here / name).read_bytes())
                known[name] = found[name]
            for name in gone:
                place.remove(name)
                del known[name]

        yield here, save


def _remove_abandoned() -> None:
    """Remove the temporary folders of workers that were killed on this node: nobody holds their locks."""
    for folder in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*"):
        with suppress(OSError, LockedError):  # another user's, at work, or where nothing says whether it is
            if time.time() - folder.stat().st_mtime > ABANDONED_S:
                with lock_folder(folder, has_to_lock=True):
                    shutil.rmtree(folder)


def _fetch_all(place: Bucket, folder: Path) -> None:
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            place.fetch(place.files(), folder)
        except FileNotFoundError:
            if attempt == READ_ATTEMPTS:
                raise
        else:
            return


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Of each file that is not hidden its name and what changes when it is written."""
    found = {}
    for path in folder.rglob("[!.]*"):
        if path.is_file():
            status = path.stat()
            found[path.relative_to(folder).as_posix()] = (status.st_mtime_ns, status.st_size)
    return found


def try_bucket(place: Bucket) -> str:
    """What is wrong, seen from here, with the place where a search is kept; nothing if that is empty."""
    name = f"state/{socket.gethostname()}-{os.getpid()}{LEFTOVER}"
    try:
        place.read(DRIVER)
        place.write(name, b"")
        place.remove(name)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""
