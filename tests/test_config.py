"""Holds the settings to their ranges, the schedule to the reference's, the flags to what was typed, and the project's
folders to the imports DESIGN allows them."""

import ast
import json
import math
import re
import sys
from argparse import ArgumentParser
from dataclasses import FrozenInstanceError, fields
from importlib.metadata import packages_distributions
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from byot.config import DATASETS, RECIPES, TrainConfig, crop_padding, cutout_size, learning_rate, resolution, work_after
from byot.system.flags import Parser, add_settings, given_settings
from byot.system.paths import PROJECT_ROOT, cache_folder, check_name, outputs_folder
from byot.train import build_parser
from tests.helpers import PROJECT

# every setting at a value that is not its default
OTHER: dict[str, Any] = {
    "model": "resnet50",
    "width": 16,
    "dataset": "digits",
    "data_dir": "/somewhere",
    "recipe": "reference",
    "epochs": 7,
    "batch_size": 64,
    "lr": 0.05,
    "momentum": 0.8,
    "weight_decay": 1e-4,
    "alpha": 0.25,
    "temperature": 4.5,
    "beta": 1e-5,
    "loss_form": "paper",
    "label_smoothing": 0.1,
    "teacher": "ensemble",
    "seed": 3,
    "val_fraction": 0.1,
    "split_seed": 2,
    "device": "cpu",
    "precision": "bf16",
    "batch_norm": "local",
    "acceleration": "none",
    "placement": "streamed",
}


def test_every_setting_is_in_these_tests() -> None:
    defaults = TrainConfig().to_dict()
    assert set(OTHER) == set(defaults)
    assert all(OTHER[name] != defaults[name] for name in OTHER)


def test_defaults_are_the_references() -> None:
    config = TrainConfig()
    assert (config.alpha, config.temperature, config.beta) == (0.1, 3, 1e-6)
    assert (config.momentum, config.weight_decay) == (0.9, 5e-4)
    assert (config.batch_size, config.model, config.dataset) == (128, "resnet18", "cifar100")
    assert (config.loss_form, config.recipe, config.teacher) == ("reference", "modern", "deepest")


@pytest.mark.parametrize("config", [TrainConfig(), TrainConfig(**OTHER)], ids=["defaults", "others"])
def test_json_round_trip(config: TrainConfig) -> None:
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.run_name() == config.run_name()


def test_settings_cannot_be_changed_in_place() -> None:
    config: Any = TrainConfig()
    with pytest.raises(FrozenInstanceError):
        config.alpha = 0.5


def test_missing_settings_take_their_defaults_and_unknown_ones_are_named() -> None:
    assert TrainConfig.from_dict({"alpha": 0.5}) == TrainConfig(alpha=0.5)
    with pytest.raises(ValueError, match="unknown setting gamma, lamda"):
        TrainConfig.from_dict({"lamda": 1, "alpha": 0.5, "gamma": 2})


WRONG: list[tuple[str, Any]] = [
    *((name, "other") for name in ("model", "dataset", "recipe", "loss_form", "precision", "device", "batch_norm")),
    *((name, "other") for name in ("acceleration", "placement")),
    *((name, None) for name in ("model", "dataset", "width", "alpha", "seed", "val_fraction")),
    *((name, 2.5) for name in ("width", "epochs", "batch_size", "seed", "split_seed")),
    *((name, True) for name in ("width", "epochs", "seed", "lr", "alpha", "beta")),
    *((n, "1") for n in ("epochs", "lr", "momentum", "weight_decay", "alpha", "temperature", "beta", "val_fraction")),
    *((n, math.nan) for n in ("lr", "momentum", "weight_decay", "alpha", "temperature", "beta", "val_fraction")),
    *((n, math.inf) for n in ("lr", "momentum", "weight_decay", "alpha", "temperature", "beta", "val_fraction")),
    *((n, -0.01) for n in ("lr", "momentum", "weight_decay", "alpha", "temperature", "beta", "val_fraction")),
    *((name, -1) for name in ("width", "epochs", "batch_size", "seed", "split_seed")),
    *((name, 2**32) for name in ("seed", "split_seed")),
    ("width", 0),
    ("width", 1025),
    ("epochs", 0),
    ("batch_size", 0),
    ("batch_size", 1),
    ("lr", 0.0),
    ("momentum", 1.0),
    ("alpha", 1.01),
    ("temperature", 0.0),
    ("val_fraction", 0.51),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{n}={v}" for n, v in WRONG])
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must .*not ") as caught:
        TrainConfig(**{name: value})
    assert "\n" not in str(caught.value)


EDGES: list[tuple[str, Any]] = [
    ("alpha", 0.0),
    ("alpha", 1.0),
    ("alpha", 0),
    ("beta", 0.0),
    ("temperature", 1e-3),
    ("momentum", 0.0),
    ("weight_decay", 0.0),
    ("epochs", 1),
    ("batch_size", 2),
    ("width", 1),
    ("width", 1024),
    ("seed", 2**32 - 1),
    ("val_fraction", 0.0),
    ("val_fraction", 0.5),
]


@pytest.mark.parametrize(("name", "value"), EDGES, ids=[f"{n}={v}" for n, v in EDGES])
def test_the_edges_of_a_range_are_in_it(name: str, value: Any) -> None:
    assert getattr(TrainConfig(**{name: value}), name) == value


# ---------------------------------------------------------------- identity


@pytest.mark.parametrize("name", OTHER)
def test_run_name_tells_runs_apart_but_not_their_place(name: str) -> None:
    config, other = TrainConfig(), TrainConfig().with_settings(**{name: OTHER[name]})
    same = name in ("device", "data_dir", "acceleration", "placement")
    assert (config.run_name() == other.run_name()) is same
    assert config.differing_settings(other) == ({} if same else {name: (getattr(config, name), OTHER[name])})


def test_run_name_is_one_plain_folder_name_and_says_what_ran() -> None:
    name = TrainConfig(**OTHER).run_name()
    assert check_name(name) == name
    for part in ("resnet50", "w16", "digits", "e7", "s3"):
        assert part in name.split("-")


def test_equal_settings_have_one_name() -> None:
    """JSON written elsewhere may say 0 for 0.0, and the run must still be found again."""
    whole, point = TrainConfig(alpha=0, lr=1, beta=1), TrainConfig(alpha=0.0, lr=1.0, beta=1.0)
    assert whole == point
    assert whole.run_name() == point.run_name()


@pytest.mark.parametrize("name", ["a", "run-1", "resnet18_w8.v2", "0"])
def test_plain_names_are_taken(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "a b", "a\nb", "a\n", "x" * 129, "-rf", "é"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a name is made of"):
        check_name(name)


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYOT_CACHE", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "c"
    monkeypatch.delenv("BYOT_CACHE")
    assert cache_folder() == PROJECT_ROOT / "data" / "cache"
    (tmp_path / "file").touch()
    monkeypatch.setattr("byot.system.paths.PROJECT_ROOT", tmp_path / "file")  # a copy that cannot be written to
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "byot"


def test_outputs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outputs_folder(None) == PROJECT_ROOT / "outputs" == PROJECT / "outputs"
    monkeypatch.setenv("BYOT_OUTPUTS", str(tmp_path / "variable"))
    assert outputs_folder(None) == tmp_path / "variable"
    monkeypatch.chdir(tmp_path)
    assert outputs_folder("given") == tmp_path / "given", "absolute, and before the variable"


# ---------------------------------------------------------------- learning rate


def rates(config: TrainConfig, steps: int = 4) -> list[float]:
    """The learning rate of every step of a run whose epochs have `steps` steps."""
    return [learning_rate(config, (e + i / steps) / config.epochs) for e in range(config.epochs) for i in range(steps)]


def test_the_references_milestones() -> None:
    found = rates(TrainConfig(recipe="reference", epochs=200), steps=391)
    expected = [0.1] * 75 + [0.01] * 55 + [0.001] * 50 + [0.0001] * 20
    assert found == pytest.approx([lr for lr in expected for _ in range(391)], rel=1e-12)


@pytest.mark.parametrize("epochs", [20, 6, 1, 7, 40, 100, 300])
def test_milestones_scale_with_the_run(epochs: int) -> None:
    """The reference's fall at epochs 75, 130 and 180 whatever the number of epochs asked for."""
    found = rates(TrainConfig(recipe="reference", epochs=epochs), steps=32)
    drops = [step for step, (a, b) in enumerate(pairwise(found), start=1) if a != b]
    # the first step that begins at or past the milestone: rounded up, in whole numbers
    assert drops == [-(-milestone * epochs * 32 // 200) for milestone in (75, 130, 180)]
    assert [found[0], *(found[step] for step in drops)] == pytest.approx([0.1, 0.01, 0.001, 0.0001], rel=1e-12)


@pytest.mark.parametrize("recipe", ["reference", "modern"])
@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 200])
def test_every_run_reaches_its_peak_and_never_rises_above_it(epochs: int, recipe: Any) -> None:
    found = rates(TrainConfig(lr=0.1, epochs=epochs, recipe=recipe), steps=40)
    assert max(found) == pytest.approx(0.1)
    assert min(found) >= 0


def test_the_modern_recipe_goes_up_and_down_in_two_lines() -> None:
    found = rates(TrainConfig(lr=0.2, epochs=40, recipe="modern"), steps=100)
    top = 600  # 15 % of 4,000 steps
    assert [found[0], found[top]] == pytest.approx([0.01, 0.2])
    up, down = ([b - a for a, b in pairwise(part)] for part in (found[: top + 1], found[top:]))
    assert up == pytest.approx([0.19 / 600] * 600, rel=1e-6)
    assert down == pytest.approx([-0.2 / 3400] * 3399, rel=1e-6)
    assert found[-1] == pytest.approx(0.2 / 3400)


# ---------------------------------------------------------------- recipes


def test_a_recipe_has_its_own_settings_where_none_are_given() -> None:
    modern, reference = TrainConfig(), TrainConfig(recipe="reference")
    assert (modern.recipe, modern.epochs, modern.lr, modern.label_smoothing) == ("modern", 30, RECIPES["modern"].lr, 0)
    assert (reference.epochs, reference.lr, reference.label_smoothing) == (200, 0.1, 0)
    assert TrainConfig(epochs=3, lr=0.5, label_smoothing=0.1).to_dict().items() >= {
        ("epochs", 3),
        ("lr", 0.5),
        ("label_smoothing", 0.1),
    }
    with pytest.raises(ValueError, match=re.escape("label_smoothing must be at least 0 and below 1, not 1")):
        TrainConfig(label_smoothing=1)
    with pytest.raises(ValueError, match="teacher ensemble needs the shallow classifiers"):
        TrainConfig(loss_form="plain", teacher="ensemble")


@pytest.mark.parametrize("epochs", [2, 3, 16, 300])
def test_images_grow_with_the_share_of_the_run(epochs: int) -> None:
    config = TrainConfig(epochs=epochs)
    sizes = [resolution(config, i / 1000) for i in range(1000)]
    assert sizes == sorted(sizes)
    assert set(sizes) == {16, 24, 32}
    assert resolution(config, 1.0) == 32
    work = sum((size / 32) ** 2 for size in sizes) / 1000 * epochs
    assert work_after(config, epochs) == pytest.approx(work, rel=0.01)
    assert work_after(config, 0) == 0
    halves = [work_after(config, epochs * share) for share in (0.25, 0.5, 0.75)]
    assert halves == sorted(halves)
    assert halves[0] == pytest.approx(epochs / 4 / 4), "a quarter of the run at a quarter of the pixels"


@pytest.mark.parametrize("config", [TrainConfig(dataset="digits"), TrainConfig(recipe="reference")])
def test_images_of_8_pixels_and_the_reference_s_keep_their_size(config: TrainConfig) -> None:
    size = DATASETS[config.dataset].image_size
    assert {resolution(config, i / 100) for i in range(101)} == {size}
    assert work_after(config, 7) == pytest.approx(7)


def test_long_runs_vary_their_images_more() -> None:
    short, long, reference = TrainConfig(epochs=30), TrainConfig(epochs=31), TrainConfig(recipe="reference")
    assert [(crop_padding(c), cutout_size(c)) for c in (short, long, reference)] == [(2, 0), (4, 8), (4, 0)]
    assert crop_padding(TrainConfig(dataset="digits", epochs=3)) == 1


# ---------------------------------------------------------------- flags


def parse(*arguments: str) -> dict[str, Any]:
    return given_settings(build_parser().parse_args(arguments), TrainConfig)


def test_only_given_flags_are_given() -> None:
    assert parse() == {}
    assert parse("--name", "a", "--outputs", "b") == {}
    assert parse("--alpha", "0.1", "--val-fraction", "0.2") == {"alpha": 0.1, "val_fraction": 0.2}


def test_every_setting_has_a_flag_of_its_name_and_type() -> None:
    arguments = [part for name, value in OTHER.items() for part in ("--" + name.replace("_", "-"), str(value))]
    found = parse(*arguments)
    assert found == OTHER
    assert {name: type(value) for name, value in found.items()} == {name: type(OTHER[name]) for name in OTHER}
    assert TrainConfig(**found) == TrainConfig(**OTHER)


def test_settings_can_be_left_out_of_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="some.py")
    add_settings(parser, TrainConfig, omit=("alpha",))
    assert given_settings(parser.parse_args(["--beta", "2"]), TrainConfig) == {"beta": 2.0}
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--alpha", "0.5"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "some.py: unrecognized arguments: --alpha 0.5\n"


def test_abbreviated_flags_are_refused() -> None:
    """`--te 4` must not silently mean `--temperature`, nor `--b` `--beta` today and something else tomorrow."""
    with pytest.raises(SystemExit):
        parse("--temp", "4")


def test_help_tells_every_setting_with_its_default() -> None:
    text = " ".join(build_parser().format_help().split())
    for f in fields(TrainConfig):
        assert "--" + f.name.replace("_", "-") in text
        assert " ".join(f.metadata["help"].split()) in text
        if f.default is not None:
            assert f"[{f.default}]" in text


def test_parser_errors_are_one_line() -> None:
    assert issubclass(Parser, ArgumentParser)
    for arguments in (["--epochs", "2.5"], ["--model", "vgg"], ["--nonsense"], ["--alpha"]):
        with pytest.raises(SystemExit) as caught:
            build_parser().parse_args(arguments)
        assert caught.value.code == 2


# ---------------------------------------------------------------- names and arrows

ROOMS = ("byot", "search", "analysis")


def modules_of(room: str) -> list[Path]:
    return sorted((PROJECT / room).glob("**/*.py"))


def imported(path: Path) -> set[str]:
    """The top-level packages a file imports, anywhere in it; a relative import counts as '.'."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0] if node.module and not node.level else ".")
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found |= {str(a.value).split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return found


def test_no_module_takes_the_name_of_another() -> None:
    """A script's own folder comes first on sys.path: byot/random.py would be `import random` for everybody."""
    names = {path.stem: path for room in ROOMS for path in modules_of(room) if path.stem != "__init__"}
    assert len(names) > 10
    taken = set(sys.stdlib_module_names) | set(packages_distributions()) - set(ROOMS)
    assert {"json", "torch", "ray", "numpy", "pytest"} <= taken
    assert {str(path) for name, path in names.items() if name in taken} == set()


def test_modules_of_one_folder_import_each_other_by_their_full_name() -> None:
    """`from byot.loss import …` everywhere: a bare `import loss` would work for a script only, and load it twice."""
    for room in ROOMS:
        own = {path.stem for path in modules_of(room)}
        for path in modules_of(room):
            assert not imported(path) & (own | {"."} - set(ROOMS)), path


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("byot", {"ray", "optuna", "pandas", "search", "analysis", "matplotlib", "plotly", "tests"}),
        ("search", {"analysis", "pandas", "matplotlib", "tests"}),
        ("analysis", {"tests"}),
    ],
)
def test_arrows_point_one_way(room: str, forbidden: set[str]) -> None:
    paths = modules_of(room)
    assert paths
    assert {f"{path.name} imports {name}" for path in paths for name in imported(path) & forbidden} == set()


def test_in_analysis_only_retrain_goes_beyond_files() -> None:
    """The others know of byot what needs the standard library alone: settings, flags, JSON files."""
    for path in modules_of("analysis"):
        if path.name != "retrain.py":
            assert not imported(path) & {"search", "ray", "optuna", "torch"}, path
            modules = re.findall(r"^\s*(?:from|import) (byot[.\w]*)", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert set(modules) <= {"byot.config", "byot.system.flags", "byot.system.files", "byot.search_files"}, path


def test_arrows_are_seen(tmp_path: Path) -> None:
    """The check above finds what it looks for."""
    (tmp_path / "module.py").write_text(
        "import os.path as p\nfrom . import x\n"
        "def f():\n    from ray.tune import y\n    importlib.import_module('pandas.io')\n"
    )
    assert imported(tmp_path / "module.py") == {"os", ".", "ray", "pandas"}
