"""Several processes train as one does: the same losses, the same weights, checkpoints that move between them."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing

from byot import step, train
from byot.batches import augment
from byot.config import TrainConfig
from byot.data import LabelledImages
from byot.runs import open_run, train_run, train_saving
from byot.system.distributed import ALONE, CpuSyncBatchNorm2d, Processes, joined_processes, synchronise_batch_norms
from byot.system.files import read_json, read_json_lines
from byot.system.stopping import StoppedError
from byot.trainer import Trainer, build_model, check_parts
from tests.helpers import PROJECT, random_pixels

SETTINGS = TrainConfig(recipe="reference", width=4, epochs=3, batch_size=64, lr=0.1, device="cpu", precision="fp32")
STEPS = 20


def losses_of_first_steps(cases: list[tuple[TrainConfig, bool]], processes: Processes) -> list[list[float]]:
    """For each configuration, in float64 or not, the mean loss over the epoch so far, after each of the first steps."""
    return [_losses(config, in_float64, processes) for config, in_float64 in cases]


def _losses(config: TrainConfig, in_float64: bool, processes: Processes) -> list[float]:
    images = LabelledImages(random_pixels(700), np.arange(700) % 100)
    trainer = Trainer(config, images, processes=processes)
    losses: list[float] = []

    def on_batch(done: int, images: int) -> None:
        losses.append(trainer._sums.read_loss())
        if len(losses) == STEPS:
            raise StoppedError(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        if in_float64:
            trainer.model.double()
            patch.setattr(step, "augment", lambda *given: augment(*given).double())
        with pytest.raises(StoppedError):
            list(trainer.epochs(on_batch))
    return losses


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def become(rank: int, count: int, port: int) -> None:
    """Tell this process its place as torchrun would."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def as_process(rank: int, count: int, port: int, work: Any, arguments: tuple[Any, ...], found: Any) -> None:
    become(rank, count, port)
    torch.set_num_threads(1)
    with joined_processes() as processes:
        found.put((rank, work(*arguments, processes)))


def in_processes(count: int, work: Any, *arguments: Any) -> list[Any]:
    """What `work(*arguments, processes)` returns, as plain data, in each of several processes."""
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    multiprocessing.spawn(as_process, (count, free_port(), work, arguments, found), nprocs=count)
    return [result for _, result in sorted(found.get() for _ in range(count))]


def leave_and_count_threads(rank: int, port: int, found: Any) -> None:
    become(rank, 2, port)
    with joined_processes() as processes:
        losses_of_first_steps([(SETTINGS, False)], processes)
        during = num_worker_threads()
        gc.collect()
    give_up_at = time.monotonic() + 10  # Linux may list a thread for a moment after it was joined
    while (after := num_worker_threads()) and time.monotonic() < give_up_at:
        time.sleep(0.1)
    found.put((during, after))


def num_worker_threads() -> int:
    return sum("gloo_runloop" in name for name in thread_names())


def thread_names() -> Iterator[str]:
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has ended
            yield path.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted where Linux lists them")
def test_no_thread_outlives_the_group():
    """One that still holds a tensor when the interpreter ends aborts the process."""
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    multiprocessing.spawn(leave_and_count_threads, (free_port(), found), nprocs=2)
    for during, after in (found.get(), found.get()):
        assert during > 0
        assert after == 0


def leave_the_other_alone(rank: int, port: int, found: Any) -> None:
    become(rank, 2, port)
    with joined_processes() as processes:
        processes.add_up(torch.ones(3))
        if processes.is_first:
            os._exit(0)
        try:
            with processes.ending_with_first():
                processes.add_up(torch.ones(3))
        except SystemExit as ended:
            found.put(ended.code)
        with pytest.raises(ZeroDivisionError), processes.ending_with_first():
            print(1 // 0)
        with pytest.raises(RuntimeError, match="a defect"), processes.ending_with_first():
            raise RuntimeError("a defect")


@pytest.mark.slow
def test_a_process_whose_first_is_gone_ends_without_a_word():
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    multiprocessing.spawn(leave_the_other_alone, (free_port(), found), nprocs=2)
    assert found.get() == 1


@pytest.mark.slow
def test_two_processes_refuse_a_missing_folder_in_one_sentence(tmp_path: Path) -> None:
    _, complaint = torchrun(2, "--data-dir", tmp_path / "nowhere", "--outputs", tmp_path, cwd=tmp_path).communicate()
    assert complaint.count("nowhere does not exist") == 1
    assert 'train.py", line' not in complaint, "no traceback of ours"


@pytest.mark.slow
def test_the_first_steps_losses_are_those_of_one_process() -> None:
    """In float64 with the recipe's learning rate; in fp32 with one at which rounding does not grow: with the recipe's
    the last bit of a weight is a hundredth of the loss twenty steps later.

    Batch normalisation over each process's own part is something else: so it is the one over the whole that does it.
    """
    small_steps = SETTINGS.with_settings(lr=1e-4)
    cases = [(SETTINGS, True), (small_steps, False), (SETTINGS.with_settings(batch_norm="local"), True)]
    alone = losses_of_first_steps(cases, ALONE)
    shared = in_processes(2, losses_of_first_steps, cases)
    assert shared[0] == shared[1], "every process knows the loss of the whole batch"
    assert [len(set(losses)) for losses in alone] == [STEPS] * 3
    assert shared[0][0] == pytest.approx(alone[0], rel=1e-10)
    assert shared[0][1] == pytest.approx(alone[1], rel=1e-5)
    assert shared[0][2] != pytest.approx(alone[2], abs=1e-2)


@pytest.mark.slow
def test_uneven_parts_weigh_what_they_are() -> None:
    cases = [(SETTINGS.with_settings(batch_size=50), True)]
    (alone,) = losses_of_first_steps(cases, ALONE)
    assert in_processes(3, losses_of_first_steps, cases)[2][0] == pytest.approx(alone, rel=1e-10)


def batch_and_weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(7, 5, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return [x * 3 + 1, weight]


def normalise_parts(processes: Processes) -> list[list[Any]]:
    """Output, gradients and running statistics of a batch normalisation that sees its part of x."""
    x, weight = batch_and_weights()
    bn = CpuSyncBatchNorm2d(x.shape[1]).to(x.dtype)
    part = processes.part(torch.arange(len(x)))
    mine = x[part].requires_grad_()
    y = bn(mine)
    (y * weight[part]).sum().backward()
    assert mine.grad is not None
    assert bn.weight.grad is not None
    assert bn.bias.grad is not None
    found = (y, mine.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var)
    return [tensor.tolist() for tensor in found if tensor is not None]


@pytest.mark.slow
def test_batch_norm_over_processes_is_torchs_over_the_whole_batch() -> None:
    x, weight = batch_and_weights()
    found = [
        [torch.tensor(values, dtype=torch.float64) for values in of_one] for of_one in in_processes(3, normalise_parts)
    ]
    bn = torch.nn.BatchNorm2d(5).double()
    whole = x.clone().requires_grad_()
    y = bn(whole)
    (y * weight).sum().backward()
    assert whole.grad is not None
    torch.testing.assert_close(torch.cat([f[0] for f in found]), y.detach())
    torch.testing.assert_close(torch.cat([f[1] for f in found]), whole.grad)
    for i, summed in ((2, bn.weight.grad), (3, bn.bias.grad)):
        torch.testing.assert_close(torch.stack([f[i] for f in found]).sum(dim=0), summed)
    for mean, variance in (f[4:] for f in found):
        torch.testing.assert_close(mean, bn.running_mean)
        torch.testing.assert_close(variance, bn.running_var)


def torchrun(count: int, *arguments: Any, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count, "--master-port", free_port()]
    words = [str(word) for word in (*command, PROJECT / "byot" / "train.py", *arguments)]
    return subprocess.Popen(words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


FLAGS = (
    *("--dataset", "digits", "--width", 4, "--epochs", 8, "--device", "cpu", "--precision", "fp32"),
    *("--val-fraction", 0.2, "--lr", 0.001, "--name", "r"),
)


@pytest.mark.slow
def test_a_run_moves_from_two_processes_to_one(tmp_path: Path) -> None:
    """Started by torchrun, interrupted, finished by one process, it ends where one alone would have ended."""
    together = torchrun(2, *FLAGS, "--outputs", tmp_path, cwd=tmp_path)
    folder = tmp_path / "runs" / "r"
    deadline = time.monotonic() + 300
    while len(read_json_lines(folder / "metrics.jsonl")) < 2:
        assert together.poll() is None, together.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    together.send_signal(signal.SIGTERM)
    said, complaint = together.communicate(timeout=300)
    assert together.returncode != 0, said
    assert said.count("starting: resnet18") == 1, "one process prints"
    assert "2 processes" in said
    assert "stopped and saved; go on with" in complaint
    before = [record["train_loss"] for record in read_json_lines(folder / "metrics.jsonl")]
    assert 2 <= len(before) < 8
    config = TrainConfig.from_dict(read_json(folder / "config.json"))
    found, expected = (train_run(config, where) for where in (folder, tmp_path / "alone"))
    assert (found["num_test_images"], found["num_processes"]) == (expected["num_test_images"], 1)
    assert found["test_nll"] == pytest.approx(expected["test_nll"], rel=0.02)
    losses = [
        [record["train_loss"] for record in read_json_lines(f / "metrics.jsonl")] for f in (folder, tmp_path / "alone")
    ]
    assert losses[0][: len(before)] == before
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_a_run_moves_from_one_process_to_two(tmp_path: Path) -> None:
    config = TrainConfig(dataset="digits", width=4, epochs=3, device="cpu", precision="fp32", lr=0.001)
    straight = train_run(config, tmp_path / "alone")
    folder = tmp_path / "runs" / "r"
    epochs = train_saving(open_run(config, folder).trainer, folder)
    next(epochs)
    said, complaint = torchrun(2, "--resume", folder, cwd=tmp_path).communicate(timeout=300)
    assert "going on from" in said, complaint
    found = read_json(folder / "result.json")
    assert found["num_processes"] == 2
    assert found["test_nll"] == pytest.approx(straight["test_nll"], rel=0.02)
    assert [record["epoch"] for record in read_json_lines(folder / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.slow
def test_two_processes_refuse_in_one_sentence(tmp_path: Path) -> None:
    process = torchrun(2, *FLAGS, "--alpha", 2, "--outputs", tmp_path / "o", cwd=tmp_path)
    _, complaint = process.communicate(timeout=300)
    assert process.returncode != 0
    assert complaint.count("alpha must lie between 0 and 1") == 1
    assert 'train.py", line' not in complaint, "no traceback of ours"
    assert not (tmp_path / "o").exists()


def test_a_further_process_leaves_refusing_to_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends only after the first has had time to: torchrun ends them all as soon as one has ended."""
    waited: list[tuple[float, str]] = []
    monkeypatch.setattr("time.sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    monkeypatch.setattr("sys.argv", ["train.py", "--alpha", "2"])
    for rank, waits in (("0", []), ("1", [(train.FIRST_SPEAKS_WITHIN_S, "")])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as refused:
            train.main()
        assert (refused.value.code, waited) == (2, waits)
        assert capsys.readouterr().err == "train.py: alpha must lie between 0 and 1, not 2\n"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_network_takes_batch_norms_of_either_kind(device: str) -> None:
    """torch's own, for GPUs, and ours; in evaluation they need no other process."""
    model = build_model(SETTINGS).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model(images).logits
        synchronise_batch_norms(model, torch.device(device))
        kind = torch.nn.SyncBatchNorm if device == "cuda" else CpuSyncBatchNorm2d
        assert sum(isinstance(m, kind) for m in model.modules()) == 29
        for found, logits in zip(model(images).logits, expected, strict=True):
            torch.testing.assert_close(found, logits)


def test_batches_too_small_to_share_are_refused() -> None:
    check_parts(SETTINGS, 640, Processes(0, 64))
    with pytest.raises(ValueError, match="65 processes cannot share a batch of 64 images"):
        check_parts(SETTINGS, 640, Processes(0, 65))
    with pytest.raises(ValueError, match="3 processes cannot share a batch of 2 images"):
        check_parts(SETTINGS, 642, Processes(0, 3))
    check_parts(SETTINGS, 641, Processes(0, 3))  # the last batch of one image is left out
    with pytest.raises(ValueError, match="33 processes"):
        check_parts(SETTINGS.with_settings(batch_norm="local"), 640, Processes(0, 33))
