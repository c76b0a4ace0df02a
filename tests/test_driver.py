"""How a machine is shared among trials, and what is said of the time before a search starts."""

from pathlib import Path

import pytest

from byot.config import TrainConfig
from search.messages import describe_confirmation, describe_time
from search.race import Confirmation, Run
from search.settings import SearchSettings, choose_grace
from search.space import DEFAULT_SPACE
from search.system.resources import Share, Slots, share


@pytest.mark.parametrize(
    ("settings", "cpus", "gpus", "expected"),
    [
        ({}, 2, 0, (2, 1, 0)),
        ({"cpus": 2}, 2, 0, (1, 2, 0)),
        ({"max_concurrent": 1}, 8, 0, (1, 1, 0)),
        ({"max_concurrent": 99}, 8, 0, (8, 1, 0)),
        ({}, 16, 2, (2, 1, 1)),
        ({"gpus": 0.25}, 16, 1, (4, 1, 0.25)),
        ({"gpus": 0.4}, 16, 2, (4, 1, 0.4)),  # a fraction does not span two GPUs
        ({"gpus": 2.0}, 16, 4, (2, 1, 2)),
        ({"gpus": 0.0}, 16, 4, (16, 1, 0)),
        ({"gpus": 0.1, "cpus": 4}, 16, 1, (4, 4, 0.1)),
    ],
)
def test_slots(settings: dict, cpus: int, gpus: int, expected: tuple):
    assert share(Share(**settings), cpus, gpus, "here")[:3] == expected


@pytest.mark.parametrize("settings", [{"gpus": 1.0}, {"gpus": 0.5}, {"cpus": 3}])
def test_more_than_there_is(settings: dict):
    with pytest.raises(ValueError, match="here has"):
        share(Share(**settings), 2, 0, "here")


def test_days_come_with_advice_and_hours_do_not():
    cpu, gpu = Slots(2, 1, 0, 2, 0), Slots(1, 1, 1, 16, 1)
    told = describe_time(42, TrainConfig(recipe="reference"), SearchSettings(), cpu, 45_000, 5_000)
    assert "days" in told
    for advice in ("a GPU", "--width 16", "fewer --epochs"):
        assert advice in told
    # 8 trials of 6 epochs: two whole, six of 4 + 2/3 epochs; (45,000 + 5,000 / 3) / 400 s an epoch, two at a time
    short = TrainConfig(recipe="reference", width=16, epochs=6)
    quick = describe_time(400, short, SearchSettings(num_samples=8), cpu, 45_000, 5_000)
    assert quick == "400 images/s a trial, 2 at a time: about 39 min, at most 47 min"
    slow_gpu = describe_time(4000, TrainConfig(recipe="reference"), SearchSettings(num_samples=200), gpu, 45_000, 5_000)
    assert "a GPU" not in slow_gpu
    assert "fewer --epochs" in slow_gpu
    limited = describe_time(42, TrainConfig(recipe="reference"), SearchSettings(time_budget="8h"), cpu, 45_000, 5_000)
    assert "it will stop after 8h" in limited
    # 2 trials of 8 epochs, measured at a quarter of the pixels: (45,000 * 4.375 + 8 * 5,000 / 3) * 4 / 400 s
    growing = describe_time(400, TrainConfig(epochs=8), SearchSettings(num_samples=2), cpu, 45_000, 5_000)
    assert growing == "400 images/s a trial, 2 at a time: about 35 min"


def test_the_time_of_a_confirmation_is_told_by_the_pace_of_the_trials(tmp_path: Path):
    """Trials of two runs each, 10 s an epoch of both: a run of 6 epochs takes 30 s. Two at a time."""
    settings = SearchSettings(confirm=1, seeds_per_trial=2)
    rows = [
        {"trial_id": f"t{i:04}", "role": role, "status": "completed", "val_accuracy": value, "epochs_done": 6}
        | {"seconds": 60.0, "error": "", **params}
        for i, (role, value, params) in enumerate(
            [
                ("reference", 50.0, {"alpha": 0.1, "temperature": 3.0, "beta": 1e-6}),
                ("control", 49.0, {"alpha": 0.0, "temperature": 3.0, "beta": 0.0}),
                ("sampled", 51.0, {"alpha": 0.2, "temperature": 2.0, "beta": 1e-5}),
            ]
        )
    ]
    confirmation = Confirmation(tmp_path, rows, DEFAULT_SPACE, TrainConfig(epochs=6), settings, 5000)
    told = describe_confirmation(confirmation, rows, Slots(2, 1, 0, 2, 0))
    assert (
        told == "3 configurations again, over 3 to 8 fresh seeds each: about 2 min, at most 6 min"
    )  # 5 x 30, 12 x 30 s
    for arm in confirmation.arms:
        confirmation.results |= {Run(arm, number): {"error": "", "val_accuracy": 50.0} for number in range(2)}
    told = describe_confirmation(confirmation, rows, Slots(2, 1, 0, 2, 0))
    assert told.endswith(", 6 runs finished before: about 60 s, at most 4 min"), told


def test_grace_is_that_of_the_schedule_or_what_the_search_was_started_with():
    base, smooth = TrainConfig(recipe="reference"), TrainConfig(recipe="modern", epochs=200)
    assert choose_grace(base, SearchSettings()) == 76, "the first whole epoch after the learning rate's first drop"
    assert choose_grace(smooth, SearchSettings()) == 81, "the first whole epoch after images have grown"
    assert choose_grace(TrainConfig(dataset="digits", epochs=200), SearchSettings()) == 20, "images of 8 pixels stay"
    assert choose_grace(base, SearchSettings(grace=500)) == 200
    assert choose_grace(base, SearchSettings(), {"grace_epochs": 33}) == 33
    assert choose_grace(base, SearchSettings(), {}) == 20, "of a version that recorded none"
