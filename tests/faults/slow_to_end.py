"""A small search by Ray alone, of trials that take 4 s to end after they are stopped: FOLDER. Prints their epochs."""

import sys
import time
from typing import Any

from search.system.resources import Share, share_machine, start_ray

SECONDS_TO_END = 4


def trial(config: dict[str, Any]) -> None:
    from ray import tune

    try:
        for epoch in range(1, 100):
            tune.report({"epoch": epoch})
    finally:
        time.sleep(SECONDS_TO_END)


def main() -> None:
    start_ray(share_machine(Share(), "cpu"))
    from ray import tune

    tuner = tune.Tuner(
        trial,
        tune_config=tune.TuneConfig(num_samples=3, max_concurrent_trials=1, reuse_actors=True),
        run_config=tune.RunConfig(name="ray", storage_path=sys.argv[1], stop={"epoch": 2}, verbose=0),
    )
    results = tuner.fit()
    print([(results[i].metrics or {})["epoch"] for i in range(len(results))])


if __name__ == "__main__":
    main()
