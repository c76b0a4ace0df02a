"""The search space, and the settings that are tried first, whatever the sampler would propose."""

import tomllib
from pathlib import Path
from typing import NamedTuple

from byot.config import TrainConfig
from byot.search_files import Range, Role, Space, space_from_dict
from byot.system.files import errors_in

DEFAULT_SPACE: Space = {
    "alpha": Range(0.0, 1.0),
    "temperature": Range(1.0, 10.0),
    "beta": Range(1e-8, 1e-3, log=True),
}


class FirstPoint(NamedTuple):
    """A setting run before any sampled one."""

    role: Role
    params: dict[str, float]


def first_points(space: Space, base: TrainConfig) -> list[FirstPoint]:
    """Make the reference implementation's setting, then deep supervision alone (alpha = beta = 0) as a control."""
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
