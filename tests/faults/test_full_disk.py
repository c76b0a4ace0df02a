"""A full disk stops runs and searches with one sentence; what was saved is whole, and with space they go on."""

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from byot.system.checkpoint import list_checkpoints, load_checkpoint
from tests.faults.conftest import LONG
from tests.faults.searches import Search
from tests.faults.tally import TALLY
from tests.helpers import command_environment, command_line, run_command

TIMES_TRIED = 5 if LONG else 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    place = tmp_path / "small disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, leave: int) -> Path:
    """Leave so many bytes free."""
    filler = place / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(place).free - leave))
    return filler


RUN = ("--dataset", "digits", "--width", 4, "--epochs", 8, "--name", "run")


@pytest.mark.slow
@pytest.mark.parametrize("leave", [100_000 + 150_000 * i for i in range(TIMES_TRIED)])
def test_run(tmp_path: Path, small_disk: Path, leave: int) -> None:
    with TALLY.attempt("a full disk under a run"):
        filler = fill(small_disk, leave)
        arguments = [*RUN, "--outputs", small_disk]
        stopped = run_command(arguments, cwd=tmp_path)
        assert stopped.returncode == 1, stopped.stdout + stopped.stderr
        (said,) = stopped.stderr.splitlines()
        assert "No space left on device" in said
        assert "go on with: " in said
        for path in list_checkpoints(small_disk / "runs" / "run" / "checkpoints"):
            load_checkpoint(path)
        filler.unlink()
        finished = run_command(arguments, cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr


def test_run_with_a_limit_on_files(tmp_path: Path) -> None:
    """The same where nothing can be mounted: no file may grow over 1 MB, the size of a checkpoint is 1.2."""
    with TALLY.attempt("a limit on the size of files under a run"):
        command = command_line("byot/train.py", *RUN, "--outputs", tmp_path)
        stopped = subprocess.run(
            command,
            cwd=tmp_path,
            env=command_environment(),
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        )
        assert stopped.returncode == 1, stopped.stdout + stopped.stderr
        assert "File too large" in stopped.stderr
        assert "Traceback" not in stopped.stderr
        finished = run_command([*RUN, "--outputs", tmp_path], cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("leave", [100_000 + 1_200_000 * i for i in range(TIMES_TRIED)])
def test_search(small_disk: Path, leave: int) -> None:
    search = Search(small_disk / "outputs")
    with TALLY.attempt("a full disk under a search"):
        filler = fill(small_disk, leave)
        process = search.start()
        assert process.wait(timeout=300) == 1
        search.note_ended()
        filler.unlink()
        search.finish()
