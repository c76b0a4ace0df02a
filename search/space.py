"""The search space, and the settings that are tried first, whatever the sampler would propose."""

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from byot.config import TrainConfig
from byot.search_files import ROLE_SETTINGS, TEXT_PARAMETERS, Range, Role, Space, space_from_dict
from byot.system.files import errors_in
from byot.system.flags import flag_name

if TYPE_CHECKING:  # the program's help should not wait for Optuna
    from optuna.distributions import BaseDistribution

DEFAULT_SPACE: Space = {
    "alpha": Range(0.0, 0.5),  # with a larger one no recorded run ended within 2.5 points of the best
    "temperature": Range(1.0, 10.0),
    "beta": Range(1e-8, 1e-3, log=True),
}


class FirstPoint(NamedTuple):
    """A setting run before any sampled one."""

    role: Role
    params: dict[str, Any]


def first_points(space: Space, base: TrainConfig) -> list[FirstPoint]:
    """Make the reference implementation's setting, then deep supervision alone (alpha = beta = 0) as a control."""
    roles: tuple[Role, ...] = ("reference", "control")
    return [
        FirstPoint(role, {name: ROLE_SETTINGS[role].get(name, getattr(base, name)) for name in space}) for role in roles
    ]


def make_distributions(space: Space) -> "dict[str, BaseDistribution]":
    """Make Optuna's form of a space."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return {
        name: FloatDistribution(bounds.low, bounds.high, log=bounds.log)
        if isinstance(bounds, Range)
        else CategoricalDistribution(bounds.choices)
        for name, bounds in space.items()
    }


def read_point(text: str, space: Space, base: TrainConfig) -> FirstPoint:
    """Read a setting to be tried early, such as alpha=0.3,temperature=4; the reference's values are the others.

    Raises ValueError for what is not searched, or lies outside its range.
    """
    params = first_points(space, base)[0].params
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in space:
            raise ValueError(f"--try {text}: {name!r} is not searched; {', '.join(space)} are")
        try:
            params[name] = value if name in TEXT_PARAMETERS else float(value)
        except ValueError:
            raise ValueError(f"--try {text}: {name} must be a number, not {value!r}") from None
        if not space[name].holds(params[name]):
            raise ValueError(f"--try {text}: {name} is searched in {space[name]}")
    return FirstPoint("sampled", params)


def choose_space(path: Path | None, fixed: Iterable[str]) -> Space:
    """Return the default space with the changes of a file, without what is fixed.

    Raises ValueError where the file searches what is fixed, or nothing is left.
    """
    changes = {} if path is None else read_space(path)
    fixed = set(fixed) & set(DEFAULT_SPACE)
    if both := fixed & set(changes):
        name = min(both)
        raise ValueError(f"{name} is fixed by {flag_name(name)} and searched by {path}: leave out one of them")
    space = {name: bounds for name, bounds in (DEFAULT_SPACE | changes).items() if name not in fixed}
    if not space:
        raise ValueError("alpha, temperature and beta are all fixed: that is one run of byot/train.py, and no search")
    return space


def read_space(path: Path) -> Space:
    """Read the ranges in a TOML file, of alpha, temperature, beta, lr, weight_decay, label_smoothing and teacher.

        [alpha]
        low = 0.0
        high = 0.5

        [lr]
        low = 0.01
        high = 0.5
        log = true

        [teacher]
        choices = ["deepest", "ensemble"]

    Raises ValueError, in one sentence, for a file that cannot be read or a range that makes no sense.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the search space {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # too deeply nested
        raise ValueError(f"the search space {path} is not valid TOML ({error})") from error
    with errors_in(path):
        return space_from_dict(tables)
