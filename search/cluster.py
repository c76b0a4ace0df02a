"""The machine or cluster on which trials and runs are done: how it is shared among them, and Ray started on it."""

import logging
import os
from typing import NamedTuple

import torch

from byot.trainer import choose_device

# Read by Ray when it is imported or started.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # with Ray's 15, any other process on a busy machine would starve the trials
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # each trial keeps its own metrics.jsonl
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # search/driver.py has one for SIGINT and SIGTERM alike
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # with the default of 2 s reused workers can deadlock
}


START_ATTEMPTS = 3


class RayStartError(RuntimeError):
    """Ray did not start, or no cluster is where one was said to be."""


class Share(NamedTuple):
    """What each trial or run asks for; None leaves the choice to `share`."""

    cpus: int | None = None
    gpus: float | None = None
    max_concurrent: int | None = None


class Slots(NamedTuple):
    """What each trial or run gets and how many go on at once."""

    max_concurrent: int
    cpus: int
    gpus: float
    num_cpus: int  # of the machine or cluster
    num_gpus: int


def share(asked: Share, num_cpus: int, num_gpus: int, where: str) -> Slots:
    """One GPU each where there is one, one CPU thread each, as many at once as have room.

    Raises ValueError if one asks for more than there is.
    """
    cpus = asked.cpus or 1
    gpus = asked.gpus if asked.gpus is not None else float(min(1, num_gpus))
    if gpus > num_gpus:
        raise ValueError(f"{gpus:g} GPUs each are asked for, but {where} has {num_gpus}")
    if cpus > num_cpus:
        raise ValueError(f"{cpus} CPU threads each are asked for, but {where} has {num_cpus}")
    room = num_cpus // cpus
    if gpus > 0:
        room = min(room, int(num_gpus / gpus) if gpus >= 1 else num_gpus * int(1 / gpus))
    return Slots(min(asked.max_concurrent or room, room), cpus, gpus, num_cpus, num_gpus)


def share_machine(asked: Share, device: str) -> Slots:
    """Share this machine. Raises ValueError for more than it has, or for a device it lacks."""
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_gpus = torch.cuda.device_count() if choose_device(device).type == "cuda" else 0
    return share(asked, num_cpus, num_gpus, "this machine")


def start_ray(slots: Slots | None, address: str | None = None) -> None:
    """Start Ray quietly on this machine, or join the cluster at `address`.

    Tries again where Ray does not come up within its fixed 30 seconds, as on a busy machine it may not. Raises
    RayStartError when it does not at all.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in RAY_ENVIRONMENT.items()})
    import ray

    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                address=address or "local",  # without it Ray would join whatever cluster it finds on this machine
                num_cpus=slots.num_cpus if slots else None,
                num_gpus=slots.num_gpus if slots else None,
                include_dashboard=False if address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=None if address is None else {"env_vars": RAY_ENVIRONMENT},
            )
            return
        except ConnectionError as error:
            raise RayStartError(f"no Ray cluster answers at {address}") from error
        except Exception as error:  # Ray has no class of its own for a start that timed out
            if "timed out" not in str(error):
                raise
            if attempt == START_ATTEMPTS:
                raise RayStartError(str(error)) from error
