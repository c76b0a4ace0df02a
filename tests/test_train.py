"""Holds training, its entry points and its records to DESIGN: bit-exact resume, the test set read once and last.

What a user gets wrong is in tests/faults/test_command_lines.py, kills and full disks are beside it.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from byot import data, dry_run, evaluate, runs, search_files, train
from byot import trainer as trainer_module
from byot.batches import augment, draw_epoch, mean_and_std, shuffled
from byot.config import CLASSIFIERS, TrainConfig, learning_rate
from byot.data import LabelledImages, split_validation
from byot.loss import self_distillation_loss
from byot.metrics import EpochMetrics
from byot.optimizer import orthogonalise
from byot.runs import find_run, open_run, train_and_test, train_run
from byot.system import cores
from byot.system.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint, save_checkpoint
from byot.system.cores import OtherWork, advise_threads
from byot.system.files import read_json, read_json_lines, write_json
from byot.system.lock import lock_folder
from byot.system.provenance import find_commit
from byot.system.stopping import DivergedError, OutOfMemoryError, StoppedError
from byot.trainer import Trainer, build_model, choose_device
from tests.helpers import assert_one_sentence, assert_same_state, few_digits, picture_of, random_pixels, run_command
from tests.made_up import search_record

SMALL = TrainConfig(recipe="reference", dataset="digits", width=4, epochs=4, device="cpu", precision="fp32")
# what the command-line runs share; their precision stays the default
FLAGS = ("--dataset", "digits", "--width", 4, "--epochs", 6, "--val-fraction", 0.1)


@pytest.fixture(scope="module")
def digits() -> LabelledImages:
    return few_digits(300)


# ---------------------------------------------------------------- the loop
def augmented(trainer: Trainer, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    config, source = trainer.config, trainer.train_images
    mean, std = mean_and_std(trainer.normalisation, trainer.device)
    batches = shuffled(source, draw_epoch(config, len(source), epoch), config.batch_size)
    return [(augment(batch, config, mean, std), batch.labels) for batch in batches]


def orthogonal_direction(momentum: torch.Tensor) -> torch.Tensor:
    """Muon's direction by a singular value decomposition: its iteration works on each singular value alone."""
    left, values, right = torch.linalg.svd(momentum.double().flatten(1), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values @ right).view(momentum.shape).to(momentum.dtype)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-6), (torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("shape", [(16, 144), (144, 16), (96, 400), (400, 96), (96, 96)])
def test_directions_are_those_of_the_singular_values(shape, dtype, error):
    """Also where singular values spread over three powers of ten, and rounding makes some of the Gram's negative."""
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(*shape, dtype=torch.float64), full_matrices=False)
    matrix = left * torch.logspace(0, -3, min(shape), dtype=torch.float64) @ right
    expected = orthogonal_direction(matrix)
    found = orthogonalise(matrix, dtype)
    assert (found - expected).norm() <= error * expected.norm()
    assert torch.linalg.matrix_norm(found, 2) < 1.3


def train_by_hand(config: TrainConfig, images: LabelledImages, trainer: Trainer) -> dict[str, torch.Tensor]:
    """The epochs of a run spelled out: labels, weights, momentum and learning rate step by step."""
    modern = config.recipe == "modern"
    names = ("alpha", "temperature", "beta", "loss_form", "label_smoothing", "teacher")
    how = {name: getattr(config, name) for name in names}
    model = build_model(config).to(memory_format=torch.channels_last).train()
    buffers: list[torch.Tensor | None] = [None for _ in model.parameters()]
    for epoch in range(config.epochs):
        batches = augmented(trainer, epoch)
        for i, (batch, labels) in enumerate(batches):
            lr = learning_rate(config, (epoch + i / len(batches)) / config.epochs)
            terms = self_distillation_loss(model(batch), labels, **how)
            gradients = torch.autograd.grad(terms.total, list(model.parameters()))
            with torch.no_grad():
                for j, ((name, weight), gradient) in enumerate(zip(model.named_parameters(), gradients, strict=True)):
                    is_filter = modern and weight.ndim == 4 and name != "trunk.conv1.weight"
                    decays = not modern or (weight.ndim > 1 and not is_filter)
                    slope = gradient.add(weight, alpha=config.weight_decay if decays else 0.0)
                    old = buffers[j]
                    buffer = slope if old is None else (config.momentum * old).add(slope)
                    buffers[j] = buffer
                    step = slope.add(buffer, alpha=config.momentum) if modern else buffer
                    if is_filter:
                        step = orthogonal_direction(step) * 0.25
                        weight.mul_(min(weight.flatten(1).shape) ** 0.5 / weight.square().sum().sqrt())
                    weight.add_(step, alpha=-lr)
    return model.state_dict()


@pytest.mark.parametrize(
    "settings",
    [
        {"recipe": "reference", "loss_form": "paper", "teacher": "ensemble"},
        {"recipe": "modern", "loss_form": "paper", "teacher": "ensemble"},
        {"recipe": "reference", "loss_form": "plain"},
    ],
    ids=lambda settings: " ".join(settings.values()),
)
def test_the_loop_is_the_optimizer_on_the_loss(digits, settings):
    config = SMALL.with_settings(
        **settings, epochs=2, batch_size=100, lr=0.005, alpha=0.4, temperature=2.0, beta=1e-3, label_smoothing=0.1
    )
    trainer = Trainer(config, digits)
    start = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    assert any("branches" in key for key in start) == (config.loss_form != "plain")
    assert len(list(trainer)) == 2
    expected = train_by_hand(config, digits, trainer)
    for key, found in trainer.model.state_dict().items():
        torch.testing.assert_close(found, expected[key], rtol=1e-3, atol=1e-4)
        stays = config.recipe == "modern" and re.fullmatch(r"branches\.\d\.bottleneck\.[036]\.bias", key)
        if not stays:  # a bias that batch normalisation takes off again has no gradient, and there no weight decay
            assert not torch.equal(found, start[key]), key


def test_epoch_metrics_are_those_of_the_first_step(digits):
    """One batch an epoch: the epoch's figures are the loss of the initial weights."""
    config = SMALL.with_settings(epochs=3, batch_size=512, alpha=0.4, beta=1e-3)
    trainer = Trainer(config, digits)
    ((batch, labels),) = augmented(trainer, 0)
    outputs = build_model(config).to(memory_format=torch.channels_last).train()(batch)
    terms = self_distillation_loss(outputs, labels, alpha=0.4, temperature=3, beta=1e-3)
    found = next(iter(trainer))
    assert (found.epoch, found.lr, found.val) == (1, 0.1, None)
    assert found.loss == pytest.approx(terms.total.item(), rel=1e-5)
    assert found.label == pytest.approx(terms.label.tolist(), rel=1e-5)
    assert found.distillation == pytest.approx(terms.distillation.tolist(), rel=1e-4)
    assert found.hint == pytest.approx(terms.hint.tolist(), rel=1e-4)
    right = [F.one_hot(z.argmax(1), 10)[range(300), labels].float().mean().item() * 100 for z in outputs.logits]
    assert found.accuracy == pytest.approx(right, abs=0.01)
    assert found.images_per_s > 0


def go_on_to(trainer: Trainer, state: dict[str, Any]) -> None:
    def stop_there(*_: int) -> None:
        if (trainer.epoch, trainer.step) == (state["epoch"], state["step"]):
            raise StoppedError(signal.SIGINT)

    with suppress(StoppedError):
        for _ in trainer.epochs(stop_there):
            stop_there()


@pytest.mark.parametrize("recipe", ["reference", "modern"])
def test_resume_is_bit_exact_from_every_step(tmp_path, recipe):
    """Three epochs of four steps, in the modern recipe at 16, 24 and 32 pixels, and after each a checkpoint.

    From each it goes on to the next but one: after the last step nothing sets the learning rate.
    """
    config = TrainConfig(recipe=recipe, width=8, epochs=3, batch_size=16, device="cpu", teacher="ensemble")
    images = LabelledImages(random_pixels(64), np.arange(64) % 100)
    val = LabelledImages(random_pixels(16, seed=1), np.arange(16))
    states: list[Path] = []

    def save(*_: int) -> None:
        states.append(checkpoint_path(tmp_path, straight.epoch, straight.step))
        save_checkpoint(states[-1], straight.state_dict())

    straight = Trainer(config, images, val)
    for _ in straight.epochs(save):
        save()
    assert len(states) == 15, "of an epoch's last step the validation is missing in one, and in the next it is not"
    for path, later in zip(states, states[2:], strict=False):
        torch.manual_seed(999)  # whatever another process' generators hold
        again, expected = Trainer(config, images, val), load_checkpoint(later)
        again.load_state_dict(load_checkpoint(path))
        go_on_to(again, expected)
        assert_same_state(again.state_dict(), expected)


def change_config(**settings: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["config"].update(settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.clear(), "has no 'config'"),
        (change_config(gamma=1), "unknown setting gamma"),
        (change_config(temperature=4.0), r"temperature 4\.0 \(asked for: 3\.0\)"),
        (lambda state: state.update(num_train_images=299), "299 training images, the data set has 300 now"),
        (lambda state: state["model"].popitem(), "not written by this version"),
        (lambda state: state.pop("optimizer"), "has no 'optimizer'"),
        (lambda state: state["sums"].update(sums=torch.zeros(2)), "sums over an epoch are 2 numbers"),
        (lambda state: state.update(normalisation={"mean": 1}), "not written by this version"),
        (change_config(loss_form="plain"), "built branches for loss_form plain too: start that run anew"),
    ],
)
def test_a_checkpoint_of_another_run_or_version_is_refused(tmp_path, digits, change, words):
    state = Trainer(SMALL, digits).state_dict()
    change(state)
    path = checkpoint_path(tmp_path / "checkpoints", 0)
    save_checkpoint(path, state)
    with pytest.raises(ValueError, match=rf"{path.name} .*{words}") as caught:
        runs.restore_trainer(SMALL, digits, None, tmp_path)
    assert "\n" not in str(caught.value)


def test_training_imports_neither_torchvision_nor_the_compiler(tmp_path):
    """Each takes every process, a search's workers too, more than a second."""
    program = (
        "import sys; from pathlib import Path; from byot.config import TrainConfig; from byot.runs import open_run\n"
        "run = open_run(TrainConfig(dataset='digits', width=2, epochs=1, device='cpu'), Path(sys.argv[1]))\n"
        "list(run.trainer); run.trainer.state_dict()\n"
        "print([name for name in ('torchvision', 'torch._dynamo', 'ray', 'optuna') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_validating_does_not_change_what_is_learned(digits):
    _, val = split_validation(digits, fraction=0.2, seed=0)
    config = SMALL.with_settings(epochs=2)
    trainers = [Trainer(config, digits, val), Trainer(config, digits, None)]
    for trainer in trainers:
        list(trainer)
    states = [trainer.state_dict() for trainer in trainers]
    for part in ("model", "optimizer"):
        assert_same_state(states[0][part], states[1][part])


def test_divergence_is_seen_at_the_step(digits):
    trainer = Trainer(SMALL.with_settings(lr=1e30, batch_size=10), digits)
    with pytest.raises(DivergedError, match="in epoch 1: a smaller lr or beta would help"):
        list(trainer)
    assert trainer.step < 5, "of thirty"


def test_divergence_in_the_last_step_is_divergence_too(digits):
    """The loss is that of the weights before the step: only the validation sees what the last one did."""
    train_part, val = split_validation(digits, fraction=0.2, seed=0)
    with pytest.raises(DivergedError):
        list(Trainer(SMALL.with_settings(lr=1e10, batch_size=1000, epochs=2), train_part, val))


@pytest.mark.usefixtures("few_files")
def test_a_network_broken_by_its_last_step_has_no_result(tmp_path, call):
    """Without validation images the test set is the first to see it; a result of nothing must not be recorded."""
    arguments = ("--dataset", "digits", "--width", 4, "--epochs", 1, "--batch-size", 1000, "--recipe", "reference")
    code, _, err = call(train, *arguments, "--lr", 1e30, "--name", "run", "--outputs", tmp_path)
    assert code == 1
    assert_one_sentence(err, "train.py: ", "smaller lr")
    assert not (tmp_path / "runs" / "run" / "result.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 999 bytes"),
        RuntimeError("CUDA error: out of memory"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:10],
)
def test_running_out_of_memory_comes_with_advice(digits, monkeypatch, error):
    trainer = Trainer(SMALL, digits)
    monkeypatch.setattr(trainer.model, "forward", Mock(side_effect=error))
    with pytest.raises(OutOfMemoryError, match=r"batch_size 128 and width 4: a smaller --batch-size or --width"):
        list(trainer)


# ---------------------------------------------------------------- runs in their folder
def stop_after(epoch: int) -> Callable[[EpochMetrics], None]:
    def on_epoch(metrics: EpochMetrics) -> None:
        if metrics.epoch == epoch:
            raise KeyboardInterrupt

    return on_epoch


def start_and_stop(config: TrainConfig, folder: Path, epoch: int, checkpoint: Path | None = None) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_and_test(open_run(config, folder, checkpoint), on_epoch=stop_after(epoch))


def epochs_in(folder: Path) -> list[int]:
    return [record["epoch"] for record in read_json_lines(folder / "metrics.jsonl")]


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch, digits: LabelledImages) -> None:
    """Runs find 300 digits to train and 100 to test on."""
    test = few_digits(100, "test")
    monkeypatch.setattr(runs, "load_images", lambda *a: digits if a[2] == "train" else test)


def test_test_set_is_read_once_and_after_the_last_epoch(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    config = SMALL.with_settings(epochs=3, val_fraction=0.2)
    reads: list[tuple[str, list[int]]] = []

    def load(dataset: Any, data_dir: str | None, split: Any, image_size: int) -> LabelledImages:
        reads.append((split, epochs_in(folder)))
        return few_digits(300, split)

    monkeypatch.setattr(runs, "load_images", load)
    start_and_stop(config, folder, 2)
    assert reads == [("train", [])]
    result = train_run(config, folder)
    assert reads == [("train", []), ("train", [1, 2]), ("test", [1, 2, 3])]
    assert train_run(config, folder) == result
    assert len(reads) == 3, "a finished run reads nothing"
    (folder / "result.json").unlink()  # as if it had been stopped before
    assert train_run(config, folder) == result
    assert epochs_in(folder) == [1, 2, 3]


@pytest.mark.usefixtures("few_files")
def test_an_epoch_done_twice_is_one_tensorboard_step(tmp_path):
    events_of = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    start_and_stop(SMALL, tmp_path, 3)
    checkpoint_path(tmp_path / "checkpoints", 3).unlink()
    train_run(SMALL, tmp_path)
    events = events_of(str(tmp_path / "tensorboard")).Reload()
    found = events.Scalars("train_loss")
    assert [event.step for event in found] == epochs_in(tmp_path) == [1, 2, 3, 4]
    losses = [record["train_loss"] for record in read_json_lines(tmp_path / "metrics.jsonl")]
    assert [event.value for event in found] == pytest.approx(losses, rel=1e-6)
    assert {"train_accuracy_1", "train_hint_3", "lr"} <= set(events.Tags()["scalars"])


@pytest.mark.usefixtures("few_files")
def test_going_on_from_an_older_checkpoint_forgets_the_newer_ones(tmp_path):
    """Else a second stop would be followed by the abandoned epochs' checkpoint, whose metrics are gone."""
    config = SMALL.with_settings(epochs=6)
    start_and_stop(config, tmp_path, 3)
    older = Path(shutil.copy(checkpoint_path(tmp_path / "checkpoints", 3), tmp_path / "older.pt"))
    start_and_stop(config, tmp_path, 5)
    last = checkpoint_path(tmp_path / "checkpoints", 5)
    content = last.read_bytes()
    start_and_stop(config, tmp_path, 4, older)
    assert last.with_name(f"left-{last.name}").read_bytes() == content
    train_run(config, tmp_path)
    assert epochs_in(tmp_path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("few_files")
def test_long_epochs_are_saved_on_the_way_and_a_stop_saves_the_step_at_hand(tmp_path, monkeypatch):
    config = SMALL.with_settings(epochs=2, batch_size=30)
    straight = train_run(config, tmp_path / "straight")
    monkeypatch.setattr(runs, "SAVE_EVERY_S", 0.0)
    run = open_run(config, tmp_path / "stopped")
    with pytest.raises(StoppedError):
        train_and_test(run, stop_asked=lambda: run.trainer.step == 7)
    saved = [path.name for path in list_checkpoints(run.folder / "checkpoints")]
    assert saved == ["epoch-0000-step-000007.pt", "epoch-0000-step-000006.pt"]
    again = open_run(config, run.folder)
    assert (again.trainer.epoch, again.trainer.step) == (0, 7)
    assert_same_state(train_and_test(again), straight)


@pytest.mark.usefixtures("few_files")
@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError()])
def test_checkpoints_that_cannot_be_read_just_now_are_kept(tmp_path, monkeypatch, error):
    start_and_stop(SMALL, tmp_path, 3)
    before = picture_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", Mock(side_effect=error))
        with pytest.raises((OSError, OutOfMemoryError)):
            open_run(SMALL, tmp_path)
    assert picture_of(tmp_path) == before


# ---------------------------------------------------------------- command lines
@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of six epochs that was never stopped, and what its command printed."""
    place = tmp_path_factory.mktemp("finished")
    done = run_command([*FLAGS, "--outputs", place / "outputs", "--name", "straight"], cwd=place)
    assert done.stderr == ""
    return place / "outputs" / "runs" / "straight", done.stdout


def accuracies_in(text: str) -> dict[str, float]:
    """From a printed table: classifier -> accuracy."""
    return {name: float(value) for name, value in re.findall(r"^(\d/4|ensemble) +([\d.]+) ", text, re.MULTILINE)}


def test_command_line_trains_says_what_it_did_and_records_where_it_comes_from(finished):
    folder, out = finished
    assert re.findall(r"^epoch (\d)/6 ", out, re.MULTILINE) == list("123456")
    assert str(folder) in out
    result = read_json(folder / "result.json")
    printed = accuracies_in(out)
    assert printed == {name: round(result[f"test_accuracy_{ending}"], 2) for ending, name in CLASSIFIERS.items()}
    assert max(printed.values()) > 50, "ten classes: it did learn"
    config = TrainConfig.from_dict(result["config"])
    assert config == TrainConfig.from_dict(read_json(folder / "config.json"))
    assert (config.width, config.epochs, config.seed, config.val_fraction) == (4, 6, 0, 0.1)
    for measure in ("accuracy", "nll", "ece"):
        values = [result[f"test_{measure}_{ending}"] for ending in CLASSIFIERS]
        assert all(isinstance(v, float) and v >= 0 for v in values)
        assert result[f"test_{measure}"] == values[3], "the deepest classifier's"
    assert (result["num_train_images"], result["num_test_images"]) == (1295, 359), "without the tenth held out"
    assert result["commit"] == find_commit() or "-dirty" in str(result["commit"])
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"python", "torch", "torchvision", "ray", "optuna", "numpy"} <= set(result["versions"])
    assert (result["hardware"]["device"], result["hardware"]["threads"]) == ("cpu", 1)
    records = read_json_lines(folder / "metrics.jsonl")
    assert result["elapsed_s"] == pytest.approx(sum(r["elapsed_s"] for r in records))
    assert all(0 <= r[f"val_accuracy_{name}"] <= 100 for r in records for name in CLASSIFIERS)


def test_finished_run_prints_its_result_without_training(finished, monkeypatch, works, tmp_path):
    folder, printed = finished
    before = picture_of(folder)
    monkeypatch.chdir(tmp_path)
    for arguments in ((*FLAGS, "--outputs", folder.parents[1], "--name", "straight"), ("--resume", folder)):
        out = works(train, *arguments)
        assert "is finished already" in out
        assert "epoch 1/6" not in out
        assert out.split("test set")[1] == printed.split("test set")[1]
    assert picture_of(folder) == before


def test_evaluate_prints_the_accuracies_of_the_result(finished, works, tmp_path):
    folder, printed = finished
    before = picture_of(folder)
    by_folder = run_command([folder], cwd=tmp_path, script="byot/evaluate.py")
    assert by_folder.stderr == ""
    assert accuracies_in(by_folder.stdout) == accuracies_in(printed)
    assert "359 test images, after epoch 6/6" in by_folder.stdout
    assert "after epoch 5/6" in works(evaluate, checkpoint_path(folder / "checkpoints", 5))
    assert picture_of(folder) == before


def test_a_run_is_found_by_its_name(finished, tmp_path, monkeypatch):
    """In the outputs folder, from any folder; what is there at the path itself goes before."""
    folder, _ = finished
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BYOT_OUTPUTS", str(folder.parents[1]))
    assert find_run(folder.name).folder == folder
    (tmp_path / folder.name).mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find_run(folder.name)


def test_a_gpu_that_cannot_be_used_is_no_reason_to_train_for_weeks(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(trainer_module, "NVIDIA_DRIVER", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto").type != "cuda", "hidden on purpose"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(
        ValueError, match=r"an NVIDIA driver here and PyTorch .* cannot use it: .* --device cpu goes on"
    ):
        choose_device("auto")
    assert choose_device("cpu").type == "cpu"


@pytest.fixture
def half(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of that run as it was after its fifth epoch."""
    folder = shutil.copytree(finished[0], tmp_path / "outputs" / "runs" / "half")
    (folder / "result.json").unlink()
    checkpoint_path(folder / "checkpoints", 6).unlink()
    return folder


@pytest.mark.parametrize(
    "run", [["outputs/runs/half"], ["outputs/runs/half/checkpoints/epoch-0005.pt"], ["half", "--outputs", "outputs"]]
)
def test_resume(finished, half, monkeypatch, works, run):
    """Gone on with in this process, against never stopped in another."""
    folder, printed = finished
    monkeypatch.chdir(half.parents[2])
    out = works(train, "--resume", *run, *FLAGS)
    assert re.findall(r"^epoch (\d)/6 ", out, re.MULTILINE) == ["6"]
    assert epochs_in(half) == [1, 2, 3, 4, 5, 6]
    assert accuracies_in(out) == accuracies_in(printed)
    found, expected = (load_checkpoint(checkpoint_path(run / "checkpoints", 6)) for run in (half, folder))
    assert_same_state(found, expected)


@pytest.mark.usefixtures("few_files")
def test_control_c_says_how_to_go_on(tmp_path, monkeypatch, call):
    arguments = ("--dataset", "digits", "--width", 4, "--epochs", 2, "--outputs", tmp_path, "--name", "run")
    monkeypatch.setattr(runs, "train_and_test", Mock(side_effect=KeyboardInterrupt))
    code, _, err = call(train, *arguments)
    assert (code, err) == (130, "\nstopped; give the same command again: no checkpoint has been saved yet\n")
    monkeypatch.setattr(runs, "train_and_test", lambda run, on_batch, *_: train_and_test(run, on_batch, stop_after(1)))
    code, _, err = call(train, *arguments)
    assert code == 130
    command = f"{sys.executable} {Path('train.py').absolute()} --resume {tmp_path}/runs/run"
    assert err == f"\nstopped; go on with: {command}\n"
    assert epochs_in(tmp_path / "runs" / "run") == [1]


@pytest.mark.usefixtures("few_files")
def test_one_process_at_a_time_in_a_folder(half, refused):
    before = picture_of(half)
    with lock_folder(half):
        for arguments in (("--resume", half), (*FLAGS, "--name", "half", "--fresh", "--outputs", half.parents[1])):
            refused(train, *arguments, words=("another process is writing to", str(half)))
    assert picture_of(half) == before | {".lock": picture_of(half)[".lock"]}


@pytest.mark.usefixtures("few_files")
def test_fresh_sets_aside_what_was_there(half, works, refused):
    before = epochs_in(half)
    arguments = (*FLAGS, "--seed", 5, "--name", "half", "--outputs", half.parents[1])
    refused(train, *arguments, words=("seed 0 (asked for: 5)",))
    out = works(train, *arguments, "--fresh")
    (aside,) = (half.parent / "replaced").iterdir()
    assert str(aside) in out
    assert epochs_in(aside) == before
    assert read_json(half / "config.json")["seed"] == 5


def test_parquet_from_a_relative_folder_trains_to_a_result(parquet_folder, tmp_path, monkeypatch, works):
    parquet_folder(num_train=12, num_test=6, dataset="cifar10", folder="my data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BYOT_OUTPUTS", str(tmp_path / "elsewhere"))
    arguments = ("--dataset", "cifar10", "--data-dir", "my data", "--width", 2, "--epochs", 1, "--batch-size", 4)
    assert "test set, 6 images" in works(train, *arguments)
    (folder,) = (tmp_path / "elsewhere" / "runs").iterdir()
    assert read_json(folder / "config.json")["data_dir"] == str(tmp_path / "my data"), "absolute: found from anywhere"


# ---------------------------------------------------------------- --best
def write_search(
    outputs: Path, name: str, *, status: str = "finished", at: str = "2025-01-01", **settings: Any
) -> None:
    config = TrainConfig(dataset="digits", width=8, **settings)
    record = search_record(config, name=name, status=status, started_at=at, finished_at=at)
    write_json(outputs / "searches" / name / "search.json", record)
    write_json(outputs / "searches" / name / "best.json", {"config": config.to_dict(), "found_with": "24 trials"})


def plan(*arguments: object) -> tuple[TrainConfig, Path, Path | None]:
    return train.plan_run(train.build_parser().parse_args(list(map(str, arguments))))


def test_best_takes_the_newest_finished_search_of_the_model_and_data_that_are_named(tmp_path, capsys):
    write_search(tmp_path, "old", at="2025-01-01", alpha=0.2)
    write_search(tmp_path, "new", at="2025-03-01", alpha=0.3, temperature=4.0, beta=1e-5, epochs=9)
    write_search(tmp_path, "running", status="running", at="2025-04-01", alpha=0.4)
    write_search(tmp_path, "other-model", at="2025-05-01", alpha=0.5, model="resnet50")
    (tmp_path / "searches" / "torn").mkdir()
    (tmp_path / "searches" / "torn" / "search.json").write_text('{"status": "fini')

    named = ("--model", "resnet18", "--dataset", "digits")
    config, folder, checkpoint = plan("--best", *named, "--outputs", tmp_path)
    assert (config.alpha, config.temperature, config.beta, config.epochs, config.width) == (0.3, 4.0, 1e-5, 9, 8)
    assert (folder, checkpoint) == (tmp_path / "runs" / config.run_name(), None)
    (said,) = capsys.readouterr().out.splitlines()
    told = ("alpha 0.3", "temperature 4", "beta 1e-05", "newest finished search, new", "24 trials", "9 epochs, as")
    assert [word for word in told if word not in said] == []

    for fewer in (("--dataset", "digits"), ()):
        newest = plan("--best", *fewer, "--outputs", tmp_path)[0]
        assert (newest.alpha, newest.model, newest.dataset) == (0.5, "resnet50", "digits")
    over = plan("--best", "old", "--outputs", tmp_path, "--seed", 4, "--epochs", 3, "--alpha", 0.9)[0]
    assert (over.alpha, over.seed, over.epochs, over.width) == (0.9, 4, 3, 8)
    other = plan("--best", "old", "--outputs", tmp_path, "--recipe", "reference")[0]
    assert (other.alpha, other.epochs, other.lr) == (0.2, 200, 0.1), "what is the recipe's is the other one's"
    assert plan("--best", tmp_path / "searches" / "old", "--outputs", tmp_path / "elsewhere")[0].alpha == 0.2


def test_best_falls_back_on_what_is_shipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search_files, "SHIPPED_FOLDER", tmp_path / "shipped")
    write_json(tmp_path / "shipped" / "resnet18-digits.json", {"config": TrainConfig(alpha=0.6).to_dict()})
    assert plan("--best", "--dataset", "digits", "--outputs", tmp_path)[0].alpha == 0.6
    said = capsys.readouterr().out
    assert "shipped with the project, as no search of resnet18 on digits has finished here" in said
    assert "30 epochs, as in the search" in said, "the shipped file names them"


# ---------------------------------------------------------------- a busy machine
def test_the_work_of_other_processes_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "STAT", tmp_path / "stat")
    ticks = os.sysconf("SC_CLK_TCK")

    def write(seconds: float) -> None:
        """Of each of user, nice, system, idle, waiting, interrupts and soft interrupts."""
        numbers = (int(seconds * ticks), 0, int(seconds * ticks), 10**6, 10**6, 0, 0, 0, 0, 0)
        cores.STAT.write_text(f"cpu  {' '.join(map(str, numbers))}\ncpu0 {'1 ' * 10}\n")

    clock = iter((0.0, 10.0, 10.25, 20.0))
    monkeypatch.setattr(cores.time, "monotonic", lambda: next(clock))
    write(100)
    work = OtherWork()
    own_s = sum(os.times()[:4])
    write(108)
    assert work.cores() == pytest.approx(1.6, abs=(sum(os.times()[:4]) - own_s) / 10 + 0.01)
    cores.STAT.unlink()
    assert OtherWork().cores() == 0


def test_fewer_threads_are_advised_where_cores_are_busy(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert advise_threads(1, 8.0) is None
    assert advise_threads(8, 0.4) is None
    assert advise_threads(4, 3.0) is None, "enough are free"
    assert "keep 5.9 of 8 cores busy" in (told := advise_threads(4, 5.9) or "")
    assert told.endswith("--threads 2")
    assert (advise_threads(4, 9.0) or "").endswith("--threads 1")


def test_a_run_beside_busy_processes_says_what_is_faster(call, tmp_path, monkeypatch):
    monkeypatch.setattr(OtherWork, "cores", lambda self: float(os.cpu_count() or 1))
    flags = ("--dataset", "digits", "--width", 2, "--epochs", 1, "--device", "cpu", "--outputs", tmp_path)
    threads = torch.get_num_threads()
    try:
        code, _, err = call(train, *flags, "--threads", 2)
        assert (code, err.count("\n")) == (0, 1)
        assert re.fullmatch(r"train\.py: other processes keep .* busy, and 2 threads .*: --threads 1\n", err)
        code, _, err = call(train, *flags, "--threads", 1, "--seed", 1)
        assert (code, err) == (0, "")
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------- --dry-run
@pytest.mark.parametrize("loss_form", ["reference", "plain"])
def test_a_dry_run_says_what_the_run_is(tmp_path, monkeypatch, works, loss_form):
    monkeypatch.setattr(dry_run, "MEASURED_S", 0.2)
    flags = ["--dataset", "digits", "--width", 16, "--epochs", 1, "--batch-size", 256, "--device", "cpu"]
    config = TrainConfig(dataset="digits", width=16, epochs=1, batch_size=256, device="cpu", loss_form=loss_form)
    out = works(train, *flags, "--loss-form", loss_form, "--outputs", tmp_path, "--dry-run")
    assert not list(tmp_path.iterdir()), "nothing is written"
    assert max(map(len, out.splitlines())) <= 80
    number = sum(p.numel() for p in build_model(config).parameters())
    rows = [line.split() for line in out.splitlines() if line.startswith(("stage", "exit"))]
    assert len(rows) == (8 if loss_form == "reference" else 5)
    column = [int(row[-2 if row[0] == "stage" else -3].replace(",", "")) for row in rows]
    assert sum(column) == number
    assert f"{number:,}" in out.split("parameters")[-1]
    assert rows[-1][-1] == "1.000", "the deepest network is the measure of cost"
    (said,) = re.findall(r"a checkpoint +([\d.]+) MB", out)
    train_run(config, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("*.pt")
    assert float(said) == pytest.approx(checkpoint.stat().st_size / 1e6, rel=0.03)
    (images_per_s,) = re.findall(r"(\d+) images/s", out)
    assert int(images_per_s) > 0


def test_a_dry_run_downloads_nothing(monkeypatch, works):
    monkeypatch.setattr(dry_run, "MEASURED_S", 0.2)
    monkeypatch.delattr(data, "_load_archive")
    out = works(train, "--dataset", "cifar100", "--width", 2, "--val-fraction", 0.1, "--dry-run")
    assert "45,000 training images of 32 pixels" in out
    assert re.search(r"^exit 4/4 +100 ", out, re.MULTILINE), "classes"


def test_a_dry_run_is_refused_as_the_run_would_be(tmp_path, refused):
    given = ("--data-dir", tmp_path / "nowhere", "--outputs", tmp_path, "--dry-run")
    refused(train, *given, words=("does not exist",))
