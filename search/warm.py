"""A warm start: what an earlier search lends to a new one, copied into the new one's folder at its start.

Where both train the same way and measure the same, the earlier trials are told to the sampler as they ended. Else their
values mean something else, and the best of their settings are tried early, each measured anew.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from byot.config import TrainConfig
from byot.search_files import (
    SEARCHABLE,
    SearchRecord,
    Space,
    TrialRecord,
    confirmed_trial,
    find_folder,
    is_inside,
    is_number,
    load_search,
    ranked,
    read_trials,
    settings_of,
)
from byot.system.files import read_json, write_json
from search.settings import SearchSettings
from search.space import first_points

WARM_START = "warm_start.json"
NUM_POINTS = 3  # settings tried early


class WarmTrial(NamedTuple):
    """How a trial of the earlier search ended."""

    params: dict[str, Any]
    epochs_done: int
    values: list[float]  # of each metric after its last epoch; empty where it diverged
    completed: bool


class WarmStart(NamedTuple):
    """What an earlier search lends; one of the two lists is empty."""

    search: str
    points: list[dict[str, Any]]  # tried early
    trials: list[WarmTrial]  # told to the sampler

    def describe(self) -> str:
        if self.trials:
            return f"warm start: {len(self.trials)} trials of {self.search} are known to the sampler"
        number = f"the {len(self.points)} best settings" if len(self.points) > 1 else "the best setting"
        return f"warm start: {number} of {self.search}, which trained otherwise, are tried early"

    def save(self, folder: Path) -> Path:
        """Write the copy of a new search; returns the file."""
        write_json(folder / WARM_START, {**self._asdict(), "trials": [trial._asdict() for trial in self.trials]})
        return folder / WARM_START


def load_warm_start(folder: Path, space: Space, metrics: tuple[str, ...]) -> WarmStart:
    """Read what a search was started with. Raises ValueError where that is lost or damaged."""
    path = folder / WARM_START
    if not path.is_file():
        raise ValueError(f"{path} is missing: without it the search cannot go on as it was started; --fresh")
    record = read_json(path)
    try:
        warm = WarmStart(str(record["search"]), record["points"], [WarmTrial(**trial) for trial in record["trials"]])
        points = [*warm.points, *(trial.params for trial in warm.trials)]
        whole = all(set(point) == set(space) and is_inside(space, point) for point in points) and all(
            all(map(is_number, trial.values))
            and len(trial.values) == len(metrics) * (trial.completed or bool(trial.values))
            and type(trial.epochs_done) is int
            for trial in warm.trials
        )
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is not what a search writes there; --fresh starts the search anew")
    return warm


def make_warm_start(searches: Path, name: str, base: TrainConfig, settings: SearchSettings, space: Space) -> WarmStart:
    """Choose what the named search, or the one in that folder, lends. Raises ValueError where that is nothing."""
    folder = find_folder(searches, name, "search.json")
    if folder is None:
        raise ValueError(f"there is no search {name} in {searches} to start from")
    earlier = load_search(folder)
    trials = []
    for trial in read_trials(folder / "trials.csv"):
        # A parameter that was not searched had the value of all its trials.
        had = earlier.config.to_dict() | settings_of(earlier.config, trial.role, trial.params)
        params = {name: had[name] for name in space}
        if _is_usable(trial, settings.metric) and is_inside(space, params):
            trials.append(replace(trial, params=trial.params | params))
    if _measures_the_same(earlier, base, settings, space):
        # What is not searched now was perhaps searched then: those trials count that had the value it has now.
        fixed = {name: getattr(base, name) for name in SEARCHABLE if name not in space}
        same = [t for t in trials if all(t.params.get(name, value) == value for name, value in fixed.items())]
        if same:
            return WarmStart(folder.name, [], [_lend(trial, settings.metric, space) for trial in same])
    tried_anyway = [point.params for point in first_points(space, base)]
    confirmed = confirmed_trial(folder)
    order = ranked(trials, settings.main_metric)
    order.sort(key=lambda trial: trial.trial_id != confirmed)  # the confirmed one comes first
    best = ({name: trial.params[name] for name in space} for trial in order)
    points = [params for params in best if params not in tried_anyway][:NUM_POINTS]
    if not points:
        raise ValueError(f"the search {folder.name} has no trial within this space to start from")
    return WarmStart(folder.name, points, [])


def _measures_the_same(earlier: SearchRecord, base: TrainConfig, settings: SearchSettings, space: Space) -> bool:
    """Tell whether values of both searches mean the same, but for what is searched in either of them."""
    return (
        not set(base.differing_settings(earlier.config)) - {"seed", *space, *earlier.space}
        and (base.dataset != "imagefolder" or base.data_dir == earlier.config.data_dir)
        and earlier.metric == settings.main_metric
        and earlier.seeds_per_trial == settings.seeds_per_trial
    )


def _is_usable(trial: TrialRecord, metrics: tuple[str, ...]) -> bool:
    """Tell whether a trial says something of its region. The control does not: it is another method."""
    measured = all(trial.measures[metric] is not None for metric in metrics)
    return trial.role != "control" and (trial.diverged or (measured and trial.status in ("completed", "stopped")))


def _lend(trial: TrialRecord, metrics: tuple[str, ...], space: Space) -> WarmTrial:
    values = [] if trial.diverged else [value for m in metrics if (value := trial.measures[m]) is not None]
    params = {name: trial.params[name] for name in space}
    return WarmTrial(params, trial.epochs_done, values, trial.status == "completed")
