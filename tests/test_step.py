"""Holds byot/step.py to one result whichever way a step is done, and its choice to what was timed."""

import math
from itertools import islice
from typing import Any

import pytest
import torch

from byot import step
from byot.batches import Batch
from byot.config import TrainConfig
from byot.data import LabelledImages, load_images
from byot.distributed import ALONE, Processes
from byot.step import EXPECTED_COMPILE_S, EXPECTED_SAVING, TIMED_STEPS, WARMUP_STEPS, Pace, TrainingStep, ways_to_try
from byot.trainer import Trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = TrainConfig(dataset="digits", width=4, epochs=2, lr=0.01, batch_size=50, device="cpu", precision="fp32")
TIMED = WARMUP_STEPS + TIMED_STEPS


def few_images(number: int) -> LabelledImages:
    images, labels = load_images("digits", None, "train")
    return LabelledImages(images[:number], labels[:number])


@pytest.mark.slow
def test_a_compiled_step_is_an_eager_one() -> None:
    """Both over two epochs whose last batch is smaller; the compiled one takes the same steps but for rounding."""
    data = few_images(220)
    eager, compiled = (Trainer(SMALL.with_settings(acceleration=way), data) for way in ("none", "compile"))
    expected, found = list(eager), list(compiled)
    assert [m.loss for m in found] == pytest.approx([m.loss for m in expected], rel=1e-3)
    for (name, weight), other in zip(compiled.model.named_parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-2, atol=1e-3, msg=name)
    assert any(
        not torch.equal(a, b) for a, b in zip(*(t.model.parameters() for t in (compiled, eager)), strict=True)
    ), "the same to the last bit: nothing was compiled"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", ["graph", "compile", "auto"])
def test_a_recorded_step_is_an_eager_one(way: Any) -> None:
    config = SMALL.with_settings(device="cuda", epochs=12)
    data = few_images(420)
    eager, recorded = (Trainer(config.with_settings(acceleration=a), data) for a in ("none", way))
    expected, found = list(eager), list(recorded)
    assert [m.loss for m in found] == pytest.approx([m.loss for m in expected], rel=1e-2)
    assert recorded.paces


def made_step(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], **settings: Any) -> tuple[Trainer, list[str]]:
    """A trainer whose ways take so long a step, on a clock of our own, and the ways in which steps were done."""
    done: list[str] = []
    now = 0.0

    def prepare(self: TrainingStep, way: str, batch: Batch) -> Any:
        def run(batch: Batch) -> None:
            nonlocal now
            done.append(way)
            now += seconds[way]
            self._eager(batch)

        return run

    monkeypatch.setattr(TrainingStep, "_prepare", prepare)
    monkeypatch.setattr(TrainingStep, "_now", lambda self: now)
    monkeypatch.setattr(step, "ways_to_try", lambda *_: ["eager", "graph", "compile"])
    return Trainer(SMALL.with_settings(batch_size=4, **settings), few_images(200)), done


@pytest.mark.parametrize(
    ("seconds", "quickest"),
    [
        ({"eager": 1.0, "graph": 0.5, "compile": 0.4}, "compile"),
        ({"eager": 1.0, "graph": 0.5, "compile": 0.7}, "graph"),
        ({"eager": 1.0, "graph": 1.5, "compile": 1.2}, "eager"),
    ],
)
def test_the_quickest_way_goes_on(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], quickest: str) -> None:
    trainer, done = made_step(monkeypatch, seconds, epochs=100)
    epochs = iter(trainer)
    for _ in range(4):
        next(epochs)
    assert done == ["eager"] * TIMED + ["graph"] * TIMED + ["compile"] * TIMED + [quickest] * (200 - 3 * TIMED)
    assert [(pace.way, pytest.approx(pace.step_s)) for pace in trainer.paces] == list(seconds.items())
    assert trainer.state_dict()["way"] == quickest


def test_a_resumed_run_keeps_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"eager": 1.0, "graph": 0.5, "compile": 0.7}
    first, _ = made_step(monkeypatch, seconds, epochs=100)
    epochs = iter(first)
    for _ in range(3):
        next(epochs)
    second, done = made_step(monkeypatch, seconds, epochs=100)
    second.load_state_dict(first.state_dict())
    next(iter(second))
    assert done == ["graph"] * 50


@pytest.mark.parametrize("pays", [True, False])
def test_compiling_has_to_pay_in_the_steps_to_come(monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    """After two ways of thirty steps each, 50 steps an epoch."""
    needed = EXPECTED_COMPILE_S / (EXPECTED_SAVING * 0.5)
    epochs = math.ceil((needed + 2 * TIMED) / 50) + (1 if pays else -1)
    trainer, done = made_step(monkeypatch, {"eager": 1.0, "graph": 0.5, "compile": 0.1}, epochs=epochs)
    running = iter(trainer)
    for _ in range(2):
        next(running)
    assert ("compile" in done) is pays


@pytest.mark.parametrize("failing", [("graph",), ("compile",), ("graph", "compile")])
def test_a_way_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, failing: tuple[str, ...]) -> None:
    seconds = {"eager": 1.0, "graph": 0.5, "compile": 0.4}
    trainer, done = made_step(monkeypatch, seconds, epochs=100)
    prepare = TrainingStep._prepare

    def fail(self: TrainingStep, way: str, batch: Batch) -> Any:
        if way in failing:
            raise RuntimeError("no compiler")
        return prepare(self, way, batch)

    monkeypatch.setattr(TrainingStep, "_prepare", fail)
    epochs = iter(trainer)
    with pytest.warns(UserWarning, match="cannot be done as"):
        list(islice(epochs, 3))
    quickest = min((way for way in seconds if way not in failing), key=lambda way: seconds[way])
    assert trainer.state_dict()["way"] == quickest
    assert done[-1] == quickest
    assert not set(done) & set(failing)


def test_what_was_asked_for_and_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: TrainingStep, way: str, batch: Batch) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(TrainingStep, "_prepare", fail)
    with pytest.raises(RuntimeError, match="no compiler"):
        next(iter(Trainer(SMALL.with_settings(acceleration="compile"), few_images(100))))


def test_trials_of_a_search_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "ways_to_try", lambda *_: ["eager", "graph", "compile"])
    trainer = Trainer(SMALL, few_images(100), may_compile=False)
    assert trainer._make_training_step()._ways == ["eager", "graph"]


def test_ways() -> None:
    two = Processes(0, 2)
    assert ways_to_try("auto", CUDA, ALONE) == ["eager", "graph", "compile"]
    assert ways_to_try("auto", CPU, ALONE) == ways_to_try("auto", CUDA, two) == ways_to_try("none", CUDA, ALONE) == []
    assert ways_to_try("compile", CPU, two) == ["compile"]
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu"):
        ways_to_try("graph", CPU, ALONE)
    with pytest.raises(ValueError, match="is for one process"):
        ways_to_try("graph", CUDA, two)


def test_preparing_is_not_counted_as_stepping(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a way takes at first, as compiling does, is told apart."""
    trainer, _ = made_step(monkeypatch, {"eager": 1.0, "graph": 0.5, "compile": 0.4}, epochs=3)
    pace = Pace("eager", 1.0, 0.0)
    next(iter(trainer))
    assert trainer.paces == [pace]
