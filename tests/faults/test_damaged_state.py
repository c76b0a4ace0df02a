"""Every state file of a search truncated at ten places: it goes on all the same, and keeps what had ended."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from byot.search_files import load_search
from search.space import DEFAULT_SPACE
from search.study import OptunaMirror
from tests.faults.conftest import LONG, TALLY
from tests.faults.searches import EPOCHS, NUM_SAMPLES, Search, load_mirror
from tests.helpers import run_command
from tests.made_up import open_records

pytestmark = pytest.mark.slow

PLACES = range(10)
RESUMED = PLACES if LONG else PLACES[5:6]
long_only = pytest.mark.skipif(not LONG, reason="another way to what the others show; in `make faults`")
TRIALS = ("trials/t*/trial.json", "trials/t*/metrics.jsonl")
FILES = ("search.json", "state/search.json", "trials.csv", "best.json", "optuna.log", *TRIALS)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Search:
    """A search that was stopped with some trials ended, one on its way and some to come."""
    search = Search(tmp_path_factory.mktemp("half") / "outputs")
    process = search.start()
    while len(search.ended()) < 4:
        search.wait_for_work(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    search.note_ended()
    return search


@pytest.fixture
def copy(half: Search, tmp_path: Path) -> Search:
    """A copy of it in another place: nothing it needs is named by its old one."""
    shutil.copytree(half.outputs, tmp_path / "outputs")
    search = Search(tmp_path / "outputs")
    search.note_ended()
    assert search.ended_before == half.ended_before
    return search


def truncate(place: int, *paths: Path) -> None:
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * place // len(PLACES)])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FILES)
def test_one_kind_of_file(copy, name, place):
    """What is read back is what was there, whichever kind of file is damaged, all of its kind at once."""
    with TALLY.attempt(f"{name} truncated, the search read again"):
        before = open_records(copy.folder, epochs=EPOCHS).trials
        files = list(copy.folder.glob(name))
        assert files
        truncate(place, *files)
        assert load_search(copy.folder).num_samples == NUM_SAMPLES
        records = open_records(copy.folder, epochs=EPOCHS)
        if name.endswith("metrics.jsonl"):  # the trials write them anew from their checkpoints
            assert {trial.trial_id: trial.to_row() for trial in records.ended} == copy.ended_before
        else:
            assert records.trials == before
        records.write_tables()
        assert open_records(copy.folder, epochs=EPOCHS).notes == []
        OptunaMirror(records, DEFAULT_SPACE)
        mirrored = [trial.user_attrs["trial_id"] for trial in load_mirror(copy.folder)]
        assert sorted(mirrored) == sorted(copy.ended_before)


KINDS = ("", "[]", '{"trial_id": 3}', '{"status": "lost"}', '{"epochs_done": "many"}', '{"alpha": null}', "\0" * 90)


@pytest.mark.parametrize("wrong", KINDS)
def test_records_of_another_kind(copy, wrong):
    """What JSON can hold and no search writes, in place of a trial's record or among its epochs."""
    with TALLY.attempt("trial.json or metrics.jsonl of another kind, the search read again"):
        before = open_records(copy.folder, epochs=EPOCHS).trials
        trial = copy.folder / "trials" / "t0000"
        row = json.loads((trial / "trial.json").read_text())
        is_table = wrong.startswith("{")
        (trial / "trial.json").write_text(json.dumps(row | json.loads(wrong)) if is_table else wrong)
        with (trial / "metrics.jsonl").open("a") as file:
            file.write(wrong + '\n{"epoch": "x"}\n{"epoch": 3, "val_accuracy": true, "elapsed_s": null}\n')
        records = open_records(copy.folder, epochs=EPOCHS)
        assert records.trials == before
        assert "t0000 is taken from trials.csv" in records.notes[0]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("place", RESUMED)
def test_all_at_once(copy, place):
    """Ray's files too, the newest checkpoint of each trial, and of the two places for each fact one."""
    with TALLY.attempt("all state files truncated at once, the search finished"):
        redundant = ("search.json", "trials.csv") if place % 2 else ("state/search.json", TRIALS[0])
        files = [path for name in (*redundant, "best.json", "optuna.log") for path in copy.folder.glob(name)]
        files += [path for path in copy.folder.glob(TRIALS[1]) if path.parent.name not in copy.ended_before]
        files += [path for path in copy.folder.glob("ray/**/*") if path.is_file()]
        files += [sorted(path.iterdir())[-1] for path in copy.folder.glob("trials/t*/checkpoints")]
        truncate(place, *files)
        copy.finish()


@long_only
@pytest.mark.timeout(1200)
def test_the_same_command_finds_its_way_without_search_json(copy):
    with TALLY.attempt("search.json and its copy truncated, the search finished"):
        truncate(5, copy.folder / "search.json", copy.folder / "state" / "search.json")
        flags = ["--resume", "--name", "s", "--outputs", copy.outputs]
        refused = run_command(flags, cwd=copy.outputs, script="search/tune.py", code=2)
        assert "search.json" in refused.stderr
        copy.finish()


@long_only
@pytest.mark.timeout(1200)
def test_moved_and_renamed(copy, tmp_path):
    """It goes on where it lies now, and the old place stays as it is."""
    with TALLY.attempt("a search moved and renamed, then gone on with"):
        copy.folder = copy.folder.rename(copy.folder.with_name("moved"))
        flags = ["--resume", "--name", "moved", "--outputs", copy.outputs]
        run_command(flags, cwd=tmp_path, script="search/tune.py")
        copy.check_whole()
        assert [path.name for path in copy.folder.parent.iterdir()] == ["moved"]
