"""Tries each fault a few times, in `make faults` (BYOT_FAULTS=long) as often as docs/reliability.md says."""

import os
import random

import pytest

from tests.faults.tally import TALLY

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
