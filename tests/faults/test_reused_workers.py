"""Lets trials take long to end: reused workers do not deadlock, as with Ray's own settings they do.

Run as a script, with a folder, it is that search, by Ray alone, and prints its trials' epochs.
"""

import sys
import time
from typing import Any

import pytest

from search.system.resources import ResourceRequest, resolve, start_ray, this_machine
from tests.faults.conftest import TALLY
from tests.helpers import PROJECT, run_command

SECONDS_TO_END = 4


def trial(config: dict[str, Any]) -> None:
    from ray import tune

    try:
        for epoch in range(1, 100):
            tune.report({"epoch": epoch})
    finally:
        time.sleep(SECONDS_TO_END)


def main() -> None:
    start_ray(resolve(ResourceRequest(), *this_machine("cpu")))
    from ray import tune

    tuner = tune.Tuner(
        trial,
        tune_config=tune.TuneConfig(num_samples=3, max_concurrent_trials=1, reuse_actors=True),
        run_config=tune.RunConfig(name="ray", storage_path=sys.argv[1], stop={"epoch": 2}, verbose=0),
    )
    results = tuner.fit()
    print([(results[i].metrics or {})["epoch"] for i in range(len(results))])


@pytest.mark.slow
def test_slow_to_end(tmp_path):
    with TALLY.attempt("trials that take 4 s to end", 3):
        script = "tests/faults/test_reused_workers.py"
        result = run_command([tmp_path], cwd=tmp_path, script=script, PYTHONPATH=str(PROJECT))
        assert result.stdout.splitlines()[-1:] == ["[2, 2, 2]"], result.stderr


if __name__ == "__main__":
    main()
