"""Real searches from the command line, from another folder: what they leave, what they survive, what they refuse."""

import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from byot.config import TrainConfig
from byot.search_files import pareto_front, read_trials
from byot.system.checkpoint import load_checkpoint
from byot.system.files import read_json, read_json_lines
from byot.system.lock import lock_folder
from search.plan import make_plan
from search.tune import build_parser
from tests.helpers import TIMES, assert_one_sentence, assert_same_state, picture_of, run_command
from tests.made_up import read_rows

TUNE = "search/tune.py"
EPOCHS = 4
NUM_SAMPLES = 6
SMALL = ("--dataset", "digits", "--width", 4, "--epochs", EPOCHS, "--confirm", 0, "--num-samples", NUM_SAMPLES)


Finished = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A search that ran to its end, and what it printed."""
    outputs = tmp_path_factory.mktemp("outputs")
    result = run_command([*SMALL, "--name", "small", "--outputs", outputs], cwd=outputs, script=TUNE)
    return outputs, result


def test_every_trial_is_recorded_and_told(finished):
    outputs, result = finished
    folder = outputs / "searches" / "small"
    rows = read_rows(folder)
    assert len({row["trial_id"] for row in rows}) == NUM_SAMPLES
    assert sorted(row["role"] for row in rows) == ["control", "reference", *["sampled"] * (NUM_SAMPLES - 2)]
    for i, row in enumerate(rows, 1):
        assert row["status"] in ("completed", "stopped")
        assert (row["epochs_done"] == EPOCHS) == (row["status"] == "completed")
        lines = read_json_lines(folder / "trials" / row["trial_id"] / "metrics.jsonl")
        assert [line["epoch"] for line in lines] == list(range(1, row["epochs_done"] + 1))
        assert lines[-1]["val_accuracy"] == row["val_accuracy"] == row["val_accuracy_4"]
        assert lines[-1]["val_accuracy_ensemble"] == row["val_accuracy_ensemble"]
        assert row["seconds"] == pytest.approx(sum(line["elapsed_s"] for line in lines))
        assert row["trial_id"] in result.stdout
        assert f"\n  {i}/{NUM_SAMPLES}  " in result.stdout
    reference, control = ({row["role"]: row for row in rows}[role] for role in ("reference", "control"))
    assert (reference["alpha"], reference["temperature"], reference["beta"]) == (0.1, 3.0, 1e-6)
    assert (control["alpha"], control["beta"]) == (0.0, 0.0)
    assert reference["status"] == control["status"] == "completed"
    status = {row["trial_id"]: row["status"] for row in rows}
    table = result.stdout.partition("\ntrial  role ")[2].splitlines()[1 : NUM_SAMPLES + 1]
    assert [status[line.split()[0]] for line in table] == sorted(status.values()), "the completed ones first"
    assert "images/s a trial" in result.stdout
    for command in ("byot/train.py --best small", "analysis/retrain.py small", "analysis/report.py small"):
        assert command in result.stdout
    assert "Configuration for experiment" not in result.stdout, "Ray is silent"
    assert result.stderr == ""


def test_search_and_best_say_where_they_come_from(finished):
    folder = finished[0] / "searches" / "small"
    search, best = read_json(folder / "search.json"), read_json(folder / "best.json")
    assert search["status"] == "finished"
    assert set(search["space"]) == {"alpha", "temperature", "beta"}
    assert search["config"]["seed"] == 0
    assert search["num_train_images"] + search["num_val_images"] == 1438
    assert {"torch", "ray", "optuna"} <= set(search["versions"])
    assert search["hardware"]["cpu_cores"] == os.cpu_count()
    full = [r for r in read_rows(folder) if r["status"] == "completed" and r["role"] != "control"]
    assert best["value"] == max(row["val_accuracy"] for row in full)
    config = TrainConfig.from_dict(best["config"])
    assert config.val_fraction == 0
    assert config.device == "auto", "what was found here may be trained elsewhere"
    assert (config.alpha, config.width, config.epochs) == (best["params"]["alpha"], 4, EPOCHS)


def search_again(outputs: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    return run_command([*arguments, "--outputs", outputs], cwd=outputs, script=TUNE, code=code)


def test_the_same_command_changes_nothing_of_a_finished_search(finished):
    outputs, first = finished
    before = picture_of(outputs / "searches")
    for arguments in ((*SMALL, "--name", "small"), ("--resume", "--name", "small")):
        result = search_again(outputs, *arguments)
        assert "finished already" in result.stdout
        assert first.stdout.rpartition("best: ")[2] == result.stdout.rpartition("best: ")[2]
    assert picture_of(outputs / "searches") == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lr", 0.05), "--lr 0.2"),
        (("--metric", "val_nll", "val_accuracy"), "--metric val_accuracy and"),
        (("--space", "space.toml"), "--space"),
        (("--num-samples", 3), "--num-samples 6, which can grow but not shrink to 3"),
    ],
)
@pytest.mark.parametrize("resume", [True, False])
def test_a_search_goes_on_as_it_was_started_or_not_at_all(finished, monkeypatch, flags, words, resume):
    outputs, _ = finished
    (outputs / "space.toml").write_text("[alpha]\nlow = 0.0\nhigh = 0.4\n")
    monkeypatch.chdir(outputs)
    before = picture_of(outputs / "searches")
    line = [*(("--resume",) if resume else SMALL), *flags, "--name", "small", "--outputs", outputs]
    with ExitStack() as held, pytest.raises(ValueError, match=words):
        make_plan(build_parser().parse_args([*map(str, line)]), held)
    assert picture_of(outputs / "searches") == before


def test_another_search_at_work_is_told_of(tmp_path, capsys):
    line = [*map(str, SMALL), "--name", "mine", "--outputs", str(tmp_path)]
    with lock_folder(tmp_path / "searches" / "theirs"), ExitStack() as held:
        make_plan(build_parser().parse_args(line), held)
    assert "also running here: theirs; the searches share the machine" in capsys.readouterr().err


@pytest.mark.slow
def test_more_trials_fresh_start_and_one_process_at_a_time(finished, tmp_path):
    folder = tmp_path / "searches" / "small"
    shutil.copytree(finished[0] / "searches" / "small", folder)
    ended = read_rows(folder)
    search_again(tmp_path, "--resume", "--name", "small", "--num-samples", NUM_SAMPLES + 2)
    rows = read_rows(folder)
    assert rows[:NUM_SAMPLES] == ended
    assert [row["trial_id"] for row in rows] == [f"t{i:04d}" for i in range(NUM_SAMPLES + 2)]
    assert read_json(folder / "search.json")["settings"]["num_samples"] == NUM_SAMPLES + 2

    with lock_folder(folder):
        before = picture_of(folder)
        for arguments in (("--resume",), ("--fresh", *SMALL)):
            refused = search_again(tmp_path, *arguments, "--name", "small", code=2)
            assert_one_sentence(refused.stderr, "another process", str(folder))
        assert picture_of(folder) == before

    fresh = search_again(tmp_path, "--fresh", *SMALL[:-1], 2, "--name", "small")
    assert len(read_rows(folder)) == 2
    (aside,) = (tmp_path / "searches" / "replaced").iterdir()
    assert read_rows(aside) == rows
    assert str(aside) in fresh.stdout


@pytest.mark.slow
def test_the_best_are_confirmed_over_fresh_seeds(finished, tmp_path):
    """After the search; then the verdict is what train.py goes by. Stopped on the way: tests/faults."""
    folder = tmp_path / "searches" / "small"
    shutil.copytree(finished[0] / "searches" / "small", folder)
    before = picture_of(folder / "trials")
    result = search_again(tmp_path, "--resume", "--name", "small", "--confirm", 1, "--confirm-seeds", 4)
    record = read_json(folder / "confirmation.json")
    assert record["status"] == "finished"
    assert {arm["role"] for arm in record["arms"]} >= {"reference", "control"}
    assert record["num_rounds"] in (3, 4), "they may be told apart at the first look"
    assert all(len(arm["values"]) == record["num_rounds"] for arm in record["arms"] if arm["still_in"])
    assert all(sentence in result.stdout for sentence in record["verdict"])
    assert picture_of(folder / "trials") == before, "the search itself is as it was"
    for run in folder.glob("confirmation/*"):
        lines = read_json_lines(run / "metrics.jsonl")
        assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))
        assert not (run / "checkpoints").exists()

    again = picture_of(folder)
    assert "finished already" in search_again(tmp_path, "--resume", "--name", "small").stdout
    assert picture_of(folder) == again
    trained = run_command(["--best", "small", "--outputs", tmp_path, "--name", "r"], cwd=tmp_path)
    assert f"over {record['num_rounds']} fresh seeds" in trained.stdout
    config = read_json(tmp_path / "runs" / "r" / "config.json")
    assert config == TrainConfig.from_dict(record["config"]).to_dict()


@pytest.mark.slow
def test_several_metrics_end_in_a_pareto_front(tmp_path):
    result = search_again(tmp_path, *SMALL, "--metric", "val_accuracy", "val_accuracy_1", "--name", "s")
    folder = tmp_path / "searches" / "s"
    rows = read_rows(folder)
    assert {row["status"] for row in rows} == {"completed"}, "none is stopped by one of two metrics"
    front = [one["trial_id"] for one in read_json(folder / "best.json")["pareto_front"]]
    trials = read_trials(folder / "trials.csv")
    assert front == [trial.trial_id for trial in pareto_front(trials, ("val_accuracy", "val_accuracy_1"))]
    assert all(f"      {trial_id}  val_accuracy " in result.stdout for trial_id in front)
    shown = run_command(["s", "--outputs", tmp_path], cwd=tmp_path, script="analysis/best.py")
    assert "Pareto front" in shown.stdout


@pytest.mark.slow
def test_a_time_budget_cuts_trials_off(tmp_path):
    arguments = ("--dataset", "digits", "--width", 4, "--epochs", 2000, "--num-samples", 2, "--name", "s")
    result = search_again(tmp_path, *arguments, "--time-budget", "10s", code=1)  # none has reached its last epoch
    assert "5 s are over, and 0 of 2 trials have ended; go on with: " in result.stdout, (
        "the other half is for confirming"
    )
    folder = tmp_path / "searches" / "s"
    assert read_json(folder / "search.json")["status"] == "finished"
    assert [row["status"] for row in read_rows(folder)] == ["running", "running"]


@pytest.mark.slow
def test_a_search_in_which_every_trial_diverges_gives_up(tmp_path):
    result = search_again(tmp_path, *SMALL[:-1], 9, "--lr", 1e18, "--name", "s", code=1)
    assert_one_sentence(result.stderr, "5 trials failed", "diverged", "go on with: ", "--name s")
    rows = read_rows(tmp_path / "searches" / "s")
    failed = [row for row in rows if row["status"] == "failed"]
    assert len(failed) == 5
    assert all("diverged" in row["error"] for row in failed)
    assert all(row["status"] == "running" for row in rows if row not in failed), "cut off with the search"
    assert not (tmp_path / "searches" / "s" / "best.json").exists()


@pytest.mark.slow
def test_noise_for_test_labels_changes_no_choice(tmp_path, parquet_folder):
    """The search and the retraining see the same training files and test labels that differ."""
    choices: list[Any] = []
    weights: list[dict[str, Any]] = []
    data = parquet_folder(num_train=400, num_test=40, dataset="cifar10")
    noisy = tmp_path / "noisy"
    shutil.copytree(data, noisy)
    (file,) = noisy.glob("test*.parquet")
    table = pyarrow.parquet.read_table(file)
    noise = np.random.default_rng(1).permutation(table.column("label").to_numpy())
    assert (noise != table.column("label").to_numpy()).any()
    pyarrow.parquet.write_table(table.set_column(1, "label", pyarrow.array(noise)), file)
    for folder in (data, noisy):
        outputs = tmp_path / f"outputs of {folder.name}"
        small = ["--dataset", "cifar10", "--width", 4, "--epochs", 2, "--data-dir", folder, "--outputs", outputs]
        # One trial at a time: with two, TPE's proposals depend on which of them ends first.
        few = ("--num-samples", 4, "--max-concurrent", 1, "--confirm", 0, "--name", "s")
        run_command([*small, *few], cwd=tmp_path, script=TUNE)
        run_command(["--best", "s", "--outputs", outputs, "--name", "r"], cwd=tmp_path)
        best = read_json(outputs / "searches" / "s" / "best.json")
        rows, metrics = read_rows(outputs / "searches" / "s"), read_json_lines(outputs / "runs" / "r" / "metrics.jsonl")
        for record in (*rows, *metrics):
            for name in record.keys() & {*TIMES, "seconds"}:
                del record[name]
        choices.append((best["params"], best["value"], rows, metrics))
        weights.append(load_checkpoint(outputs / "runs" / "r" / "checkpoints" / "epoch-0002.pt")["model"])
    assert choices[0] == choices[1]
    assert_same_state(weights[0], weights[1])
