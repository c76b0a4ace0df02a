"""Gives all benchmarks the same flags, worker processes, records, means and tables."""

import argparse
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import starmap
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import mean, stdev
from threading import Thread
from typing import Any, TypeVar

from byot.system.files import write_json
from byot.system.paths import absolute_path, check_writable_file

Result = TypeVar("Result")

# ---------------------------------------------------------------- flags


def checked(convert: Callable[[str], Result]) -> Callable[[str], Result]:
    """Let argparse print the sentence of the ValueError with which a value is refused."""

    def convert_or_refuse(text: str) -> Result:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert_or_refuse


def number(least: int, most: int = 1_000_000) -> Callable[[str], int]:
    """Make the type of a flag that takes a whole number within bounds."""

    def convert(text: str) -> int:
        if not text.lstrip("-").isdigit() or not least <= int(text) <= most:
            raise ValueError(f"must be a whole number from {least} to {most}, not {text}")
        return int(text)

    return checked(convert)


def _picture_file(text: str) -> Path:
    if Path(text).suffix not in (".png", ".svg"):
        raise ValueError(f"must end in .png or .svg, unlike {text}")
    return check_writable_file(text)


path, file_to_write, picture = checked(absolute_path), checked(check_writable_file), checked(_picture_file)
data_dir = checked(lambda text: str(absolute_path(text)))  # as a TrainConfig has it
num_workers = number(1, os.cpu_count() or 1)


# ---------------------------------------------------------------- processes


def make_pool(processes: int) -> ProcessPoolExecutor:
    """Start fresh interpreters, each of which ends when the program does, however that ends."""
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_watch_program)


def _watch_program() -> None:
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _end_with(program: BaseProcess) -> None:
    program.join()
    os.kill(os.getpid(), signal.SIGKILL)


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    with make_pool(1) as pool:
        return pool.submit(function, *arguments).result()


def run_all(function: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], processes: int) -> Iterator[Result]:
    """Call the function with the arguments of each job, several at once, and yield what it returns as it comes."""
    if processes == 1:
        yield from starmap(function, jobs)
        return
    with make_pool(processes) as pool:
        try:
            for future in as_completed([pool.submit(function, *job) for job in jobs]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- records, means and tables


def save_record(path: Path | None, record: dict[str, Any], device: str = "cpu") -> None:
    """Write a record, with where it comes from, if a file is asked for."""
    if path is not None:
        import torch

        from byot.system.provenance import provenance

        write_json(path, {**record, **provenance(torch.device(device))})


def format_difference(
    values: Sequence[float], others: Sequence[float], *, digits: int = 2, bold: bool = False, num_compared: int = 1
) -> str:
    """Write the mean of paired differences, ± half of its 95 % interval where there are two pairs or more.

    With `bold` it is set in bold where it is resolved: the interval does not hold 0. It has a star where that is so
    also of the interval that holds together with all of `num_compared` (Bonferroni).
    """
    from search.significance import ERROR, compare  # imports scipy

    if len(values) < 2:
        return f"{values[0] - others[0]:+.{digits}f}"
    found = compare("", "", values, others)
    text = f"{found.difference:+.{digits}f} ± {found.half_width():.{digits}f}"
    if not bold or abs(found.difference) <= found.half_width():
        return text
    holds_with_all = num_compared > 1 and abs(found.difference) > found.half_width(ERROR / num_compared)
    return f"**{text}**{'*' * holds_with_all}"


def mean_and_sd(values: Sequence[float], digits: int = 2) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))
