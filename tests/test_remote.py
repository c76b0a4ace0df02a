"""Searches kept in an object store, piece by piece, against a small S3 on this machine."""

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
from byot.data import LabelledImages
from byot.system.files import read_json, write_text
from byot.system.lock import lock_folder
from search import plan as planning
from search import tune
from search.driver import open_records
from search.plan import SearchPlan, load_search_data, make_plan, newest_unfinished
from search.records import KEPT, save_search
from search.settings import SearchSettings
from search.space import DEFAULT_SPACE
from search.system import remote
from search.system.remote import (
    COPY_OF,
    LEASE,
    Bucket,
    Store,
    TakenOverError,
    copied_from,
    open_bucket,
    try_bucket,
    working_folder,
)
from search.system.resources import Resources, check_nodes
from tests.helpers import PROJECT
from tests.made_up import search_record
from tests.object_store import ObjectStore, answer, credentials, serve

CPUS = Resources(1, 1, 0.0, 1, 0)
MakeStore = Callable[[str], Store]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    for name, value in credentials().items():
        monkeypatch.setenv(name, value)
    remote._connect.cache_clear()
    with serve() as store:
        yield store


@pytest.fixture
def bucket(s3: ObjectStore) -> Bucket:
    return open_bucket(s3.url())


@pytest.fixture
def machine(bucket: Bucket, tmp_path: Path) -> MakeStore:
    """Makes the search's folder on a machine of this name."""

    def make(name: str) -> Store:
        folder = tmp_path / name / "s"
        folder.mkdir(parents=True, exist_ok=True)
        return Store(folder, bucket, KEPT)

    return make


@pytest.fixture
def driver(machine: MakeStore) -> Iterator[Store]:
    """The one that drives the search, and has nothing yet."""
    store = machine("one")
    with store.lease() as told:
        assert told == ""
        yield store


def push(store: Store, name: str, text: str = "") -> None:
    write_text(store.folder / name, text or name)
    store.push(store.folder / name)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def refuse_writes(method: str, key: str) -> None:
    if method in ("PUT", "POST", "DELETE"):
        raise ConnectionResetError


# ---------------------------------------------------------------- a bucket
def test_what_is_written_is_read_listed_fetched_moved_and_removed(bucket, s3, tmp_path):
    s3.objects["searches//tmp/elsewhere"] = b"not ours, and outside of any folder it would be copied into"
    content = {"a/big": os.urandom(12 << 20), "a/b/c d": b"small", "a/empty": b""}  # the first goes in parts
    for name, data in content.items():
        bucket.write(name, data)
        assert bucket.read(name) == data
    assert (bucket / "a" / "b").read("c d") == b"small"
    assert sorted(bucket.files()) == ["a/b/c d", "a/big", "a/empty"]
    assert (bucket / "nowhere").files() == []
    bucket.move("a/big", "z")
    bucket.remove("a/empty")
    bucket.remove("a/empty")
    assert sorted(bucket.files()) == ["a/b/c d", "z"]
    with pytest.raises(FileNotFoundError) as error:
        bucket.read("a/empty")
    assert error.value.filename == "s3://bucket/searches/a/empty"
    names = [f"{number:03}" for number in range(120)]  # several pages of a listing
    for name in names:
        (bucket / "many").write(name, name.encode())
    assert sorted((bucket / "many").files()) == names
    (bucket / "many").fetch([*names, "gone"], tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: name for name in names}


def test_a_store_that_refuses(s3, monkeypatch):
    with pytest.raises(ValueError, match="s3://other/searches cannot be used: there is no such bucket"):
        open_bucket(s3.url(bucket="other"))
    assert "No such file" in try_bucket(Bucket(s3.url(), "s")), "it has no lease, so it is not the driver's"
    assert s3.names() == [], "a look leaves nothing"
    for name, value in credentials("nobody").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="ACCESS_DENIED"):
        open_bucket(s3.url())
    assert "INVALID_ACCESS_KEY" in try_bucket(Bucket(s3.url(), "s"))
    assert s3.names() == [], "a look leaves nothing"
    s3.stop()
    with pytest.raises(ValueError, match=r"s3://bucket/searches cannot be used: .*connect"):
        open_bucket(s3.url())


def test_a_process_killed_within_an_upload_leaves_what_was_there(s3, bucket):
    bucket.write("x", b"before")
    code = f"from search.system.remote import Bucket; Bucket({s3.url()!r}).write('x', bytes(32 << 20))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, env=os.environ | credentials())
    s3.on_request = lambda method, key: process.kill() if method == "PUT" else None
    assert process.wait(60) == -signal.SIGKILL
    assert bucket.read("x") == b"before"
    assert bucket.files() == ["x"]


# ---------------------------------------------------------------- a worker's side
@pytest.fixture
def trial(driver: Store) -> Path:
    """The folder of a trial that has been proposed."""
    push(driver, "trials/t0000/trial.json")
    return driver.folder / "trials" / "t0000"


def write_epoch(folder: Path, epoch: int) -> None:
    """As a trial does: a checkpoint, the one before the last removed, a line."""
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / f"epoch-{epoch:04d}.pt").write_text(f"state {epoch}")
    (folder / "checkpoints" / f"epoch-{epoch - 2:04d}.pt").unlink(missing_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(f"{epoch}\n")


def test_a_trial_goes_on_in_another_folder_with_what_it_has_saved(s3, driver, trial):
    with working_folder(trial, driver) as (here, save):
        assert files_in(here) == {"trial.json"}
        for epoch in (1, 2, 3):
            write_epoch(here, epoch)
            save()
            save()
        (here / ".lock").touch()
        (here / "checkpoints" / ".epoch-0004.pt.1.tmp").touch()
        save()
    assert not here.exists()
    written = [key.rpartition("/")[2] for key in s3.written if "/t0000/" in key and not key.endswith("/")]
    in_order = [name for epoch in (1, 2, 3) for name in (f"epoch-000{epoch}.pt", "metrics.jsonl")]
    assert written == ["trial.json", *in_order]
    with working_folder(trial, driver) as (there, save):
        assert there != here
        last = {"checkpoints/epoch-0002.pt", "checkpoints/epoch-0003.pt"}
        assert files_in(there) == {*last, "metrics.jsonl", "trial.json"}
        assert (there / "metrics.jsonl").read_text() == "1\n2\n3\n"


@pytest.mark.parametrize("accident", ["the store refuses", "the folder is removed", "another driver takes over"])
def test_what_goes_wrong_costs_nothing_that_was_saved(s3, driver, trial, machine, accident):
    store = pickle.loads(pickle.dumps(driver))  # as it comes to a worker
    with ExitStack() as held, working_folder(trial, store) as (here, save):
        for epoch in (1, 2, 3):
            write_epoch(here, epoch)
            save()
        before = s3.names("searches/s/trials/t0000")
        write_epoch(here, 4)
        if accident == "the store refuses":
            s3.on_request = refuse_writes
            words = r"epoch-0004\.pt"
        elif accident == "the folder is removed":
            shutil.rmtree(here)
            words = "something has removed its files"
        else:
            held.enter_context(machine("two").lease())
            words = "goes on with it"
        with pytest.raises(OSError, match=words):
            save()
        s3.on_request = answer
        assert s3.names("searches/s/trials/t0000") == before


def test_what_a_killed_worker_leaves_is_removed_and_what_is_at_work_stays(driver, trial, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    code = (
        "import os, pickle, signal; from pathlib import Path; from search.system.remote import working_folder\n"
        f"with working_folder(Path({str(trial)!r}), pickle.loads({pickle.dumps(driver)!r})):\n"
        " os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | credentials() | {"TMPDIR": str(temporary)}
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment).returncode == -signal.SIGKILL
    (left,) = temporary.iterdir()
    assert (left / "run" / "trial.json").exists()
    with working_folder(trial, driver) as (at_work, _):
        assert left.exists(), "it may have been made this moment"
        for folder in (left, at_work.parent):
            os.utime(folder, (0, 0))
        with working_folder(trial, driver):
            assert not left.exists()
            assert at_work.exists()
    assert list(temporary.iterdir()) == []


# ---------------------------------------------------------------- the driver's side
def test_a_copy_has_the_records_and_not_the_checkpoints(driver, bucket, machine):
    records = {"search.json", "state/search.json", "trials/t0000/trial.json", "confirmation/r/result.json"}
    for name in records:
        push(driver, name)
    metrics = {f"trials/t0000/{name}" for name in ("metrics.jsonl", "seed-1/metrics.jsonl")}
    passing = ("trials/t0000/checkpoints/e.pt", "trials/t0000/seed-1/checkpoints/e.pt", "state/node-1.tmp")
    for name in (*metrics, *passing, "surprise", "../../outside"):
        bucket.write(f"s/{name}", b"")
    there = machine("two")
    there.pull()
    copied = {*records, *metrics, COPY_OF}
    assert files_in(there.folder) == copied
    assert copied_from(there.folder) == "s3://bucket/searches/s"

    write_text(there.folder / "trials" / "t0001" / "trial.json", "never put there")
    write_text(there.folder / "trials" / "t0000" / "trial.json", "nor was this")
    write_text(there.folder / "mine.txt", "a user's")
    there.pull()
    assert files_in(there.folder) == {*copied, "mine.txt"}
    assert (there.folder / "trials" / "t0000" / "trial.json").read_text() == "trials/t0000/trial.json"

    trial = driver.folder / "trials" / "t0000"
    (trial / "checkpoints").mkdir()
    driver.drop_checkpoints(trial)
    driver.pull_run(trial)
    left = ["metrics.jsonl", "seed-1/metrics.jsonl", "trial.json"]
    assert sorted((bucket / "s/trials/t0000").files()) == left == sorted(files_in(trial))
    assert not (trial / "checkpoints").exists()


def test_no_copy_is_made_over_another_search(driver, bucket, machine):
    push(driver, "search.json")
    other = machine("two")
    write_text(other.folder / "search.json", "of this machine")
    with pytest.raises(ValueError, match="is no copy of s3://bucket/searches/s"):
        other.pull()
    assert (other.folder / "search.json").read_text() == "of this machine"
    bucket.remove("s/search.json")
    with pytest.raises(ValueError, match=r"has no search\.json any more"):
        driver.pull()
    assert (driver.folder / "search.json").exists()


def test_the_last_driver_drives(driver, s3, bucket, machine):
    push(driver, "search.json")
    driver.watch_lease()
    with machine("two").lease() as told:
        assert f"process {os.getpid()}" in told
        driver.watch_lease()  # not yet again
        driver._next_look_at = 0.0
        s3.stop()
        driver.watch_lease()  # an outage says nothing
        s3.start()
        driver._next_look_at = 0.0
        for check in (driver.watch_lease, lambda: push(driver, "search.json", "again")):
            with pytest.raises(TakenOverError, match="goes on with it"):
                check()
        assert bucket.read("s/search.json") == b"search.json"
        with driver.lease():
            pass
        assert LEASE not in (bucket / "s").files()


@pytest.mark.parametrize("moved", [1, 3])
def test_what_was_being_set_aside_is_no_search_and_is_set_aside_by_the_next(driver, s3, bucket, machine, moved):
    assert driver.set_aside() == ""
    names = ["search.json", "state/search.json", "trials/t0000/trial.json", "trials.csv"]
    for name in names:
        push(driver, name)
    assert driver.set_aside(leftovers=True) == "", "it is a search"
    before = len(s3.written)

    def die(method: str, key: str) -> None:
        done = [key for key in s3.written[before:] if not key.endswith("/")]
        if method == "PUT" and len(done) == moved and not key.endswith("/"):
            raise ConnectionResetError

    s3.on_request = die
    with pytest.raises(OSError, match="replaced"):
        driver.set_aside()
    s3.on_request = answer
    second = machine("two")
    second.pull()
    assert files_in(second.folder) == set()
    with second.lease():
        assert second.set_aside(leftovers=True).startswith("s3://bucket/searches/replaced/s-")
        assert (bucket / "s").files() == [LEASE]
        assert sorted(name.partition("/")[2] for name in (bucket / "replaced").files()) == sorted(names)
        push(second, "search.json", "of the new search")
        with pytest.raises(TakenOverError):
            driver.set_aside()
        assert bucket.read("s/search.json") == b"of the new search"


def test_after_looking_at_the_nodes_nothing_is_left(tmp_path, monkeypatch):
    """So that a command that was refused can be given again. Ray has one node, which answers at once."""
    node = {"NodeID": "1" * 56, "NodeManagerAddress": "one"}
    monkeypatch.setattr("search.system.resources.nodes_with_room", lambda _: [node])
    as_task = lambda look: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=look))  # noqa: E731
    monkeypatch.setattr("ray.remote", lambda **_: as_task)
    monkeypatch.setattr("ray.wait", lambda tasks, **_: (tasks, []))
    monkeypatch.setattr("ray.get", lambda task: task)
    new, goes_on = tmp_path / "new", tmp_path / "goes on"
    write_text(goes_on / "state" / "search.json", "{}")
    check_nodes(Store(goes_on), CPUS)
    assert files_in(goes_on) == {"state/search.json"}
    with lock_folder(new):
        check_nodes(Store(new), CPUS)
        assert files_in(new) == {".lock"}
        monkeypatch.setattr("search.system.resources.try_folder", lambda _: "it cannot write there")
        with pytest.raises(ValueError, match=r"1 of 1 nodes cannot work on .* \(it cannot write there"):
            check_nodes(Store(new), CPUS)
    assert not new.exists()


# ---------------------------------------------------------------- a command and another driver
class Elsewhere:
    """A search of two trials that a driver on another machine has put into the bucket and still drives."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.base = TrainConfig(dataset="digits", width=4, epochs=2, val_fraction=0.1)
        self.images = load_search_data(self.base)
        self.save(num_samples=2)
        for _ in range(2):
            self.add_trial()

    def save(self, *, num_samples: int, **changed: Any) -> None:
        train, val = (len(images.labels) for images in self.images)
        settings = SearchSettings(num_samples=num_samples, confirm=0).to_dict()
        images = {"num_train_images": train, "num_val_images": val}
        record = search_record(self.base, status="running", settings=settings, **{**images, **changed})
        save_search(self.store.folder, record, self.store)

    def add_trial(self) -> None:
        plan = SearchPlan(self.store, self.base, SearchSettings(), DEFAULT_SPACE, *self.images, None)
        open_records(plan).begin("sampled", {"alpha": 0.5, "temperature": 3.0, "beta": 1e-6})


@pytest.fixture
def elsewhere(driver: Store) -> Elsewhere:
    return Elsewhere(driver)


Command = Callable[..., SearchPlan]


@pytest.fixture
def command(s3: ObjectStore, tmp_path: Path) -> Iterator[Command]:
    """tune.py up to the moment at which the search would run."""
    with ExitStack() as held:

        def call(*flags: object) -> SearchPlan:
            always = ["--name", "s", "--storage-path", s3.url(), "--outputs", tmp_path / "here"]
            with ExitStack() as own:
                plan = make_plan(tune.build_parser().parse_args([*map(str, always), *map(str, flags)]), own)
                held.push(own.pop_all())
            return plan

        yield call


def test_what_another_driver_does_as_this_one_starts_is_seen(elsewhere, command, monkeypatch):
    changes: list[Callable[[], None]] = [elsewhere.add_trial, lambda: elsewhere.save(num_samples=7)]

    def load(base: TrainConfig) -> tuple[LabelledImages, LabelledImages]:
        while changes:
            changes.pop()()
        return load_search_data(base)

    monkeypatch.setattr(planning, "load_search_data", load)
    plan = command("--resume")
    assert (plan.settings.num_samples, len(open_records(plan).trials)) == (7, 3)
    with pytest.raises(TakenOverError):
        elsewhere.add_trial()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--resume"], "was started with num_val_images 7"),
        (["--resume", "--metric", "val_nll"], "was started with --metric val_accuracy"),
        (["--dataset", "digits", "--epochs", 1], "was started with"),
        (["--resume", "--name", "x"], "there is no search x in s3://bucket/searches"),
    ],
)
def test_a_command_that_is_refused_takes_nothing_over(elsewhere, command, flags, words):
    elsewhere.save(num_samples=2, num_val_images=7)
    before = elsewhere.store._read_lease()
    with pytest.raises(ValueError, match=words):
        command(*flags)
    assert elsewhere.store._read_lease() == before
    elsewhere.add_trial()


def test_without_its_url_a_copy_is_not_gone_on_with(elsewhere, command):
    searches = elsewhere.store.folder.parent
    with pytest.raises(ValueError, match="is a copy of s3://bucket/searches/s: go on with --storage-path"):
        command("--resume", "--storage-path", searches)
    with pytest.raises(ValueError, match="no unfinished search is in"):
        newest_unfinished(searches, {}, str(searches))
    save_search(searches / "mine", search_record(status="running"))
    assert newest_unfinished(searches, {}, str(searches)) == "mine"
    save_search(searches / "mine", search_record(status="finished"))
    with pytest.raises(ValueError, match="no unfinished search is in"):
        newest_unfinished(searches, {}, str(searches))  # no trial got through: there is nothing to confirm


def test_of_an_earlier_search_the_bucket_is_asked_only_by_its_name(elsewhere, s3, command, tmp_path):
    asked: list[str] = []
    s3.on_request = lambda method, key: asked.append(key)
    for name in ("../s", str(tmp_path / "x"), "a/b"):
        with pytest.raises(ValueError, match="there is no search"):
            command("--name", "new", "--dataset", "digits", "--warm-start", name)
    assert not [key for key in asked if "new/" not in key and key.endswith("search.json")]
    with pytest.raises(ValueError, match="the search s has no trial within this space"):
        command("--name", "new", "--dataset", "digits", "--warm-start", "s")


def test_a_fresh_start_takes_over_and_sets_aside(elsewhere, command, capsys):
    plan = command("--fresh", "--dataset", "digits", "--width", 4, "--epochs", 3, "--num-samples", 1)
    assert "s3://bucket/searches/replaced/s-" in capsys.readouterr().out
    assert (plan.recorded, plan.base.epochs) == (None, 3)
    assert plan.store.bucket is not None
    assert plan.store.bucket.files() == [LEASE]
    with pytest.raises(TakenOverError):
        elsewhere.add_trial()
    assert read_json(plan.folder / COPY_OF) == {"place": "s3://bucket/searches/s"}
