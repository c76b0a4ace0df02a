"""Gives all tests one thread, a clean environment, the CIFAR-100 files where they are, and small parquet folders."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from byot.system.files import write_json
from tests.helpers import (
    EXIT_RULE,
    PROJECT,
    Call,
    ParquetMaker,
    Refused,
    Works,
    assert_one_sentence,
    save_digits_run,
    write_parquet,
)


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> None:
    """Compute on one thread: the cores are shared, and sums over threads are not bit-identical."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_is_heard() -> None:
    """Let Ctrl-C be heard, which a background job of a shell ignores, and so all that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep decoded images for the session, out of a tester's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BYOT_CACHE", str(tmp_path_factory.mktemp("decoded")))
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep decoded images in a folder of the test's own."""
    monkeypatch.setenv("BYOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_outputs_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget a tester's own BYOT_OUTPUTS, which must not be written to."""
    monkeypatch.delenv("BYOT_OUTPUTS", raising=False)


@pytest.fixture(scope="session")
def cifar100_dir() -> Path:
    """Find CIFAR-100 as parquet files: in $BYOT_CIFAR100, else in ../shared/data/cifar100, else skip the test."""
    given = os.environ.get("BYOT_CIFAR100")
    folder = Path(given) if given else PROJECT.parent / "shared" / "data" / "cifar100"
    if not any(folder.glob("train*.parquet")):
        pytest.skip(f"CIFAR-100 is not in {folder}; name its parquet folder in BYOT_CIFAR100")
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Give a function that calls a module's main() in this process: (exit code, stdout, stderr).

    Any other exception than SystemExit is a defect.
    """

    def call(module: ModuleType, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__.split('.')[-1]}.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def works(call: Call) -> Works:
    """Give a function that calls as `call` does what must end well and silently: what it says on stdout."""

    def check(*given: object) -> str:
        code, out, err = call(*given)
        assert (code, err) == (0, ""), given
        return out

    return check


@pytest.fixture
def refused(call: Call) -> Refused:
    """Give a function that calls as `call` does what must be refused, in one sentence that has these words."""

    def check(*given: object, words: tuple[str, ...]) -> None:
        code, out, err = call(*given)
        assert (code, out) == (2, ""), given
        assert_one_sentence(err, *words)

    return check


@pytest.fixture(scope="session")
def exits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run in outputs/runs/NAME that has an exits.json."""
    folder = save_digits_run(tmp_path_factory.mktemp("place") / "outputs" / "runs" / "NAME")
    write_json(folder / "exits.json", EXIT_RULE)
    return folder


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a network that has the deepest classifier alone."""
    return save_digits_run(tmp_path_factory.mktemp("plain") / "run", loss_form="plain", epochs=1)


@pytest.fixture
def alone(exits_run: Path, tmp_path: Path) -> Path:
    """Copy a run's checkpoint to where no exits.json is."""
    (checkpoint,) = (exits_run / "checkpoints").iterdir()
    return Path(shutil.copy(checkpoint, tmp_path / "alone.pt"))


@pytest.fixture
def parquet_folder(tmp_path: Path) -> ParquetMaker:
    """Give a function that writes a folder in the Hugging Face layout with random images."""

    def make(num_train: int = 12, num_test: int = 6, dataset: str = "cifar100", folder: str = "data set") -> Path:
        for split, num_images in (("train", num_train), ("test", num_test)):
            write_parquet(tmp_path / folder / f"{split}-00000-of-00001.parquet", num_images, dataset=dataset)
        return tmp_path / folder

    return make
