"""The plain loop that speed is measured against is the same method, and the measuring commands measure."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.quality import time_to_accuracy, transfer
from benchmarks.quality.curves import FAMILIES, TRANSFER, Curve, configurations, curves_path, save_curves
from benchmarks.quality.recipe_levers import BASE, make_tables
from benchmarks.speed.reference_loop import ReferenceLoop, ReferenceNet
from byot.config import TrainConfig, work_after
from byot.loss import self_distillation_loss
from byot.model import Branch, BranchedResNet
from byot.system.files import read_json
from search.records import MEASURES
from search.space import DEFAULT_SPACE, space_to_dict
from tests.helpers import PROJECT, assert_one_sentence, call_main, run_command

BATCH_SIZE = 128  # at which the reference quotes its hint loss


@pytest.mark.parametrize(
    ("model", "used", "unused"), [("resnet18", 13_011_152, 232_448), ("resnet50", 50_430_928, 3_682_304)]
)
def test_the_plain_network_has_the_references_parameters(model: str, used: int, unused: int) -> None:
    with torch.device("meta"):
        network = ReferenceNet(model, width=64, num_classes=100)
    assert sum(p.numel() for p in network.parameters()) == used + unused
    assert sum(p.numel() for p in network.unused.parameters()) == unused


def test_one_step_of_the_plain_loop_is_one_of_ours() -> None:
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
    meters = loop._step(images, labels)
    terms = self_distillation_loss(ours(images), labels, alpha=0.4, temperature=3.0, beta=1e-3)
    terms.total.backward()
    assert [meters[f"label_{i}"] for i in range(1, 5)] == pytest.approx(terms.label.tolist(), rel=1e-9)
    assert [meters[f"hint_{i}"] for i in range(1, 4)] == pytest.approx(terms.hint.tolist(), rel=1e-9)
    for (name, found), expected in zip(ours.trunk.named_parameters(), loop.model.trunk.parameters(), strict=True):
        assert found.grad is not None, name
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-6, atol=1e-12)
    assert all(p.grad is None for p in loop.model.unused.parameters())


@pytest.mark.slow
def test_the_speed_is_measured(tmp_path: Path) -> None:
    arguments = [
        "--models",
        "resnet18",
        "--widths",
        4,
        "--steps",
        1,
        "--rounds",
        1,
        "--seconds",
        0,
        "--output",
        tmp_path / "speed.json",
    ]
    done = run_command(arguments, cwd=tmp_path, script="benchmarks/speed/train_speed.py")
    assert done.returncode == 0, done.stderr
    (row,) = read_json(tmp_path / "speed.json")["rows"]
    assert row["ratio"] == pytest.approx(row["images_per_s"] / row["reference_images_per_s"])
    assert 0 < row["share_of_matmul_peak"] < 1
    assert row["memory_gib"] > 0
    assert "resnet18      4" in done.stdout


@pytest.mark.slow
def test_the_overhead_of_a_search_is_measured(tmp_path: Path) -> None:
    record = tmp_path / "overhead.json"
    arguments = ["--only-this", "--width", 2, "--epochs", 1, "--num-samples", 3, "--output", record]
    done = run_command(arguments, cwd=tmp_path, script="benchmarks/speed/search_overhead.py")
    assert done.returncode == 0, done.stderr
    found = read_json(record)
    assert (found["trials"], found["epochs"]) == (3, 3)
    assert 0 < found["busy_share"] < 1
    assert found["overhead_s_a_trial"] * 3 + found["training_s"] == pytest.approx(found["fit_s"] * found["slots"])
    assert found["wall_s"] > found["search_s"] > found["fit_s"] + found["start_ray_s"]


@pytest.mark.slow
def test_many_trials_are_measured_in_blocks(tmp_path: Path) -> None:
    arguments = ["--num-samples", 6, "--block", 3, "--output", tmp_path / "many.json"]
    done = run_command(arguments, cwd=tmp_path, script="benchmarks/speed/many_trials.py")
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "many.json")
    assert [row["trials"] for row in found["blocks"]] == [3, 6]
    for row in found["blocks"]:
        assert row["all_s_a_trial"] > row["propose_s_a_trial"] > row["begin_s_a_trial"] > 0
        assert row["memory_mib"] > 0
    assert "memory_mib" in done.stdout


@pytest.mark.slow
def test_trials_at_once_are_measured(tmp_path: Path) -> None:
    arguments = ["--width", 2, "--batch-size", 16, "--most", 1, "--output", tmp_path / "c.json"]
    done = run_command(arguments, cwd=tmp_path, script="benchmarks/speed/concurrent_trials.py")
    assert done.returncode == 0, done.stderr
    (row,) = read_json(tmp_path / "c.json")["rows"]
    assert row["trials"] == 1
    assert row["images_per_s"] > 0


# ---------------------------------------------------------------- accuracy against time


def test_time_to_accuracy_goes_on_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record, figure = tmp_path / "made" / "record.json", tmp_path / "figure.png"
    arguments = ["--dataset", "digits", "--width", 4, "--output", record]

    def run(*more: object) -> tuple[list[dict[str, Any]], str]:
        code, out, err = call_main(time_to_accuracy, "x", [*arguments, *more], monkeypatch, capsys)
        assert (code, err) == (0, "")
        return read_json(record)["runs"], out

    first, out = run("--budgets", 1, "--recipes", "modern")
    assert "| `modern` | 1 | 1.0 | 1 |" in out
    assert [(row["epoch"], row["val_accuracy"] > 0) for row in first[0]["epochs"]] == [(1, True)]
    assert (first[0]["num_train_images"], first[0]["num_val_images"]) == (1295, 143)
    both, out = run("--budgets", 1, 2, "--figure", figure)
    assert both[0] == first[0], "it was finished"
    asked = [(run["config"]["recipe"], run["config"]["epochs"]) for run in both]
    assert sorted(asked) == [("modern", 1), ("modern", 2), ("reference", 1), ("reference", 2)]
    for one in both:
        assert len(one["epochs"]) == one["config"]["epochs"]
        for seconds in ("cpu_s", "wall_s"):
            times = [row[seconds] for row in one["epochs"]]
            assert times == sorted(times)
            assert times[0] > 0
        assert {"commit", "versions", "hardware"} <= set(one)
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--threads", "0"], "--threads"),
        (["--figure", "x.pdf"], ".png"),
        (["--budgets", "0"], "epochs"),
        (["--output", PROJECT / "results" / "runs" / "cifar100-w16-e12.json"], "not a record"),
    ],
)
def test_bad_command_lines_of_time_to_accuracy(
    arguments: list[object], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call_main(time_to_accuracy, "x", ["--output", "x.json", *arguments], monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert_one_sentence(err, word)


# ---------------------------------------------------------------- short runs and long ones


def write_curves(folder: Path, family: str, ends: dict[tuple[int, int], float]) -> None:
    """Curves by (number, seed), which until their last epoch rank the configurations by falling number."""
    config = FAMILIES[family].base
    header = {"config": config.to_dict(), "space": space_to_dict(DEFAULT_SPACE)}
    curves = []
    for (number, seed), end in ends.items():
        values = [*[20.0 - number] * (config.epochs - 1), end]
        curves.append(Curve(number, "sampled", seed, {}, dict.fromkeys(MEASURES, values), 1.0))
    save_curves(curves_path(family, folder), header, curves)


def test_a_short_run_ranks_as_the_long_one_as_far_as_was_planted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight configurations; the short run has two of the better half in the wrong order, the cut one all of them."""
    order = range(8)
    swapped = [0, 1, 2, 3, 4, 5, 7, 6]
    write_curves(tmp_path, "modern-e24", {(n, s): 50.0 + n + 0.2 * s for n in order for s in (0, 1)})
    write_curves(tmp_path, "modern-e4", {(n, 0): 30.0 + swapped[n] for n in order} | {(99, 0): 1.0})
    output = tmp_path / "transfer.json"
    code, out, _ = call_main(transfer, "x", ["--curves", tmp_path, "--output", output], monkeypatch, capsys)
    assert code == 0
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


def test_short_and_long_runs_are_of_the_same_configurations() -> None:
    short, *others = (configurations(FAMILIES[f"{recipe}-e{epochs}"]) for recipe, epochs in TRANSFER)
    assert [role for _, role, _ in short] == ["reference", "control", *["sampled"] * 12]
    assert others == [short] * 3
    assert set(transfer.LONG) < set(FAMILIES)


def test_what_is_not_recorded_yet_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_curves(tmp_path, "modern-e24", {(n, 0): float(n) for n in range(8)})
    code, _, err = call_main(transfer, "transfer.py", ["--curves", tmp_path], monkeypatch, capsys)
    assert code == 2
    assert_one_sentence(err, str(tmp_path), "curves.py")


@pytest.mark.parametrize(
    ("script", "arguments", "word"),
    [
        ("search_overhead.py", ["--width", "0"], "width"),
        ("search_overhead.py", ["--num-samples", "0"], "num_samples"),
        ("concurrent_trials.py", ["--most", "0"], "--most"),
        ("many_trials.py", ["--block", "0"], "--block"),
        ("many_trials.py", ["--num-samples", "0", "--block", "1"], "num_samples"),
        ("concurrent_trials.py", ["--model", "vgg"], "vgg"),
    ],
)
def test_bad_command_lines_of_searches(tmp_path: Path, script: str, arguments: list[str], word: str) -> None:
    done = run_command(arguments, cwd=tmp_path, script=f"benchmarks/{script}")
    assert done.returncode == 2
    assert_one_sentence(done.stderr, word)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--models", "vgg"], "vgg"), (["--widths", "0"], "width"), (["--steps", "0"], "--steps"), (["--x"], "--x")],
)
def test_bad_command_lines(tmp_path: Path, arguments: list[str], word: str) -> None:
    done = run_command(arguments, cwd=tmp_path, script="benchmarks/speed/train_speed.py")
    assert done.returncode == 2
    assert_one_sentence(done.stderr, word)


# ---------------------------------------------------------------- levers of the recipe


def test_levers_are_compared_at_equal_arithmetic_and_by_seed():
    assert BASE.mean_cost() == pytest.approx(0.4 / 4 + 0.35 * 9 / 16 + 0.25)
    assert [BASE.size(progress) for progress in (0.0, 0.39, 0.4, 0.74, 0.75)] == [16, 16, 24, 24, 32]
    assert [BASE.schedule(progress) for progress in (0.0, 0.15, 1.0)] == pytest.approx([0.05, 1.0, 0.0])
    accuracies = {"base": [57.0, 58.0], "sgd": [49.0, 50.5]}
    records = [
        {"row": row, "budget": 3.0, "width": 16, "seed": seed, "accuracy": [1.0, 2.0, 3.0, value, 4.0], "cpu_s": 60}
        for row, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    (text,) = make_tables(records)
    assert "| base | 2 | 1.00 ± 0.00 | 2.00 ± 0.00 | 3.00 ± 0.00 | 57.50 ± 0.71 | 4.00 ± 0.00 |  | 60 |" in text
    assert "| -7.75 ± 3.18 | 60 |" in text
    (text,) = make_tables(records[:1] + records[2:3])
    assert "| 49.00 | 4.00 | -8.00 | 60 |" in text, "of one seed there is no interval"
