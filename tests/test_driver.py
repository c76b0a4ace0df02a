"""How a machine is shared among trials, and what is said of the time before a search starts."""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from byot.config import TrainConfig
from byot.console import format_duration
from byot.data import load_images
from byot.search_files import Range, SearchRecord
from byot.system.files import write_json
from byot.system.paths import PROJECT_ROOT
from search.driver import go_on, most_on_a_gpu
from search.messages import describe_confirmation, describe_time
from search.plan import SearchPlan, _check_trials, check_gpus, is_new, resource_request
from search.probe import Probe, few_images, fewest_that_gain, find_trials_per_gpu
from search.race import Confirmation, Run
from search.settings import SearchSettings, choose_grace
from search.space import DEFAULT_SPACE
from search.system.remote import Store
from search.system.resources import ResourceRequest, Resources, cpu_quota, resolve, running_ray
from tests.made_up import make_trial, search_record

CPUS = Resources(max_concurrent=2, cpus=1, gpus=0, num_cpus=2, num_gpus=0)


@pytest.mark.parametrize(
    ("asked", "cpus", "gpus", "expected"),
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
def test_resources(asked, cpus, gpus, expected):
    assert resolve(ResourceRequest(**asked), cpus, gpus, "here")[:3] == expected


@pytest.mark.parametrize("name", ["cifar100-w16", "search-w16"])
def test_a_table_of_an_older_version_is_of_the_same_space(name):
    """It lacks the columns of later measures."""
    folder, settings = PROJECT_ROOT / "results" / "searches" / name, SearchSettings()
    _check_trials(folder, settings, DEFAULT_SPACE)
    with pytest.raises(ValueError, match="of another search space"):
        _check_trials(folder, settings, {**DEFAULT_SPACE, "lr": Range(0.01, 0.5)})


def test_what_a_search_leaves_that_was_killed_before_it_began_is_none(tmp_path):
    for name in (".lock", "search.log", "warm_start.json", ".search.json.7.tmp"):
        (tmp_path / name).touch()
    assert is_new(tmp_path)
    (tmp_path / "trials.csv").touch()
    assert not is_new(tmp_path)


def test_cuda_without_a_gpu_a_trial_is_refused():
    base = TrainConfig(device="cuda")
    with pytest.raises(ValueError, match="see --gpus-per-trial"):
        check_gpus(base, resolve(ResourceRequest(gpus=0.0), 2, 1, "here"))
    check_gpus(base, resolve(ResourceRequest(), 2, 1, "a cluster"))  # whatever this machine has


@pytest.mark.slow
def test_what_asks_for_no_gpu_sees_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with running_ray(CPUS):
        import ray

        seen = ray.remote(num_cpus=1)(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
        assert ray.get(seen.remote()) == ""


def test_the_gpus_share_what_may_run_at_once():
    """Ray fills one GPU before the next: more on each than that would leave others idle."""
    plan: Any = SimpleNamespace(settings=SearchSettings(num_samples=32))
    assert most_on_a_gpu(plan, resolve(ResourceRequest(), 16, 8, "here")) == 1
    assert most_on_a_gpu(plan, resolve(ResourceRequest(), 16, 1, "here")) == 8
    plan.settings = SearchSettings(max_concurrent=3)
    assert most_on_a_gpu(plan, resolve(ResourceRequest(), 16, 1, "here")) == 3


def test_before_anything_is_recorded_the_same_command_goes_on(tmp_path, monkeypatch):
    folder, store = tmp_path / "searches" / "s", Store(tmp_path)
    plan: Any = SimpleNamespace(folder=folder, store=store, address=None, recorded=None)
    monkeypatch.setattr(sys, "argv", ["tune.py", "--width", "4"])
    assert go_on(plan).endswith("tune.py --width 4")
    write_json(plan.folder / "search.json", search_record())
    assert go_on(plan).endswith(f"tune.py --name s --outputs {tmp_path} --resume")


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("cpu.max", "200000 100000", 2),
        ("cpu.max", "150000 100000", 2),
        ("cpu.max", "max 100000", sys.maxsize),
        ("cpu.max", "", sys.maxsize),
        ("cpu/cpu.cfs_quota_us", "400000", 4),
        ("cpu/cpu.cfs_quota_us", "-1", sys.maxsize),
    ],
)
def test_a_container_allows_so_many_cpus(tmp_path, file, content, expected):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    (tmp_path / file).write_text(content)
    assert cpu_quota(tmp_path) == expected


def test_so_many_trials_run_at_once_that_the_sampler_learns():
    assert [SearchSettings(num_samples=n).at_once(64) for n in (2, 16, 32, 400)] == [4, 4, 8, 64]
    assert SearchSettings(num_samples=32).at_once(2) == 2
    assert SearchSettings(num_samples=32, max_concurrent=20).at_once(20) == 20
    assert SearchSettings(num_samples=32, sampler="random").at_once(64) == 64


@pytest.mark.parametrize(("num_samples", "slots", "waves"), [(2, 16, 1), (5, 4, 2), (32, 2, 16)])
def test_trials_are_whole_and_end_when_the_last_one_does(num_samples, slots, waves):
    trial_s = (45_000 + 5_000 / 3) * 8 / 400
    config = TrainConfig(recipe="reference", epochs=8)
    told = told_time(
        400, config, Resources(slots, 1, 0, slots, 0), num_samples=num_samples, scheduler="none", max_concurrent=slots
    )
    assert told.endswith(f"{slots} at a time: about {format_duration(waves * trial_s)}"), told


def test_so_many_trials_get_a_gpu():
    for number in range(1, 100):
        found = resolve(ResourceRequest(1, 1 / number), 200, 2, "here")
        assert found.max_concurrent == 2 * number
        assert number * round(found.gpus * 10_000) <= 10_000, "Ray counts in ten-thousandths, rounded to the nearest"


@pytest.mark.parametrize(
    ("recorded", "gpus"),
    [({}, None), ({"gpus_per_trial": 0.5}, 0.5), ({"trials_per_gpu": "4"}, 0.25), ({"trials_per_gpu": "auto"}, None)],
)
def test_gpus_as_searches_record_them(recorded, gpus):
    """Older ones recorded the trials a GPU; with auto they begin with a whole one."""
    settings = SearchSettings.from_dict({"num_samples": 9, "patience": None, **recorded})
    assert resource_request(settings).gpus == gpus
    assert (settings.gpus_per_trial == "auto") == ("auto" in recorded.values())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"gpus_per_trial": True}, "not True"),
        ({"gpus_per_trial": "auto", "seeds_per_trial": 2}, "give a number"),
        ({"sampler": "cmaes"}, "--fresh starts the search anew with tpe"),
        ({"patience": 3}, "--fresh starts the search anew without it"),
        ({"surprise": 1}, "unknown setting surprise"),
    ],
)
def test_settings_that_no_search_has(wrong, words):
    with pytest.raises(ValueError, match=words):
        SearchSettings.from_dict(wrong)


def told_time(images_per_s: float, base: TrainConfig, resources: Resources = CPUS, **settings: Any) -> str:
    train: Any = SimpleNamespace(labels=range(45_000))
    val: Any = SimpleNamespace(labels=range(5_000))
    searched = SearchSettings(**{"confirm": 0, **settings})
    plan = SearchPlan(Store(Path("s")), base, searched, DEFAULT_SPACE, train, val, resources)
    return describe_time(images_per_s, plan, resources)


def test_days_come_with_advice_and_hours_do_not():
    reference = TrainConfig(recipe="reference")
    told = told_time(42, reference)
    assert "days" in told
    for advice in ("a GPU", "--width 16", "fewer --epochs"):
        assert advice in told
    # 8 trials of 6 epochs: two whole, six of 4 + 2/3 epochs; (45,000 + 5,000 / 3) / 400 s an epoch, two at a time, the
    # last one whole beside an idle slot
    quick = told_time(400, TrainConfig(recipe="reference", width=16, epochs=6), num_samples=8)
    assert quick == "400 images/s a trial, 2 at a time: about 45 min, at most 47 min"
    slow_gpu = told_time(4000, reference, Resources(1, 1, 1, 16, 1), num_samples=200)
    assert "a GPU" not in slow_gpu
    assert "fewer --epochs" in slow_gpu
    assert "it will stop after 8h" in told_time(42, reference, time_budget="8h")
    # 2 trials of 8 epochs, measured at a quarter of the pixels: (45,000 * 4.375 + 8 * 5,000 / 3) * 4 / 400 s
    growing = told_time(400, TrainConfig(epochs=8), num_samples=2)
    assert growing == "400 images/s a trial, 2 at a time: about 35 min"
    # The same with 4 trials, then four settings over 8 fresh seeds: 32 runs at most, 28.8 as a rule, two at a time.
    raced = told_time(400, TrainConfig(epochs=8), num_samples=4, confirm=3)
    assert raced == "400 images/s a trial, 2 at a time: about 9.9 h, 8.8 h of it over fresh seeds, at most 10.5 h"


def test_the_time_of_a_confirmation_is_told_by_the_pace_of_the_trials(tmp_path):
    """Trials of two runs each, 10 s an epoch of both: a run of 6 epochs takes 30 s. Two at a time."""
    settings = SearchSettings(confirm=1, seeds_per_trial=2)
    trials = [
        make_trial("t0000", 50.0, role="reference", seconds=60.0),
        make_trial("t0001", 49.0, role="control", seconds=60.0, alpha=0.0, beta=0.0),
        make_trial("t0002", 51.0, seconds=60.0, alpha=0.2, temperature=2.0, beta=1e-5),
    ]
    confirmation = Confirmation(Store(tmp_path), trials, DEFAULT_SPACE, TrainConfig(epochs=6), settings, 5000)
    told = describe_confirmation(confirmation, trials, CPUS)
    assert told.endswith("over 3 to 8 fresh seeds each: about 2 min, at most 6 min"), told  # 5 x 30, 12 x 30 s
    for arm in confirmation.arms:
        confirmation.results |= {Run(arm, number): {"error": "", "val_accuracy": 50.0} for number in range(2)}
    told = describe_confirmation(confirmation, trials, CPUS)
    assert told.endswith(", 6 runs finished before: about 60 s, at most 4 min"), told


def test_grace_is_that_of_the_schedule_or_what_the_search_was_started_with():
    base, smooth = TrainConfig(recipe="reference"), TrainConfig(recipe="modern", epochs=200)
    assert choose_grace(base, SearchSettings()) == 76, "the first whole epoch after the learning rate's first drop"
    assert choose_grace(smooth, SearchSettings()) == 81, "the first whole epoch after images have grown"
    digits = TrainConfig(dataset="digits", epochs=200)  # 8 pixels do not grow
    assert choose_grace(digits, SearchSettings()) == 31, "the first whole epoch after the warm-up"
    assert choose_grace(base, SearchSettings(grace=500)) == 200
    recorded = SearchRecord.from_dict(search_record(grace_epochs=33))
    assert choose_grace(base, SearchSettings(), recorded) == 33
    older = SearchRecord.from_dict(search_record())
    assert choose_grace(base, SearchSettings(), older) == 20, "of a version that recorded none"


# ---------------------------------------------------------------- how many trials share a GPU

BASE = TrainConfig(dataset="digits", width=2, device="cpu", precision="fp32", batch_size=64)


@pytest.mark.parametrize(
    ("speeds", "best", "measured"),
    [
        ([100, 180, 240, 250, 260], 3, 4),
        ([100, 90, 300], 1, 2),
        ([100, 180, None], 2, 2),
        ([None], 1, 0),
        ([100, 200, 300], 3, 3),
    ],
)
def test_trials_are_added_as_long_as_it_gains(speeds, best, measured):
    found, told = fewest_that_gain(lambda trials: speeds[trials - 1], most=len(speeds))
    assert found == best
    assert told == speeds[:measured]


def test_a_probe_trains_for_the_time_given():
    probe = Probe(BASE, few_images(load_images("digits", None, "train"), BASE.batch_size), threads=1)
    before = probe._trainer.model.trunk.conv1.weight.clone()
    images_per_s = probe.images_in(0.5)
    assert images_per_s is not None
    assert images_per_s > 0
    assert probe._trainer.step > 0
    assert not before.equal(probe._trainer.model.trunk.conv1.weight)


@pytest.mark.slow
def test_a_number_is_found_on_a_gpu_that_ray_counts(monkeypatch, capsys):
    """Ray is told of a GPU; the trials train on the CPU, two at once at most."""
    monkeypatch.setattr("search.probe.WARMUP_S", 0.2)
    monkeypatch.setattr("search.probe.MEASURED_S", 0.5)
    resources = Resources(1, 1, 1.0, num_cpus=2, num_gpus=1)
    with running_ray(resources):
        assert find_trials_per_gpu(BASE, load_images("digits", None, "train"), resources, most=2) in (1, 2)
        told = capsys.readouterr().out
        assert " with 1, " in told
        assert " with 2)" in told
        deadline = time.monotonic() + 30
        while ray.available_resources().get("GPU", 0) < 1:  # the trials will need all of it
            assert time.monotonic() < deadline, "the probes still hold the GPU"
            time.sleep(0.1)
