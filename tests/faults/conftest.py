"""Tries each fault a few times, in `make faults` (BYOT_FAULTS=long) as often as docs/reliability.md says."""

import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

LONG = os.environ.get("BYOT_FAULTS") == "long"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TALLY.tried:
        terminalreporter.section("faults")
        terminalreporter.write_line(TALLY.to_text())


@pytest.fixture
def moments() -> random.Random:
    """Draws the moments at which a test strikes, others at each run; a failing test prints the seed."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"moments from random.Random({seed})")
    return random.Random(seed)


class Tally:
    """Attempts tried and lost, by fault."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()

    @contextmanager
    def attempt(self, fault: str, times: int = 1) -> Iterator[None]:
        """Count one attempt, or several that are judged together. They are lost if an exception is raised within."""
        self.tried[fault] += times
        try:
            yield
        except BaseException:
            self.lost[fault] += times
            raise

    def to_text(self) -> str:
        width = max(map(len, self.tried))
        lines = [f"{'fault':<{width}}  tried  survived  lost"]
        for fault, tried in self.tried.items():
            lines.append(f"{fault:<{width}}  {tried:>5}  {tried - self.lost[fault]:>8}  {self.lost[fault]:>4}")
        return "\n".join(lines)


TALLY = Tally()
