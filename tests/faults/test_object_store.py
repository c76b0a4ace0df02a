"""Searches kept in an object store: whatever is lost but the store, they end as if nothing had happened."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from byot.system.checkpoint import load_checkpoint
from byot.system.files import read_json, read_json_lines
from search.system.remote import COPY_OF, LEASE
from tests.faults.conftest import TALLY
from tests.faults.searches import add_node, hiding, kill_quietly, running_cluster, trial_workers
from tests.helpers import TIMES, assert_one_sentence, assert_same_state, run_command, start_command
from tests.made_up import read_rows
from tests.object_store import ObjectStore, answer, credentials, serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

EPOCHS = 6
NUM_SAMPLES = 5
# One at a time: with two, proposals depend on which of them ends first.
SMALL = ("--dataset", "digits", "--width", 4, "--confirm", 0, "--epochs")
FLAGS = (*SMALL, EPOCHS, "--num-samples", NUM_SAMPLES, "--max-concurrent", 1)
TUNE = "search/tune.py"
KEPT = "searches/s/"  # the search's keys in the bucket
THIRD = f"{KEPT}trials/t0002/"  # its first sampled trial


class Outcome(NamedTuple):
    """What two searches that did the same have in common."""

    rows: list[dict[str, Any]]
    metrics: dict[str, list[dict[str, Any]]]  # by trial
    best: dict[str, Any]
    weights: dict[str, Any]  # of the last checkpoints, by trial


class BucketSearch:
    """A search of one bucket, driven from one machine after another."""

    def __init__(self, store: ObjectStore, folder: Path) -> None:
        self.store = store
        self.folder = folder
        self.log = folder / "driver.log"

    def flags(self, machine: str, *more: object) -> list[object]:
        return ["--name", "s", "--storage-path", self.store.url(), "--outputs", self.folder / machine, *more]

    def start(self, machine: str, *more: object, before: Sequence[str] = ()) -> subprocess.Popen[str]:
        flags, folder = self.flags(machine, *more), self.folder
        with open(self.log, "ab") as log:
            return start_command(flags, cwd=folder, script=TUNE, before=before, output=log, **credentials())

    def run(self, machine: str, *more: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        return run_command(self.flags(machine, *more), cwd=self.folder, script=TUNE, code=code, **credentials())

    def copy(self, machine: str) -> Path:
        return self.folder / machine / "searches" / "s"

    def wait_for(self, key: str, process: subprocess.Popen[str]) -> None:
        """Wait until the search has put this into the store."""
        deadline = time.monotonic() + 180
        while key not in self.store.names():
            assert time.monotonic() < deadline, self.log.read_text()
            assert process.poll() is None, self.log.read_text()
            time.sleep(0.01)

    def kept(self) -> set[str]:
        """Return the names of what the bucket has of the search."""
        return {key.removeprefix(KEPT) for key in self.store.names(KEPT)}

    def outcome(self) -> Outcome:
        """Read what was found from the bucket, as from a folder in which nobody has worked."""
        folder = self.folder / "bucket"
        for name in self.kept():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(self.store.objects[KEPT + name])
        rows = read_rows(folder)
        metrics = {path.parent.name: read_json_lines(path) for path in sorted(folder.glob("trials/*/metrics.jsonl"))}
        last = {path.parts[-3]: load_checkpoint(path)["model"] for path in folder.rglob(f"*{EPOCHS:04d}.pt")}
        best = read_json(folder / "best.json")
        for record in (best, *rows, *(line for lines in metrics.values() for line in lines)):
            for name in record.keys() & {*TIMES, "seconds", "commit", "hardware"}:
                del record[name]
        return Outcome(rows, metrics, best, last)

    def assert_outcome(self, expected: Outcome) -> None:
        found = self.outcome()
        assert found[:-1] == expected[:-1]
        assert_same_state(found.weights, expected.weights)

    def assert_went_on(self, run: str) -> None:
        assert self.store.written.count(f"{run}checkpoints/epoch-0001.pt") == 1, "it began anew"


Finished = tuple[BucketSearch, str]


@pytest.fixture
def search(tmp_path: Path) -> Iterator[BucketSearch]:
    with serve() as store:
        yield BucketSearch(store, tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A search that nothing has befallen, and what it printed."""
    with serve() as store:
        search = BucketSearch(store, tmp_path_factory.mktemp("whole"))
        done = search.run("a", *FLAGS)
        assert done.stderr == ""
        yield search, done.stdout


@pytest.fixture(scope="module")
def whole(finished: Finished) -> Outcome:
    return finished[0].outcome()


def test_the_bucket_has_all_and_the_copy_all_but_checkpoints(finished, whole):
    search, said = finished
    assert "s3://bucket/searches/s" in said
    assert {row["status"] for row in whole.rows} <= {"completed", "stopped"}
    expected = {"search.json", "state/search.json", "trials.csv", "best.json"}
    for row in whole.rows:
        expected |= {f"trials/{row['trial_id']}/{name}" for name in ("trial.json", "metrics.jsonl")}
        if row["status"] == "completed":
            expected |= {f"trials/{row['trial_id']}/checkpoints/epoch-{n:04d}.pt" for n in (EPOCHS - 1, EPOCHS)}
    assert search.kept() == expected
    copy = search.copy("a")
    copied = {name for name in expected if not name.endswith(".pt")}
    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file() and path.name != ".lock"}
    assert {name for name in files if not name.startswith("ray/")} == copied | {COPY_OF, "optuna.log", "search.log"}
    for name in copied:
        assert (copy / name).read_bytes() == search.store.objects[KEPT + name], name
    assert read_json(copy / "search.json")["status"] == "finished"


def test_a_finished_search_is_known_everywhere_and_the_copy_serves_all_that_reads(finished):
    search, said = finished
    before = {key: search.store.objects[key] for key in search.store.names()}
    again = search.run("b", *FLAGS)
    assert "finished already" in again.stdout
    of_this_machine = said.replace(str(search.copy("a").parents[1]), str(search.copy("b").parents[1]))
    assert of_this_machine.rpartition("best: ")[2] == again.stdout.rpartition("best: ")[2]
    assert {key: search.store.objects[key] for key in search.store.names()} == before
    for script, *flags in (
        ("byot/train.py", "--best", "s", "--epochs", 1, "--name", "r"),
        ("analysis/best.py", "s"),
        ("analysis/report.py", "s"),
    ):
        run_command([*flags, "--outputs", search.folder / "b"], cwd=search.folder, script=script)


def test_the_drivers_machine_is_lost(search, whole):
    """Twice, on the way through a trial, and nothing of it is left; the third finds the search by itself."""
    with TALLY.attempt("the machine of a driver whose search is in a bucket", 2):
        for machine, flags, key in (
            ("a", FLAGS, f"{THIRD}checkpoints/epoch-0002.pt"),
            ("b", ("--resume",), f"{KEPT}trials/t0003/trial.json"),
        ):
            process = search.start(machine, *flags)
            search.wait_for(key, process)
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            shutil.rmtree(search.folder / machine)
        unnamed = search.flags("c", "--resume")[2:]
        done = run_command(unnamed, cwd=search.folder, script=TUNE, code=0, **credentials())
        assert_one_sentence(done.stderr, "was left by its driver on", "without a word")
        search.assert_went_on(THIRD)
        search.assert_outcome(whole)


def test_a_worker_is_lost(search, whole):
    with TALLY.attempt("kill -9 of a worker whose search is in a bucket"):
        process = search.start("a", *FLAGS)
        search.wait_for(f"{THIRD}checkpoints/epoch-0003.pt", process)
        workers = trial_workers(process.pid)
        assert workers
        for worker in workers:
            kill_quietly(worker)
        assert process.wait(600) == 0, search.log.read_text()
        search.assert_went_on(THIRD)
        search.assert_outcome(whole)


def test_the_store_is_gone_for_a_while(search, whole):
    with TALLY.attempt("an object store that is gone in the middle of a search"):
        process = search.start("a", *FLAGS)
        search.wait_for(f"{THIRD}checkpoints/epoch-0002.pt", process)
        search.store.stop()
        assert process.wait(600) == 1
        said = search.log.read_text()
        assert "Traceback" not in said, said
        last = said.strip().splitlines()[-1]
        assert last.startswith("tune.py: s3://bucket/searches/s/")
        for words in ("onnect", "go on with: ", f"--storage-path '{search.store.url()}'"):
            assert words in last
        again = search.run("a", "--resume", code=2)
        assert_one_sentence(again.stderr, "s3://bucket/searches cannot be used")
        search.store.start()
        search.run("b", "--resume")
        search.assert_outcome(whole)


@pytest.mark.parametrize("name", ["trials/t0002/trial.json", "trials.csv"])
def test_a_record_of_the_driver_cannot_be_put_there(search, whole, name):
    """That of a trial that is proposed, so that it is not begun; or the table, as a trial ends."""

    def refuse(method: str, key: str) -> None:
        ended = f"{KEPT}trials/t0000/checkpoints/epoch-{EPOCHS:04d}.pt" in search.store.objects
        if (method, key) == ("PUT", KEPT + name) and ended:
            raise ConnectionResetError

    search.store.on_request = refuse
    stopped = search.run("a", *FLAGS, code=1)
    assert_one_sentence(stopped.stderr, f"s3://bucket/searches/s/{name} cannot be read or written", "go on with: ")
    search.store.on_request = answer
    search.run("b", "--resume")
    search.assert_outcome(whole)


def test_a_second_driver_takes_the_search_over(search, whole):
    """The first hears nothing of it for a while: it would else have ended its search before the second can begin."""
    first = search.start("a", *FLAGS)
    search.wait_for(f"{THIRD}checkpoints/epoch-0001.pt", first)
    first.send_signal(signal.SIGSTOP)
    try:
        done = search.run("b", "--resume")
    finally:
        first.send_signal(signal.SIGCONT)
    assert_one_sentence(done.stderr, "if that still runs, it ends now")
    assert first.wait(300) == 1
    said = search.log.read_text()
    assert "goes on with it" in said
    assert "Traceback" not in said
    search.assert_outcome(whole)
    assert LEASE not in search.kept()


def test_seeds_side_by_side_confirmation_and_a_fresh_start(search):
    """Ctrl-C in the search and in the confirmation, gone on with elsewhere; then all of it is set aside."""
    few = (*SMALL, 3, "--num-samples", 2)
    run = f"{KEPT}confirmation/t0000-seed-1000/"
    for machine, flags, key in (
        (
            "a",
            (*few, "--seeds-per-trial", 2, "--confirm", 1, "--confirm-seeds", 2),
            f"{KEPT}trials/t0000/seed-1/checkpoints/epoch-0001.pt",
        ),
        ("b", ("--resume",), f"{run}checkpoints/epoch-0001.pt"),
    ):
        process = search.start(machine, *flags)
        search.wait_for(key, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(600) == 128 + signal.SIGINT, search.log.read_text()
        assert "go on with: " in search.log.read_text().splitlines()[-1]
    search.run("c", "--resume")
    copy = search.copy("c")
    record = read_json(copy / "confirmation.json")
    assert record["status"] == "finished"
    assert all(len(arm["values"]) == 2 for arm in record["arms"])
    assert (copy / "confirmation" / "t0000-seed-1000" / "metrics.jsonl").is_file()
    assert [key for key in search.store.names(run) if "checkpoints" in key] == []
    search.assert_went_on(run)
    assert read_json_lines(copy / "trials" / "t0000" / "metrics.jsonl")[-1]["epoch"] == 3

    before = search.kept()
    search.run("c", *few, "--fresh", "--epochs", 1)
    assert {key.split("/", 3)[3] for key in search.store.names("searches/replaced/")} == before
    assert len(read_rows(copy)) == 2
    assert "confirmation.json" not in search.kept()


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that runs no trials and two nodes, with credentials."""
    with running_cluster(2, **credentials()) as made:
        yield made


def test_nodes_that_share_nothing_but_the_bucket(search, cluster):
    """What the driver writes is not seen by the nodes; one of them is lost on the way."""
    outputs = search.folder / "a"
    outputs.mkdir()
    flags = (*FLAGS[:-2], "--address", cluster.address)
    with TALLY.attempt("kill -9 of a node of two whose search is in a bucket"):
        process = search.start("a", *flags, before=hiding(outputs))
        search.wait_for(f"{KEPT}trials/t0001/checkpoints/epoch-0002.pt", process)
        cluster.remove_node(sorted(cluster.worker_nodes, key=id)[0], allow_graceful=False)
        add_node(cluster)
        assert process.wait(600) == 0, search.log.read_text()
        assert list(outputs.iterdir()) == [], "the driver's own mount"
        found = search.outcome()
        assert {row["status"] for row in found.rows} <= {"completed", "stopped"}
        assert len(found.rows) == NUM_SAMPLES
        for row in found.rows:
            epochs = [line["epoch"] for line in found.metrics[row["trial_id"]]]
            assert epochs == list(range(1, row["epochs_done"] + 1))
    search.run("b", "--resume", "--num-samples", NUM_SAMPLES + 1)  # without --address
    assert search.outcome().rows[:NUM_SAMPLES] == found.rows, "what had ended is as it was"


def test_nodes_without_credentials_are_named(search, cluster):
    add_node(cluster, env_vars={"AWS_ACCESS_KEY_ID": "nobody"})
    done = search.run("a", *FLAGS, "--address", cluster.address, code=2)
    assert_one_sentence(done.stderr, "1 of 3 nodes cannot work on s3://bucket/searches/s: ", "INVALID_ACCESS_KEY")
