"""Searches kept in an object store, piece by piece, against a small S3 on this machine."""

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from byot.config import TrainConfig
from byot.system.files import read_json, write_json, write_text
from byot.system.lock import lock_folder
from search import driver, tune
from search.race import confirm
from search.records import SearchRecords, save_search
from search.settings import SearchSettings
from search.space import DEFAULT_SPACE, space_to_dict
from search.system.remote import (
    COPY_OF,
    DRIVER,
    Bucket,
    KeptInBucket,
    TakenOverError,
    copied_from,
    open_bucket,
    try_bucket,
    working_folder,
)
from search.system.resources import Slots, check_nodes
from tests.helpers import PROJECT
from tests.object_store import ObjectStore, credentials, serve


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    for name, value in credentials().items():
        monkeypatch.setenv(name, value)
    with serve() as store:
        yield store


@pytest.fixture
def bucket(store: ObjectStore) -> Bucket:
    return open_bucket(store.url())


def refuse_writes(method: str, key: str) -> None:
    if method in ("PUT", "POST", "DELETE"):
        raise ConnectionResetError


def refuse_all(method: str, key: str) -> None:
    raise ConnectionResetError


def test_what_is_written_is_read_listed_moved_and_removed(bucket: Bucket):
    big = os.urandom(12 << 20)  # in parts
    bucket.write("a/big", big)
    (bucket / "a").write("b/c d", b"small")
    bucket.write("a/empty", b"")
    assert bucket.read("a/big") == big
    assert (bucket / "a" / "b").read("c d") == b"small"
    assert bucket.read("a/empty") == b""
    assert sorted(bucket.files()) == ["a/b/c d", "a/big", "a/empty"]
    assert (bucket.folders(), (bucket / "nowhere").files()) == (["a"], [])
    bucket.move("a/big", "z")
    bucket.remove("a/empty")
    bucket.remove("a/empty")
    assert sorted(bucket.files()) == ["a/b/c d", "z"]
    with pytest.raises(FileNotFoundError) as error:
        bucket.read("a/empty")
    assert error.value.filename == "s3://bucket/searches/a/empty"


def test_a_listing_of_several_pages(bucket: Bucket, tmp_path: Path):
    names = [f"{number:03}" for number in range(120)]
    for name in names:
        bucket.write(name, name.encode())
    assert sorted(bucket.files()) == names
    bucket.fetch(names, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: name for name in names}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("foo://bucket/x", "must be a folder or the URL of an object store"),
        ("file:///tmp/a", "must be a folder or the URL of an object store"),
        ("s3://", "must be like s3://BUCKET/FOLDER"),
        ("s3:///x", "must be like s3://BUCKET/FOLDER"),
        ("s3://bucket/../x", "must be like s3://BUCKET/FOLDER"),
        ("s3://bucket/x#y", "must be like s3://BUCKET/FOLDER"),
        ("s3://[bucket/x", "is not a URL"),
        ("s3://a b/x", "Cannot parse URI"),
        ("s3://name:word@bucket/x", "credentials come from the environment"),
        ("s3://bucket/x?surprise=1", "surprise"),
        ("abfs://container@account.dfs.core.windows.net/x", r"object store \(s3, gs, gcs\), not abfs://"),
    ],
)
def test_urls_of_no_store(url: str, words: str):
    with pytest.raises(ValueError, match=words):
        open_bucket(url)


@pytest.mark.parametrize("option", ["client_secret", "sig", "SAS", "access_key", "secret_key", "X-Amz-Security-Token"])
@pytest.mark.parametrize("place", ["s3://bucket/x", "s3://"])
def test_a_secret_in_a_url_is_refused_and_not_told(option: str, place: str):
    with pytest.raises(ValueError, match="must have no secret in its query") as error:
        open_bucket(f"{place}?region=us-west-2&{option}=xyzzy")
    assert "xyzzy" not in str(error.value)


def test_a_store_that_refuses(store: ObjectStore, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="s3://other/searches cannot be used: there is no such bucket"):
        open_bucket(store.url(bucket="other"))
    for name, value in credentials("nobody").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="ACCESS_DENIED"):
        open_bucket(store.url())
    assert "ACCESS_DENIED" in try_bucket(Bucket(store.url(), "s"))
    store.stop()
    with pytest.raises(ValueError, match=r"s3://bucket/searches cannot be used: .*connect"):
        open_bucket(store.url())


def test_a_process_killed_within_an_upload_leaves_what_was_there(store: ObjectStore, bucket: Bucket):
    bucket.write("x", b"before")
    code = f"from search.system.remote import Bucket; Bucket({store.url()!r}).write('x', bytes(32 << 20))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, env=os.environ | credentials())

    def kill(method: str, key: str) -> None:
        if method == "PUT":
            process.kill()

    store.on_request = kill
    assert process.wait(60) == -signal.SIGKILL
    assert bucket.read("x") == b"before"
    assert bucket.files() == ["x"]


# ---------------------------------------------------------------- a trial's folder


def place_of_trial(bucket: Bucket) -> Bucket:
    place = bucket / "s" / "trials" / "t0000"
    place.write("trial.json", b"{}")
    return place


def write_epoch(folder: Path, epoch: int) -> None:
    """As a trial does: a checkpoint, the one before the last removed, a line."""
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / f"epoch-{epoch:04d}.pt").write_text(f"state {epoch}")
    (folder / "checkpoints" / f"epoch-{epoch - 2:04d}.pt").unlink(missing_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(f"{epoch}\n")


def test_a_trial_goes_on_in_another_folder_with_what_it_has_saved(store: ObjectStore, bucket: Bucket):
    place = place_of_trial(bucket)
    with working_folder(Path("unused"), place) as (here, save):
        assert [path.name for path in here.iterdir()] == ["trial.json"]
        for epoch in (1, 2, 3):
            write_epoch(here, epoch)
            save()
            save()
        (here / ".lock").touch()
        (here / "checkpoints" / ".epoch-0004.pt.1.tmp").touch()
        save()
    assert not here.exists()
    written = [key.rpartition("/")[2] for method, key in store.log if method == "PUT" and not key.endswith("/")]
    assert written == ["trial.json"] + [name for n in (1, 2, 3) for name in (f"epoch-000{n}.pt", "metrics.jsonl")]
    with working_folder(Path("unused"), place) as (there, save):
        assert there != here
        assert sorted(path.name for path in there.rglob("*.*")) == [
            "epoch-0002.pt",
            "epoch-0003.pt",
            "metrics.jsonl",
            "trial.json",
        ]
        assert (there / "metrics.jsonl").read_text() == "1\n2\n3\n"


def test_a_checkpoint_that_cannot_be_put_there_costs_none_that_can_be_read(store: ObjectStore, bucket: Bucket):
    place = place_of_trial(bucket)
    with working_folder(Path("unused"), place) as (here, save):
        for epoch in (1, 2):
            write_epoch(here, epoch)
            save()
        before = sorted(place.files())
        store.on_request = refuse_writes
        write_epoch(here, 3)
        with pytest.raises(OSError, match=r"epoch-0003\.pt"):
            save()
    assert sorted(place.files()) == before


def test_what_a_killed_worker_leaves_is_removed_and_what_is_at_work_stays(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place = place_of_trial(bucket)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, signal; from pathlib import Path; from search.system.remote import Bucket, working_folder\n"
        f"with working_folder(Path('unused'), Bucket({place.url!r}, {place.below!r})):\n"
        " os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | credentials() | {"TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "run" / "trial.json").exists()
    with working_folder(Path("unused"), place) as (at_work, _):
        assert left.exists(), "it may have been made this moment"
        for folder in (left, at_work.parent):
            os.utime(folder, (0, 0))
        with working_folder(Path("unused"), place):
            assert not left.exists()
            assert at_work.exists()
    assert list(tmp_path.iterdir()) == []


def test_what_something_else_removes_here_is_not_removed_there(bucket: Bucket):
    place = place_of_trial(bucket)
    with working_folder(Path("unused"), place) as (here, save):
        for epoch in (1, 2, 3):
            write_epoch(here, epoch)
            save()
        before = sorted(place.files())
        shutil.rmtree(here)
        with pytest.raises(FileNotFoundError, match="something has removed it"):
            save()
        shutil.rmtree(here.parent)
    assert sorted(place.files()) == before


def test_a_worker_of_a_driver_that_was_taken_over_puts_nothing(bucket: Bucket, tmp_path: Path):
    kept = KeptInBucket(bucket, tmp_path / "one" / "s")
    kept.folder.mkdir(parents=True)
    kept.take_over()
    place = pickle.loads(pickle.dumps(kept.place(kept.folder / "trials" / "t0000")))
    with working_folder(Path("unused"), place) as (here, save):
        write_epoch(here, 1)
        save()
        before = sorted(place.files())
        assert before
        KeptInBucket(bucket, tmp_path / "two" / "s").bucket.write(DRIVER, b"{}")
        write_epoch(here, 2)
        with pytest.raises(TakenOverError, match="goes on with this search"):
            save()
    assert sorted(place.files()) == before


@pytest.mark.filterwarnings("ignore:.* no file can be locked")
def test_where_nothing_can_be_locked_no_working_folder_is_removed(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place = place_of_trial(bucket)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("byot.system.lock.FileLock.acquire", refuse)
    with working_folder(Path("unused"), place) as (at_work, _):
        os.utime(at_work.parent, (0, 0))
        with working_folder(Path("unused"), place):
            assert (at_work / "trial.json").exists()


def test_a_folder_of_its_own_is_left_as_it_is(tmp_path: Path):
    with working_folder(tmp_path, None) as (here, save):
        save()
        assert here == tmp_path
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the driver's copy


@pytest.fixture
def kept(bucket: Bucket, tmp_path: Path) -> KeptInBucket:
    (tmp_path / "one" / "s").mkdir(parents=True)
    made = KeptInBucket(bucket, tmp_path / "one" / "s")
    assert made.take_over() == ""
    return made


def put(kept: KeptInBucket, name: str, text: str) -> None:
    write_text(kept.folder / name, text)
    kept.put(kept.folder / name)


def test_a_copy_has_the_records_and_not_the_checkpoints(kept: KeptInBucket, bucket: Bucket, tmp_path: Path):
    for name in ("search.json", "state/search.json", "trials/t0000/trial.json", "confirmation/r/result.json"):
        put(kept, name, name)
    place = kept.place(kept.folder / "trials" / "t0000")
    for name in (
        "metrics.jsonl",
        "seed-1/metrics.jsonl",
        "checkpoints/epoch-0001.pt",
        "seed-1/checkpoints/epoch-0001.pt",
    ):
        place.write(name, b"")
    bucket.write("s/surprise", b"")
    bucket.write("s/state/node-1.tmp", b"")
    bucket.write("s/../../outside", b"")
    there = tmp_path / "two" / "s"
    there.mkdir(parents=True)
    KeptInBucket(bucket, there).fetch()
    found = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    assert found == {
        *("search.json", "state/search.json", "confirmation/r/result.json", COPY_OF),
        *(f"trials/t0000/{name}" for name in ("trial.json", "metrics.jsonl", "seed-1/metrics.jsonl")),
    }
    assert copied_from(there) == "s3://bucket/searches/s"

    write_text(there / "trials" / "t0001" / "trial.json", "never put there")
    write_text(there / "trials" / "t0000" / "trial.json", "nor was this")
    write_text(there / "mine.txt", "a user's")
    KeptInBucket(bucket, there).fetch()
    assert not (there / "trials" / "t0001").exists()
    assert (there / "trials" / "t0000" / "trial.json").read_text() == "trials/t0000/trial.json"
    assert (there / "mine.txt").exists()

    kept.drop_checkpoints(kept.folder / "trials" / "t0000")
    assert sorted(place.files()) == ["metrics.jsonl", "seed-1/metrics.jsonl", "trial.json"]
    kept.fetch_run(kept.folder / "trials" / "t0000")
    assert (kept.folder / "trials" / "t0000" / "seed-1" / "metrics.jsonl").exists()


def test_no_copy_is_made_over_another_search(kept: KeptInBucket, bucket: Bucket, tmp_path: Path):
    put(kept, "search.json", "{}")
    other = tmp_path / "two" / "s"
    write_json(other / "search.json", {"name": "of this machine"})
    with pytest.raises(ValueError, match="is no copy of s3://bucket/searches/s"):
        KeptInBucket(bucket, other).fetch()
    assert "of this machine" in (other / "search.json").read_text()
    bucket.remove("s/search.json")
    with pytest.raises(ValueError, match="holds no search any more"):
        kept.fetch()
    assert (kept.folder / "search.json").exists()


def test_the_last_driver_drives(kept: KeptInBucket, bucket: Bucket, tmp_path: Path):
    put(kept, "search.json", "first")
    (tmp_path / "two" / "s").mkdir(parents=True)
    second = KeptInBucket(bucket, tmp_path / "two" / "s")
    assert f"process {os.getpid()}" in second.take_over()
    put(second, "search.json", "second")
    with pytest.raises(TakenOverError, match="goes on with this search"):
        put(kept, "search.json", "first again")
    kept.let_go()
    assert bucket.read("s/search.json") == b"second"
    put(second, "search.json", "second again")
    second.let_go()
    assert DRIVER not in (bucket / "s").files()


def test_a_driver_looks_now_and_then_whether_it_still_drives(
    kept: KeptInBucket, store: ObjectStore, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept.look()
    KeptInBucket(bucket, tmp_path / "two" / "s").take_over()
    kept.look()  # not yet again
    monkeypatch.setattr("search.system.remote.LOOK_EVERY_S", 0.0)
    kept._next_look_at = 0.0
    asked = store.on_request
    store.on_request = refuse_all
    kept.look()
    store.on_request = asked
    with pytest.raises(TakenOverError, match="goes on with this search"):
        kept.look()


def test_a_confirmation_ends_once_another_driver_goes_on_with_it(monkeypatch: pytest.MonkeyPatch):
    def run_tasks(function: object, take: object, slots: object, stop_asked: Callable[[], int], *_: object) -> Any:
        assert stop_asked() == 0
        kept.look = taken_over
        stop_asked()
        yield

    def taken_over() -> None:
        raise TakenOverError(errno.EBUSY, "the driver elsewhere goes on with this search", "s3://bucket/s")

    saved: list[str] = []
    kept: Any = SimpleNamespace(look=lambda: None)
    confirmation: Any = SimpleNamespace(base=TrainConfig(dataset="digits"), kept=kept, save=saved.append)
    monkeypatch.setattr("ray.put", lambda images: images)
    monkeypatch.setattr("search.race.run_tasks", run_tasks)
    with pytest.raises(TakenOverError):
        confirm(confirmation, Slots(1, 1, 0.0, 1, 0), lambda: 0, None)
    assert saved == ["running"]


def test_setting_aside_leaves_nothing_and_loses_nothing(kept: KeptInBucket, bucket: Bucket):
    assert kept.set_aside() == ""
    put(kept, "search.json", "a")
    kept.place(kept.folder / "trials" / "t0000").write("checkpoints/epoch-0001.pt", b"b")
    aside = kept.set_aside()
    assert (bucket / "s").files() == [DRIVER]
    name = aside.removeprefix("s3://bucket/searches/")
    assert name.startswith("replaced/s-")
    assert sorted((bucket / name).files()) == ["search.json", "trials/t0000/checkpoints/epoch-0001.pt"]


@pytest.mark.parametrize("moved", [0, 1, 3])
def test_what_was_being_set_aside_is_no_search_and_is_set_aside_by_the_next(
    kept: KeptInBucket, store: ObjectStore, bucket: Bucket, tmp_path: Path, moved: int
):
    names = ["search.json", "state/search.json", "trials/t0000/trial.json", "trials.csv"]
    for name in names:
        put(kept, name, name)
    left = moved

    def die(method: str, key: str) -> None:
        nonlocal left
        if method == "PUT" and key.startswith("searches/replaced/") and not key.endswith("/"):
            if left == 0:
                raise ConnectionResetError
            left -= 1

    store.on_request = die
    with pytest.raises(OSError, match="replaced"):
        kept.set_aside()
    store.on_request = lambda method, key: None
    second = KeptInBucket(bucket, tmp_path / "two" / "s")
    second.folder.mkdir(parents=True)
    for name in ("search.json", "trials.csv"):
        write_text(second.folder / name, "of the copy that was here before")
    write_json(second.folder / COPY_OF, {"place": str(second.bucket)})
    second.fetch()
    assert [path.name for path in second.folder.iterdir()] == [COPY_OF]
    assert second.take_over() != ""
    second.fetch()
    assert [path.name for path in second.folder.iterdir()] == [COPY_OF]
    assert (bucket / "s").files() == [DRIVER]
    (aside,) = (bucket / "replaced").folders()
    assert sorted((bucket / "replaced" / aside).files()) == sorted(names)
    put(second, "search.json", "of the new search")
    with pytest.raises(TakenOverError):
        kept._finish_setting_aside()
    assert bucket.read("s/search.json") == b"of the new search"


def test_a_node_that_cannot_reach_it_says_so(kept: KeptInBucket, store: ObjectStore, tmp_path: Path):
    place: Any = kept.bucket
    assert try_bucket(place) == ""
    assert (tmp_path / "one" / "s" / COPY_OF).exists()
    assert place.files() == [DRIVER]
    store.on_request = refuse_writes
    assert "AWS Error" in try_bucket(place)


class Node:
    """Ray's client, on one node that answers at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "search.system.resources.nodes_with_room", lambda _: [{"NodeID": "1" * 56, "NodeManagerAddress": "one"}]
        )
        monkeypatch.setattr("ray.remote", lambda **_: lambda look: self.task(look))
        monkeypatch.setattr("ray.wait", lambda tasks, **_: (tasks, []))
        monkeypatch.setattr("ray.get", lambda task: task)

    def task(self, look: Callable[[Any], str]) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=look))


def test_after_looking_at_the_nodes_nothing_is_left(
    bucket: Bucket, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """So that a command that was refused can be given again."""
    Node(monkeypatch)
    bucket.write(f"s/{DRIVER}", b"{}")
    slots = Slots(1, 1, 0.0, 1, 0)
    folder, goes_on = tmp_path / "s", tmp_path / "t"
    write_text(goes_on / "state" / "search.json", "{}")
    check_nodes(goes_on, slots)
    assert [path.name for path in (goes_on / "state").iterdir()] == ["search.json"]
    with lock_folder(folder):
        check_nodes(folder, slots)
        check_nodes(folder, slots, bucket / "s")
        assert [path.name for path in folder.iterdir()] == [".lock"]
        store.on_request = refuse_writes
        with pytest.raises(ValueError, match=r"1 of 1 nodes cannot work on s3://bucket/searches/s: one .*AWS Error"):
            check_nodes(folder, slots, bucket / "s")
        monkeypatch.setattr("search.system.resources.try_folder", lambda _: "it cannot write there")
        with pytest.raises(ValueError, match=r"1 of 1 nodes cannot work on .* \(it cannot write there"):
            check_nodes(folder, slots)
    assert not folder.exists()


# ---------------------------------------------------------------- a command and another driver


class Elsewhere:
    """A search of two trials that a driver on another machine has put into the bucket and still drives."""

    def __init__(self, bucket: Bucket, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.kept = KeptInBucket(bucket, folder)
        assert self.kept.take_over() == ""
        self.bucket: Bucket = self.kept.bucket
        self.base = TrainConfig(dataset="digits", width=4, epochs=2, val_fraction=0.1)
        self.data = driver.load_search_data(self.base)
        self.save(num_samples=2)
        for _ in range(2):
            self.add_trial()

    def save(self, **changed: Any) -> None:
        settings = SearchSettings(**changed)
        images = {"num_train_images": len(self.data.train.labels), "num_val_images": len(self.data.val.labels)}
        record = {"config": self.base.to_dict(), "settings": settings.to_dict(), "space": space_to_dict(DEFAULT_SPACE)}
        save_search(self.kept.folder, record | images, self.kept)

    def records(self) -> SearchRecords:
        return SearchRecords(
            self.kept.folder,
            parameters=list(DEFAULT_SPACE),
            metric="val_accuracy",
            mode="max",
            epochs=2,
            seed=0,
            kept=self.kept,
        )

    def add_trial(self) -> None:
        records = self.records()
        records.begin("sampled", {"alpha": 0.5, "temperature": 3.0, "beta": 1e-6})
        records.write_table(at_once=True)


@pytest.fixture
def elsewhere(bucket: Bucket, tmp_path: Path) -> Elsewhere:
    return Elsewhere(bucket, tmp_path / "elsewhere" / "s")


class Command:
    """tune.py up to the moment at which the search would run."""

    def __init__(self, store: ObjectStore, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flags = ["--name", "s", "--storage-path", store.url(), "--outputs", str(outputs)]
        self.folder = outputs / "searches" / "s"
        self.plans: list[driver.SearchPlan] = []
        monkeypatch.setattr(driver, "run_search", self.run)

    def run(self, plan: driver.SearchPlan, *_: object) -> int:
        self.plans.append(plan)
        return 0

    def __call__(self, *flags: object) -> int:
        arguments = tune.build_parser().parse_args([*self.flags, *map(str, flags)])
        with ExitStack() as held:
            return tune.search(arguments, held)


@pytest.fixture
def command(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(store, tmp_path / "here", monkeypatch)


def test_what_another_driver_does_as_this_one_starts_is_seen(
    elsewhere: Elsewhere, command: Command, monkeypatch: pytest.MonkeyPatch
):
    load = driver.load_search_data

    def meanwhile(base: TrainConfig) -> driver.SearchData:
        elsewhere.save(num_samples=3)
        elsewhere.add_trial()
        return load(base)

    monkeypatch.setattr(driver, "load_search_data", meanwhile)
    assert command("--resume") == 0
    (plan,) = command.plans
    assert plan.settings.num_samples == 3
    assert plan.recorded is not None
    assert plan.recorded["settings"]["num_samples"] == 3
    assert len(driver.read_records(plan).rows) == 3
    with pytest.raises(TakenOverError):
        elsewhere.add_trial()


@pytest.mark.parametrize("wrong", ["images", "space", "number"])
def test_a_command_that_is_refused_takes_nothing_over(
    elsewhere: Elsewhere, command: Command, capsys: pytest.CaptureFixture[str], wrong: str
):
    if wrong == "images":
        record = read_json(elsewhere.kept.folder / "search.json") | {"num_val_images": 7}
        save_search(elsewhere.kept.folder, record, elsewhere.kept)
        words = "num_val_images 7"
    elif wrong == "space":
        put(elsewhere.kept, "trials.csv", "trial_id,lr,error\n")
        words = "another search space"
    else:
        elsewhere.save(num_samples=1)
        words = "has 2 trials already"
    before = elsewhere.bucket.read(DRIVER)
    with pytest.raises(SystemExit) as refusal:
        command("--resume")
    assert refusal.value.code == 2
    assert words in capsys.readouterr().err
    assert elsewhere.bucket.read(DRIVER) == before
    elsewhere.add_trial()


def test_without_a_bucket_the_newest_search_is_none_of_the_copies(elsewhere: Elsewhere):
    searches = elsewhere.kept.folder.parent
    with pytest.raises(ValueError, match="no unfinished search is in"):
        tune._find_resumable(searches, None, {})
    save_search(searches / "mine", {"started_at": "2020", "config": {}})
    assert tune._find_resumable(searches, None, {}) == searches / "mine"
    assert tune._find_resumable(searches, "s", {}) == elsewhere.kept.folder


def test_of_an_earlier_search_the_bucket_is_asked_only_by_its_name(
    elsewhere: Elsewhere, store: ObjectStore, tmp_path: Path
):
    def ask(name: str) -> object:
        settings = SearchSettings(warm_start=name)
        return tune.find_warm_start(
            *(tmp_path / "here", tmp_path / "here" / "new", elsewhere.base, settings, DEFAULT_SPACE),
            is_new=True,
            bucket=Bucket(store.url()),
        )

    asked: list[str] = []
    store.on_request = lambda method, key: asked.append(key)
    for name in ("../s", str(tmp_path / "s"), "a/b"):
        with pytest.raises(ValueError, match="there is no search"):
            ask(name)
    assert asked == []
    with pytest.raises(ValueError, match="the search s has no trial within this space"):
        ask("s")


def test_a_fresh_start_takes_over_and_sets_aside(
    elsewhere: Elsewhere, command: Command, capsys: pytest.CaptureFixture[str]
):
    assert command("--fresh", "--dataset", "digits", "--width", 4, "--epochs", 3) == 0
    assert "s3://bucket/searches/replaced/s-" in capsys.readouterr().out
    (plan,) = command.plans
    assert (plan.recorded, plan.base.epochs) == (None, 3)
    assert elsewhere.bucket.files() == []
    with pytest.raises(TakenOverError):
        elsewhere.add_trial()
