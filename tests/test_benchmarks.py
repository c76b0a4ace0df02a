"""The plain loop that speed is measured against is the same method, and the measuring commands measure."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import common, tables
from benchmarks.plans import SEARCH_PLANS, TABLE_PLANS
from benchmarks.quality import curves, recipe_levers, search_quality, time_to_accuracy, transfer
from benchmarks.quality.curves import FAMILIES, Curve, curves_path, save_curves
from benchmarks.quality.recipe_levers import BASE, make_tables
from benchmarks.speed import searches, train_speed
from benchmarks.speed.reference_loop import ReferenceLoop, ReferenceNet
from byot.config import TrainConfig, work_after
from byot.loss import self_distillation_loss
from byot.model import Branch, BranchedResNet
from byot.search_files import MEASURES, space_to_dict
from byot.system.files import append_json_line, read_json
from search.space import DEFAULT_SPACE
from tests.helpers import assert_one_sentence, picture_of, run_command

BATCH_SIZE = 128  # at which the reference quotes its hint loss


# ---------------------------------------------------------------- what all use
def test_means_differences_and_tables():
    assert common.mean_and_sd([1.0, 2.0]) == "1.50 ± 0.71"
    assert common.mean_and_sd([1.0]) == "1.00"
    assert common.format_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], bold=True) == "+2.00 ± 2.48", "not resolved"
    assert common.format_difference([1.0, 1.1], [2.0, 2.1], bold=True) == "**-1.00 ± 0.00**"
    far, near = [2.1, 2.0, 2.1], [0.2, 0.3, 0.3]
    assert common.format_difference(far, [0.0] * 3, bold=True, num_compared=10) == "**+2.07 ± 0.14***", "with all ten"
    assert common.format_difference(near, [0.0] * 3, digits=1, bold=True, num_compared=100) == "**+0.3 ± 0.1**", "alone"
    assert common.format_difference([2.0], [1.5], bold=True) == "+0.50", "no interval of one pair"
    assert common.markdown(["a", "bb"], [["long", "1"]]) == "| a | bb |\n| --- | --- |\n| long | 1 |"


# ---------------------------------------------------------------- speed
def test_the_plain_network_has_the_references_parameters():
    for model, used, unused in (("resnet18", 13_011_152, 232_448), ("resnet50", 50_430_928, 3_682_304)):
        with torch.device("meta"):
            network = ReferenceNet(model, width=64, num_classes=100)
        assert sum(p.numel() for p in network.parameters()) == used + unused
        assert sum(p.numel() for p in network.unused.parameters()) == unused


def test_one_step_of_the_plain_loop_is_one_of_ours():
    """The same weights and images give the same gradients, whatever the form of the losses.

    In float64: rounding in float32 takes some activations to the other side of a ReLU, which shows in the gradients.
    """
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, 32, 32, 3), dtype=np.uint8)
    config = TrainConfig(
        recipe="reference", width=4, alpha=0.4, beta=1e-3, batch_size=BATCH_SIZE, precision="fp32", device="cpu"
    )
    loop = ReferenceLoop(config, pixels, np.arange(BATCH_SIZE) % 100)
    ours = BranchedResNet("resnet18", num_classes=100, width=4)
    ours.trunk.load_state_dict(loop.model.trunk.state_dict())
    branches = zip(ours.branches, loop.model.bottlenecks, loop.model.classifiers, strict=True)
    for branch, bottleneck, classifier in branches:
        assert isinstance(branch, Branch)
        branch.bottleneck.load_state_dict(bottleneck.state_dict())
        branch.fc.load_state_dict(classifier.state_dict())
    loop.model.double()
    ours.double()
    images, labels = torch.randn(BATCH_SIZE, 3, 32, 32, dtype=torch.float64), torch.arange(BATCH_SIZE) % 100
    meters = loop.step(images, labels)
    terms = self_distillation_loss(ours(images), labels, alpha=0.4, temperature=3.0, beta=1e-3)
    terms.total.backward()
    assert [meters[f"label_{i}"] for i in range(1, 5)] == pytest.approx(terms.label.tolist(), rel=1e-9)
    assert [meters[f"hint_{i}"] for i in range(1, 4)] == pytest.approx(terms.hint.tolist(), rel=1e-9)
    expected = dict(loop.model.trunk.named_parameters())
    for name, found in ours.trunk.named_parameters():
        assert found.grad is not None, name
        torch.testing.assert_close(found.grad, expected[name].grad, rtol=1e-6, atol=1e-12)
    assert all(p.grad is None for p in loop.model.unused.parameters())


@pytest.mark.slow
def test_the_speed_is_measured(tmp_path):
    sizes = ["--models", "resnet18", "--widths", 4, "--steps", 1, "--rounds", 1, "--seconds", 0]
    arguments = [*sizes, "--output", tmp_path / "speed.json"]
    done = run_command(arguments, cwd=tmp_path, script="benchmarks/speed/train_speed.py")
    (row,) = read_json(tmp_path / "speed.json")["rows"]
    assert row["ratio"] == pytest.approx(row["images_per_s"] / row["reference_images_per_s"])
    assert 0 < row["share_of_matmul_peak"] < 1
    assert row["memory_gib"] > 0
    assert "resnet18, width 4" in done.stdout


@pytest.mark.slow
def test_searches_are_measured(tmp_path):
    def measure(line: str) -> dict[str, Any]:
        command = [*line.split(), "--output", tmp_path / "record.json"]
        run_command(command, cwd=tmp_path, script="benchmarks/speed/searches.py")
        return read_json(tmp_path / "record.json")

    found = measure("overhead --width 2 --epochs 1 --num-samples 3")["searches"]["real"]
    assert (found["trials"], found["epochs"]) == (3, 3)
    assert 0 < found["busy_share"] < 1
    assert found["overhead_s_a_trial"] * 3 + found["training_s"] == pytest.approx(found["fit_s"] * found["slots"])
    assert found["wall_s"] > found["search_s"] > found["fit_s"] + found["start_ray_s"]
    blocks = measure("many --num-samples 6 --block 3")["blocks"]
    assert [row["trials"] for row in blocks] == [3, 6]
    for row in blocks:
        assert min(row.values()) > 0
    (row,) = measure("at-once --width 2 --batch-size 16 --most 1")["rows"]
    assert row["trials"] == 1
    assert row["images_per_s"] > 0


# ---------------------------------------------------------------- recorded curves
def write_curves(folder: Path, family: str, ends: dict[tuple[int, int], float]) -> None:
    """Curves by (number, seed), which until their last epoch rank the configurations by falling number."""
    config = FAMILIES[family].base
    header = {"config": config.to_dict(), "space": space_to_dict(DEFAULT_SPACE)}
    curves = []
    for (number, seed), end in ends.items():
        values = [*[20.0 - number] * (config.epochs - 1), end]
        cpu_s = tuple(map(float, range(config.epochs)))
        curves.append(Curve(number, "sampled", seed, {}, dict.fromkeys(MEASURES, values), 1.0, cpu_s))
    save_curves(curves_path(family, folder), header, curves)


def test_curves_are_recorded_and_gone_on_with(tmp_path, monkeypatch, call):
    family = FAMILIES["digits"]
    small = family._replace(base=family.base.with_settings(epochs=2), num_configurations=1, num_seeds=1)
    path = curves_path("digits", tmp_path)

    def run(**changes: Any) -> tuple[int, str]:
        monkeypatch.setitem(FAMILIES, "digits", small._replace(**changes))
        code, _, err = call(curves, "digits", "--folder", tmp_path)
        return code, err

    assert run(num_first=1) == (0, "")
    first = curves.load_curves(path)
    assert [(curve.number, curve.role) for curve in first.curves] == [(-2, "reference"), (0, "sampled")]
    for curve in first.curves:
        assert len(curve.values["val_accuracy"]) == len(curve.cpu_s) == 2
        assert 0 < curve.cpu_s[0] < curve.cpu_s[1]
    assert run() == (0, "")
    more = curves.load_curves(path)
    assert more.header == first.header
    assert sorted(set(map(str, more.curves)) - set(map(str, first.curves)))[0].startswith("Curve(number=-1")
    assert len(more.curves) == 3
    code, err = run(base=small.base.with_settings(lr=0.2))
    assert code == 2
    assert_one_sentence(err, str(path), "other settings")


def test_a_short_run_ranks_as_the_long_one_as_far_as_was_planted(tmp_path, works):
    """Eight configurations; the short run has two of the better half in the wrong order, the cut one all of them."""
    order = range(8)
    swapped = [0, 1, 2, 3, 4, 5, 7, 6]
    write_curves(tmp_path, "modern-e24", {(n, s): 50.0 + n + 0.2 * s for n in order for s in (0, 1)})
    write_curves(tmp_path, "modern-e4", {(n, 0): 30.0 + swapped[n] for n in order} | {(99, 0): 1.0})
    output = tmp_path / "transfer.json"
    out = works(transfer, "--curves", tmp_path, "--output", output)
    found = read_json(output)["families"]["modern-e24"]
    short, cut = found["rows"]
    assert (short["ended"], short["configurations"], found["configurations"]) == ("modern-e4", 8, 8)
    assert short["all"]["rank_correlation"] == pytest.approx(1 - 6 * 2 / (8 * 63))
    assert short["better_half"]["rank_correlation"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert short["better_half"]["low"] < short["better_half"]["rank_correlation"] <= short["better_half"]["high"]
    assert cut["all"] == {"rank_correlation": -1.0, "low": -1.0, "high": -1.0}
    base = FAMILIES["modern-e24"].base
    after = int(cut["ended"].split()[-1])
    assert abs(work_after(base, after) - short["arithmetic"] * work_after(base, 24)) < 0.2
    assert found["sd_between_seeds"] == pytest.approx(0.2 / 2**0.5)
    assert short["sd_between_seeds"] is None
    assert "8 configurations" in out


def test_accuracy_against_time(tmp_path, works):
    write_curves(tmp_path, "time-reference-e2", {(-2, 0): 50.0})
    write_curves(tmp_path, "time-modern-e4", {(-2, 0): 60.0, (-2, 1): 61.0})
    out = works(time_to_accuracy, "--curves", tmp_path)
    assert "| `reference` | 2 | 2.0 | 1 | 50.00 | 50.00 | 1 |" in out
    assert "| 2 | 60.50 ± 0.71 | 60.50 ± 0.71 | 3 |" in out


# ---------------------------------------------------------------- levers of the recipe
def test_levers_are_compared_at_equal_arithmetic_and_by_seed():
    assert BASE.mean_cost() == pytest.approx(0.4 / 4 + 0.35 * 9 / 16 + 0.25)
    assert [BASE.size(progress) for progress in (0.0, 0.39, 0.4, 0.74, 0.75)] == [16, 16, 24, 24, 32]
    assert [BASE.schedule(progress) for progress in (0.0, 0.15, 1.0)] == pytest.approx([0.05, 1.0, 0.0])
    common_fields = {"budget": 3.0, "width": 16, "cpu_s": 60}
    records: list[dict[str, Any]] = [
        {"row": row, "seed": seed, "val_accuracy": [1.0, 2.0, 3.0, value, 4.0], **common_fields}
        for row, values in {"base": [57.0, 58.0], "sgd": [49.0, 50.5]}.items()
        for seed, value in enumerate(values)
    ]
    (text,) = make_tables(records)
    assert "| base | 2 | 1.00 ± 0.00 | 2.00 ± 0.00 | 3.00 ± 0.00 | 57.50 ± 0.71 | 4.00 ± 0.00 |  | 60 |" in text
    assert "| -7.75 ± 3.18 | 60 |" in text
    older = {"row": "sgd", "seed": 0, "accuracy": [0.0, 0.0, 0.0, 99.0, 0.0], **common_fields}
    held_out, of_test_images = make_tables([records[0], records[2], older])
    assert "| 49.00 | 4.00 | -8.00 | 60 |" in held_out, "of one seed there is no interval"
    assert "test images" in of_test_images
    assert "| 99.00 | 0.00 |  | 60 |" in of_test_images, "older records share no row with new ones"


def test_levers_train_what_is_missing_on_held_out_images(tmp_path, monkeypatch, works):
    """Every lever at once, on few images: one run is recorded, and the same command trains none again."""
    monkeypatch.setattr(recipe_levers, "load_images", lambda *given: train_speed.some_images(None, 2000))
    levers: dict[str, Any] = {"cutout": 8, "padding": 4, "batch_size": 450, "cosine": True, "optimizer": "sgd"}
    monkeypatch.setitem(recipe_levers.ROWS, "all", recipe_levers.replace(BASE, **levers))
    output = tmp_path / "levers.jsonl"
    append_json_line(output, {"row": "all", "budget": 1.0, "width": 4, "seed": 1, "accuracy": [1.0] * 5, "cpu_s": 9})
    arguments = ["--rows", "all", "--seeds", 1, "--budget", 1, "--width", 4, "--output", output]
    assert "all, seed 1" in works(recipe_levers, *arguments)
    record = recipe_levers.read_json_lines(output)[-1]
    assert record["num_steps"] == round(4 / BASE.mean_cost())
    assert len(record["val_accuracy"]) == 5
    again = works(recipe_levers, *arguments)
    assert "all, seed 1" not in again
    assert again.strip() in (tmp_path / "levers.md").read_text()


@pytest.mark.parametrize(
    ("module", "line", "words"),
    [
        (searches, "overhead --width 0", ["width"]),
        (searches, "many --num-samples 3 --block 4", ["--block"]),
        (searches, "at-once --most 0", ["--most"]),
        (train_speed, "--models vgg", ["vgg"]),
        (train_speed, "--data-dir nowhere", ["nowhere"]),
        (curves, "digits --workers 1000", ["--workers"]),
        (transfer, "--curves .", ["curves.py"]),
        (time_to_accuracy, "--curves .", ["curves.py"]),
        (recipe_levers, "--output .", ["folder"]),
        (search_quality, "--seeds 1", ["--seeds"]),
        (search_quality, "--figure x.pdf", [".png"]),
        (search_quality, "--families mnist", ["mnist"]),
        (search_quality, "--families digits --curves no-such-folder", ["no-such-folder"]),
        (tables, "", ["plan"]),
        (tables, "large", ["large", *TABLE_PLANS, *SEARCH_PLANS]),
        (tables, "tiny --minutes nan", ["--minutes", "above 0"]),
        (tables, "tiny --seeds 0", ["--seeds"]),
        (tables, "tiny --arms searched --toy", ["search-tiny"]),
        (tables, "modern-w16 --arms searched --toy", ["modern-w16", "names no search"]),
        (tables, "tiny --toy --data-dir .", ["--toy", "--data-dir"]),
        (tables, "search-r18 --concurrent 2", ["--concurrent"]),
    ],
)
def test_bad_command_lines(module, line, words, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BYOT_OUTPUTS", str(tmp_path / "outputs"))
    refused(module, *line.split(), words=words)
    assert picture_of(tmp_path) == {}, "nothing is written"
