"""Simulates how often the test of a confirmation is right: of five settings, over at most eight seeds.

  python benchmarks/quality/winner_test.py --output results/benchmarks/winner-test.json

Values are normal. A standard deviation of 1 is that of a single run, without what a seed does to all settings alike;
means and margins are in the same unit. The first setting is the simplest, deep supervision alone; the second is the
reference's; the others are sampled. A winner is wrong where another setting is as good or better. A choice among equals
is wrong where the best is better than it by the margin or more.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import common
from byot.system.files import write_text
from byot.system.flags import Parser
from search.significance import judge

MAX_ROUNDS = 8
FAR = 30.0
TITLE = f"""# How often the test of a confirmation is right

Made by `benchmarks/quality/winner_test.py`, which says what the columns mean. At most {MAX_ROUNDS} seeds, in one case
then {MAX_ROUNDS} more; shares of all simulations. `runs`: how many were done; {MAX_ROUNDS} seeds of all five are
{5 * MAX_ROUNDS}.
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """The truth about the settings."""

    means: tuple[float, ...]
    sds: tuple[float, ...] = (1.0,) * 5
    margin: float = 0.0
    then_rounds: int = MAX_ROUNDS  # where it is not resolved after MAX_ROUNDS, go on up to so many


CASES: dict[str, Case] = {
    "five equal": Case(means=(0, 0, 0, 0, 0)),
    "two equal, far ahead": Case(means=(-FAR, -FAR, -FAR, 0, 0)),
    "two equal, far ahead, one of them 6.3 times as noisy": Case(means=(-FAR, -FAR, -FAR, 0, 0), sds=(1, 1, 1, 1, 6.3)),
    "five equal, one 3 times as noisy": Case(means=(0, 0, 0, 0, 0), sds=(1, 1, 1, 1, 3)),
    "five equal, one 5 times as noisy": Case(means=(0, 0, 0, 0, 0), sds=(1, 1, 1, 1, 5)),
    "five equal, two 6.3 times as noisy": Case(means=(0, 0, 0, 0, 0), sds=(1, 1, 1, 6.3, 6.3)),
    "two equal, far ahead, and 8 more seeds": Case(means=(-FAR, -FAR, -FAR, 0, 0), then_rounds=2 * MAX_ROUNDS),
    "one ahead by 1.67": Case(means=(0, 0, 0, 0, 1.67)),
    "one ahead by 2": Case(means=(0, 0, 0, 0, 2)),
    "one ahead by 3": Case(means=(0, 0, 0, 0, 3)),
    "five equal, margin 1": Case(means=(0, 0, 0, 0, 0), margin=1),
    "one ahead by 1.67, margin 1": Case(means=(0, 0, 0, 0, 1.67), margin=1),
    "one ahead by 2, margin 1": Case(means=(0, 0, 0, 0, 2), margin=1),
    "one ahead by 1, margin 1": Case(means=(0, 0, 0, 0, 1), margin=1),
    "five equal, margin 2": Case(means=(0, 0, 0, 0, 0), margin=2),
    "one ahead by 2, margin 2": Case(means=(0, 0, 0, 0, 2), margin=2),
    "the simplest behind four equal ones by 2, margin 2": Case(means=(0, 2, 2, 2, 2), margin=2),
}


def simulate(name: str, num_simulations: int) -> dict[str, Any]:
    """Count the endings of the simulations of a case."""
    case, generator = CASES[name], np.random.default_rng(1)
    best = max(case.means)
    winners = [str(arm) for arm, mean in enumerate(case.means) if mean == best]
    counts = {"right_winner": 0, "wrong_winner": 0, "equal": 0, "wrong_equal": 0, "num_runs": 0}
    for _ in range(num_simulations):
        noise = generator.normal(size=(len(case.means), case.then_rounds))
        runs = np.array(case.means)[:, None] + noise * np.array(case.sds)[:, None]
        for last in dict.fromkeys((MAX_ROUNDS, case.then_rounds)):
            found, num_runs = race(runs[:, :last], case.margin)
            if found.resolved or found.equivalent:
                break
        counts["num_runs"] += num_runs
        if found.resolved:
            counts["right_winner" if winners == [found.leader] else "wrong_winner"] += 1
        elif found.equivalent:
            counts["equal"] += 1
            counts["wrong_equal"] += case.means[int(found.equivalent[0])] <= best - case.margin
    shares = {name: count / num_simulations for name, count in counts.items()}
    return {"case": name, "num_simulations": num_simulations, **shares}


def race(runs: np.ndarray, margin: float) -> tuple[Any, int]:
    """Judge runs [settings, rounds] as a confirmation does, which stops running what is out; count the runs."""
    max_rounds = runs.shape[1]
    found = judge({str(arm): list(values) for arm, values in enumerate(runs)}, max_rounds, margin, simplest=("0", "1"))
    lasts = {other: one.rounds for other, one in found.comparisons.items()}
    return found, sum(lasts.get(str(arm), found.rounds) for arm in range(len(runs)))


def make_table(records: list[dict[str, Any]]) -> str:
    columns = ("right_winner", "wrong_winner", "equal", "wrong_equal")
    header = ("case", *(name.replace("_", " ") for name in columns), "not resolved", "runs")
    rows = []
    for record in records:
        undecided = 1 - record["right_winner"] - record["wrong_winner"] - record["equal"]
        shares = (f"{value:.3f}" for value in (*(record[name] for name in columns), abs(undecided)))
        rows.append([record["case"], *shares, f"{record['num_runs']:.1f}"])
    return common.markdown(header, rows)


def main() -> None:
    parser = Parser(prog="winner_test.py", description=__doc__)
    parser.add_argument("--simulations", type=common.number(1), default=4000, metavar="N", help="of each case [4000]")
    parser.add_argument("--output", type=common.file_to_write, help="the record, as JSON, and a table beside it")
    arguments = parser.parse_args()
    records = [simulate(name, arguments.simulations) for name in CASES]
    table = f"{TITLE}\n{make_table(records)}\n"
    print(table)
    if arguments.output is not None:
        common.save_record(arguments.output, {"cases": records})
        write_text(arguments.output.with_suffix(".md"), table)


if __name__ == "__main__":
    main()
