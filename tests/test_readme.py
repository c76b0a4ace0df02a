"""Runs the commands that the README and docs/ show, word for word but for a search's number of trials."""

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from byot.cli import COMMANDS
from byot.system.paths import PROJECT_ROOT
from tests.helpers import run_command

PAGES = [PROJECT_ROOT / "README.md", *sorted((PROJECT_ROOT / "docs").glob("*.md"))]
FEWER = {"search/tune.py": ("--num-samples", 6, "--confirm", 1, "--confirm-seeds", 3)}  # what would take minutes
FOR_GPUS = ("--model resnet18", "DIR")  # or for data that is not here: such commands are parsed alone


def commands_in(page: Path) -> Iterator[str]:
    """List the lines of a page's blocks of commands, those that go on below as one."""
    for block in re.findall(r"^```\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        yield from block.replace("\\\n", "").splitlines()


def parse(line: str) -> tuple[str, list[str]] | None:
    """Find the script that a command line calls, and its arguments; None for a line that is no such command."""
    found = re.search(r"(?:python |torchrun .*)(search|byot|analysis)/(\w+)\.py(.*)|^\$? ?byot (\w+)(.*)", line)
    if found is None:
        return None
    script = f"{found[1]}/{found[2]}.py" if found[1] else f"{COMMANDS[found[4]][0].replace('.', '/')}.py"
    return script, shlex.split(found[3] if found[1] else found[5], comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_shown_is_understood(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (PROJECT_ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands_in(page):
        if made := re.match(r"make ([\w-]+)", line):
            assert made[1] in targets, line
        if command := parse(line):
            script, arguments = command
            import_module(script.removesuffix(".py").replace("/", ".")).build_parser().parse_args(arguments)


@pytest.mark.slow
def test_the_use_block_of_the_readme_runs_in_its_order(tmp_path: Path) -> None:
    shown = {line: parse(line) for line in commands_in(PAGES[0]) if not any(word in line for word in FOR_GPUS)}
    commands = {line: command for line, command in shown.items() if command}
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photo.jpg")
    names: dict[str, str] = {}
    for line, (script, arguments) in commands.items():
        of_run = script.startswith("byot/") or "--run" in arguments
        known = names.get("run" if of_run else "search", "")
        done = run_command(
            [*(known if argument == "NAME" else argument for argument in arguments), *FEWER.get(script, ())],
            cwd=tmp_path,
            script=script,
            BYOT_OUTPUTS=str(tmp_path),
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        for kind, folder in (("search", "searches"), ("run", "runs")):
            if kind not in names and (tmp_path / folder).is_dir():
                (names[kind],) = (path.name for path in (tmp_path / folder).iterdir())
    assert len(commands) >= 12
    assert set(names) == {"search", "run"}
    reports = {path.name for path in (tmp_path / "reports").glob("*.html")}
    assert reports == {f"{names['search']}.html", f"run-{names['run']}.html"}
