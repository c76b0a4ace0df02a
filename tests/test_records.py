"""The files of a search: read back as written, right about which trial is best, restored where they are damaged."""

from itertools import islice
from pathlib import Path
from statistics import fmean

import pytest

from byot.config import TrainConfig
from byot.data import LabelledImages, split_validation
from byot.search_files import (
    SearchRecord,
    list_searches,
    load_search,
    pareto_front,
    ranked,
    read_trials,
    write_best,
    write_trials,
)
from byot.system.files import read_json, read_json_lines, write_json, write_text
from search.records import save_search
from search.trial import mean_record, train_seeds
from tests.helpers import assert_same_state, few_digits
from tests.made_up import BASE, make_trial, open_records, search_record

PARAMS = {"alpha": 0.5, "temperature": 2.0, "beta": 1e-6}
PARAMETERS = list(PARAMS)


# ---------------------------------------------------------------- trials.csv and metrics.jsonl
def test_trials_read_back_as_written(tmp_path):
    trials = [
        make_trial("1234e567", 71.5, alpha=0.1 + 0.2),
        make_trial("00000042", status="failed", error='diverged, "badly"'),
        make_trial("inf", 3.0, status="stopped"),
    ]
    path = tmp_path / "trials.csv"
    assert read_trials(path) == []
    write_trials(path, trials, PARAMETERS)
    assert read_trials(path) == trials
    write_trials(path, [make_trial("t0000", 70.0, measures={"val_nll": float("inf")})], PARAMETERS)
    assert read_trials(path)[0].measures["val_nll"] is None


# ---------------------------------------------------------------- which is best
def test_the_best_has_reached_its_last_epoch_and_is_not_the_control():
    trials = [
        make_trial("stopped", 99.0, status="stopped"),
        make_trial("control", 98.0, role="control"),
        make_trial("good", 70.0),
        make_trial("reference", 60.0, role="reference"),
        make_trial("equal", 70.0),
        make_trial("failed", status="failed"),
    ]
    assert [trial.trial_id for trial in ranked(trials, "val_accuracy")] == ["good", "equal", "reference"]
    assert [trial.trial_id for trial in ranked(trials, "val_nll")] == ["reference", "good", "equal"]
    assert ranked(trials[:2], "val_accuracy") == []


def test_pareto_front():
    values = [(70.0, 1.0), (71.0, 1.2), (69.0, 1.1), (70.0, 1.0)]
    trials = [make_trial(f"t{i}", value, measures={"val_nll": nll}) for i, (value, nll) in enumerate(values)]
    trials += [make_trial("t4", 99.0, role="control"), make_trial("t5", 99.0, status="stopped")]
    assert [t.trial_id for t in pareto_front(trials, ("val_accuracy", "val_nll"))] == ["t1", "t0", "t3"]
    assert [t.trial_id for t in pareto_front(trials, ("val_accuracy",))] == ["t1"]
    assert pareto_front([], ("val_accuracy", "val_nll")) == []


def test_best_json_trains_again_on_all_images(tmp_path):
    trials = [make_trial("control", 98.0, role="control"), make_trial("good", 70.0, alpha=0.25)]
    settings = search_record()["settings"] | {"metric": ["val_accuracy", "val_nll"]}
    write_best(tmp_path, SearchRecord.from_dict(search_record(settings=settings)), trials)
    best = read_json(tmp_path / "best.json")
    assert TrainConfig.from_dict(best["config"]) == BASE.with_settings(
        alpha=0.25, temperature=3.0, beta=1e-6, val_fraction=0.0
    )
    assert (best["trial_id"], best["value"], best["params"]) == ("good", 70.0, trials[1].params)
    assert [other["role"] for other in best["compared_with"]] == ["control"]
    values = {"val_accuracy": 70.0, "val_nll": 70.0}
    assert best["pareto_front"] == [{"trial_id": "good", "params": trials[1].params, "values": values}]


# ---------------------------------------------------------------- search.json
def test_a_search_is_read_from_its_copy_where_it_is_no_json(tmp_path):
    save_search(tmp_path / "s", search_record(also="kept"))
    whole = load_search(tmp_path / "s")
    assert (whole.config, whole.metrics, whole.num_val_images) == (BASE, ("val_accuracy",), 287)
    assert whole.fields["also"] == "kept"
    assert whole.finished_at - whole.started_at == 2.5 * 3600
    write_text(tmp_path / "s" / "search.json", "{")
    assert load_search(tmp_path / "s") == whole
    write_json(tmp_path / "s" / "search.json", search_record(metric="speed"))
    assert list_searches(tmp_path) == [], "a damaged one is passed over"


# ---------------------------------------------------------------- the running search
def test_an_epoch_reported_again_counts_once(tmp_path):
    records = open_records(tmp_path, "val_nll")
    trial_id = records.begin("sampled", PARAMS).trial_id
    for epoch, value in ((1, 3.0), (2, 2.0), (1, 3.0), (2, 2.5)):
        records.add_epoch(trial_id, {"epoch": epoch, "elapsed_s": 2.0, "val_nll": value})
    trial = records.end(trial_id, "stopped")
    records.add_epoch(trial_id, {"epoch": 3, "elapsed_s": 2.0, "val_nll": 1.0})
    assert (trial.epochs_done, trial.seconds, trial.measures["val_nll"]) == (2, 4.0, 2.5)
    again = open_records(tmp_path, "val_nll")
    assert (again.trials, again.curves) == ({trial_id: trial}, {trial_id: {1: 3.0, 2: 2.5}})


def test_a_search_of_an_older_version_goes_on(tmp_path):
    """Its trials kept CMA-ES's state, and their ids were no numbers."""
    trials = [make_trial("170572c2", 70.0), make_trial("t0001", 60.0)]
    write_trials(tmp_path / "trials.csv", trials, PARAMETERS)
    record = trials[1].to_row() | {"judged": {}, "curve": {"6": 60.0}, "sampler_state": {"cma:generation": 0}}
    write_json(tmp_path / "trials" / "t0001" / "trial.json", record)
    records = open_records(tmp_path)
    assert (list(records.trials.values()), records.next_id) == (trials, "t0002")


# ---------------------------------------------------------------- a trial of several seeds

CONFIG = TrainConfig(dataset="digits", width=2, epochs=3, val_fraction=0.2, device="cpu", seed=5)
Data = tuple[LabelledImages, LabelledImages]


@pytest.fixture(scope="module")
def data() -> Data:
    train, val = split_validation(few_digits(300), fraction=CONFIG.val_fraction, seed=0)
    assert val is not None
    return train, val


def test_several_seeds_are_the_mean_of_each_alone(tmp_path: Path, data: Data) -> None:
    together = list(train_seeds(CONFIG, 2, tmp_path / "both", *data, timed=None))
    alone = [
        list(train_seeds(CONFIG.with_settings(seed=seed), 1, tmp_path / str(seed), *data, timed=None))
        for seed in (5, 6)
    ]
    assert alone[0] != alone[1]
    for record, first, second in zip(together, *alone, strict=True):
        for name in ("val_accuracy", "val_accuracy_1", "val_nll_ensemble", "train_loss"):
            assert record[name] == pytest.approx(fmean((first[name], second[name])))
    assert [record["epoch"] for record in together] == [1, 2, 3]
    assert read_json_lines(tmp_path / "both" / "metrics.jsonl") == together
    assert {path.name for path in (tmp_path / "both").glob("seed-*")} == {"seed-5", "seed-6"}


@pytest.mark.parametrize("epochs_before", [1, 2])
def test_it_goes_on_exactly_where_it_was_stopped(tmp_path: Path, data: Data, epochs_before: int) -> None:
    whole = list(train_seeds(CONFIG, 2, tmp_path / "whole", *data, timed=None))
    broken = tmp_path / "broken"
    list(islice(train_seeds(CONFIG, 2, broken, *data, timed=None), epochs_before))
    # The kill left the first seed an epoch ahead of the second, and the means a line short.
    ahead = train_seeds(CONFIG, 1, broken / "seed-5", *data, timed=None)
    list(islice(ahead, epochs_before + 1))
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join(lines[:-1]))
    resumed = list(train_seeds(CONFIG, 2, broken, *data, timed=None))
    assert_same_state(resumed, whole)
    assert_same_state(read_json_lines(broken / "metrics.jsonl"), whole)


def test_mean_record():
    first = {"epoch": 3, "val_accuracy": 70.0, "elapsed_s": 2.0}
    second = {"epoch": 3, "val_accuracy": 72.0, "elapsed_s": 3.0}
    assert mean_record([first]) is first
    expected = {"epoch": 3, "val_accuracy": 71.0, "elapsed_s": 5.0}
    assert mean_record([first, second]) == expected
    assert mean_record([first | {"val_exit_accuracy": 60.0}, second]) == expected, "an older version measured less"
