"""Reused workers do not deadlock when a trial takes long to end, as with Ray's own settings they do."""

from pathlib import Path

import pytest

from tests.faults.tally import TALLY
from tests.helpers import PROJECT, run_command


@pytest.mark.slow
def test_slow_to_end(tmp_path: Path) -> None:
    with TALLY.attempt("trials that take 4 s to end", 3):
        result = run_command([tmp_path], cwd=tmp_path, script="tests/faults/slow_to_end.py", PYTHONPATH=str(PROJECT))
        assert result.stdout.splitlines()[-1] == "[2, 2, 2]", result.stderr
