"""Searches kept in an object store: whatever is lost but the store, they end as if nothing had happened."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from byot.system.checkpoint import load_checkpoint
from byot.system.files import read_json, read_json_lines
from search.system.remote import COPY_OF, LEASE
from search.system.resources import RAY_ENVIRONMENT
from tests.faults.nodes import add_node, start_cluster
from tests.faults.searches import kill_quietly, trial_workers
from tests.faults.tally import TALLY
from tests.helpers import (
    PROJECT,
    TIMES,
    assert_one_sentence,
    assert_same_state,
    command_environment,
    command_line,
    run_command,
)
from tests.made_up import read_rows
from tests.object_store import ObjectStore, credentials, serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

EPOCHS = 6
NUM_SAMPLES = 5
# One at a time: with two, proposals depend on which of them ends first.
FLAGS = ("--dataset", "digits", "--width", 4, "--epochs", EPOCHS, "--num-samples", NUM_SAMPLES, "--max-concurrent", 1)
TUNE = "search/tune.py"
KEPT = "searches/s/"  # the search's keys in the bucket
THIRD = f"{KEPT}trials/t0002/"  # its first sampled trial
ON_DRIVER_ALONE = {COPY_OF, "optuna.log", "search.log"}


class Outcome(NamedTuple):
    """What two searches that did the same have in common."""

    rows: list[dict[str, Any]]
    metrics: dict[str, list[dict[str, Any]]]  # by trial
    best: dict[str, Any]
    weights: dict[str, Any]  # by key, those of the last checkpoints


def outcome(store: ObjectStore, folder: Path) -> Outcome:
    """Read from the bucket, as from a folder that nobody has worked in."""
    for key in store.names(KEPT):
        path = folder / key.removeprefix(KEPT)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.objects[key])
    rows = [{name: cell for name, cell in row.items() if name != "seconds"} for row in read_rows(folder / "trials.csv")]
    metrics = {
        path.parent.name: [
            {name: value for name, value in line.items() if name not in TIMES} for line in read_json_lines(path)
        ]
        for path in sorted(folder.glob("trials/*/metrics.jsonl"))
    }
    last = {str(path.relative_to(folder)): load_checkpoint(path)["model"] for path in folder.rglob(f"*{EPOCHS:04d}.pt")}
    best = {
        name: value for name, value in read_json(folder / "best.json").items() if name not in ("commit", "hardware")
    }
    return Outcome(rows, metrics, best, last)


def assert_same(found: Outcome, expected: Outcome) -> None:
    assert found.rows == expected.rows
    assert found.metrics == expected.metrics
    assert found.best == expected.best
    assert_same_state(found.weights, expected.weights)


def names_in(folder: Path) -> set[str]:
    """All files but locks and what is Ray's."""
    found = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    }
    return {name for name in found if not name.startswith("ray/")}


class BucketSearch:
    """A search of one bucket, driven from one machine after another."""

    def __init__(self, store: ObjectStore, folder: Path) -> None:
        self.store = store
        self.folder = folder
        self.log = folder / "driver.log"

    def flags(self, machine: str, *more: object) -> list[object]:
        url, outputs = self.store.url(), self.folder / machine
        return ["--name", "s", "--storage-path", url, "--outputs", outputs, *more]

    def start(self, machine: str, *more: object, before: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [*before, *command_line(TUNE, *self.flags(machine, *more))],
                cwd=self.folder,
                env=command_environment(**credentials()),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, machine: str, *more: object) -> subprocess.CompletedProcess[str]:
        return run_command(self.flags(machine, *more), cwd=self.folder, script=TUNE, **credentials())

    def copy(self, machine: str) -> Path:
        return self.folder / machine / "searches" / "s"

    def wait_for(self, key: str, process: subprocess.Popen[bytes]) -> None:
        """Until the search has put this into the store."""
        deadline = time.monotonic() + 180
        while key not in self.store.names():
            assert time.monotonic() < deadline, self.log.read_text()
            assert process.poll() is None, self.log.read_text()
            time.sleep(0.01)

    def times_put(self, key: str) -> int:
        return self.store.log.count(("PUT", key))


@pytest.fixture
def search(tmp_path: Path) -> Iterator[BucketSearch]:
    with serve() as store:
        yield BucketSearch(store, tmp_path)


class Finished(NamedTuple):
    search: BucketSearch
    outcome: Outcome
    said: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A search that nothing has befallen."""
    folder = tmp_path_factory.mktemp("whole")
    with serve() as store:
        search = BucketSearch(store, folder)
        said = search.run("a", *FLAGS)
        assert said.returncode == 0, said.stdout + said.stderr
        yield Finished(search, outcome(store, folder / "bucket"), said)


def test_the_bucket_has_all_and_the_copy_all_but_checkpoints(whole: Finished) -> None:
    search = whole.search
    assert whole.said.stderr == ""
    assert "s3://bucket/searches/s" in whole.said.stdout
    kept = {key.removeprefix(KEPT) for key in search.store.names(KEPT)}
    assert {row["status"] for row in whole.outcome.rows} <= {"completed", "stopped"}
    expected = {"search.json", "state/search.json", "trials.csv", "best.json"}
    for row in whole.outcome.rows:
        expected |= {f"trials/{row['trial_id']}/{name}" for name in ("trial.json", "metrics.jsonl")}
        if row["status"] == "completed":
            expected |= {f"trials/{row['trial_id']}/checkpoints/epoch-{n:04d}.pt" for n in (EPOCHS - 1, EPOCHS)}
    assert kept == expected
    copy = search.copy("a")
    assert names_in(copy) == {name for name in kept if not name.endswith(".pt")} | ON_DRIVER_ALONE
    for name in names_in(copy) - ON_DRIVER_ALONE:
        assert (copy / name).read_bytes() == search.store.objects[KEPT + name], name
    assert read_json(copy / "search.json")["status"] == "finished"


def test_a_finished_search_is_known_everywhere_and_the_copy_serves_all_that_reads(whole: Finished) -> None:
    search = whole.search
    before = {key: search.store.objects[key] for key in search.store.names()}
    again = search.run("b", *FLAGS)
    assert again.returncode == 0, again.stderr
    assert "finished already" in again.stdout
    assert whole.said.stdout.rpartition("best: ")[2] == again.stdout.rpartition("best: ")[2]
    assert {key: search.store.objects[key] for key in search.store.names()} == before
    for script, *flags in (
        ("byot/train.py", "--best", "s", "--epochs", 1, "--name", "r"),
        ("analysis/best.py", "s"),
        ("analysis/report.py", "s"),
    ):
        done = run_command([*flags, "--outputs", search.folder / "b"], cwd=search.folder, script=script)
        assert done.returncode == 0, done.stderr


def test_the_drivers_machine_is_lost(search: BucketSearch, whole: Finished) -> None:
    """Twice, on the way through a trial, and nothing of it is left; the second finds the search by itself."""
    with TALLY.attempt("the machine of a driver whose search is in a bucket", 2):
        process = search.start("a", *FLAGS)
        search.wait_for(f"{THIRD}checkpoints/epoch-0002.pt", process)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        shutil.rmtree(search.folder / "a")

        process = search.start("b", "--resume")
        search.wait_for(f"{KEPT}trials/t0003/trial.json", process)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        shutil.rmtree(search.folder / "b")

        command = ["--resume", "--storage-path", search.store.url(), "--outputs", search.folder / "c"]
        done = run_command(command, cwd=search.folder, script=TUNE, **credentials())
        assert done.returncode == 0, done.stdout + done.stderr
        assert_one_sentence(done.stderr, "was left by its driver on", "without a word")
        assert search.times_put(f"{THIRD}checkpoints/epoch-0001.pt") == 1, "it began anew"
        assert_same(outcome(search.store, search.folder / "bucket"), whole.outcome)


def test_a_worker_is_lost(search: BucketSearch, whole: Finished) -> None:
    with TALLY.attempt("kill -9 of a worker whose search is in a bucket"):
        process = search.start("a", *FLAGS)
        search.wait_for(f"{THIRD}checkpoints/epoch-0003.pt", process)
        workers = trial_workers(process.pid)
        assert workers
        for worker in workers:
            kill_quietly(worker)
        assert process.wait(600) == 0, search.log.read_text()
        assert search.times_put(f"{THIRD}checkpoints/epoch-0001.pt") == 1, "it began anew"
        assert_same(outcome(search.store, search.folder / "bucket"), whole.outcome)


def test_the_store_is_gone_for_a_while(search: BucketSearch, whole: Finished) -> None:
    with TALLY.attempt("an object store that is gone in the middle of a search"):
        process = search.start("a", *FLAGS)
        search.wait_for(f"{THIRD}checkpoints/epoch-0002.pt", process)
        search.store.stop()
        assert process.wait(600) == 1
        said = search.log.read_text()
        assert "Traceback" not in said, said
        last = said.strip().splitlines()[-1]
        assert last.startswith("tune.py: s3://bucket/searches/s/")
        assert "onnect" in last
        assert "go on with: " in last
        assert f"--storage-path '{search.store.url()}'" in last
        again = search.run("a", "--resume")
        assert again.returncode == 2
        assert_one_sentence(again.stderr, "s3://bucket/searches cannot be used")
        search.store.start()
        done = search.run("b", "--resume")
        assert done.returncode == 0, done.stdout + done.stderr
        assert_same(outcome(search.store, search.folder / "bucket"), whole.outcome)


@pytest.mark.parametrize("name", ["trials/t0002/trial.json", "trials.csv"])
def test_a_record_of_the_driver_cannot_be_put_there(search: BucketSearch, whole: Finished, name: str) -> None:
    """Of a trial that is proposed, so that it is not begun; or the table, as one ends."""

    def refuse(method: str, key: str) -> None:
        ended = f"{KEPT}trials/t0000/checkpoints/epoch-{EPOCHS:04d}.pt" in search.store.objects
        if (method, key) == ("PUT", KEPT + name) and ended:
            raise ConnectionResetError

    search.store.on_request = refuse
    stopped = search.run("a", *FLAGS)
    assert stopped.returncode == 1, stopped.stdout
    assert_one_sentence(stopped.stderr, f"s3://bucket/searches/s/{name} cannot be read or written", "go on with: ")
    search.store.on_request = lambda method, key: None
    done = search.run("b", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(outcome(search.store, search.folder / "bucket"), whole.outcome)


def test_a_second_driver_takes_the_search_over(search: BucketSearch, whole: Finished) -> None:
    """The first hears nothing of it for a while: it would else have ended its search before the second can begin."""
    first = search.start("a", *FLAGS)
    search.wait_for(f"{THIRD}checkpoints/epoch-0001.pt", first)
    first.send_signal(signal.SIGSTOP)
    try:
        done = search.run("b", "--resume")
    finally:
        first.send_signal(signal.SIGCONT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_one_sentence(done.stderr, "if that still runs, it ends now")
    assert first.wait(300) == 1
    said = search.log.read_text()
    assert "goes on with it" in said
    assert "Traceback" not in said
    assert_same(outcome(search.store, search.folder / "bucket"), whole.outcome)
    assert KEPT + LEASE not in search.store.names()


def test_seeds_side_by_side_confirmation_and_a_fresh_start(search: BucketSearch) -> None:
    """Ctrl-C in the search and in the confirmation, gone on with elsewhere; then all of it is set aside."""
    few = ("--dataset", "digits", "--width", 4, "--epochs", 3, "--num-samples", 2, "--seeds-per-trial", 2)
    confirmed = ("--confirm", 1, "--confirm-seeds", 2)

    def stopped(machine: str, key: str, *flags: object) -> None:
        process = search.start(machine, *flags)
        search.wait_for(key, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(600) == 128 + signal.SIGINT, search.log.read_text()
        assert "go on with: " in search.log.read_text().splitlines()[-1]

    stopped("a", f"{KEPT}trials/t0000/seed-1/checkpoints/epoch-0001.pt", *few, *confirmed)
    assert search.copy("a").joinpath("trials/t0000/trial.json").is_file()
    run = f"{KEPT}confirmation/t0000-seed-1000/"
    stopped("b", f"{run}checkpoints/epoch-0001.pt", "--resume")
    done = search.run("c", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_json(search.copy("c") / "confirmation.json")
    assert record["status"] == "finished"
    assert all(len(arm["values"]) == 2 for arm in record["arms"])
    assert (search.copy("c") / "confirmation" / "t0000-seed-1000" / "metrics.jsonl").is_file()
    assert [key for key in search.store.names(run) if "checkpoints" in key] == []
    assert search.times_put(f"{run}checkpoints/epoch-0001.pt") == 1, "it began anew"
    assert read_json_lines(search.copy("c") / "trials" / "t0000" / "metrics.jsonl")[-1]["epoch"] == 3

    before = {key.removeprefix(KEPT) for key in search.store.names(KEPT)}
    fresh = search.run("c", *few[:-3], 2, "--fresh", "--epochs", 1)
    assert fresh.returncode == 0, fresh.stdout + fresh.stderr
    aside = {key.split("/", 3)[3] for key in search.store.names("searches/replaced/")}
    assert aside == before
    assert len(read_rows(search.copy("c") / "trials.csv")) == 2
    assert f"{KEPT}confirmation.json" not in search.store.names()


@pytest.fixture
def make_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    """A head that runs no trials and two nodes, with credentials."""
    made: list[Any] = []

    def make() -> Any:
        variables = RAY_ENVIRONMENT | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | credentials()
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        made.append(start_cluster(2))
        return made[0]

    yield make
    for cluster in made:
        cluster.shutdown()


def test_nodes_that_share_nothing_but_the_bucket(search: BucketSearch, make_cluster: Callable[[], Any]) -> None:
    """What the driver writes is not seen by the nodes; one of them is lost on the way."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("a process can have no mounts of its own here")
    cluster = make_cluster()
    outputs = search.folder / "a"
    outputs.mkdir()
    hidden = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(outputs))
    flags = (*FLAGS[:-2], "--address", cluster.address)
    with TALLY.attempt("kill -9 of a node of two whose search is in a bucket"):
        process = search.start("a", *flags, before=hidden)
        search.wait_for(f"{KEPT}trials/t0001/checkpoints/epoch-0002.pt", process)
        cluster.remove_node(sorted(cluster.worker_nodes, key=id)[0], allow_graceful=False)
        add_node(cluster)
        assert process.wait(600) == 0, search.log.read_text()
        assert list(outputs.iterdir()) == [], "the driver's own mount"
        found = outcome(search.store, search.folder / "bucket")
        assert {row["status"] for row in found.rows} <= {"completed", "stopped"}
        assert len(found.rows) == NUM_SAMPLES
        for row in found.rows:
            epochs = [line["epoch"] for line in found.metrics[row["trial_id"]]]
            assert epochs == list(range(1, row["epochs_done"] + 1))
    alone = search.run("b", "--resume", "--num-samples", NUM_SAMPLES + 1)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert read_rows(search.copy("b") / "trials.csv")[:NUM_SAMPLES] == read_rows(
        search.folder / "bucket" / "trials.csv"
    ), "what had ended is as it was, without --address"


def test_nodes_without_credentials_are_named(search: BucketSearch, make_cluster: Callable[[], Any]) -> None:
    cluster = make_cluster()
    add_node(cluster, env_vars={"AWS_ACCESS_KEY_ID": "nobody"})
    done = search.run("a", *FLAGS, "--address", cluster.address)
    assert done.returncode == 2, done.stdout + done.stderr
    assert_one_sentence(done.stderr, "1 of 3 nodes cannot work on s3://bucket/searches/s: ", "INVALID_ACCESS_KEY")
    assert str(PROJECT) not in done.stderr
