"""Lets Ray do work a few pieces at a time, each in its own process, until there is no more or it is asked to stop."""

import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

from byot.runs import StopAsked
from byot.system.flags import tell
from byot.system.stopping import StoppedError
from search.system.resources import RayStartError, Resources

LOOK_UP_S = 0.5  # between two looks at whether to stop
MAX_RETRIES = 2  # of a piece whose worker died; what it does has to go on from a checkpoint of its own

Key = TypeVar("Key")


class Task(NamedTuple, Generic[Key]):
    """The arguments of one call, and the key by which its caller knows it."""

    key: Key
    arguments: tuple[Any, ...]


class Done(NamedTuple, Generic[Key]):
    """How a task ended: what it returned, or why it failed."""

    key: Key
    result: Any
    error: str = ""


def run_tasks(
    function: Callable[..., Any],
    take: Callable[[], Task[Key] | None],
    resources: Resources,
    stop_asked: StopAsked = lambda: 0,
    deadline: float | None = None,
    on_look: Callable[[Collection[Key]], None] = lambda running: None,
) -> Iterator[Done[Key]]:
    """Call the function for each task on a Ray that is started; yields each as it ends; a failed one stops no other.

    `take` gives the next task whenever there is room, and None when there is none for now; the iterator ends when none
    runs and none is given, or at the deadline on the monotonic clock, whatever runs then. Raises StoppedError once
    `stop_asked` says so: an exception out of a signal may be lost within Ray. `on_look` is told of the tasks that run.
    """
    import ray

    remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=MAX_RETRIES)(function)
    running: dict[Any, Key] = {}
    while deadline is None or time.monotonic() < deadline:
        while len(running) < resources.max_concurrent and (task := take()) is not None:
            running[remote.remote(*task.arguments)] = task.key
        if not running:
            return
        on_look(running.values())
        ended, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_UP_S)
        if stop_asked():
            raise StoppedError(stop_asked())
        for reference in ended:
            key = running.pop(reference)
            try:
                yield Done(key, ray.get(reference))
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                reason = str(cause).strip().partition("\n")[0]
                yield Done(key, None, f"{type(cause).__name__}: {reason}")


@contextmanager
def told_if_stopped(program: str, go_on: Callable[[], str]) -> Iterator[None]:
    """Say how to go on where a signal ends what is within, or Ray does not start, and exit with the code for that."""
    try:
        yield
    except (KeyboardInterrupt, StoppedError) as stopped:
        print(f"\nstopped; go on with: {go_on()}", file=sys.stderr)
        number = stopped.signal_number if isinstance(stopped, StoppedError) else signal.SIGINT
        raise SystemExit(128 + number) from None
    except RayStartError as error:
        tell(program, f"Ray did not start ({error}); try again with: {go_on()}")
        raise SystemExit(1) from None
