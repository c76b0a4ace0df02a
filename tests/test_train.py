"""Holds training, its entry points and its records to DESIGN: bit-exact resume, the test set read once and last, one
sentence for whatever a user got wrong. Real command lines run in processes of their own, from another folder."""

import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import normalize

from byot import data, evaluate, runs, search_files, train
from byot.batches import augment, batches_per_epoch, constants, draw_epoch, shuffled
from byot.config import TrainConfig, learning_rate, resolution
from byot.data import LabelledImages, load_images, split_validation
from byot.loss import self_distillation_loss
from byot.metrics import EpochMetrics
from byot.runs import finish_run, load_network, open_run, train_run, train_saving
from byot.system.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint, save_checkpoint
from byot.system.files import read_json, read_json_lines, write_json
from byot.system.lock import lock_folder
from byot.system.provenance import find_commit
from byot.system.stopping import DivergedError, OutOfMemoryError, StoppedError
from byot.trainer import Trainer, build_model, choose_autocast_dtype, choose_device
from tests.helpers import (
    PROJECT,
    TIMES,
    ParquetMaker,
    assert_one_sentence,
    assert_same_state,
    call_main,
    picture_of,
    random_pixels,
    run_command,
    write_parquet,
)

SMALL = TrainConfig(recipe="reference", dataset="digits", width=4, epochs=4, device="cpu", precision="fp32")
# what the command-line runs share; their precision stays the default
FLAGS = ("--dataset", "digits", "--width", 4, "--epochs", 6, "--val-fraction", 0.1)


@pytest.fixture(scope="module")
def digits() -> LabelledImages:
    return load_images("digits", None, "train")


@pytest.fixture(scope="module")
def few_digits(digits: LabelledImages) -> LabelledImages:
    return LabelledImages(digits.images[:300], digits.labels[:300])


# ---------------------------------------------------------------- the loop


def augmented(trainer: Trainer, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    config, source = trainer.config, trainer.train_images
    mean, std = constants(trainer.normalisation, trainer.device)
    batches = shuffled(source, draw_epoch(config, len(source), epoch), config.batch_size)
    return [(augment(batch, config, mean, std), batch.labels) for batch in batches]


def orthogonal_direction(momentum: torch.Tensor) -> torch.Tensor:
    """Muon's direction by a singular value decomposition: its iteration works on each singular value alone."""
    left, values, right = torch.linalg.svd(momentum.double().flatten(1), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values @ right).view(momentum.shape).to(momentum.dtype)


def train_by_hand(config: TrainConfig, images: LabelledImages, trainer: Trainer) -> dict[str, torch.Tensor]:
    """The epochs of a run spelled out: labels, weights, momentum and learning rate step by step."""
    modern = config.recipe == "modern"
    model = build_model(config).to(memory_format=torch.channels_last).train()
    buffers: list[torch.Tensor | None] = [None for _ in model.parameters()]
    for epoch in range(config.epochs):
        batches = augmented(trainer, epoch)
        for i, (batch, labels) in enumerate(batches):
            lr = learning_rate(config, (epoch + i / len(batches)) / config.epochs)
            terms = self_distillation_loss(
                model(batch),
                labels,
                alpha=config.alpha,
                temperature=config.temperature,
                beta=config.beta,
                loss_form=config.loss_form,
                label_smoothing=config.label_smoothing,
                teacher=config.teacher,
            )
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


@pytest.mark.parametrize("recipe", ["reference", "modern"])
def test_the_loop_is_the_optimizer_on_the_loss(few_digits: LabelledImages, recipe: Any) -> None:
    config = SMALL.with_settings(
        recipe=recipe,
        epochs=2,
        batch_size=100,
        lr=0.005,
        alpha=0.4,
        temperature=2.0,
        beta=1e-3,
        loss_form="paper",
        label_smoothing=0.1,
        teacher="ensemble",
    )
    trainer = Trainer(config, few_digits)
    start = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    assert len(list(trainer)) == 2
    expected = train_by_hand(config, few_digits, trainer)
    for key, found in trainer.model.state_dict().items():
        torch.testing.assert_close(found, expected[key], rtol=1e-3, atol=1e-4)
        stays = recipe == "modern" and re.fullmatch(r"branches\.\d\.bottleneck\.[036]\.bias", key)
        if not stays:  # a bias that batch normalisation takes off again has no gradient, and there no weight decay
            assert not torch.equal(found, start[key]), key


def test_the_plain_form_trains_the_trunk_as_an_ordinary_resnet(few_digits: LabelledImages) -> None:
    """Stages, pooling and the last layer alone, by PyTorch's own optimizer: the branches have no say."""
    config = SMALL.with_settings(epochs=2, batch_size=100, lr=0.005, alpha=0.4, beta=1e-3, loss_form="plain")
    trainer = Trainer(config, few_digits)
    trunk = build_model(config).trunk.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(trunk.parameters(), momentum=config.momentum, weight_decay=config.weight_decay)
    for epoch in range(config.epochs):
        batches = augmented(trainer, epoch)
        for i, (batch, labels) in enumerate(batches):
            x = trunk.stem(batch)
            for stage in trunk.stages():
                x = stage(x)
            optimizer.zero_grad()
            F.cross_entropy(trunk.fc(x.mean(dim=(2, 3))), labels).backward()
            optimizer.param_groups[0]["lr"] = learning_rate(config, (epoch + i / len(batches)) / config.epochs)
            optimizer.step()
    assert len(list(trainer)) == 2
    for key, found in trainer.model.trunk.state_dict().items():
        torch.testing.assert_close(found, trunk.state_dict()[key], rtol=1e-3, atol=1e-4)


def test_epoch_metrics_are_those_of_the_first_step(few_digits: LabelledImages) -> None:
    """One batch an epoch: the epoch's figures are the loss of the initial weights."""
    config = SMALL.with_settings(epochs=3, batch_size=512, alpha=0.4, beta=1e-3)
    trainer = Trainer(config, few_digits)
    ((batch, labels),) = augmented(trainer, 0)
    outputs = build_model(config).to(memory_format=torch.channels_last).train()(batch)
    terms = self_distillation_loss(outputs, labels, alpha=0.4, temperature=3, beta=1e-3)
    found = next(iter(trainer))
    assert isinstance(found, EpochMetrics)
    assert (found.epoch, found.val) == (1, None)
    assert found.lr == 0.1
    assert found.loss == pytest.approx(terms.total.item(), rel=1e-5)
    assert found.label == pytest.approx(terms.label.tolist(), rel=1e-5)
    assert found.distillation == pytest.approx(terms.distillation.tolist(), rel=1e-4)
    assert found.hint == pytest.approx(terms.hint.tolist(), rel=1e-4)
    right = [F.one_hot(z.argmax(1), 10)[range(300), labels].float().mean().item() * 100 for z in outputs.logits]
    assert found.accuracy == pytest.approx(right, abs=0.01)
    assert found.images_per_s > 0


def losses(config: TrainConfig, images: LabelledImages) -> list[tuple[Any, ...]]:
    train_part, val = split_validation(images, fraction=config.val_fraction, seed=config.split_seed)
    return [(m.loss, m.label, m.distillation, m.hint, m.accuracy, m.val) for m in Trainer(config, train_part, val)]


def test_a_seed_gives_the_same_losses_twice_and_another_seed_others(few_digits: LabelledImages) -> None:
    config = SMALL.with_settings(epochs=2, val_fraction=0.2)
    torch.manual_seed(1)
    first = losses(config, few_digits)
    torch.manual_seed(2)
    np.random.seed(2)
    assert losses(config, few_digits) == first
    assert losses(config.with_settings(seed=1), few_digits)[0] != first[0]


@pytest.mark.parametrize("recipe", ["reference", "modern"])
def test_resume_is_bit_exact(tmp_path: Path, few_digits: LabelledImages, recipe: Any) -> None:
    config = SMALL.with_settings(recipe=recipe, epochs=4, val_fraction=0.2)
    train_part, val = split_validation(few_digits, fraction=0.2, seed=0)
    straight = Trainer(config, train_part, val)
    straight_metrics = list(straight)

    first = Trainer(config, train_part, val)
    for metrics in first:
        if metrics.epoch == 2:
            break
    save_checkpoint(tmp_path / "epoch-0002.pt", first.state_dict())
    torch.manual_seed(999)  # whatever another process' generators hold
    second = Trainer(config, train_part, val)
    second.load_state_dict(load_checkpoint(tmp_path / "epoch-0002.pt"))
    second_metrics = list(second)

    assert_same_state(second.state_dict(), straight.state_dict())
    assert [m.epoch for m in second_metrics] == [3, 4]
    assert_same_metrics(second_metrics, straight_metrics[2:])


def test_resume_is_bit_exact_from_every_step_of_images_that_grow(tmp_path: Path) -> None:
    """Three epochs of four steps at 16, 24 and 32 pixels; a run goes on from a checkpoint after each step."""
    config = TrainConfig(width=8, epochs=3, batch_size=16, device="cpu", teacher="ensemble", label_smoothing=0.1)
    images = LabelledImages(random_pixels(64), np.arange(64) % 100)
    states: list[Path] = []

    def save(done: int, num_images: int) -> None:
        states.append(save_state(straight, tmp_path))

    straight = Trainer(config, images)
    metrics = list(straight.epochs(save))
    assert {resolution(config, i / 12) for i in range(12)} == {16, 24, 32}
    assert len(states) == 12
    for path in states[:-1]:
        again = Trainer(config, images)
        again.load_state_dict(load_checkpoint(path))
        first = again.epoch
        assert_same_metrics(list(again), metrics[first:])
        assert_same_state(again.state_dict(), straight.state_dict())


def test_a_plain_run_of_a_version_with_branches_is_refused(tmp_path: Path, few_digits: LabelledImages) -> None:
    state = Trainer(SMALL, few_digits).state_dict()
    state["config"]["loss_form"] = "plain"
    save_checkpoint(checkpoint_path(tmp_path / "checkpoints", 0, 0), state)
    with pytest.raises(ValueError, match=r"built branches for loss_form plain too: start that run anew"):
        runs.restore_trainer(SMALL.with_settings(loss_form="plain"), few_digits, None, tmp_path)


def save_state(trainer: Trainer, folder: Path) -> Path:
    path = folder / f"epoch-{trainer.epoch:04}-step-{trainer.step:06}.pt"
    save_checkpoint(path, trainer.state_dict())
    return path


def assert_same_metrics(found_metrics: list[EpochMetrics], expected_metrics: list[EpochMetrics]) -> None:
    for found, expected in zip(found_metrics, expected_metrics, strict=True):
        assert (found.loss, found.lr, found.accuracy, found.val) == (
            expected.loss,
            expected.lr,
            expected.accuracy,
            expected.val,
        )


def test_nothing_grows_from_epoch_to_epoch(few_digits: LabelledImages) -> None:
    """Neither the tensors that are alive nor, once warm, the process."""
    train_part, val = split_validation(few_digits, fraction=0.2, seed=0)
    tensors, resident = [], []
    for _ in Trainer(SMALL.with_settings(epochs=12, val_fraction=0.2), train_part, val):
        gc.collect()
        tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
        (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
        resident.append(int(line.split()[1]) / 1024)  # MiB
    assert len(set(tensors[1:])) == 1
    assert resident[-1] - resident[3] < 8


def test_training_imports_neither_torchvision_nor_the_compiler(tmp_path: Path) -> None:
    """Each takes every process, a search's workers too, more than a second."""
    program = (
        "import sys; from pathlib import Path; from byot.config import TrainConfig; from byot.runs import open_run\n"
        "run = open_run(TrainConfig(dataset='digits', width=2, epochs=1, device='cpu'), Path(sys.argv[1]))\n"
        "list(run.trainer); run.trainer.state_dict()\n"
        "print([name for name in ('torchvision', 'torch._dynamo', 'ray', 'optuna') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def stop_in_the_middle(trainer: Trainer, epoch: int, step: int) -> None:
    """Break training off after some whole epochs and steps."""

    def on_batch(done: int, images: int) -> None:
        if (trainer.epoch, trainer.step) == (epoch, step):
            raise StoppedError(signal.SIGINT)

    with pytest.raises(StoppedError):
        list(trainer.epochs(on_batch))


@pytest.mark.parametrize("step", [1, 3, 8])
def test_resume_within_an_epoch_is_bit_exact(tmp_path: Path, few_digits: LabelledImages, step: int) -> None:
    """Of eight steps an epoch: after the last one only the validation is missing."""
    config = SMALL.with_settings(epochs=3, val_fraction=0.2, batch_size=30)
    train_part, val = split_validation(few_digits, fraction=0.2, seed=0)
    straight = Trainer(config, train_part, val)
    list(straight)
    first = Trainer(config, train_part, val)
    stop_in_the_middle(first, 1, step)
    assert batches_per_epoch(len(first.train_images), 30) == 8
    path = checkpoint_path(tmp_path, first.epoch, first.step)
    assert path.name == f"epoch-0001-step-{step:06d}.pt"
    save_checkpoint(path, first.state_dict())
    second = Trainer(config, train_part, val)
    second.load_state_dict(load_checkpoint(path))
    list(second)
    assert_same_state(second.state_dict(), straight.state_dict())
    assert second.history[1]["elapsed_s"] > 0
    assert [record["epoch"] for record in second.history] == [1, 2, 3]


def test_validating_does_not_change_what_is_learned(few_digits: LabelledImages) -> None:
    _, val = split_validation(few_digits, fraction=0.2, seed=0)
    config = SMALL.with_settings(epochs=2)
    trainers = [Trainer(config, few_digits, val), Trainer(config, few_digits, None)]
    for trainer in trainers:
        list(trainer)
    states = [trainer.state_dict() for trainer in trainers]
    for part in ("model", "optimizer"):
        assert_same_state(states[0][part], states[1][part])


def test_a_state_of_another_run_is_refused_by_the_name_of_the_setting(few_digits: LabelledImages) -> None:
    state = Trainer(SMALL, few_digits).state_dict()
    with pytest.raises(ValueError, match=r"temperature 3\.0 \(asked for: 4\.0\)"):
        Trainer(SMALL.with_settings(temperature=4.0), few_digits).load_state_dict(state)


def test_a_huge_learning_rate_diverges_with_a_sentence(few_digits: LabelledImages) -> None:
    config = SMALL.with_settings(lr=1e30, batch_size=32)
    with pytest.raises(DivergedError, match="in epoch 1: a smaller lr or beta would help"):
        list(Trainer(config, few_digits))


def test_divergence_is_seen_at_the_step_and_not_at_the_end_of_the_epoch(few_digits: LabelledImages) -> None:
    trainer = Trainer(SMALL.with_settings(lr=1e30, batch_size=10), few_digits)
    with pytest.raises(DivergedError):
        list(trainer)
    assert trainer.step < 5, "of thirty"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 999 bytes"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_running_out_of_memory_comes_with_advice(
    few_digits: LabelledImages, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    trainer = Trainer(SMALL, few_digits)

    def fail(batch: torch.Tensor) -> Any:
        raise error

    monkeypatch.setattr(trainer.model, "forward", fail)
    with pytest.raises(OutOfMemoryError, match=r"batch_size 128 and width 4: a smaller --batch-size or --width"):
        list(trainer)


def test_other_errors_stay_what_they_are(few_digits: LabelledImages, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(SMALL, few_digits)
    monkeypatch.setattr(trainer.model, "forward", lambda batch: torch.zeros(2, 3) @ torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(trainer)


def test_a_state_of_another_number_of_images_is_refused(few_digits: LabelledImages) -> None:
    state = Trainer(SMALL, few_digits).state_dict()
    fewer = LabelledImages(few_digits.images[:-1], few_digits.labels[:-1])
    with pytest.raises(ValueError, match=r"300 training images, the data set has 299 now"):
        Trainer(SMALL, fewer).load_state_dict(state)


@pytest.mark.parametrize("lr", [1e10, 1e30])
def test_divergence_in_the_last_step_is_divergence_too(few_digits: LabelledImages, lr: float) -> None:
    """The loss is that of the weights before the step: only the validation sees what the last one did."""
    train_part, val = split_validation(few_digits, fraction=0.2, seed=0)
    config = SMALL.with_settings(lr=lr, batch_size=1000, epochs=2)
    with pytest.raises(DivergedError):
        list(Trainer(config, train_part, val))


@pytest.mark.usefixtures("few_files")
def test_a_network_broken_by_its_last_step_has_no_result(tmp_path: Path) -> None:
    """Without validation images the test set is the first to see it; a result of nothing must not be recorded."""
    config = SMALL.with_settings(lr=1e30, batch_size=1000, epochs=1)
    with pytest.raises(DivergedError):
        train_run(config, tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_too_few_images_are_refused(few_digits: LabelledImages) -> None:
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        Trainer(SMALL, LabelledImages(few_digits.images[:1], few_digits.labels[:1]))


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    for name in ("cuda", "mps"):
        with pytest.raises(ValueError, match=f"device {name} is not available here; cpu is"):
            choose_device(name)


def test_precision_is_what_was_asked_for() -> None:
    cpu = torch.device("cpu")
    assert choose_autocast_dtype("fp32", cpu) is None
    assert choose_autocast_dtype("bf16", torch.device("cuda")) is torch.bfloat16
    assert choose_autocast_dtype("auto", torch.device("mps")) is None


# ---------------------------------------------------------------- runs in their folder


def stop_after(epoch: int) -> Callable[[EpochMetrics], None]:
    def on_epoch(metrics: EpochMetrics) -> None:
        if metrics.epoch == epoch:
            raise KeyboardInterrupt

    return on_epoch


def start_and_stop(config: TrainConfig, folder: Path, epoch: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        finish_run(open_run(config, folder), on_epoch=stop_after(epoch))


def epochs_in(folder: Path) -> list[int]:
    return [record["epoch"] for record in read_json_lines(folder / "metrics.jsonl")]


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch, few_digits: LabelledImages) -> None:
    """Runs find 300 digits to train and 100 to test on."""
    test = load_images("digits", None, "test")
    few_test = LabelledImages(test.images[:100], test.labels[:100])
    monkeypatch.setattr(runs, "load_images", lambda *a: few_digits if a[2] == "train" else few_test)


def test_test_set_is_read_once_and_after_the_last_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    config = SMALL.with_settings(epochs=3, val_fraction=0.2)
    reads: list[tuple[str, list[int]]] = []

    def load(dataset: Any, data_dir: str | None, split: Any) -> LabelledImages:
        reads.append((split, epochs_in(folder)))
        found = load_images(dataset, data_dir, split)
        return LabelledImages(found.images[:300], found.labels[:300])

    monkeypatch.setattr(runs, "load_images", load)
    start_and_stop(config, folder, 2)
    assert reads == [("train", [])]
    train_run(config, folder)
    assert reads == [("train", []), ("train", [1, 2]), ("test", [1, 2, 3])]
    train_run(config, folder)
    assert len(reads) == 3, "a finished run reads nothing"


def test_test_labels_change_nothing_but_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_digits: LabelledImages
) -> None:
    """Replaced by noise, every weight and every validated figure stays the same to the last bit."""
    config = SMALL.with_settings(epochs=2, val_fraction=0.2)
    test = load_images("digits", None, "test")
    noise = np.random.default_rng(0).permutation(test.labels)
    results = {}
    for name, labels in (("true", test.labels), ("noise", noise)):
        part = LabelledImages(test.images, labels)
        monkeypatch.setattr(runs, "load_images", lambda *a, p=part: few_digits if a[2] == "train" else p)
        results[name] = train_run(config, tmp_path / name)
    assert results["true"]["test_nll"] != results["noise"]["test_nll"]
    states = [load_checkpoint(checkpoint_path(tmp_path / name / "checkpoints", 2)) for name in results]
    assert_same_state(states[0], states[1])
    lines = [read_json_lines(tmp_path / name / "metrics.jsonl") for name in results]
    for a, b in zip(*lines, strict=True):
        assert {k: v for k, v in a.items() if k not in TIMES} == {k: v for k, v in b.items() if k not in TIMES}


@pytest.mark.usefixtures("few_files")
def test_a_checkpoint_that_cannot_be_written_costs_one_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SMALL.with_settings(epochs=3)
    straight = train_run(config, tmp_path / "straight")

    def fail(path: Path, state: dict[str, Any]) -> None:
        if state["epoch"] == 2:
            raise OSError(28, "No space left on device")
        save_checkpoint(path, state)

    monkeypatch.setattr(runs, "save_checkpoint", fail)
    with pytest.raises(OSError, match="No space"):
        train_run(config, tmp_path / "crashed")
    assert epochs_in(tmp_path / "crashed") == [1], "a line only of what a checkpoint holds"
    monkeypatch.setattr(runs, "save_checkpoint", save_checkpoint)
    result = train_run(config, tmp_path / "crashed")
    assert epochs_in(tmp_path / "crashed") == [1, 2, 3]
    assert {k: v for k, v in result.items() if k not in TIMES} == {k: v for k, v in straight.items() if k not in TIMES}


@pytest.mark.usefixtures("few_files")
def test_a_stop_before_the_result_is_made_up_for(tmp_path: Path) -> None:
    config = SMALL.with_settings(epochs=2)
    first = train_run(config, tmp_path)
    (tmp_path / "result.json").unlink()
    again = train_run(config, tmp_path)
    assert again == first
    assert epochs_in(tmp_path) == [1, 2]


@pytest.mark.usefixtures("few_files")
def test_the_folder_of_another_run_is_not_taken_over(tmp_path: Path) -> None:
    """Not even before its first checkpoint, or when that cannot be read."""
    open_run(SMALL, tmp_path)
    before = picture_of(tmp_path)
    with pytest.raises(ValueError, match=r"seed 0 \(asked for: 1\)"):
        open_run(SMALL.with_settings(seed=1), tmp_path)
    assert picture_of(tmp_path) == before


@pytest.mark.usefixtures("few_files")
def test_a_damaged_last_checkpoint_costs_one_epoch(tmp_path: Path) -> None:
    config = SMALL.with_settings(epochs=4)
    straight = train_run(config, tmp_path / "straight")
    folder = tmp_path / "damaged"
    start_and_stop(config, folder, 3)
    last = checkpoint_path(folder / "checkpoints", 3)
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"epoch-0003\.pt is damaged"):
        result = train_run(config, folder)
    assert epochs_in(folder) == [1, 2, 3, 4]
    assert result["test_nll"] == straight["test_nll"]


@pytest.mark.usefixtures("few_files")
def test_two_checkpoints_are_kept_and_one_tensorboard_step_an_epoch(tmp_path: Path) -> None:
    events_of = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    config = SMALL.with_settings(epochs=4)
    start_and_stop(config, tmp_path, 3)
    checkpoint_path(tmp_path / "checkpoints", 3).unlink()  # so that epoch 3 is done, and written, twice
    train_run(config, tmp_path)
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["epoch-0004.pt", "epoch-0003.pt"]
    events = events_of(str(tmp_path / "tensorboard")).Reload()
    records = read_json_lines(tmp_path / "metrics.jsonl")
    found = events.Scalars("train_loss")
    assert [event.step for event in found] == [1, 2, 3, 4]
    assert [event.value for event in found] == pytest.approx([r["train_loss"] for r in records], rel=1e-6)
    assert {"train_accuracy_1", "train_hint_3", "lr"} <= set(events.Tags()["scalars"])


@pytest.mark.usefixtures("few_files")
def test_going_on_from_an_older_checkpoint_forgets_the_newer_ones(tmp_path: Path) -> None:
    """Else a second stop would be followed by the abandoned epochs' checkpoint, whose metrics are gone."""
    config = SMALL.with_settings(epochs=6)
    start_and_stop(config, tmp_path, 3)
    older = Path(shutil.copy(checkpoint_path(tmp_path / "checkpoints", 3), tmp_path / "older.pt"))
    start_and_stop(config, tmp_path, 5)
    with pytest.raises(KeyboardInterrupt):
        finish_run(open_run(config, tmp_path, older), on_epoch=stop_after(4))
    train_run(config, tmp_path)
    assert epochs_in(tmp_path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("few_files")
def test_long_epochs_are_saved_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SMALL.with_settings(epochs=2, batch_size=30)
    straight = train_run(config, tmp_path / "straight")
    monkeypatch.setattr(runs, "SAVE_EVERY_S", 0.0)
    run = open_run(config, tmp_path / "saved")
    seen = []
    for _ in train_saving(
        run.trainer, run.folder, lambda *_: seen.append(list_checkpoints(run.folder / "checkpoints"))
    ):
        break
    assert [path.name for path in seen[2]] == ["epoch-0000-step-000002.pt", "epoch-0000-step-000001.pt"]
    assert [path.name for path in seen[9]] == ["epoch-0000-step-000009.pt", "epoch-0000-step-000008.pt"]
    names = [path.name for path in list_checkpoints(run.folder / "checkpoints")]
    assert names == ["epoch-0001.pt", "epoch-0000-step-000010.pt"]
    result = train_run(config, run.folder)
    assert {k: v for k, v in result.items() if k not in TIMES} == {k: v for k, v in straight.items() if k not in TIMES}


@pytest.mark.usefixtures("few_files")
def test_asked_to_stop_it_saves_the_step_at_hand(tmp_path: Path) -> None:
    config = SMALL.with_settings(epochs=2, batch_size=30)
    run = open_run(config, tmp_path)
    with pytest.raises(StoppedError):
        finish_run(run, stop_asked=lambda: run.trainer.step == 7)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["epoch-0000-step-000007.pt"]
    again = open_run(config, tmp_path)
    assert (again.trainer.epoch, again.trainer.step) == (0, 7)


@pytest.mark.usefixtures("few_files")
@pytest.mark.parametrize(
    "error",
    [OSError(24, "Too many open files"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_checkpoints_that_cannot_be_read_just_now_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    start_and_stop(SMALL, tmp_path, 3)
    before = picture_of(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    if isinstance(error, OSError):
        monkeypatch.setattr(Path, "read_bytes", fail)
    else:
        monkeypatch.setattr(torch, "load", fail)
    with pytest.raises((OSError, OutOfMemoryError)):
        open_run(SMALL, tmp_path)
    monkeypatch.undo()
    assert picture_of(tmp_path) == before


@pytest.mark.usefixtures("few_files")
def test_damaged_and_abandoned_checkpoints_are_renamed_and_others_left_alone(tmp_path: Path) -> None:
    start_and_stop(SMALL, tmp_path, 3)
    folder = tmp_path / "checkpoints"
    shutil.copy(checkpoint_path(folder, 2), folder / "epoch-0002-good.pt")
    content = checkpoint_path(folder, 3).read_bytes()
    train_from = open_run(SMALL, tmp_path, checkpoint_path(folder, 2))
    assert (folder / "left-epoch-0003.pt").read_bytes() == content
    finish_run(train_from)
    assert (folder / "epoch-0002-good.pt").exists()


@pytest.mark.usefixtures("few_files")
def test_metrics_are_made_good_from_the_checkpoint(tmp_path: Path) -> None:
    config = SMALL.with_settings(epochs=4)
    start_and_stop(config, tmp_path, 3)
    lines = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(lines[:100])
    open_run(config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == lines


# ---------------------------------------------------------------- command lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of six epochs never stopped, started from another folder: (its folder, what the command said)."""
    place = tmp_path_factory.mktemp("finished")
    done = run_command([*FLAGS, "--outputs", place / "outputs", "--name", "straight"], cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "outputs" / "runs" / "straight", done


def accuracies_in(text: str) -> dict[str, float]:
    """From a printed table: classifier -> accuracy."""
    return {name: float(value) for name, value in re.findall(r"^(\d/4|ensemble) +([\d.]+) ", text, re.MULTILINE)}


def test_command_line_trains_and_says_what_it_did(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = finished
    assert done.stderr == ""
    assert re.findall(r"^epoch (\d)/6 ", done.stdout, re.MULTILINE) == list("123456")
    assert str(folder) in done.stdout
    result = read_json(folder / "result.json")
    printed = accuracies_in(done.stdout)
    assert printed == {
        name: round(result[f"test_accuracy_{key}"], 2)
        for name, key in (("1/4", 1), ("2/4", 2), ("3/4", 3), ("4/4", 4), ("ensemble", "ensemble"))
    }
    assert max(printed.values()) > 50, "ten classes: it did learn"


def test_result_holds_what_every_record_must(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = finished
    result = read_json(folder / "result.json")
    config = TrainConfig.from_dict(result["config"])
    assert config == TrainConfig.from_dict(read_json(folder / "config.json"))
    assert (config.width, config.epochs, config.seed, config.val_fraction) == (4, 6, 0, 0.1)
    for measure in ("accuracy", "nll", "ece"):
        values = [result[f"test_{measure}_{name}"] for name in (1, 2, 3, 4, "ensemble")]
        assert all(isinstance(v, float) and v >= 0 for v in values)
        assert result[f"test_{measure}"] == values[3], "the deepest classifier's"
    assert result["num_test_images"] == len(load_images("digits", None, "test").labels)
    train_images = load_images("digits", None, "train")
    rest, _ = split_validation(train_images, fraction=0.1, seed=0)
    assert result["num_train_images"] == len(rest.labels)
    assert result["commit"] == find_commit() or "-dirty" in str(result["commit"])
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"python", "torch", "torchvision", "ray", "optuna", "numpy"} <= set(result["versions"])
    assert result["hardware"]["device"] == "cpu"
    assert result["hardware"]["cpu_cores"] == os.cpu_count()
    assert result["hardware"]["threads"] == 1
    records = read_json_lines(folder / "metrics.jsonl")
    assert result["elapsed_s"] == pytest.approx(sum(r["elapsed_s"] for r in records))
    assert all(0 <= r[f"val_accuracy_{name}"] <= 100 for r in records for name in (1, 2, 3, 4, "ensemble"))


def test_finished_run_prints_its_result_without_training(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    folder, done = finished
    before = picture_of(folder)
    monkeypatch.chdir(tmp_path)
    outputs = folder.parents[1]
    for arguments in ((*FLAGS, "--outputs", outputs, "--name", "straight"), ("--resume", folder)):
        code, out, err = call_main(train, "script", arguments, monkeypatch, capsys)
        assert (code, err) == (0, "")
        assert "is finished already" in out
        assert "epoch 1/6" not in out
        assert out.split("test set")[1] == done.stdout.split("test set")[1]
    assert picture_of(folder) == before


def test_evaluate_prints_the_accuracies_of_the_result(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    folder, done = finished
    before = picture_of(folder)
    by_folder = run_command([folder], cwd=tmp_path, script="byot/evaluate.py")
    assert (by_folder.returncode, by_folder.stderr) == (0, "")
    assert len(accuracies_in(by_folder.stdout)) == 5
    assert accuracies_in(by_folder.stdout) == accuracies_in(done.stdout)
    assert "359 test images, after epoch 6/6" in by_folder.stdout

    code, out, err = call_main(evaluate, "script", (checkpoint_path(folder / "checkpoints", 5),), monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert "after epoch 5/6" in out
    assert accuracies_in(out).keys() == accuracies_in(done.stdout).keys()
    assert picture_of(folder) == before


def test_the_network_of_a_run_from_python(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """As in the README: what it says of the test images is what the run's result says."""
    folder, _ = finished
    network, (mean, std) = load_network(folder)
    assert not network.training
    test = load_images("digits", None, "test")
    images = torch.from_numpy(test.images).permute(0, 3, 1, 2)
    with torch.inference_mode():
        outputs = network(normalize(images / 255, mean, std))
    ensemble = torch.stack(outputs.logits).softmax(dim=-1).mean(dim=0)
    expected = read_json(folder / "result.json")
    for name, scores in (("1", outputs.logits[0]), ("4", outputs.logits[3]), ("ensemble", ensemble)):
        right = (scores.argmax(dim=1) == torch.from_numpy(test.labels)).float().mean().item()
        assert 100 * right == pytest.approx(expected[f"test_accuracy_{name}"], abs=0.6), "two of 359 images: it is bf16"
    with pytest.raises(ValueError, match="there is no run or checkpoint at"):
        load_network("nowhere")


def test_killed_and_started_again_ends_in_the_same_weights(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    straight, _ = finished
    folder = tmp_path / "outputs" / "runs" / "killed"
    arguments = [*FLAGS, "--outputs", tmp_path / "outputs", "--name", "killed"]
    killed = run_command(
        ["epoch-*.pt", 4, "written", PROJECT / "byot/train.py", *arguments],
        cwd=tmp_path,
        script="tests/faults/killed_in_write.py",
        PYTHONPATH=str(PROJECT),
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / "result.json").exists()

    again = run_command(arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stdout
    assert "epoch 2/6" not in again.stdout
    assert_same_state(
        load_checkpoint(checkpoint_path(folder / "checkpoints", 6)),
        load_checkpoint(checkpoint_path(straight / "checkpoints", 6)),
    )
    records = [read_json_lines(f / "metrics.jsonl") for f in (folder, straight)]
    assert epochs_in(folder) == [1, 2, 3, 4, 5, 6]
    for a, b in zip(*records, strict=True):
        assert {k: v for k, v in a.items() if k not in TIMES} == {k: v for k, v in b.items() if k not in TIMES}
    results = [read_json(f / "result.json") for f in (folder, straight)]
    for key in results[0]:
        if key != "elapsed_s":
            assert results[0][key] == results[1][key], key


CLI_CONFIG = TrainConfig(dataset="digits", width=4, epochs=6, val_fraction=0.1)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `finished`, stopped after its third epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "runs" / "half"
    start_and_stop(CLI_CONFIG, folder, 3)
    return folder


@pytest.fixture
def half(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run to go on with."""
    return shutil.copytree(stopped, tmp_path / "outputs" / "runs" / "half")


def test_resume_of_a_folder(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
    half: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped in this process and gone on with, against never stopped in another."""
    monkeypatch.chdir(half.parents[2])
    code, out, err = call_main(train, "script", ("--resume", "outputs/runs/half"), monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert re.findall(r"^epoch (\d)/6 ", out, re.MULTILINE) == list("456")
    assert accuracies_in(out) == accuracies_in(finished[1].stdout)
    assert_same_state(
        load_checkpoint(checkpoint_path(half / "checkpoints", 6)),
        load_checkpoint(checkpoint_path(finished[0] / "checkpoints", 6)),
    )


def test_resume_of_a_file(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
    half: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = checkpoint_path(half / "checkpoints", 2)
    code, out, err = call_main(train, "script", ("--resume", checkpoint, *FLAGS), monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert re.findall(r"^epoch (\d)/6 ", out, re.MULTILINE) == list("3456")
    assert epochs_in(half) == [1, 2, 3, 4, 5, 6]
    assert accuracies_in(out) == accuracies_in(finished[1].stdout)


def test_resume_warns_of_a_damaged_checkpoint(
    half: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last = checkpoint_path(half / "checkpoints", 3)
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"epoch-0003\.pt is damaged"):
        code, out, _ = call_main(train, "script", ("--resume", half), monkeypatch, capsys)
    assert code == 0
    assert re.findall(r"^epoch (\d)/6 ", out, re.MULTILINE) == list("3456")


@pytest.mark.usefixtures("few_files")
def test_control_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "finish_run", lambda run, on_batch, *_: finish_run(run, on_batch, stop_after(1)))
    arguments = ("--dataset", "digits", "--width", 4, "--epochs", 2, "--outputs", tmp_path, "--name", "run")
    code, _, err = call_main(train, "script", arguments, monkeypatch, capsys)
    assert code == 130
    assert err == f"\nstopped; go on with: {sys.executable} script --resume {tmp_path}/runs/run\n"
    assert epochs_in(tmp_path / "runs" / "run") == [1]


@pytest.mark.usefixtures("few_files")
def test_one_process_at_a_time_in_a_folder(
    half: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = picture_of(half)
    with lock_folder(half):
        for arguments in (("--resume", half), (*FLAGS, "--name", "half", "--fresh", "--outputs", half.parents[1])):
            code, _, err = call_main(train, "script", arguments, monkeypatch, capsys)
            assert code == 2
            assert_one_sentence(err, "another process is writing to", str(half))
    assert picture_of(half) == before | {".lock": picture_of(half)[".lock"]}


@pytest.mark.usefixtures("few_files")
def test_fresh_sets_aside_what_was_there(
    half: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = epochs_in(half)
    arguments = (*FLAGS, "--seed", 5, "--name", "half", "--outputs", half.parents[1])
    code, _, err = call_main(train, "script", arguments, monkeypatch, capsys)
    assert code == 2
    assert_one_sentence(err, "seed 0 (asked for: 5)")
    code, out, _ = call_main(train, "script", (*arguments, "--fresh"), monkeypatch, capsys)
    assert code == 0
    (aside,) = (half.parent / "replaced").iterdir()
    assert str(aside) in out
    assert epochs_in(aside) == before
    assert read_json(half / "config.json")["seed"] == 5


@pytest.mark.usefixtures("few_files")
def test_divergence_is_one_sentence_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--dataset", "digits", "--width", 4, "--lr", 1e30, "--batch-size", 32, "--outputs", tmp_path)
    code, _, err = call_main(train, "script", arguments, monkeypatch, capsys)
    assert code == 1
    assert_one_sentence(err, "train.py: ", "smaller lr")
    (folder,) = (tmp_path / "runs").iterdir()
    assert not (folder / "result.json").exists()


def test_parquet_from_a_relative_folder_trains_to_a_result(
    parquet_folder: ParquetMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet_folder(num_train=12, num_test=6, dataset="cifar10", folder="my data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BYOT_OUTPUTS", str(tmp_path / "elsewhere"))
    arguments = ("--dataset", "cifar10", "--data-dir", "my data", "--width", 2, "--epochs", 1, "--batch-size", 4)
    code, out, err = call_main(train, "script", arguments, monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert "test set, 6 images" in out
    (folder,) = (tmp_path / "elsewhere" / "runs").iterdir()
    assert read_json(folder / "config.json")["data_dir"] == str(tmp_path / "my data"), "absolute: found from anywhere"


# ---------------------------------------------------------------- what a user gets wrong


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "vgg16"), ("--model", "vgg16", "resnet18")),
        (("--dataset", "mnist"), ("--dataset", "mnist", "digits")),
        (("--alpha", 2), ("alpha must lie between 0 and 1, not 2",)),
        (("--alpha", "nan"), ("alpha", "nan")),
        (("--alpha", "much"), ("--alpha", "much")),
        (("--temperature", 0), ("temperature must be a finite number above 0, not 0",)),
        (("--beta", -1), ("beta must be", "-1")),
        (("--epochs", 0), ("epochs must be at least 1, not 0",)),
        (("--epochs", 1.5), ("--epochs", "1.5")),
        (("--batch-size", 1), ("batch_size must be at least 2",)),
        (("--nonsense",), ("--nonsense",)),
        (("--name", "../up"), ("a name is made of", "../up")),
        (("--best", "--dataset", "digits", "--model", "resnet34"), ("search/tune.py", "resnet34", "digits")),
        (("--best", "unknown"), ("the search unknown has no best.json",)),
        (("--best", "--resume", "x"), ("not allowed with",)),
        (("--best", "--alpha", 2), ("alpha must lie",)),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_a_wrong_command_line_is_one_sentence(
    tmp_path: Path, arguments: tuple[Any, ...], words: tuple[str, ...]
) -> None:
    done = run_command(arguments, cwd=tmp_path, BYOT_OUTPUTS=str(tmp_path / "outputs"))
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_sentence(done.stderr, "train.py: ", *words)
    assert picture_of(tmp_path) == {}, "nothing was written"


def test_unreadable_parquet_from_a_shell(tmp_path: Path) -> None:
    """One of the cases below in a process of its own: no warning, no banner, no traceback from anywhere."""
    write_parquet(tmp_path / "images" / "test.parquet")
    (tmp_path / "images" / "train.parquet").write_text("not parquet at all, though long enough to hold a footer")
    before = picture_of(tmp_path)
    done = run_command(["--data-dir", "images", "--outputs", "outputs"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_sentence(done.stderr, "train.py: ", str(tmp_path / "images/train.parquet"), "cannot be read as parquet")
    assert picture_of(tmp_path) == before


def no_parquet(folder: Path) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    (folder / "images").mkdir()
    return ("--data-dir", "images"), (str(folder / "images"), "--data-dir must name a folder with cifar100")


def no_data_folder(folder: Path) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    return ("--data-dir", "images"), (str(folder / "images"), "does not exist")


def no_test_images(folder: Path) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    write_parquet(folder / "images" / "train.parquet")
    return ("--data-dir", "images"), (str(folder / "images"), "test*.parquet")


def unlabelled_test_images(folder: Path) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    write_parquet(folder / "images" / "train.parquet")
    write_parquet(folder / "images" / "test.parquet", columns=["img"])
    return ("--data-dir", "images"), ("test.parquet", "fine_label")


def labels_out_of_range(folder: Path) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    write_parquet(folder / "images" / "train.parquet", labels=[0, 100, 5, 7])
    write_parquet(folder / "images" / "test.parquet")
    return ("--data-dir", "images"), ("train.parquet", "0 to 100")


def no_data_and_no_network(folder: Path) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    return (), ("cifar100", "--data-dir", "--dataset digits")


def resume_without_checkpoint(folder: Path) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    (folder / "empty").mkdir()
    return ("--resume", "empty"), (str(folder / "empty"), "no checkpoint")


def resume_of_a_missing_path(folder: Path) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    return ("--resume", "gone"), (str(folder / "gone"), "no run or checkpoint")


def resume_of_something_else(folder: Path) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    torch.save({"state_dict": {}}, folder / "weights.pt")
    return ("--resume", "weights.pt"), ("weights.pt", "not written by this project")


def device_not_here(folder: Path) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    return ("--dataset", "digits", "--device", "mps"), ("device mps is not available",)


def too_small_a_share(folder: Path) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    return ("--dataset", "digits", "--val-fraction", 1e-6), ("val_fraction", "holds out none")


def outputs_in_a_file(folder: Path) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    (folder / "file").write_text("")
    return ("--dataset", "digits", "--outputs", "file"), (str(folder / "file"),)


WRONG = [
    no_parquet,
    no_data_folder,
    no_test_images,
    unlabelled_test_images,
    labels_out_of_range,
    no_data_and_no_network,
    resume_without_checkpoint,
    resume_of_a_missing_path,
    resume_of_something_else,
    device_not_here,
    too_small_a_share,
    outputs_in_a_file,
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_wrong_inputs_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: Callable[[Path], Any]
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(data, "DEFAULT_DATA_DIR", tmp_path / "data")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BYOT_OUTPUTS", str(tmp_path / "outputs"))
    arguments, words = wrong(tmp_path)
    if "--resume" not in arguments:
        arguments = (*arguments, "--width", 1, "--epochs", 1)  # soon over if it is let through
    before = picture_of(tmp_path)
    code, out, err = call_main(train, "script", arguments, monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert_one_sentence(err, "train.py: ", *words)
    assert picture_of(tmp_path) == before, "nothing was written"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--alpha", 0.5), "alpha 0.1 (asked for: 0.5)"),
        (("--epochs", 7), "epochs 6 (asked for: 7)"),
        (("--seed", 1, "--lr", 0.4), "lr 0.2 (asked for: 0.4), seed 0 (asked for: 1)"),
    ],
)
@pytest.mark.parametrize("way", ["--name", "--resume folder", "--resume file"])
def test_a_changed_setting_is_named(
    half: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    way: str,
    flags: tuple[Any, ...],
    words: str,
) -> None:
    before = picture_of(half.parents[1])
    start: dict[str, tuple[Any, ...]] = {
        "--name": (*FLAGS, "--outputs", half.parents[1], "--name", "half"),
        "--resume folder": ("--resume", half),
        "--resume file": ("--resume", checkpoint_path(half / "checkpoints", 3)),
    }
    code, out, err = call_main(train, "script", (*start[way], *flags), monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert_one_sentence(err, words)
    assert picture_of(half.parents[1]) == before, "nothing was written"


def test_what_does_not_change_a_run_may_change_on_the_way(
    half: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call_main(train, "script", ("--resume", half, "--device", "cpu"), monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert re.findall(r"^epoch (\d)/6 ", out, re.MULTILINE) == list("456")


@pytest.mark.parametrize("path", ["gone", "file.pt"])
def test_evaluate_tells_a_wrong_path_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    (tmp_path / "file.pt").write_text("x")
    code, out, err = call_main(evaluate, "script", (tmp_path / path,), monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert_one_sentence(err, "evaluate.py: ", path)


@pytest.mark.parametrize("script", ["byot/train.py", "byot/evaluate.py"])
def test_help_answers_without_importing_anything_heavy(tmp_path: Path, script: str) -> None:
    done = run_command(["--help"], cwd=tmp_path, script=script, python=("-X", "importtime"))
    assert done.returncode == 0
    assert "usage: " + Path(script).name in done.stdout
    modules = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert {"argparse", "byot"} <= modules, "the list was read"
    heavy = {"torch", "torchvision", "ray", "optuna", "numpy", "pandas", "pyarrow", "PIL", "sklearn", "rich"}
    assert modules & heavy == set()


# ---------------------------------------------------------------- --best


def write_search(
    outputs: Path, name: str, *, status: str = "finished", at: str = "2025-01-01", **settings: Any
) -> None:
    config = TrainConfig(dataset="digits", width=8, **settings).to_dict()
    write_json(outputs / "searches" / name / "search.json", {"status": status, "finished_at": at, "config": config})
    write_json(outputs / "searches" / name / "best.json", {"config": config, "found_with": "24 trials"})


def plan(*arguments: object) -> tuple[TrainConfig, Path, Path | None]:
    return train.plan_run(train.build_parser().parse_args(list(map(str, arguments))))


def test_best_takes_the_newest_finished_search_of_the_model_and_data_that_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_search(tmp_path, "old", at="2025-01-01", alpha=0.2)
    write_search(tmp_path, "new", at="2025-03-01", alpha=0.3, temperature=4.0, beta=1e-5, epochs=9)
    write_search(tmp_path, "running", status="running", at="2025-04-01", alpha=0.4)
    write_search(tmp_path, "other-model", at="2025-05-01", alpha=0.5, model="resnet50")
    (tmp_path / "searches" / "torn").mkdir()
    (tmp_path / "searches" / "torn" / "search.json").write_text('{"status": "fini')

    named = ("--model", "resnet18", "--dataset", "digits")
    config, folder, checkpoint = plan("--best", *named, "--outputs", tmp_path)
    assert (config.alpha, config.temperature, config.beta, config.epochs, config.width) == (0.3, 4.0, 1e-5, 9, 8)
    assert folder == tmp_path / "runs" / config.run_name()
    assert checkpoint is None
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    for word in (
        "alpha 0.3",
        "temperature 4",
        "beta 1e-05",
        "newest finished search, new",
        "24 trials",
        "9 epochs, as",
    ):
        assert word in said

    for fewer in (("--dataset", "digits", "--model", "resnet50"), ("--dataset", "digits"), ()):
        newest = plan("--best", *fewer, "--outputs", tmp_path)[0]
        assert (newest.alpha, newest.model, newest.dataset) == (0.5, "resnet50", "digits")
    over = plan("--best", "old", "--outputs", tmp_path, "--seed", 4, "--epochs", 3, "--alpha", 0.9)[0]
    assert (over.alpha, over.seed, over.epochs, over.width) == (0.9, 4, 3, 8)
    assert plan("--best", tmp_path / "searches" / "old", "--outputs", tmp_path / "elsewhere")[0].alpha == 0.2


def test_best_falls_back_on_what_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search_files, "SHIPPED_FOLDER", tmp_path / "shipped")
    write_json(tmp_path / "shipped" / "resnet18-digits.json", {"config": TrainConfig(alpha=0.6).to_dict()})
    assert plan("--best", "--dataset", "digits", "--outputs", tmp_path)[0].alpha == 0.6
    said = capsys.readouterr().out
    assert "shipped with the project, as no search of resnet18 on digits has finished here" in said
    assert "30 epochs, as in the search" in said, "the shipped file names them"
    write_json(tmp_path / "shipped" / "resnet18-digits.json", {"accuracy": 1})
    with pytest.raises(ValueError, match="has no configuration"):
        plan("--best", "--dataset", "digits", "--outputs", tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", json.dumps({"config": {"alpha": 7}}), json.dumps({"config": {"gamma": 1}})]
)
def test_a_damaged_best_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "searches" / "mine").mkdir(parents=True)
    (tmp_path / "searches" / "mine" / "best.json").write_text(content)
    code, out, err = call_main(train, "script", ("--best", "mine", "--outputs", tmp_path), monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert_one_sentence(err, "train.py: ")
