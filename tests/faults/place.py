"""Makes a place to be wrong in: a finished search and run, some images, no network, and no work that could start.

In the current folder of every test lie `folder`, empty; `file`, a text; `images`, a data set; `space.toml`;
`checkpoint.pt` of a run on digits after one epoch of two; `cifar.pt` of one on CIFAR-100; and outputs/ with the search
`done` and the run `mine`.
"""

import shutil
import socket
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision  # noqa: F401  # which imports torch's compiler, as it must before torch's backends are patched

import byot.cli
from byot.cli import COMMANDS
from byot.config import TrainConfig
from byot.data import LabelledImages
from byot.metrics import Evaluation
from byot.system.checkpoint import save_checkpoint
from byot.system.files import write_json
from byot.system.lock import LOCK_FILE
from byot.system.paths import PROJECT_ROOT
from byot.trainer import Trainer
from tests.faults.conftest import TALLY
from tests.helpers import Call, Refuse, assert_one_sentence, few_digits, picture_of, random_pixels, write_parquet

PROGRAMS: dict[str, Any] = {"byot": byot.cli} | {  # the module of each command, by its name in what it says
    f"byot {name}" if "_outputs" in module else f"{module.rpartition('.')[2]}.py": import_module(module)
    for name, (module, _) in COMMANDS.items()
}
FAULTS = {"test_command_lines": "a bad command line", "test_hostile_files": "a damaged or hostile file to read"}
SPACE = "[alpha]\nlow = 0.0\nhigh = 0.5\n\n[lr]\nlow = 0.01\nhigh = 0.5\nlog = true\n"
MEASURES = Evaluation(num_images=1, accuracy=(1.0,) * 5, nll=(1.0,) * 5, ece=(1.0,) * 5).to_record("test")


@pytest.fixture(scope="session")
def belongings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make, once, what lies in the current folder of every test here."""
    folder = tmp_path_factory.mktemp("belongings")
    config = TrainConfig(dataset="digits", width=1, epochs=2, batch_size=64, device="cpu")
    trainer = Trainer(config, few_digits(64))
    next(iter(trainer))
    save_checkpoint(folder / "checkpoint.pt", trainer.state_dict())
    cifar = LabelledImages(random_pixels(2), np.arange(2))
    save_checkpoint(folder / "cifar.pt", Trainer(TrainConfig(width=1, device="cpu"), cifar).state_dict())
    for split in ("train", "test"):
        write_parquet(folder / "images" / f"{split}.parquet", 2)
    (folder / "folder").mkdir()
    (folder / "file").write_text("neither TOML nor JSON {", encoding="utf-8")
    (folder / "space.toml").write_text(SPACE)
    write_json(folder / "outputs/runs/mine/config.json", TrainConfig(dataset="digits").to_dict())
    write_json(folder / "outputs/runs/mine/result.json", {"num_test_images": 1, "elapsed_s": 1.0, **MEASURES})
    shutil.copytree(PROJECT_ROOT / "results/searches/cifar100-w16", folder / "outputs/searches/done")
    return folder


@pytest.fixture
def place(tmp_path: Path, belongings: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fill the current folder; whatever would start work fails the test at once."""
    shutil.copytree(belongings, tmp_path, dirs_exist_ok=True)
    work = Mock(side_effect=AssertionError("work has started"))
    no_network = Mock(side_effect=socket.gaierror(-3, "Temporary failure in name resolution"))
    monkeypatch.setattr("byot.runs.train_and_test", work)
    monkeypatch.setattr("search.driver.run_search", work)
    monkeypatch.setattr("search.system.resources.start_ray", work)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("byot.data.DEFAULT_DATA_DIR", tmp_path / "data")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("BYOT_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refuse(request: pytest.FixtureRequest, place: Path, call: Call) -> Refuse:
    """Run a command here and hold it to one sentence that has these words, exit code 2, and nothing written."""
    fault = FAULTS[request.module.__name__.rpartition(".")[2]]

    def check(program: str, arguments: tuple[Any, ...], *words: str) -> None:
        with TALLY.attempt(fault):
            before = picture(place)
            code, out, err = call(PROGRAMS[program], *arguments)
            assert (code, out) == (2, ""), err
            assert_one_sentence(err, f"{program}: ", *words)
            assert err[:-1].isprintable(), "nothing a terminal would obey"
            assert picture(place) == before, "something was written"

    return check


def picture(folder: Path) -> dict[str, str]:
    """Picture a folder but for locks: those stay, empty, in a folder that was there before."""
    return {path: content for path, content in picture_of(folder).items() if Path(path).name != LOCK_FILE}
