"""Fills the disk: runs and searches stop with one sentence, what was saved is whole, and with space they go on."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from byot.system.checkpoint import list_checkpoints, load_checkpoint
from tests.faults.conftest import LONG, TALLY
from tests.faults.searches import Search
from tests.helpers import run_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TIMES_TRIED = 5 if LONG else 1
RUN = ("--dataset", "digits", "--width", 4, "--epochs", 8, "--name", "run", "--outputs")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    place = tmp_path / "small disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, leave: int) -> Path:
    """Leave this many bytes free."""
    filler = place / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(place).free - leave))
    return filler


@pytest.mark.parametrize("leave", [100_000 + 150_000 * i for i in range(TIMES_TRIED)])
def test_run(tmp_path, small_disk, leave):
    with TALLY.attempt("a full disk under a run"):
        filler = fill(small_disk, leave)
        stopped = run_command([*RUN, small_disk], cwd=tmp_path, code=1)
        (said,) = stopped.stderr.splitlines()
        assert "No space left on device" in said
        assert "go on with: " in said or "give the same command again" in said
        for path in list_checkpoints(small_disk / "runs" / "run" / "checkpoints"):
            load_checkpoint(path)
        filler.unlink()
        run_command([*RUN, small_disk], cwd=tmp_path)


def test_run_with_a_limit_on_files(tmp_path):
    """The same where nothing can be mounted: no file may grow to the size of a checkpoint."""
    with TALLY.attempt("a limit on the size of files under a run"):
        limited = ("sh", "-c", 'ulimit -f 100 && exec "$@"', "sh")
        stopped = run_command([*RUN, tmp_path], cwd=tmp_path, before=limited, code=1)
        assert "File too large" in stopped.stderr
        assert "Traceback" not in stopped.stderr
        run_command([*RUN, tmp_path], cwd=tmp_path)


@pytest.mark.parametrize("leave", [100_000 + 1_200_000 * i for i in range(TIMES_TRIED)])
def test_search(small_disk, leave):
    search = Search(small_disk / "outputs")
    with TALLY.attempt("a full disk under a search"):
        filler = fill(small_disk, leave)
        process = search.start()
        assert process.wait(timeout=600) == 1, search.log()
        search.note_ended()
        filler.unlink()
        search.finish()
