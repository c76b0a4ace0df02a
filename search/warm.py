"""A warm start: what an earlier search lends to a new one, copied into the new one's folder at its start.

Where both train the same way and measure the same, the earlier trials are told to the sampler as they ended. Else their
values mean something else, and the best of their settings are tried early, each measured anew.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from byot.config import TrainConfig
from byot.system.files import errors_in, read_json, write_json
from byot.system.paths import absolute_path
from search.records import DIVERGED, Row, load_search, ranked, read_rows
from search.settings import SearchSettings
from search.space import SEARCHABLE, Range, Space, first_points

FILE = "warm_start.json"
NUM_POINTS = 3  # settings tried early


class WarmTrial(NamedTuple):
    """How a trial of the earlier search ended."""

    params: dict[str, float]
    epochs_done: int
    values: list[float]  # of each metric after its last epoch; empty where it diverged
    completed: bool

    def is_whole(self, num_metrics: int) -> bool:
        """Whether this is what a search writes."""
        measured = all(isinstance(value, float) and math.isfinite(value) for value in self.values)
        number = len(self.values) == num_metrics or (not self.values and not self.completed)
        return measured and number and type(self.epochs_done) is int and isinstance(self.completed, bool)


class WarmStart(NamedTuple):
    """Of the two lists one is empty."""

    search: str
    points: list[dict[str, float]]  # tried early
    trials: list[WarmTrial]  # told to the sampler

    def describe(self) -> str:
        if self.trials:
            return f"warm start: {len(self.trials)} trials of {self.search} are known to the sampler"
        number = f"the {len(self.points)} best settings" if len(self.points) > 1 else "the best setting"
        return f"warm start: {number} of {self.search}, which trained otherwise, are tried early"

    def save(self, folder: Path) -> Path:
        """Returns the file."""
        write_json(folder / FILE, {**self._asdict(), "trials": [trial._asdict() for trial in self.trials]})
        return folder / FILE


def load_warm_start(folder: Path, space: Space, metrics: tuple[str, ...]) -> WarmStart | None:
    """What a search's folder has of its warm start. Raises ValueError where that is damaged."""
    if not (folder / FILE).is_file():
        return None
    record = read_json(folder / FILE)
    with errors_in(folder / FILE):
        try:
            trials = [WarmTrial(**trial) for trial in record["trials"]]
            for params in (*record["points"], *(trial.params for trial in trials)):
                if set(params) != set(space) or not all(space[name].holds(value) for name, value in params.items()):
                    raise ValueError("parameters that are not of the space")
            if not all(trial.is_whole(len(metrics)) for trial in trials):
                raise ValueError("values that are not of the metrics")
            return WarmStart(str(record["search"]), list(record["points"]), trials)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError("it is not what a search writes there; --fresh starts the search anew") from error


def make_warm_start(searches: Path, name: str, base: TrainConfig, settings: SearchSettings, space: Space) -> WarmStart:
    """What the named search, or the one in the folder of that path, lends. Raises ValueError where that is nothing."""
    folder = next((f for f in (searches / name, absolute_path(name)) if (f / "search.json").is_file()), None)
    if folder is None:
        raise ValueError(f"there is no search {name} in {searches} to start from")
    record = load_search(folder)
    with errors_in(folder / "search.json"):
        earlier = TrainConfig.from_dict(record.get("config"))
    with errors_in(folder / "trials.csv"):
        rows = [row for row in read_rows(folder / "trials.csv") if _is_usable(row, settings.metric)]
    for row in rows:
        row["params"] = {name: row.get(name, getattr(earlier, name)) for name in space}
    rows = [row for row in rows if all(_holds(bounds, row["params"][name]) for name, bounds in space.items())]
    if _is_same(record, earlier, base, settings, space):
        fixed = {
            name: getattr(base, name) for name in SEARCHABLE if name not in space
        }  # of these the earlier may differ
        told = [row for row in rows if all(row.get(name, value) == value for name, value in fixed.items())]
        if told:
            return WarmStart(folder.name, [], [_as_told(row, settings.metric) for row in told])
    tried_anyway = [point.params for point in first_points(space, base)]
    best = (row["params"] for row in ranked(rows, settings.main_metric, settings.mode))
    points = [params for params in best if params not in tried_anyway][:NUM_POINTS]
    if not points:
        raise ValueError(f"the search {folder.name} has no trial within this space to start from")
    return WarmStart(folder.name, points, [])


def _holds(bounds: Range, value: Any) -> bool:
    return isinstance(value, float) and bounds.holds(value)


def _is_same(
    record: dict[str, Any], earlier: TrainConfig, base: TrainConfig, settings: SearchSettings, space: Space
) -> bool:
    """Whether values of both searches mean the same, but for what is searched in either of them."""
    before, searched_before = record.get("settings"), record.get("space")
    num_seeds = before.get("seeds_per_trial", 1) if isinstance(before, dict) else 1
    searched = {"seed", *space, *(searched_before if isinstance(searched_before, dict) else ())}
    return (
        not set(base.differing_settings(earlier)) - searched
        and record.get("metric") == settings.main_metric
        and num_seeds == settings.seeds_per_trial
    )


def _is_usable(row: Row, metrics: tuple[str, ...]) -> bool:
    """Whether a trial says something of its region; not deep supervision alone, which is another method."""
    measured = all(isinstance(row.get(metric), float) for metric in metrics)
    diverged = row.get("status") == "failed" and str(row.get("error")).startswith(DIVERGED)
    return row.get("role") != "control" and ((measured and row.get("status") in ("completed", "stopped")) or diverged)


def _as_told(row: Row, metrics: tuple[str, ...]) -> WarmTrial:
    values = [] if row["status"] == "failed" else [row[metric] for metric in metrics]
    return WarmTrial(row["params"], row["epochs_done"], values, row["status"] == "completed")
