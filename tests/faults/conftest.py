"""How often each fault is tried: a few times in `make test`, as often as the README's table says in `make faults`."""

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
    """Random moments at which to strike, others at each run; the seed is printed with a failure."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"moments from random.Random({seed})")
    return random.Random(seed)
