"""Several processes train as one does: the same losses, the same weights, checkpoints that move between them."""

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing

from byot import train, trainer
from byot.batches import augment
from byot.config import TrainConfig
from byot.data import LabelledImages
from byot.runs import open_run, train_run, train_saving
from byot.system.distributed import ALONE, CpuSyncBatchNorm2d, Processes, joined_processes, synchronise_batch_norms
from byot.system.files import read_json, read_json_lines
from byot.system.stopping import StoppedError
from byot.trainer import Trainer, build_model, check_shards
from tests.helpers import PROJECT, random_pixels

SETTINGS = TrainConfig(recipe="reference", width=4, epochs=3, batch_size=64, lr=0.1, device="cpu", precision="fp32")
STEPS = 20

# ---------------------------------------------------------------- processes of our own


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def as_process(rank: int, count: int, port: int, work: Any, arguments: tuple[Any, ...], found: Any) -> None:
    """Take a place among the processes as torchrun would give it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with joined_processes() as processes:
        result = work(*arguments, processes)
        during = num_worker_threads()
        gc.collect()
    give_up_at = time.monotonic() + 10  # Linux may list a thread for a moment after it was joined
    while (after := num_worker_threads()) and time.monotonic() < give_up_at:
        time.sleep(0.1)
    found.put((rank, result, (during, after)))


def num_worker_threads() -> int:
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has ended
            names.append(path.read_text())
    return sum("gloo_runloop" in name for name in names)


def in_processes(count: int, work: Any, *arguments: Any) -> list[Any]:
    """What `work(*arguments, processes)` returns, as plain data, in each of several processes.

    No thread of theirs outlives the group: one that holds a tensor when the interpreter ends aborts the process.
    """
    found = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(as_process, (count, free_port(), work, arguments, found), nprocs=count)
    results = sorted(found.get() for _ in range(count))
    if Path("/proc/self/task").is_dir():  # where Linux lists them
        assert all(during > 0 and after == 0 for _, _, (during, after) in results)
    return [result for _, result, _ in results]


def losses_of_first_steps(cases: list[tuple[TrainConfig, bool]], processes: Processes) -> list[list[float]]:
    """For each configuration, in float64 or not, the mean loss over the epoch so far, after each of the first steps."""
    return [_losses(config, in_float64, processes) for config, in_float64 in cases]


def _losses(config: TrainConfig, in_float64: bool, processes: Processes) -> list[float]:
    trained = Trainer(config, LabelledImages(random_pixels(700), np.arange(700) % 100), processes=processes)
    losses: list[float] = []

    def on_batch(done: int, images: int) -> None:
        losses.append(trained._sums.read_loss())
        if len(losses) == STEPS:
            raise StoppedError(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        if in_float64:
            trained.model.double()
            patch.setattr(trainer, "augment", lambda *given: augment(*given).double())
        with pytest.raises(StoppedError):
            list(trained.epochs(on_batch))
    return losses


@pytest.mark.slow
def test_the_first_steps_losses_are_those_of_one_process() -> None:
    """In float64 with the recipe's learning rate; in fp32 with one at which rounding does not grow: with the recipe's
    the last bit of a weight is a hundredth of the loss twenty steps later.

    Batch normalisation over each process's own shard is something else: so it is the one over the whole that does it.
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
def test_uneven_shards_weigh_what_they_are() -> None:
    cases = [(SETTINGS.with_settings(batch_size=50), True)]
    (alone,) = losses_of_first_steps(cases, ALONE)
    assert in_processes(3, losses_of_first_steps, cases)[2][0] == pytest.approx(alone, rel=1e-10)


def normalise(kind: type[torch.nn.BatchNorm2d], processes: Processes) -> list[np.ndarray]:
    """Output, gradients and running statistics of a batch normalisation that sees its shard of a batch."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(7, 5, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    bn = kind(5).double()
    mine = processes.shard(x * 3 + 1).requires_grad_()
    y = bn(mine)
    (y * processes.shard(weight)).sum().backward()
    tensors = (y, mine.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var)
    return [tensor.detach().numpy() for tensor in tensors if tensor is not None]


@pytest.mark.slow
def test_batch_norm_over_processes_is_torchs_over_the_whole_batch() -> None:
    expected = normalise(torch.nn.BatchNorm2d, ALONE)
    found = list(zip(*in_processes(3, normalise, CpuSyncBatchNorm2d), strict=True))
    # output and dx are in shards, the gradients of weight and bias in summands
    whole: list[Any] = [*map(np.concatenate, found[:2]), *map(sum, found[2:4])]
    for array, right in zip(whole, expected[:4], strict=True):
        np.testing.assert_allclose(array, right, rtol=1e-7, atol=1e-7)
    for statistic, right in zip(found[4:], expected[4:], strict=True):
        np.testing.assert_allclose(statistic, [right] * 3, rtol=1e-7, atol=1e-7)


def leave_the_others_alone(exchange: str, processes: Processes) -> None:
    processes.barrier()
    if processes.is_first:
        os._exit(0)
    getattr(processes, exchange)(torch.ones(3))


def fail(processes: Processes) -> None:
    if not processes.is_first:
        raise RuntimeError("a defect")


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["broadcast", "all_reduce_sum"])
def test_a_process_whose_first_is_gone_ends_without_a_word(exchange: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(multiprocessing.ProcessExitedException) as ended:
        in_processes(2, leave_the_others_alone, exchange)
    assert (ended.value.error_index, ended.value.exit_code) == (1, 1)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_process_with_a_defect_tells_it() -> None:
    with pytest.raises(multiprocessing.ProcessRaisedException, match="a defect"):
        in_processes(2, fail)


# ---------------------------------------------------------------- torchrun


def torchrun(count: int, *arguments: Any, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count, "--master-port", free_port()]
    words = [str(word) for word in (*command, PROJECT / "byot" / "train.py", *arguments)]
    return subprocess.Popen(words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def losses_in(folder: Path) -> list[float]:
    return [record["train_loss"] for record in read_json_lines(folder / "metrics.jsonl")]


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
    while len(losses_in(folder)) < 2:
        assert together.poll() is None, together.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    together.send_signal(signal.SIGTERM)
    said, complaint = together.communicate(timeout=300)
    assert together.returncode != 0, said
    assert said.count("starting: resnet18") == 1, "one process prints"
    assert "2 processes" in said
    assert "stopped and saved; go on with" in complaint
    before = losses_in(folder)
    assert 2 <= len(before) < 8
    config = TrainConfig.from_dict(read_json(folder / "config.json"))
    found, expected = (train_run(config, where) for where in (folder, tmp_path / "alone"))
    assert (found["num_test_images"], found["num_processes"]) == (expected["num_test_images"], 1)
    assert found["test_nll"] == pytest.approx(expected["test_nll"], rel=0.02)
    assert losses_in(folder)[: len(before)] == before
    assert losses_in(folder) == pytest.approx(losses_in(tmp_path / "alone"), rel=1e-3)


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
    assert len(losses_in(folder)) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [(("--alpha", 2), "alpha must lie between 0 and 1"), (("--data-dir", "nowhere"), "nowhere does not exist")],
)
def test_two_processes_refuse_in_one_sentence(tmp_path: Path, flags: tuple[Any, ...], words: str) -> None:
    process = torchrun(2, "--name", "r", *flags, "--outputs", tmp_path / "o", cwd=tmp_path)
    _, complaint = process.communicate(timeout=300)
    assert process.returncode != 0
    assert complaint.count(words) == 1
    assert 'train.py", line' not in complaint, "no traceback of ours"
    assert not (tmp_path / "o" / "runs" / "r" / "config.json").exists()


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
    check_shards(SETTINGS, 640, Processes(0, 64))
    with pytest.raises(ValueError, match="65 processes cannot share a batch of 64 images"):
        check_shards(SETTINGS, 640, Processes(0, 65))
    with pytest.raises(ValueError, match="3 processes cannot share a batch of 2 images"):
        check_shards(SETTINGS, 642, Processes(0, 3))
    check_shards(SETTINGS, 641, Processes(0, 3))  # the last batch of one image is left out
    with pytest.raises(ValueError, match="33 processes"):
        check_shards(SETTINGS.with_settings(batch_norm="local"), 640, Processes(0, 33))
