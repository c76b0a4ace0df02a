"""The format of a search's files: what they hold, how they are read, ranked and written.

search.json                   settings, seed, versions, commit, hardware, status; state/search.json is its copy
warm_start.json               what an earlier search lent, where one was named
confirmation.json             what running the best again over fresh seeds found; confirmation/ has the runs
trials.csv                    one row a trial, failed ones too
best.json                     the best configuration that reached its last epoch
trials/TRIAL_ID/trial.json    the trial's row, with what ASHA has judged
trials/TRIAL_ID/metrics.jsonl one line an epoch, written by the trial itself
trials/TRIAL_ID/checkpoints/  the trial's last two, by itself
optuna.log                    the trials that have ended as an Optuna journal, for optuna-dashboard
ray/                          Ray Tune's own folder, made anew whenever the search goes on
search.log                    what Ray and the libraries had to say

Readers raise ValueError, one sentence with the file's name, for what no search writes.
"""

import csv
import io
import math
import shlex
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from byot.config import CLASSIFIERS, LARGEST_COUNT, TrainConfig
from byot.system.files import errors_in, read_json, read_json_lines, write_json, write_text
from byot.system.flags import as_called
from byot.system.paths import SHIPPED_FOLDER, absolute_path, check_name, default_outputs

Role = Literal["sampled", "reference", "control"]
Status = Literal["completed", "stopped", "failed", "running"]  # running: begun and not ended, whether it runs or not
Mode = Literal["max", "min"]

ROLE_NAMES = {"reference": "the reference's setting", "control": "deep supervision alone"}  # in sentences
ROLE_SETTINGS = {
    "reference": {"alpha": 0.1, "temperature": 3.0, "beta": 1e-6},
    "control": {"alpha": 0.0, "temperature": 3.0, "beta": 0.0},
}
DIVERGED = "diverged: "  # how the error of such a trial begins; tried again it would diverge again
TEXT_PARAMETERS = ("teacher",)  # whose values are texts
SEARCHABLE = ("alpha", "temperature", "beta", "lr", "weight_decay", "label_smoothing", *TEXT_PARAMETERS)
ACCURACIES = ("val_accuracy", *(f"val_accuracy_{classifier}" for classifier in CLASSIFIERS))
MEASURES = (
    *ACCURACIES,
    "val_nll",
    "val_nll_ensemble",
    "val_ece",
    "val_ece_ensemble",
    # Older tables lack these.
    "val_accuracy_mean",
    "val_exit_accuracy",
)
# The columns of trials.csv, but for the parameters and the measures between them.
FIRST_COLUMNS = ("trial_id", "role", "status", "epochs_done")
LAST_COLUMNS = ("seconds", "seed", "error")
TEXT_COLUMNS = ("trial_id", "role", "status", "error")

CONFIRMATION = "confirmation.json"
KINDS = {str: "a text", int: "a count", float: "a number", dict: "a table", list: "a list", bool: "true or false"}


def take(record: Any, kind: type, *names: str) -> dict[str, Any]:
    """Take the values of these names, which must all be of one kind, from a record."""
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be a table, not {record!r:.40}")
    for name in names:
        value: Any = record.get(name)
        fits = is_number(value) if kind is float else type(value) is kind
        if not fits or (kind is int and not 0 <= value < 2**63):
            raise ValueError(f"{name} must be {KINDS[kind]}, not {value!r:.40}")
    return {name: kind(record[name]) for name in names}


def _known(record: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Return what a record knows, and the defaults of what it does not."""
    return defaults | {name: value for name, value in record.items() if value is not None}


def is_number(value: Any) -> bool:
    """Tell whether this is a number that a float holds; JSON also has NaN, infinity and ints of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


# ---------------------------------------------------------------- the search space


class Range(NamedTuple):
    """The values of one parameter, uniform or, with `log`, uniform in the logarithm."""

    low: float
    high: float
    log: bool = False

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{', logarithmic' if self.log else ''}"

    def holds(self, value: Any) -> bool:
        return is_number(value) and self.low <= value <= self.high

    def place(self, value: float) -> float:
        """Scale a value to its place from 0 to 1; one outside the range, as a beta of 0, is at its nearer end."""
        scale = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        return (scale(min(max(value, self.low), self.high)) - low) / (high - low)

    def at(self, place: float) -> float:
        """Return the value at a place from 0 to 1."""
        value = self.low * (self.high / self.low) ** place if self.log else self.low + (self.high - self.low) * place
        return min(max(value, self.low), self.high)  # rounding may have left the range


class Choices(NamedTuple):
    """The values of one parameter, as a list."""

    choices: list[float | str]

    def __str__(self) -> str:
        return " or ".join(map(str, self.choices))

    def holds(self, value: Any) -> bool:
        return value in self.choices

    def place(self, value: Any) -> float:
        """Scale a value to its place from 0 to 1; one that is not in the list is at 0."""
        return self.choices.index(value) / len(self.choices) if value in self.choices else 0.0

    def at(self, place: float) -> Any:
        """Return the value at a place from 0 to 1: each has as much room."""
        return self.choices[min(int(place * len(self.choices)), len(self.choices) - 1)]


Space = dict[str, Range | Choices]


def is_inside(space: Mapping[str, Range | Choices], params: Mapping[str, Any]) -> bool:
    """Tell whether all parameters that are searched lie within the space."""
    return all(bounds.holds(params[name]) for name, bounds in space.items())


def space_to_dict(space: Space) -> dict[str, dict[str, Any]]:
    return {name: bounds._asdict() for name, bounds in space.items()}


def space_from_dict(tables: Any) -> Space:
    """Make ranges of tables of low, high and log, and lists of tables of choices."""
    if not isinstance(tables, dict):
        raise ValueError(f"a search space must be tables of low, high and log, not {tables!r:.40}")
    space: Space = {}
    for name, table in tables.items():
        if name not in SEARCHABLE:
            raise ValueError(f"the search space names {name!r}; {', '.join(SEARCHABLE)} can be searched")
        if isinstance(table, dict) and set(table) == {"choices"}:
            space[name] = _read_choices(name, table["choices"])
            continue
        if not isinstance(table, dict) or not {"low", "high"} <= set(table) <= {"low", "high", "log"}:
            raise ValueError(
                f"the range of {name} needs low and high, and may have log = true, nothing else; or choices alone"
            )
        with errors_in(f"the range of {name}"):
            space[name] = bounds = Range(
                **take({"log": False} | table, bool, "log"), **take(table, float, "low", "high")
            )
            if not bounds.low < bounds.high:
                raise ValueError(f"low must be below high, not {bounds.low:g} and {bounds.high:g}")
            if bounds.log and bounds.low <= 0:
                raise ValueError(f"low must be above 0 on a logarithmic range, not {bounds.low:g}")
            for end in (bounds.low, bounds.high):
                TrainConfig().with_settings(**{name: end})  # raises ValueError for a value no run would take
    return space


def _read_choices(name: str, values: Any) -> Choices:
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f"the choices of {name} must be a list of two values or more, not {values!r:.40}")
    settings = [TrainConfig().with_settings(**{name: value}) for value in values]  # raises ValueError for a wrong one
    choices = Choices([getattr(one, name) for one in settings])
    if len(set(choices.choices)) < len(values):
        raise ValueError(f"the choices of {name} name one value twice: {', '.join(map(str, values))}")
    return choices


def take_parameters(record: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Take the values of these parameters from a record."""
    return {n: take(record, str if n in TEXT_PARAMETERS else float, n)[n] for n in names}


def format_parameter(value: float | str, digits: int = 3) -> str:
    return value if isinstance(value, str) else f"{value:.{digits}g}"


# ---------------------------------------------------------------- search.json


@dataclass(frozen=True, kw_only=True)
class SearchRecord:
    """What search.json says; `fields` is all of it, as it is there. A count of 0 is not known."""

    name: str
    status: str  # running, interrupted or finished
    config: TrainConfig  # the settings that are not searched
    settings: dict[str, Any]  # of the search itself: search.settings.SearchSettings
    space: Space
    metrics: tuple[str, ...]  # by the first one trials are ranked
    num_samples: int
    max_concurrent: int
    num_train_images: int
    num_val_images: int
    seeds_per_trial: int
    started_at: float  # seconds since 1970; 0 is not known
    finished_at: float
    commit: str
    versions: dict[str, Any]
    hardware: dict[str, Any]
    fields: dict[str, Any]

    @property
    def metric(self) -> str:
        return self.metrics[0]

    @property
    def mode(self) -> Mode:
        return metric_mode(self.metric)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        counts = ("num_samples", "max_concurrent", "num_train_images", "num_val_images")
        record = _known(fields, commit="", versions={}, hardware={}, **dict.fromkeys(counts, 0))
        metric, settings = record.get("metric"), {"confirm": None, **take(record, dict, "settings")["settings"]}
        settings["confirm"] = settings["confirm"] or 0  # older searches that were not to confirm have null or nothing
        if metric not in MEASURES:
            raise ValueError(f"metric must be a measure such as val_accuracy, not {metric!r:.40}")
        metrics = settings.get("metric")  # one metric was no list in older searches
        if not isinstance(metrics, list) or metrics[:1] != [metric] or not all(name in MEASURES for name in metrics):
            metrics = [metric]
        return cls(
            **take(record, str, "name", "status", "commit"),
            **take(record, dict, "versions", "hardware"),
            **take(record, int, *counts),
            **take({"seeds_per_trial": 1} | settings, int, "seeds_per_trial"),
            config=TrainConfig.from_dict(record.get("config")),
            settings=settings,
            space=space_from_dict(record.get("space")),
            metrics=tuple(metrics),
            started_at=_read_time(record.get("started_at")),
            finished_at=_read_time(record.get("finished_at")),
            fields=dict(fields),
        )


def _read_time(text: Any) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return 0.0


def load_search(folder: Path) -> SearchRecord:
    """Read the record of a search, from its copy where it is no JSON."""
    path = folder / "search.json"
    try:
        fields = read_json(path)
    except ValueError as error:
        try:
            fields = read_json(folder / "state" / "search.json")
        except ValueError:
            raise error from None
    with errors_in(path):
        return SearchRecord.from_dict(fields)


def list_searches(searches: Path) -> list[tuple[Path, SearchRecord]]:
    """Find the searches in a folder, with their records; a damaged one is passed over."""
    found = []
    for path in sorted(searches.glob("*/search.json")):
        with suppress(ValueError):  # naming the search tells what is wrong with it
            found.append((path.parent, load_search(path.parent)))
    return found


def find_folder(searches: Path, name: str, file: str) -> Path | None:
    """Find the folder of the named search, or of a path to one, that has this file."""
    folders = (absolute_path(searches / name), absolute_path(name))
    return next((folder for folder in folders if (folder / file).is_file()), None)


def find_search(outputs: Path, name: str | None = None) -> Path:
    """Find the folder of the named search, or of a path to one; without a name the one started last."""
    searches = outputs / "searches"
    if name is None:
        found = [(search.started_at, folder) for folder, search in list_searches(searches)]
        if not found:
            raise ValueError(f"no search is in {searches}: run python search/tune.py first")
        return max(found)[1]
    folder = find_folder(searches, name, "search.json")
    if folder is None:
        known = sorted(path.parent.name for path in searches.glob("*/search.json"))
        there = f"; there are {', '.join(known)}" if known else ""
        raise ValueError(f"there is no search {name} in {searches}{there}")
    return folder


# ---------------------------------------------------------------- trials


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A row of trials.csv."""

    trial_id: str
    role: Role
    status: Status
    epochs_done: int
    params: dict[str, Any]
    measures: dict[str, float | None]  # after the last epoch done; None before the first
    seconds: float
    seed: int
    error: str

    @property
    def diverged(self) -> bool:
        return self.status == "failed" and self.error.startswith(DIVERGED)

    def after_epoch(self, epoch: int, measured: Mapping[str, float], seconds: float) -> "TrialRecord":
        """Return the trial once it has done an epoch, `seconds` being those of all its epochs."""
        measures = self.measures | {name: measured[name] for name in MEASURES if name in measured}
        return replace(self, epochs_done=epoch, measures=measures, seconds=seconds)

    def to_row(self) -> dict[str, Any]:
        """Return the cells by their columns."""
        first, last = ({n: getattr(self, n) for n in names} for names in (FIRST_COLUMNS, LAST_COLUMNS))
        return first | self.params | self.measures | last

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Build a trial from cells by their columns, the numbers as numbers."""
        for name, allowed in (("role", get_args(Role)), ("status", get_args(Status))):
            if row.get(name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {row.get(name)!r:.40}")
        trial = cls(
            **take(row, str, *TEXT_COLUMNS),
            **take(row, int, "epochs_done", "seed"),
            **take(row, float, "seconds"),
            params=take_parameters(row, (name for name in row if name in SEARCHABLE)),
            measures=dict.fromkeys(MEASURES) | take(row, float, *(n for n in MEASURES if row.get(n) is not None)),
        )
        check_name(trial.trial_id)
        TrainConfig.from_dict({"seed": trial.seed, **trial.params})  # raises ValueError for what no run would take
        for name in ACCURACIES:
            if not 0 <= (trial.measures[name] or 0) <= 100:
                raise ValueError(f"{name} must lie between 0 and 100, not {trial.measures[name]:g}")
        return trial


def trial_columns(parameters: Iterable[str]) -> list[str]:
    """Return the header of trials.csv."""
    return [*FIRST_COLUMNS, *parameters, *MEASURES, *LAST_COLUMNS]


def read_trials(path: Path) -> list[TrialRecord]:
    """Read the trials of a trials.csv in their order; none if there is no file."""
    if not path.exists():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    trials: dict[str, TrialRecord] = {}
    with errors_in(path):
        if missing := [name for name in (*FIRST_COLUMNS, *LAST_COLUMNS) if name not in header]:
            raise ValueError(f"it is no table of trials: it lacks the column {missing[0]}")
        for number, cells in enumerate(rows, start=2):
            with errors_in(f"row {number}"):
                if len(cells) != len(header):
                    raise ValueError(f"it has {len(cells)} cells instead of {len(header)}")
                row = {name: _read_cell(name, cell) for name, cell in zip(header, cells, strict=True)}
                trial = TrialRecord.from_row(row)
                if trial.trial_id in trials:
                    raise ValueError(f"the trial {trial.trial_id} is there a second time")
                trials[trial.trial_id] = trial
    return list(trials.values())


def _read_cell(column: str, cell: str) -> Any:
    """Read the number in a cell, None where there is none that is finite; other text in its place stays text."""
    if column in TEXT_COLUMNS:
        return cell
    try:
        number = int(cell) if column in ("epochs_done", "seed") else float(cell)
    except ValueError:
        return cell or None
    return number if is_number(number) else None


def write_trials(path: Path, trials: Iterable[TrialRecord], parameters: Iterable[str]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, trial_columns(parameters), lineterminator="\n")
    writer.writeheader()
    writer.writerows(trial.to_row() for trial in trials)
    write_text(path, text.getvalue())


def read_epochs(path: Path) -> dict[int, dict[str, float]]:
    """Read the numbers in a metrics.jsonl by epoch, in order; of an epoch done twice, the later ones."""
    epochs: dict[int, dict[str, float]] = {}
    for line in read_json_lines(path):
        epoch = line.get("epoch")
        if type(epoch) is int and 0 < epoch <= LARGEST_COUNT:
            epochs.setdefault(epoch, {}).update({name: value for name, value in line.items() if is_number(value)})
    return dict(sorted(epochs.items()))


def settings_of(base: TrainConfig, role: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the loss weights of a trial and whatever else was searched; `base` has the weights that were not.

    The reference's setting and the control have weights of their own, whatever is searched.
    """
    weights = ROLE_SETTINGS.get(role) or {name: getattr(base, name) for name in ROLE_SETTINGS["reference"]}
    return {**weights, **params}


def to_retrain(base: TrainConfig, role: str, params: Mapping[str, Any]) -> TrainConfig:
    """Make the settings of a trial for a run on all training images: nothing is held out."""
    return base.with_settings(**settings_of(base, role, params), val_fraction=0.0)


# ---------------------------------------------------------------- which is best


def metric_mode(metric: str) -> Mode:
    """Tell whether more of a metric is better, or less."""
    return "max" if "_accuracy" in metric else "min"


def format_value(metric: str, value: float | None) -> str:
    """A measure as text: a likelihood in nats with four digits, the rest in percent with two; '-' if not known."""
    if value is None:
        return "-"
    digits = 4 if "_nll" in metric else 2
    return f"{round(value, digits) + 0.0:.{digits}f}"  # no difference of -0.00


def unit(metric: str, percent: str = "%") -> str:
    """Name the unit of a measure; `percent` is that of one in percent, such as "points" for a difference."""
    return "nats" if "_nll" in metric else percent


def to_unit(metric: str, points: float) -> float:
    """Convert a margin in percentage points to a measure's unit; of a likelihood in nats it is a hundredth."""
    return points / 100 if "_nll" in metric else points


def whole_trials(trials: Iterable[TrialRecord], metric: str) -> list[TrialRecord]:
    """Select the trials that reached their last epoch; one that was stopped before is not comparable with them."""
    return [trial for trial in trials if trial.status == "completed" and trial.measures.get(metric) is not None]


def find_role(trials: Iterable[TrialRecord], role: str, metric: str) -> TrialRecord | None:
    """Find the trial of the reference's setting or the control, None if it has not reached its last epoch."""
    return next((trial for trial in whole_trials(trials, metric) if trial.role == role), None)


def ranked(trials: Iterable[TrialRecord], metric: str) -> list[TrialRecord]:
    """Sort the trials that reached their last epoch, best first; of equals, the one started first leads.

    The control, another method, is not among them.
    """
    competing = [trial for trial in whole_trials(trials, metric) if trial.role != "control"]
    return sorted(competing, key=lambda trial: _cost(trial, metric))


def pareto_front(trials: Iterable[TrialRecord], metrics: Iterable[str]) -> list[TrialRecord]:
    """Select the ranked trials that no other beats in one metric without being worse in another."""
    first, *others = metrics
    whole = ranked(trials, first)
    costs = [[_cost(trial, metric) for metric in (first, *others)] for trial in whole]

    def is_beaten(cost: list[float]) -> bool:
        return any(other != cost and all(o <= c for o, c in zip(other, cost, strict=True)) for other in costs)

    return [trial for trial, cost in zip(whole, costs, strict=True) if not is_beaten(cost)]


def _cost(trial: TrialRecord, metric: str) -> float:
    """Return a number that is less for a better trial; what was not measured is worst."""
    value = trial.measures[metric]
    if value is None:
        return sys.float_info.max
    return -value if metric_mode(metric) == "max" else value


# ---------------------------------------------------------------- best.json and confirmation.json


def write_best(folder: Path, search: SearchRecord, trials: Iterable[TrialRecord]) -> None:
    """Write the settings with which byot/train.py --best trains, and what they are compared with.

    One trial at least has reached its last epoch. Of several metrics there is also the Pareto front.
    """
    whole = whole_trials(trials, search.metric)
    best = ranked(whole, search.metric)[0]
    record: dict[str, Any] = {
        "search": folder.name,
        "trial_id": best.trial_id,
        "role": best.role,
        "metric": search.metric,
        "mode": search.mode,
        "value": best.measures[search.metric],
        "params": best.params,
        "val": best.measures,
        "num_val_images": search.num_val_images,
        "compared_with": [
            {"role": trial.role, "params": trial.params, "value": trial.measures[search.metric]}
            for trial in whole
            if trial.role != "sampled"
        ],
    }
    if len(search.metrics) > 1:
        record["pareto_front"] = [
            {"trial_id": one.trial_id, "params": one.params, "values": {n: one.measures[n] for n in search.metrics}}
            for one in pareto_front(whole, search.metrics)
        ]
    record["config"] = to_retrain(search.config, best.role, best.params).to_dict()
    record |= {name: search.fields.get(name) for name in ("commit", "versions", "hardware")}
    write_json(folder / "best.json", record)


class ArmRecord(NamedTuple):
    """A configuration that was run again over fresh seeds."""

    trial_id: str
    role: str
    params: dict[str, Any]
    values: list[float | None]  # by seed; None where the run diverged or is not done
    still_in: bool


@dataclass(frozen=True, kw_only=True)
class ConfirmationRecord:
    """What running the best of a search again over fresh seeds found; `fields` is all of confirmation.json."""

    status: str
    metric: str
    arms: list[ArmRecord]
    choice: str  # a trial's id; empty where none is chosen
    resolved: bool
    num_rounds: int
    verdict: list[str]  # sentences
    fields: dict[str, Any]

    @property
    def final_choice(self) -> str:
        """The trial that is the best of the search, by its id; empty while the confirmation has not ended."""
        return self.choice if self.status == "finished" else ""

    @property
    def sentences(self) -> list[str]:
        """The verdict and, where the runs over fresh seeds have not ended, that it may change."""
        more = "The runs over fresh seeds have not ended: nothing is chosen by them yet, and this may change."
        return self.verdict if self.status == "finished" else [*self.verdict, more]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        record = _known(fields, choice="", resolved=False)
        verdict = take(record, list, "verdict")["verdict"]
        if not verdict or not all(isinstance(sentence, str) for sentence in verdict):
            raise ValueError(f"verdict must be sentences, not {verdict!r:.40}")
        return cls(
            **take(record, str, "status", "metric", "choice"),
            **take(record, bool, "resolved"),
            **take(record, int, "num_rounds"),
            verdict=verdict,
            arms=[_read_arm(arm) for arm in take(record, list, "arms")["arms"]],
            fields=dict(fields),
        )


def _read_arm(arm: Any) -> ArmRecord:
    values, params = take(arm, list, "values")["values"], take(arm, dict, "params")["params"]
    if not all(value is None or is_number(value) for value in values):
        raise ValueError(f"values must be numbers, not {values!r:.40}")
    names = take(arm, str, "trial_id", "role")
    return ArmRecord(**names, params=take_parameters(params, params), values=values, still_in=bool(arm.get("still_in")))


def load_confirmation(folder: Path) -> ConfirmationRecord | None:
    """Read what running the best of a search again over fresh seeds found; None where that was not done."""
    path = folder / CONFIRMATION
    if not path.is_file():
        return None
    record = read_json(path)
    with errors_in(path):
        return ConfirmationRecord.from_dict(record)


def confirmed_trial(folder: Path) -> str:
    """Return the id of the trial that is the best of a search over fresh seeds; empty where that was not found out."""
    confirmation = load_confirmation(folder)
    return confirmation.final_choice if confirmation else ""


# ---------------------------------------------------------------- the configuration that a search chose


class SearchedChoice(NamedTuple):
    """Settings a search chose and one sentence on where they come from."""

    settings: dict[str, Any]
    source: str


def find_best(outputs: Path, search: str, model: str | None = None, dataset: str | None = None) -> SearchedChoice:
    """Find the configuration that the named search confirmed, else its best.

    An empty name stands for the newest finished search, of this model and data set where they are given; where no
    search has finished, for what is shipped in results/best. Raises ValueError where there is nothing.
    """
    searches = outputs / "searches"
    if search:
        folder = find_folder(searches, search, "best.json")
        if folder is None:
            find_search(outputs, search)  # which says where there is none
            raise ValueError(f"the search {search} has no best.json: no trial of it has reached its last epoch yet")
        return find_choice(folder, f"the search {folder.name}")
    finished = [
        (record.finished_at, folder)
        for folder, record in list_searches(searches)
        if record.status == "finished"
        and (folder / "best.json").is_file()
        and model in (None, record.config.model)
        and dataset in (None, record.config.dataset)
    ]
    if finished:
        folder = max(finished)[1]
        return find_choice(folder, f"the newest finished search, {folder.name}")
    model, dataset = model or TrainConfig().model, dataset or TrainConfig().dataset
    shipped = SHIPPED_FOLDER / f"{model}-{dataset}.json"
    if shipped.is_file():
        return _read_choice(
            shipped, f"results/best, shipped with the project, as no search of {model} on {dataset} has finished here"
        )
    raise ValueError(
        f"no finished search of {model} on {dataset} is in {searches} and none is shipped: "
        f"run python search/tune.py --model {model} --dataset {dataset} first"
    )


def find_choice(folder: Path, source: str) -> SearchedChoice:
    """Read what was confirmed over fresh seeds, else the best single run."""
    confirmed = load_confirmation(folder)
    if confirmed is not None and confirmed.final_choice:
        how = "equal" if confirmed.fields.get("equivalent") else "confirmed" if confirmed.resolved else "not resolved"
        return _read_choice(folder / CONFIRMATION, f"{source}, {how} over {confirmed.num_rounds} fresh seeds")
    return _read_choice(folder / "best.json", source)


def _read_choice(path: Path, source: str) -> SearchedChoice:
    record = read_json(path)
    with errors_in(path):
        TrainConfig.from_dict(record.get("config"))
    found = record.get("found_with")
    return SearchedChoice(record["config"], f"{source} ({found})" if found else source)


def next_commands(folder: Path, outputs: Path) -> list[str]:
    """List what to run after a search, as typed in the project's folder."""
    name = shlex.quote(folder.name if folder.parent == outputs / "searches" else str(folder))
    where = "" if outputs == default_outputs() else f" --outputs {shlex.quote(str(outputs))}"
    return [
        as_called("python byot/train.py --best ") + f"{name}{where}",
        as_called("python analysis/retrain.py ") + f"{name} --top 3 --seeds 3{where}",
        as_called("python analysis/report.py ") + f"{name}{where}",
    ]
