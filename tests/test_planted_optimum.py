"""A planted optimum is found by the search and confirmed over seeds, although single runs are noisy."""

import math
from pathlib import Path

import numpy as np
import pytest

from byot.config import TrainConfig
from byot.system.files import write_json
from search.race import Confirmation
from search.settings import SearchSettings
from search.space import DEFAULT_SPACE
from search.system.remote import Store
from tests.test_study import EPOCHS, MadeUpSearch

OPTIMUM = {"alpha": 0.55, "temperature": 5.0, "beta": 1e-5}
BEST = 78.0  # percent, of the optimum
SD = 0.3  # points, of a run
BASE = TrainConfig(dataset="digits", epochs=EPOCHS, val_fraction=0.1)
NUM_SAMPLES = 60


def true_accuracy(params: dict[str, float]) -> float:
    """Falls off by 1.5 points where alpha is 0.25 away, or the temperature 3, or beta a factor of 30."""
    far = ((params["alpha"] - OPTIMUM["alpha"]) / 0.25) ** 2 + (
        (params["temperature"] - OPTIMUM["temperature"]) / 3
    ) ** 2
    beta = max(params["beta"], 1e-9)  # deep supervision alone has none
    return BEST - 1.5 * (far + (math.log(beta / OPTIMUM["beta"]) / math.log(30)) ** 2)


@pytest.mark.parametrize("seed", range(2))
def test_it_is_found_and_confirmed(tmp_path: Path, seed: int):
    noise = np.random.default_rng(seed)
    search = MadeUpSearch(tmp_path, num_samples=NUM_SAMPLES, seed=seed)
    for _ in range(NUM_SAMPLES):
        suggestion = search.suggest()
        final, status = true_accuracy(suggestion["params"]) + noise.normal(0, SD), "completed"
        for epoch in range(1, EPOCHS + 1):
            value = final * (1 - 0.8 * math.exp(-epoch / 3)) if epoch < EPOCHS else final
            if search.report(suggestion, epoch, value) == "STOP" and epoch < EPOCHS:
                status = "stopped"
                break
        search.end(suggestion, status)

    settings = SearchSettings(confirm=3, confirm_seeds=8)
    trials = list(search.records.trials.values())
    confirmation = Confirmation(Store(tmp_path), trials, DEFAULT_SPACE, BASE, settings, num_val=5000)
    shared = noise.normal(0, 1, settings.confirm_seeds)  # what a seed does to all arms
    while (run := confirmation.next_run()) is not None:
        value = true_accuracy(confirmation.arms[run.arm].params) + shared[run.round] + noise.normal(0, SD)
        result = {"config": confirmation.config(run).to_dict(), "error": "", "val_accuracy": value}
        write_json(confirmation.run_folder(run) / "result.json", result)
        confirmation.results[run] = result

    judgement = confirmation.judge()
    assert judgement.chosen is not None
    choice = confirmation.arms[judgement.chosen]
    reference = next(arm for arm in confirmation.arms.values() if arm.role == "reference")
    assert true_accuracy(choice.params) > BEST - 1, "found"
    assert true_accuracy(reference.params) < BEST - 5, "which is worth finding"
    for role in ("reference", "control"):
        arm = next(arm.trial_id for arm in confirmation.arms.values() if arm.role == role)
        assert arm not in judgement.remaining, "confirmed: both controls are resolved to be worse"
