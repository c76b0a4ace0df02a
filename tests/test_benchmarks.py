"""The plain loop that speed is measured against is the same method, and the measuring command measures."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.reference_loop import ReferenceLoop, ReferenceNet
from byot.config import TrainConfig
from byot.files import read_json
from byot.loss import self_distillation_loss
from byot.model import Branch, BranchedResNet
from tests.helpers import assert_one_sentence, run_command

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
    """The same weights and images give the same gradients, whatever the form of the losses."""
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, 32, 32, 3), dtype=np.uint8)
    config = TrainConfig(width=4, alpha=0.4, beta=1e-3, batch_size=BATCH_SIZE, precision="fp32", device="cpu")
    loop = ReferenceLoop(config, pixels, np.arange(BATCH_SIZE) % 100)
    ours = BranchedResNet("resnet18", num_classes=100, width=4)
    ours.trunk.load_state_dict(loop.model.trunk.state_dict())
    branches = zip(ours.branches, loop.model.bottlenecks, loop.model.classifiers, strict=True)
    for branch, bottleneck, classifier in branches:
        assert isinstance(branch, Branch)
        branch.bottleneck.load_state_dict(bottleneck.state_dict())
        branch.fc.load_state_dict(classifier.state_dict())
    images, labels = torch.randn(BATCH_SIZE, 3, 32, 32), torch.arange(BATCH_SIZE) % 100
    meters = loop._step(images, labels)
    terms = self_distillation_loss(ours(images), labels, alpha=0.4, temperature=3.0, beta=1e-3)
    terms.total.backward()
    assert [meters[f"label_{i}"] for i in range(1, 5)] == pytest.approx(terms.label.tolist(), rel=1e-4)
    assert [meters[f"hint_{i}"] for i in range(1, 4)] == pytest.approx(terms.hint.tolist(), rel=1e-4)
    for (name, found), expected in zip(ours.trunk.named_parameters(), loop.model.trunk.parameters(), strict=True):
        assert found.grad is not None, name
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-5)
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
    done = run_command(arguments, cwd=tmp_path, script="benchmarks/train_speed.py")
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
    done = run_command(arguments, cwd=tmp_path, script="benchmarks/search_overhead.py")
    assert done.returncode == 0, done.stderr
    found = read_json(record)
    assert (found["trials"], found["epochs"]) == (3, 3)
    assert 0 < found["busy_share"] < 1
    assert found["overhead_s_a_trial"] * 3 + found["training_s"] == pytest.approx(found["fit_s"] * found["slots"])
    assert found["wall_s"] > found["search_s"] > found["fit_s"] + found["start_ray_s"]


@pytest.mark.slow
def test_many_trials_are_measured_in_blocks(tmp_path: Path) -> None:
    arguments = ["--num-samples", 6, "--block", 3, "--output", tmp_path / "many.json"]
    done = run_command(arguments, cwd=tmp_path, script="benchmarks/many_trials.py")
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
    done = run_command(arguments, cwd=tmp_path, script="benchmarks/concurrent_trials.py")
    assert done.returncode == 0, done.stderr
    (row,) = read_json(tmp_path / "c.json")["rows"]
    assert row["trials"] == 1
    assert row["images_per_s"] > 0


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
    done = run_command(arguments, cwd=tmp_path, script="benchmarks/train_speed.py")
    assert done.returncode == 2
    assert_one_sentence(done.stderr, word)
