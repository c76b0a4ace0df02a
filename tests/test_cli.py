"""The command byot, from a checkout and installed, and what its list, clean and compare say and do."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import get_args
from unittest.mock import Mock

import pytest
from scipy.stats import ttest_rel

import byot.clean_outputs
import byot.cli
import byot.list_outputs
from analysis.listing import NOTHING
from byot.cli import COMMANDS
from byot.config import TrainConfig
from byot.console import waiting
from byot.search_files import Status, write_trials
from byot.system.files import write_json
from byot.system.lock import LOCK_FILE, lock_folder
from byot.system.paths import PROJECT_ROOT
from search.space import DEFAULT_SPACE
from tests.helpers import PROJECT, FakeTerminal, assert_one_sentence, picture_of, run_process
from tests.made_up import make_trial, search_record

CONFIG = TrainConfig(dataset="digits", width=4, epochs=2)
HEAVY = ("torch", "torchvision", "ray", "optuna", "numpy", "pandas", "pyarrow", "PIL", "sklearn", "rich")


def python(*arguments: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_process([sys.executable, *map(str, arguments)], cwd, variables, timeout_s=120)


def save_run(folder: Path, config: TrainConfig = CONFIG, **result: float) -> Path:
    write_json(folder / "config.json", config.to_dict())
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "epoch-0002.pt").write_bytes(b"x" * 1000)
    if result:
        write_json(folder / "result.json", {"config": config.to_dict(), "num_test_images": 359, **result})
    return folder


def save_search(folder: Path, status: str = "finished") -> Path:
    """A search with a completed, a stopped, a failed and a running trial, each with a checkpoint."""
    write_json(folder / "search.json", search_record(name=folder.name, status=status))
    trials = [make_trial(f"t{number}", 90.0, status=state) for number, state in enumerate(get_args(Status))]
    write_trials(folder / "trials.csv", trials, DEFAULT_SPACE)
    for trial in trials:
        checkpoint = folder / "trials" / trial.trial_id / "checkpoints" / "epoch-0006.pt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_bytes(b"x" * 1000)
    (folder / "ray").mkdir()
    (folder / "ray" / "tuner.pkl").write_bytes(b"x" * 500)
    return folder


# ---------------------------------------------------------------- one command
def test_byot_and_its_help_are_light(tmp_path):
    """Neither the list of commands nor the help of any imports what is slow to import."""
    script = (
        "import sys\nfrom byot.cli import COMMANDS, main\n"
        "for line in ([], *([name, '--help'] for name in COMMANDS)):\n"
        "    sys.argv = ['byot', *line]\n"
        "    try:\n        main()\n    except SystemExit as stop:\n        assert not stop.code\n"
        f"    heavy = set({HEAVY}) & set(sys.modules)\n    assert not heavy, (line, heavy)\n"
    )
    done = python("-c", script, cwd=tmp_path, PYTHONPATH=str(PROJECT))
    assert (done.returncode, done.stderr) == (0, "")
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", done.stdout, re.MULTILINE)
        assert f"usage: byot {name} " in done.stdout
    assert "torchrun --nproc-per-node 4 -m byot train …" in done.stdout
    assert not re.search(r"(byot|search|analysis)/\w+\.py", done.stdout)


def test_a_command_bears_its_name_in_what_it_says(tmp_path):
    done = python("-m", "byot", "best", "--outputs", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"byot best: no search is in {tmp_path}/searches: run byot search first\n"


@pytest.mark.parametrize("module", [module for module, _ in COMMANDS.values() if "_outputs" not in module])
def test_a_python_without_the_packages_is_told_what_to_do(tmp_path, module):
    done = python("-S", PROJECT_ROOT / f"{module.replace('.', '/')}.py", "--help", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("byot is not installed for this Python: ")
    assert done.stderr.count("\n") == 1


def test_the_help_fits_80_columns(tmp_path):
    for name in COMMANDS:
        done = python("-m", "byot", name, "--help", cwd=tmp_path, COLUMNS="80")
        lines = done.stdout.splitlines()
        assert [line for line in lines if len(line) > 80] == [], name
        text = done.stdout.partition("\n\n")[2].partition("\n\npositional")[0].partition("\n\noptions")[0]
        paragraphs = [part.splitlines() for part in text.split("\n\n") if not part.startswith(" ")]
        short = [line for part in paragraphs for line in part[:-1] if len(line) < 50]
        assert short == [], f"{name}: lines of a paragraph are filled"


def test_what_is_waited_for_is_shown_until_it_is_over(monkeypatch):
    monkeypatch.setattr(sys, "stdout", written := FakeTerminal())
    with waiting("loading"):
        deadline = time.monotonic() + 60
        while ", 1 s" not in written.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    lines = written.getvalue().split("\r")
    assert lines[:2] == ["loading", "loading, 1 s"]
    assert lines[-2:] == [" " * len(lines[-3]), ""]


def test_what_it_says_to_type_next_can_be_typed(works, tmp_path, monkeypatch):
    shutil.copytree(PROJECT_ROOT / "results/searches/cifar100-w16", tmp_path / "searches" / "done")
    monkeypatch.setenv("BYOT_OUTPUTS", str(tmp_path))
    next_lines = works(byot.cli, "best", "done").partition("\nnext:\n")[2].splitlines()
    assert next_lines[0] == "  byot train --best done"
    assert all(line.split()[:1] == ["byot"] and line.split()[1] in COMMANDS for line in next_lines)


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("byot tr", ["train"]),
        ("byot train --rec", ["--recipe"]),
        ("byot train --recipe ", ["modern", "reference"]),
        ("byot train --best ", ["s1"]),
        ("byot train --resume ", ["r1", "r2"]),
        ("byot predict r", ["r1", "r2"]),
        ("byot  train --resume train", []),
        ("byot search --warm-start ", ["s1"]),
        ("byot compare r1 ", ["r1", "r2", "s1"]),
        ("byot trian --", []),
    ],
)
def test_the_shell_completes_what_was_typed(tmp_path, typed, completed):
    for name in ("r1", "r2"):
        save_run(tmp_path / "runs" / name)
    save_search(tmp_path / "searches" / "s1")
    answer = tmp_path / "answer"
    asked = {"COMP_LINE": typed, "COMP_POINT": str(len(typed)), "COMP_TYPE": "9"}
    asked |= {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": " ", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    done = python("-m", "byot", cwd=tmp_path, BYOT_OUTPUTS=str(tmp_path), **asked)
    assert (done.stdout, done.stderr) == ("", "")
    found = [word for word in answer.read_text().split(" ") if word]
    if not typed.endswith("--rec"):  # where a name may stand, a flag may too
        found = [word for word in found if not word.startswith("--")]
    assert found == completed


def test_installed_it_keeps_to_the_current_folder(tmp_path):
    """As the wheel lays it out: outputs and data go to the current folder, and the shipped setting is found."""
    site, here = tmp_path / "site", tmp_path / "here"
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in project["packages"]:
        source = PROJECT / project["package-dir"].get(package, package.replace(".", "/"))
        target = site / package.replace(".", "/")
        target.mkdir(parents=True)
        for pattern in ("*.py", *project["package-data"].get(package, [])):
            for file in source.glob(pattern):
                shutil.copy(file, target)
    before = picture_of(site)
    here.mkdir()
    for arguments, code, words in (
        (["list"], 0, f"no search and no run is in {here}/outputs"),
        (["train", "--best", "--data-dir", "nowhere"], 2, "results/best, shipped with the project"),
        (["report"], 2, f"no search is in {here}/outputs/searches: run byot search first"),
    ):
        done = python("-B", "-m", "byot", *arguments, cwd=here, PYTHONPATH=str(site))
        assert done.returncode == code, done.stderr
        assert words in done.stdout + done.stderr
    script = "import os; os.chdir('/'); import byot.data; print(byot.data.DEFAULT_DATA_DIR)"
    worker = "import subprocess, sys, byot.system.paths as p; subprocess.run([sys.executable, '-B', '-c', sys.argv[1]])"
    done = python("-B", "-c", worker, script, cwd=here, PYTHONPATH=str(site))
    assert done.stdout == f"{here}/data\n", "a worker in another folder finds the same data"
    assert picture_of(site) == before


def test_every_package_is_installed():
    packages = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        path.parent.relative_to(PROJECT).as_posix().replace("/", ".") for path in PROJECT.glob("[abs]*/**/__init__.py")
    }
    assert set(packages) - {"byot.shipped"} == found


# ---------------------------------------------------------------- list
@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make one search or run of each state; the run `done` is the newest, the search `gone` the oldest."""
    save_search(tmp_path / "searches" / "finished-search")
    save_search(tmp_path / "searches" / "gone", status="running")
    save_run(tmp_path / "runs" / "done", test_accuracy=97.5)
    save_run(tmp_path / "runs" / "half")
    save_run(tmp_path / "runs" / "damaged", test_accuracy=float("nan"))
    (tmp_path / "runs" / "no-record").mkdir()
    (tmp_path / "runs" / "no-record" / "metrics.jsonl").write_text("")
    (tmp_path / "runs" / "refused").mkdir()
    (tmp_path / "runs" / "refused" / LOCK_FILE).touch()
    for age, name in ((0, "runs/done"), (9, "searches/gone")):
        for path in (tmp_path / name).rglob("*"):
            os.utime(path, (1.9e9 - age * 1e8,) * 2)
    monkeypatch.setenv("BYOT_OUTPUTS", str(tmp_path))
    return tmp_path


def test_list_tells_the_states(works, outputs):
    with lock_folder(outputs / "runs" / "half"):
        listed = json.loads(works(byot.list_outputs, "--format", "json"))
    entries = {entry["name"]: entry for entry in listed}
    assert {name: entry["state"] for name, entry in entries.items()} == {
        "finished-search": "finished",
        "gone": "killed",
        "done": "finished",
        "half": "running",
        "damaged": "damaged",
        "no-record": "damaged",
    }
    names = list(entries)
    assert (names[0], names[-1]) == ("done", "gone"), "newest first"
    done = entries["done"]
    assert (done["model"], done["width"], done["dataset"], done["epochs"]) == ("resnet18", 4, "digits", 2)
    assert (done["metric"], done["value"]) == ("test_accuracy", 97.5)
    assert (done["alpha"], done["temperature"], done["beta"]) == (0.1, 3.0, 1e-6)
    assert entries["gone"]["alpha"] is None, "of a search"
    assert done["bytes"] == sum(path.stat().st_size for path in (outputs / "runs/done").rglob("*") if path.is_file())
    assert "config.json cannot be read" in entries["no-record"]["error"]
    assert "no number as test_accuracy" in entries["damaged"]["error"]
    with lock_folder(outputs / "runs" / "no-record"):  # its images are being decoded
        table = works(byot.list_outputs, "--format", "csv")
    rows = {row["name"]: (row["state"], row["error"]) for row in csv.DictReader(table.splitlines())}
    assert (rows["half"], rows["no-record"]) == (("interrupted", ""), ("running", ""))


def test_the_list_fits_80_columns(works, outputs):
    big = TrainConfig(model="resnet152", dataset="cifar100", width=128, epochs=200)
    save_run(outputs / "runs" / "big", big, test_accuracy=100.0)
    lines = works(byot.list_outputs).splitlines()
    assert max(map(len, lines[:-2])) <= 80
    line = lines[lines.index("run big  alpha 0.1  temperature 3  beta 1e-06") + 1]
    assert line.split()[:7] == ["finished", "resnet152", "w128", "cifar100", "e200", "100.00", "%"]


# ---------------------------------------------------------------- clean
@pytest.fixture
def litter(outputs: Path) -> set[str]:
    """Add what may be removed without asking for checkpoints; return its paths."""
    old = save_run(outputs / "runs" / "replaced" / "done-20261126-100000-000000", test_accuracy=1.0)
    torn = outputs / "runs" / "half" / ".result.json.123.tmp"
    left = outputs / "runs" / "half" / "checkpoints" / "left-epoch-0003.pt"
    for path in (torn, left):
        path.write_text("x")
    rays = [outputs / "searches" / name / "ray" for name in ("finished-search", "gone")]
    return {str(path.relative_to(outputs)) for path in (old, torn, left, *rays)}


def test_what_only_lists_needs_no_place_to_write(works, outputs, monkeypatch):
    monkeypatch.setattr("byot.system.paths.check_writable", Mock(side_effect=ValueError("nothing can be written")))
    assert "run done" in works(byot.list_outputs)


def test_clean_goes_on_beside_a_damaged_table(call, outputs):
    (outputs / "searches" / "finished-search" / "trials.csv").write_text("trial_id\nt0")
    code, out, err = call(byot.clean_outputs, "--checkpoints")
    assert code == 0
    assert "runs/done/checkpoints" in out
    assert_one_sentence(err, "byot clean: ", "finished-search/trials.csv")


CHECKPOINTS = {f"searches/{name}/trials/t{i}/checkpoints" for name in ("finished-search", "gone") for i in (0, 1)}
CHECKPOINTS |= {"runs/done/checkpoints"}


def removed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """The files and folders that are gone, without what was in such a folder."""
    gone = before.keys() - after.keys()
    assert all(after[path] == before[path] for path in after.keys() & before.keys())
    return {path for path in gone if not any(str(parent) in gone for parent in Path(path).parents)}


@pytest.mark.parametrize("flags", [(), ("--checkpoints",)])
def test_clean_removes_what_it_shows(works, outputs, litter, flags):
    expected = litter | CHECKPOINTS if flags else litter
    before = picture_of(outputs)
    *lines, last = works(byot.clean_outputs, *flags).splitlines()  # pytest's standard input is no terminal
    assert {line.split()[2] for line in lines} == expected
    assert "--yes does it" in last
    assert picture_of(outputs) == before, "without a terminal it only lists"
    works(byot.clean_outputs, *flags, "--yes")
    assert removed(before, picture_of(outputs)) == expected
    assert works(byot.clean_outputs, *flags) == f"nothing to remove in {outputs}\n"


@pytest.mark.parametrize(("answer", "goes"), [("y", True), ("", False), ("no", False)])
def test_clean_asks_on_a_terminal(call, outputs, litter, monkeypatch, answer, goes):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    before = picture_of(outputs)
    assert call(byot.clean_outputs)[0] == 0
    assert removed(before, picture_of(outputs)) == (litter if goes else set())


def test_clean_leaves_what_is_in_use(works, outputs, litter):
    """A run, a search by the worker of one of its trials, and a folder that was moved away under its writer."""
    old = next((outputs / "runs" / "replaced").iterdir())
    places = [outputs / "runs" / "done", outputs / "searches" / "gone" / "trials" / "t3", old]
    with lock_folder(places[0]), lock_folder(places[1]), lock_folder(places[2]):
        before = picture_of(outputs)
        out = works(byot.clean_outputs, "--checkpoints", "--yes")
        gone = removed(before, picture_of(outputs))
    assert gone
    assert not any(path.startswith(("runs/done", "searches/gone", "runs/replaced")) for path in gone)
    assert out.count("in use") == 3


def test_clean_leaves_what_came_into_use_while_it_asked(call, outputs, litter, monkeypatch):
    held = lock_folder(outputs / "runs" / "half")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: held.__enter__() or "y")
    before = picture_of(outputs)
    code, _, err = call(byot.clean_outputs)
    held.__exit__(None, None, None)
    assert code == 1
    assert err.startswith(f"byot clean: another process is writing to {outputs / 'runs' / 'half'}")
    after = {path: what for path, what in picture_of(outputs).items() if path != f"runs/half/{LOCK_FILE}"}
    assert removed(before, after) == {path for path in litter if not path.startswith("runs/half")}


def test_clean_follows_no_link(call, outputs, tmp_path_factory):
    """Neither a link in place of a run, nor one to its checkpoints, to replaced/, or in it."""
    outside = tmp_path_factory.mktemp("outside")
    save_run(outside / "run", test_accuracy=1.0)
    (outside / "run" / ".a.1.tmp").touch()
    (outputs / "runs" / "linked").symlink_to(outside / "run")
    shutil.rmtree(outputs / "runs" / "done" / "checkpoints")
    (outputs / "runs" / "done" / "checkpoints").symlink_to(outside / "run" / "checkpoints")
    (outputs / "searches" / "replaced").symlink_to(outside)
    (outputs / "runs" / "replaced").mkdir()
    (outputs / "runs" / "replaced" / "a").symlink_to(outside / "run")
    before = picture_of(outside)
    assert call(byot.clean_outputs, "--checkpoints", "--yes")[0] == 0
    assert picture_of(outside) == before
    assert (outputs / "runs" / "replaced" / "a").is_symlink()


# ---------------------------------------------------------------- compare
def accuracies(outputs: Path, name: str, values: list[float], **settings: object) -> None:
    for seed, value in enumerate(values):
        config = CONFIG.with_settings(seed=seed, **settings)
        figures = {"test_accuracy": value, "test_accuracy_4": value, "test_nll": value / 50, "elapsed_s": 1.0}
        save_run(outputs / "runs" / f"{name}-s{seed}", config, **figures)


def test_compare_gives_the_paired_interval(works, tmp_path, monkeypatch):
    monkeypatch.setenv("BYOT_OUTPUTS", str(tmp_path))
    first, other = [90.0, 92.0, 91.0, 80.0], [90.5, 94.0, 91.7]  # a fourth seed that has no pair
    accuracies(tmp_path, "a", first)
    accuracies(tmp_path, "b", other, alpha=0.5)
    accuracies(tmp_path, "long", [95.0], epochs=4)
    out = works(byot.cli, "compare", "a-s*", *(f"b-s{seed}" for seed in range(3)), "long-s0")
    rows = {line[0]: line.split() for line in out.splitlines() if re.match(r"[ABC]  +\d", line)}
    assert [rows[letter][1] for letter in "ABC"] == ["4", "3", "1"]
    assert rows["B"][5] == f"{sum(other) / 3:.2f}"
    low, high = ttest_rel(other, first[:3]).confidence_interval(0.95)
    gain = sum(other) / 3 - sum(first[:3]) / 3
    assert (
        f"B against A, test accuracy, classifier 4/4: better by {gain:.2f} points "
        f"(95 % interval {low:+.2f} to {high:+.2f}, 3 seeds)" in out
    )
    assert f"test NLL, classifier 4/4: worse by {gain / 50:.4f} nats" in out
    assert "B differs from A in alpha 0.5 (0.1)." in out
    assert "C differs from A in epochs 4 (2)." in out
    assert "Epochs alone may make a difference between C and A." in out
    assert "It takes two seeds that C and A both have" in out


def test_runs_on_other_images_are_not_compared(works, tmp_path, monkeypatch):
    monkeypatch.setenv("BYOT_OUTPUTS", str(tmp_path))
    for name in ("flowers", "cats"):
        accuracies(tmp_path, name, [90.0, 91.0], dataset="imagefolder", data_dir=f"/{name}")
    out = works(byot.cli, "compare", "flowers-s*", "cats-s*")
    assert "B differs from A in data_dir /cats (/flowers)." in out
    assert "B was perhaps tested on other images than A: there is nothing to compare." in out


def test_compare_puts_searches_side_by_side(works):
    searches = PROJECT_ROOT / "results" / "searches"
    out = works(byot.cli, "compare", searches / "cifar100-w16", searches / "cifar100-w16-e6")
    lines = [line.split() for line in out.splitlines()]
    assert ["A", "val_accuracy", "8", "5cc7cd4c", "34.12", NOTHING, NOTHING] in lines
    assert ["B", "val_accuracy", "12", "t0000", "33.82", "t0000", "34.43", "(3)"] in lines
    confirmation = json.loads((searches / "cifar100-w16-e6" / "confirmation.json").read_text())
    assert all(f"- {sentence}" in out for sentence in confirmation["verdict"])
