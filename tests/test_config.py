"""Holds settings to their limits, the schedule to the reference's, flags to what was typed, imports to DESIGN."""

import ast
import json
import math
import os
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import packages_distributions
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from byot.config import RECIPES, TrainConfig, crop_padding, cutout_size, learning_rate, resolution, work_after
from byot.system.flags import given_settings
from byot.system.paths import PROJECT_ROOT, cache_folder, check_name
from byot.train import build_parser
from tests.helpers import PROJECT, command_environment

# every setting at a value that is not its default
OTHER: dict[str, Any] = {
    **{"model": "resnet50", "width": 16, "branch": "lean", "dataset": "imagefolder", "data_dir": "/somewhere"},
    **{"image_size": 64, "recipe": "reference", "epochs": 7, "batch_size": 64, "lr": 0.05, "momentum": 0.8},
    **{"weight_decay": 1e-4, "alpha": 0.25, "temperature": 4.5, "beta": 1e-5, "loss_form": "paper"},
    **{"label_smoothing": 0.1, "teacher": "ensemble", "seed": 3, "val_fraction": 0.1, "split_seed": 2},
    **{"device": "cpu", "precision": "bf16", "batch_norm": "local", "acceleration": "none", "placement": "streamed"},
}


def test_every_setting_is_in_these_tests():
    defaults = TrainConfig().to_dict()
    assert set(OTHER) == set(defaults)
    assert all(OTHER[name] != defaults[name] for name in OTHER)
    assert set(LIMITS) == {f.name for f in fields(TrainConfig) if f.type in (int, float)}


@pytest.mark.parametrize("config", [TrainConfig(), TrainConfig(**OTHER)], ids=["defaults", "others"])
def test_json_round_trip(config):
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.run_name() == config.run_name()


def test_unknown_settings_are_named():
    assert TrainConfig.from_dict({"alpha": 0.5}) == TrainConfig(alpha=0.5)
    for values, words in (({"lamda": 1, "gamma": 2}, "unknown setting gamma, lamda"), ([1], "must be a table")):
        with pytest.raises(ValueError, match=words):
            TrainConfig.from_dict(values)


# of each number: the ends of its range, and values just beyond
LIMITS: dict[str, tuple[list[Any], list[Any]]] = {
    "width": ([1, 1024], [0, 1025]),
    "epochs": ([1, 1_000_000], [0, 1_000_001]),
    "image_size": ([32], [24, 64, 10**9]),
    "batch_size": ([2, 1_000_000], [1, 1_000_001]),
    "lr": ([1e-9, 1e9], [0.0, -0.01, math.inf, math.nan, 10**400]),
    "momentum": ([0.0, 0.999], [-0.01, 1.0, math.nan]),
    "weight_decay": ([0.0, 1e9], [-0.01, math.inf, math.nan]),
    "alpha": ([0.0, 1.0], [-0.01, 1.01, math.inf, math.nan]),
    "temperature": ([1e-3, 1e9], [0.0, -0.01, math.inf, math.nan]),
    "beta": ([0.0, 1e9], [-0.01, math.inf, math.nan]),
    "label_smoothing": ([0.0, 0.999], [-0.01, 1.0, math.nan]),
    "seed": ([0, 2**32 - 1], [-1, 2**32]),
    "val_fraction": ([0.0, 0.5], [-0.01, 0.51, math.nan]),
    "split_seed": ([0, 2**32 - 1], [-1, 2**32]),
}
OTHER_TYPES: list[tuple[str, Any, str]] = [
    ("recipe", [], "one of modern, "),
    ("device", None, "one of auto, "),
    ("width", 2.5, "a whole number"),
    ("seed", True, "a whole number"),
    ("alpha", "1", "a number"),
    ("data_dir", "", "a text"),
]


@pytest.mark.parametrize("name", LIMITS)
def test_a_number_out_of_its_range_is_refused_by_name(name):
    allowed, refused = LIMITS[name]
    for value in allowed:
        assert getattr(TrainConfig(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(ValueError, match=rf"^{name} must .*not [^\n]+$"):
            TrainConfig(**{name: value})


@pytest.mark.parametrize(("name", "value", "words"), OTHER_TYPES)
def test_a_value_of_another_type_is_refused_by_name(name, value, words):
    with pytest.raises(ValueError, match=rf"^{name} must be {words}.*not [^\n]+$"):
        TrainConfig(**{name: value})


# ---------------------------------------------------------------- identity
@pytest.mark.parametrize("name", OTHER)
def test_run_name_tells_runs_apart_but_not_their_place(name):
    config = TrainConfig(dataset="imagefolder") if name == "image_size" else TrainConfig()
    other = config.with_settings(**{name: OTHER[name]})
    same = name in ("device", "data_dir", "acceleration", "placement")
    assert (config.run_name() == other.run_name()) is same
    assert check_name(other.run_name()) == other.run_name()
    assert config.differing_settings(other) == ({} if same else {name: (getattr(config, name), OTHER[name])})


def test_an_image_folder_is_another_run_but_may_be_moved():
    config = TrainConfig(dataset="imagefolder", data_dir="/a/photos")
    moved = config.with_settings(data_dir="/b/photos")
    assert config.run_name() != moved.run_name()
    assert config.differing_settings(moved) == {}


def test_names_from_before_image_sizes_stay():
    """They hold every default, too."""
    assert TrainConfig().run_name() == "resnet18-w64-cifar100-e30-s0-b1ef3611"
    assert TrainConfig(dataset="digits", width=8).run_name() == "resnet18-w8-digits-e30-s0-4e276b09"


def test_image_sizes_are_an_image_folder_s_alone():
    folder = TrainConfig(dataset="imagefolder")
    assert (folder.image_size, TrainConfig().image_size, TrainConfig(dataset="digits").image_size) == (32, 32, 8)
    assert folder.run_name() == folder.with_settings(image_size=32).run_name()
    for size in (16, 32, 72, 224, 1024):
        assert folder.with_settings(image_size=size).image_size == size
    for size in (8, 0, -32, 36, 1032):
        with pytest.raises(ValueError, match=f"^image_size must be a multiple of 8 between 16 and 1024, not {size}$"):
            folder.with_settings(image_size=size)
    assert TrainConfig(dataset="imagefolder", image_size=64).with_settings(dataset="digits").image_size == 8
    assert [c.has_imagenet_stem for c in (folder, TrainConfig(dataset="imagefolder", image_size=72))] == [False, True]


def test_equal_settings_have_one_name():
    """JSON written elsewhere may say 0 for 0.0, and the run must still be found again."""
    whole, point = TrainConfig(alpha=0, lr=1, beta=1), TrainConfig(alpha=0.0, lr=1.0, beta=1.0)
    assert whole == point
    assert whole.run_name() == point.run_name()


def test_names_are_plain_folder_names():
    for name in ("a", "run-1", "resnet18_w8.v2", "0", "x" * 128):
        assert check_name(name) == name
    for name in ("", ".", "..", ".hidden", "a/b", "../a", "a b", "a\n", "x" * 129, "-rf", "é"):
        with pytest.raises(ValueError, match="a name is made of"):
            check_name(name)


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BYOT_CACHE", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "c"
    monkeypatch.delenv("BYOT_CACHE")
    assert cache_folder() == PROJECT_ROOT / "data" / "cache"
    (tmp_path / "file").touch()
    monkeypatch.setattr("byot.system.paths.PROJECT_ROOT", tmp_path / "file")  # a copy that cannot be written to
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "byot"


# ---------------------------------------------------------------- learning rate
def rates(config: TrainConfig, steps: int) -> list[float]:
    """The learning rate of every step of a run whose epochs have `steps` steps."""
    return [learning_rate(config, (e + i / steps) / config.epochs) for e in range(config.epochs) for i in range(steps)]


@pytest.mark.parametrize("epochs", [1, 7, 200, 300])
def test_milestones_scale_with_the_run(epochs):
    """The reference's learning rate falls at its epochs 75, 130 and 180 of 200."""
    found = rates(TrainConfig(recipe="reference", epochs=epochs), steps=32)
    drops = [step for step, (a, b) in enumerate(pairwise(found), start=1) if a != b]
    # the first step that begins at or past the milestone: rounded up, in whole numbers
    assert drops == [-(-milestone * epochs * 32 // 200) for milestone in (75, 130, 180)]
    assert [found[0], *(found[step] for step in drops)] == pytest.approx([0.1, 0.01, 0.001, 0.0001], rel=1e-12)


def test_the_modern_recipe_goes_up_and_down_in_two_lines():
    found = rates(TrainConfig(lr=0.2, epochs=40, recipe="modern"), steps=100)
    top = 600  # 15 % of 4,000 steps
    assert [found[0], found[top]] == pytest.approx([0.01, 0.2])
    up, down = ([b - a for a, b in pairwise(part)] for part in (found[: top + 1], found[top:]))
    assert up == pytest.approx([0.19 / 600] * 600, rel=1e-6)
    assert down == pytest.approx([-0.2 / 3400] * 3399, rel=1e-6)
    assert found[-1] == pytest.approx(0.2 / 3400)


# ---------------------------------------------------------------- recipes
def test_a_recipe_has_its_own_settings_where_none_are_given():
    modern, reference = TrainConfig(), TrainConfig(recipe="reference")
    assert (modern.epochs, modern.lr) == (30, RECIPES["modern"].lr)
    assert (reference.epochs, reference.lr) == (200, 0.1)
    given = TrainConfig(epochs=3, lr=0.5)
    assert (given.epochs, given.lr) == (3, 0.5)


LARGE = [(16, {16}), (64, {32, 48, 64}), (96, {64, 96}), (224, {128, 160, 224})]


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        *((TrainConfig(epochs=epochs), {16, 24, 32}) for epochs in (2, 300)),
        *((TrainConfig(dataset="imagefolder", image_size=size), sizes) for size, sizes in LARGE),
        (TrainConfig(dataset="digits"), {8}),
        (TrainConfig(recipe="reference"), {32}),
    ],
)
def test_images_grow_with_the_share_of_the_run(config, sizes):
    """In steps of the stride; images of 8 pixels and the reference's keep their size."""
    found = [resolution(config, i / 1000) for i in range(1001)]
    assert found == sorted(found)
    assert set(found) == sizes
    for share in (0, 0.25, 0.5, 0.75, 1):
        work = sum((size / config.image_size) ** 2 for size in found[: int(share * 1000)]) / 1000 * config.epochs
        assert work_after(config, config.epochs * share) == pytest.approx(work, rel=0.01)


def test_long_runs_vary_their_images_more():
    short, long, reference = TrainConfig(epochs=30), TrainConfig(epochs=31), TrainConfig(recipe="reference")
    assert [(crop_padding(c), cutout_size(c)) for c in (short, long, reference)] == [(2, 0), (4, 8), (4, 0)]
    large = TrainConfig(dataset="imagefolder", image_size=224)
    assert (crop_padding(large), crop_padding(large.with_settings(epochs=31))) == (14, 28)


# ---------------------------------------------------------------- flags
def parse(*arguments: str) -> dict[str, Any]:
    return given_settings(build_parser().parse_args(arguments), TrainConfig)


def test_every_setting_has_a_flag_of_its_name_and_type_and_only_given_ones_are_given():
    assert parse("--name", "a", "--outputs", "b") == {}
    arguments = [part for name, value in OTHER.items() for part in ("--" + name.replace("_", "-"), str(value))]
    found = parse(*arguments)
    assert found == OTHER
    assert {name: type(value) for name, value in found.items()} == {name: type(OTHER[name]) for name in OTHER}


def test_help_tells_every_setting_with_its_default():
    text = " ".join(build_parser().format_help().split())
    for f in fields(TrainConfig):
        assert "--" + f.name.replace("_", "-") in text
        assert " ".join(f.metadata["help"].split()) in text
        if f.default is not None:
            assert f"[{f.default}]" in text


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_ends_quietly_once_nobody_reads_what_it_prints(unbuffered):
    code = (
        "from byot.system.flags import one_sentence_errors\n"
        "with one_sentence_errors('x'): pass\n"
        "for line in range(3): print(line)\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    environment = command_environment(PYTHONUNBUFFERED=unbuffered)
    with os.fdopen(writing, "wb") as pipe:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, cwd=PROJECT, env=environment)
    assert done.stderr == b""


# ---------------------------------------------------------------- names and arrows

ROOMS = ("byot", "search", "analysis")
# what the analysis knows of byot: it needs the standard library alone
FILES_ALONE = ["byot.config", "byot.console", "byot.search_files", "byot.system.files", "byot.system.flags"]
FILES_ALONE += ["byot.system.paths"]
SEARCH_BASICS = ["search.significance", "search.space"]  # without Ray
RUN_READERS = ["byot.runs", "byot.exits", "byot.exit_report"]  # of a run's files, for its page; they import torch


def modules_of(room: str) -> list[Path]:
    return sorted((PROJECT / room).glob("**/*.py"))


def imported(path: Path) -> set[str]:
    """The modules a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if "." in node.module else {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_no_module_takes_the_name_of_another():
    """A script's own folder comes first on sys.path: byot/random.py would be `import random` for everybody."""
    names = {path.stem: path for room in ROOMS for path in modules_of(room) if path.stem != "__init__"}
    assert len(names) > 10
    taken = set(sys.stdlib_module_names) | set(packages_distributions()) - set(ROOMS)
    assert {"json", "torch", "ray", "numpy", "pytest"} <= taken
    assert {str(path) for name, path in names.items() if name in taken} == set()


@pytest.mark.parametrize(
    ("room", "forbidden", "allowed"),
    [
        ("byot", "ray optuna pandas search analysis matplotlib plotly tests", ["byot"]),
        ("search", "analysis pandas matplotlib tests", ["search", "byot"]),
        ("analysis", "ray torch tests", ["analysis", *FILES_ALONE, *RUN_READERS, *SEARCH_BASICS]),
        ("byot/system", "search analysis", ["byot.system"]),  # it knows nothing of the method
        ("search/system", "optuna analysis", ["search.system", "byot"]),  # nor this of a search
    ],
)
def test_arrows_point_one_way(room, forbidden, allowed):
    paths = [path for path in modules_of(room) if path.name != "retrain.py"]  # which starts runs with Ray
    assert len(paths) > 2
    for path in paths:
        for module in imported(path):
            package = module.split(".")[0]
            assert package not in forbidden.split(), (path, module)
            if package in ROOMS and module not in ROOMS:  # `import search` ships it
                assert module.startswith(tuple(allowed)), (path, module)
