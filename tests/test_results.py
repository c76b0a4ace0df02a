"""What is shipped in results/ is what its records say."""

import re
import shlex
import statistics
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.plans import RESULTS, SEARCH_PLANS
from benchmarks.quality.curves import FAMILIES, configurations, curves_path, load_curves
from benchmarks.readme_tables import RESULTS_PAGE, make_pages
from byot.cli import COMMANDS
from byot.config import TrainConfig
from byot.search_files import SHIPPED_FOLDER, find_best, load_search, ranked, read_trials
from byot.system.files import read_json
from byot.system.paths import PROJECT_ROOT
from tests.helpers import run_command

SPEEDS = ("images_per_s", "reference_images_per_s", "ratio", "share_of_matmul_peak", "memory_ratio")


@pytest.mark.parametrize("path", sorted(SHIPPED_FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_choice_is_that_of_its_record(path):
    shipped = read_json(path)
    best = read_json(PROJECT_ROOT / shipped["record"] / "best.json")
    for name, value in best["params"].items():
        assert shipped["config"][name] == value
    assert path.stem == f"{shipped['config']['model']}-{shipped['config']['dataset']}"


def test_shipped_choice_trains_the_full_network_and_says_how_it_was_found(tmp_path):
    choice = find_best(tmp_path, "", "resnet18", "cifar100")
    config = TrainConfig.from_dict(choice.settings)
    assert (config.width, config.epochs, config.val_fraction) == (64, TrainConfig().epochs, 0)
    assert "results/best" in choice.source
    assert "width 16" in choice.source


@pytest.mark.parametrize("folder", sorted((RESULTS / "searches").iterdir()), ids=lambda folder: folder.name)
def test_best_of_each_recorded_search_is_the_best_of_its_trials(folder):
    search, best = load_search(folder), read_json(folder / "best.json")
    found = ranked(read_trials(folder / "trials.csv"), search.metric)[0]
    assert (found.trial_id, found.measures[search.metric]) == (best["trial_id"], best["value"])


def test_tables_of_the_pages_are_made_from_the_records():
    for path, made in make_pages().items():
        assert path.read_text(encoding="utf-8") == made, "python benchmarks/readme_tables.py --write makes them anew"


def test_speeds_stand_in_the_records():
    """Every row of the speed table is a record's."""
    section = RESULTS_PAGE.read_text().split("## Speed")[1].split("\n## ")[0]
    told = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if "| ResNet" in line]
    known = []
    for path in RESULTS.glob("benchmarks/*thread*.json"):
        for row in read_json(path)["rows"]:
            network = f"ResNet{row['model'].removeprefix('resnet')}, width {row['width']}"
            known.append([network, str(row["threads"]), *(row[name] for name in SPEEDS)])
    assert len(told) == len(known)
    for network, threads, *numbers in told:
        (recorded,) = ([*values] for n, t, *values in known if (n, t) == (network, threads))
        for number, value in zip(numbers, recorded, strict=True):
            digits = len(number.partition(".")[2])
            assert number == f"{value:.{digits}f}"


def test_means_are_those_of_the_records():
    section = RESULTS_PAGE.read_text().split("## Speed")[1].split("\n## ")[0]
    names = [*(f"test_accuracy_{i}" for i in range(1, 5)), "test_accuracy_ensemble"]
    for told, precision in (("bf16", "bf16"), ("float32", "fp32")):
        (line,) = (line for line in section.splitlines() if line.startswith(f"| {told} |"))
        records = [read_json(path) for path in RESULTS.glob(f"runs/cifar100-w16-e4-{precision}-s*.json")]
        assert len(records) >= 3
        found = [[record[name] for record in records] for name in names]
        expected = [f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" for values in found]
        assert [cell.strip() for cell in line.split("|")[2:-1]] == expected


def test_recorded_searches_are_those_of_their_plans():
    for name, search in SEARCH_PLANS.items():
        path = RESULTS / "searches" / name / "search.json"
        if path.is_file():
            assert not search.base.differing_settings(TrainConfig.from_dict(read_json(path)["config"]))


def test_recorded_curves_are_those_of_their_families():
    """At least 150 configurations, each trained to its last epoch or until it diverged."""
    recorded = {name: load_curves(path) for name in FAMILIES if (path := curves_path(name)).exists()}
    assert sum(len({curve.number for curve in one.curves}) for one in recorded.values()) >= 150
    for name, one in recorded.items():
        family = FAMILIES[name]
        assert not family.base.differing_settings(one.config)
        assert one.space == family.space
        params = {number: (role, params) for number, role, params in configurations(family)}
        for curve in one.curves:
            assert params[curve.number] == (curve.role, curve.params)
            assert 0 <= len(curve.values["val_accuracy"]) <= one.config.epochs
        whole = [curve for curve in one.curves if len(curve.values["val_accuracy"]) == one.config.epochs]
        assert len(whole) > 0.9 * len(one.curves)


def test_regrets_are_those_of_the_record():
    families = read_json(RESULTS / "benchmarks" / "search-quality.json")["families"]
    section = RESULTS_PAGE.read_text().split("## How good the search is")[1].split("\n## ")[0]
    told = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    assert [row[0].split("`")[1] for row in told] == list(families)

    def text(estimate: dict[str, float], digits: int) -> str:
        return f"{estimate['mean']:.{digits}f} ± {estimate['half']:.{digits}f}"

    def share(method: dict[str, float | None]) -> str:
        return "never" if method["share_of_budget"] is None else f"{method['share_of_budget']:.2f}"

    for row, found in zip(told, families.values(), strict=True):
        names = ("ours", "stock", "tpe", "few epochs", "random")
        ours, stock, tpe, few, random = (found["methods"][name] for name in names)
        digits = len(row[1].split()[0].partition(".")[2])
        against = (tpe, few, random)
        estimates = (ours["final"], stock["final"], ours["minus_stock"], *(other["final"] for other in against))
        expected = [*(text(one, digits) for one in estimates), share(ours), share(stock)]
        assert [cell.strip() for cell in row[1:]] == expected
        assert ours["share_of_budget"] <= 1 / 3, "random's final regret, with a third of its epochs"
        assert ours["minus_stock"]["mean"] <= ours["minus_stock"]["half"], "no worse than Ray's beyond the noise"


# ---------------------------------------------------------------- the commands that README and docs show

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
def test_every_command_shown_is_understood(page):
    targets = re.findall(r"^([\w-]+):", (PROJECT_ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands_in(page):
        if made := re.match(r"make ([\w-]+)", line):
            assert made[1] in targets, line
        if command := parse(line):
            script, arguments = command
            import_module(script.removesuffix(".py").replace("/", ".")).build_parser().parse_args(arguments)


@pytest.mark.slow
def test_the_use_block_of_the_readme_runs_in_its_order(tmp_path):
    shown = {line: parse(line) for line in commands_in(PAGES[0]) if not any(word in line for word in FOR_GPUS)}
    commands = {line: command for line, command in shown.items() if command}
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photo.jpg")
    names: dict[str, str] = {}
    for script, arguments in commands.values():
        of_run = script.startswith("byot/") or "--run" in arguments
        known = names.get("run" if of_run else "search", "")
        words = [*(known if argument == "NAME" else argument for argument in arguments), *FEWER.get(script, ())]
        run_command(words, cwd=tmp_path, script=script, BYOT_OUTPUTS=str(tmp_path))
        for kind, folder in (("search", "searches"), ("run", "runs")):
            if kind not in names and (tmp_path / folder).is_dir():
                (names[kind],) = (path.name for path in (tmp_path / folder).iterdir())
    assert len(commands) >= 12
    assert set(names) == {"search", "run"}
    reports = {path.name for path in (tmp_path / "reports").glob("*.html")}
    assert reports == {f"{names['search']}.html", f"run-{names['run']}.html"}
