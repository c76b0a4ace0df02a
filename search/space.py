"""The search space and the settings that are tried first, whatever the sampler would propose."""

import sys
import tomllib
from pathlib import Path
from typing import Any, Literal, NamedTuple

from byot.config import TrainConfig
from byot.system.files import errors_in

Role = Literal["sampled", "reference", "control"]
ROLE_NAMES = {"reference": "the reference's setting", "control": "deep supervision alone"}  # in sentences


class Range(NamedTuple):
    """The values of one parameter, uniform or, with `log`, uniform in the logarithm."""

    low: float
    high: float
    log: bool = False

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


Space = dict[str, Range]

DEFAULT_SPACE: Space = {
    "alpha": Range(0.0, 1.0),
    "temperature": Range(1.0, 10.0),
    "beta": Range(1e-8, 1e-3, log=True),
}
LARGEST = sys.float_info.max  # a file's whole numbers may be larger than any float
SEARCHABLE = ("alpha", "temperature", "beta", "lr", "weight_decay", "label_smoothing")


class FirstPoint(NamedTuple):
    """A setting run before any sampled one."""

    role: Role
    params: dict[str, float]


def first_points(space: Space, base: TrainConfig) -> list[FirstPoint]:
    """The reference implementation's setting, then deep supervision alone (alpha = beta = 0) as a control."""
    others = {name: getattr(base, name) for name in space if name not in DEFAULT_SPACE}
    reference = {"alpha": 0.1, "temperature": 3.0, "beta": 1e-6, **others}
    control = {"alpha": 0.0, "temperature": 3.0, "beta": 0.0, **others}
    return [FirstPoint("reference", reference), FirstPoint("control", control)]


def read_space(path: Path) -> Space:
    """Read a TOML file that changes ranges of the default space or adds lr, weight_decay and label_smoothing.

        [alpha]
        low = 0.0
        high = 0.5

        [lr]
        low = 0.01
        high = 0.5
        log = true

    Raises ValueError, in one sentence, for a file that cannot be read or a range that makes no sense.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the search space {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # too deeply nested
        raise ValueError(f"the search space {path} is not valid TOML ({error})") from error
    with errors_in(path):
        return {**DEFAULT_SPACE, **space_from_dict(tables)}


def _read_range(name: str, table: Any) -> Range:
    if name not in SEARCHABLE:
        raise ValueError(f"the search space names {name!r}; {', '.join(SEARCHABLE)} can be searched")
    if not isinstance(table, dict) or not {"low", "high"} <= set(table) or set(table) - {"low", "high", "log"}:
        raise ValueError(f"the range of {name} needs low and high, and may have log = true, nothing else")
    low, high, log = table["low"], table["high"], table.get("log", False)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= LARGEST for v in (low, high)):
        raise ValueError(f"low and high of {name} must be finite numbers")
    if not isinstance(log, bool):
        raise ValueError(f"log of {name} must be true or false")
    if not low < high:
        raise ValueError(f"low of {name} must be below high, not {low:g} and {high:g}")
    if log and low <= 0:
        raise ValueError(f"low of {name} must be above 0 on a logarithmic range, not {low:g}")
    for end in (low, high):
        TrainConfig().with_settings(**{name: float(end)})  # raises ValueError for a value no run would take
    return Range(float(low), float(high), log)


def space_to_dict(space: Space) -> dict[str, dict[str, Any]]:
    return {name: bounds._asdict() for name, bounds in space.items()}


def space_from_dict(tables: Any) -> Space:
    """The ranges in tables of low, high and log. Raises ValueError for one that makes no sense."""
    if not isinstance(tables, dict):
        raise ValueError(f"a search space must be tables of low, high and log, not {tables!r:.40}")
    return {name: _read_range(name, table) for name, table in tables.items()}
