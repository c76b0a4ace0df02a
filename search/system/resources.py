"""Shares a machine or cluster among trials and runs, and starts Ray on it."""

import functools
import json
import logging
import math
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from byot.system.files import remove_leftovers, write_text
from byot.trainer import choose_device
from search.system.remote import Store, try_bucket

# Read by Ray when it is imported or started.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # with Ray's 15, any other process on a busy machine would starve the trials
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # what asks for no GPU sees none
    "RAY_gcs_server_port_wait_time_s": "120",  # instead of 30, which a busy machine may take
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # each trial keeps its own metrics.jsonl
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # search/driver.py has one for SIGINT and SIGTERM alike
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # with the default of 2 s reused workers can deadlock
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # Ray's snapshots grow with the trials, and are never read
}


CGROUP = Path("/sys/fs/cgroup")
START_ATTEMPTS = 3
LOOK_TIMEOUT_S = 120  # for a node to start a worker, which imports torch, on a busy machine
TOKEN_ADVICE = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its head"


class RayStartError(RuntimeError):
    """Ray did not start, or no cluster is where one was said to be."""


class ResourceRequest(NamedTuple):
    """What each trial or run asks for; None leaves the choice to `resolve`."""

    cpus: int | None = None
    gpus: float | None = None
    max_concurrent: int | None = None


class Resources(NamedTuple):
    """What each trial or run gets and how many go on at once."""

    max_concurrent: int
    cpus: int
    gpus: float
    num_cpus: int  # of the machine or cluster
    num_gpus: int


def resolve(request: ResourceRequest, num_cpus: int, num_gpus: int, where: str) -> Resources:
    """Give each one GPU where there is one, and one CPU thread, unless it asks for others; as many as have room.

    Raises ValueError if one asks for more than there is.
    """
    cpus = request.cpus or 1
    gpus = round_down(float(min(1, num_gpus)) if request.gpus is None else request.gpus)
    if gpus > num_gpus:
        raise ValueError(f"{gpus:g} GPUs each are asked for, but {where} has {num_gpus}")
    if cpus > num_cpus:
        raise ValueError(f"{cpus} CPU threads each are asked for, but {where} has {num_cpus}")
    room = num_cpus // cpus
    if gpus > 0:
        room = min(room, int(num_gpus / gpus) if gpus >= 1 else num_gpus * int(1 / gpus))
    return Resources(min(request.max_concurrent or room, room), cpus, gpus, num_cpus, num_gpus)


def round_down(gpus: float) -> float:
    """Round a part of a GPU down to what Ray counts in, 1/10,000: of thirds rounded up only two would fit."""
    return max(1, int(gpus * 10_000)) / 10_000 if 0 < gpus < 1 else gpus


def this_machine(device: str) -> tuple[int, int, str]:
    """Count the CPUs that this process may use and, where the device is one, the GPUs, as `resolve` takes them."""
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_cpus = min(num_cpus, cpu_quota(CGROUP))
    return num_cpus, torch.cuda.device_count() if choose_device(device).type == "cuda" else 0, "this machine"


def cpu_quota(cgroup: Path) -> int:
    """Return how many CPUs a container's cgroup allows, rounded up; very many where it sets no limit."""
    with suppress(OSError, ValueError, ZeroDivisionError):  # "max 100000" is no limit
        quota, period = (cgroup / "cpu.max").read_text().split()
        return max(1, math.ceil(int(quota) / int(period)))
    with suppress(OSError, ValueError, ZeroDivisionError):  # version 1; -1 is no limit
        quota_us, period_us = (int((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        if quota_us > 0:
            return max(1, math.ceil(quota_us / period_us))
    return sys.maxsize


def joined_cluster(device: str) -> tuple[int, int, str]:
    """Count the CPUs of the cluster that has been joined and, unless `device` is cpu, its GPUs: see `resolve`."""
    import ray

    found = ray.cluster_resources()
    return int(found.get("CPU", 0)), 0 if device == "cpu" else int(found.get("GPU", 0)), "the cluster"


@contextmanager
def running_ray(resources: Resources | None, address: str | None = None) -> Iterator[None]:
    """Start Ray quietly, or join the cluster at `address`, and shut it down at the end. Raises RayStartError."""
    start_ray(resources, address)
    import ray  # with its settings in the environment

    try:
        yield
    finally:
        ray.shutdown()


def start_ray(resources: Resources | None, address: str | None = None) -> None:
    """Start Ray quietly on this machine, or join the cluster at `address`. Raises RayStartError.

    Tries again where Ray does not come up within its fixed 30 seconds, as on a busy machine it may not.
    """
    if address is not None and "://" in address:
        raise RayStartError(f"{address} is not the address of a cluster's head; from outside use `ray job submit`")
    os.environ.update({name: os.environ.get(name, value) for name, value in RAY_ENVIRONMENT.items()})
    import ray
    from ray.exceptions import AuthenticationError

    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with groups_of_their_own():
                ray.init(
                    address=address or "local",  # without it Ray would join whatever cluster it finds on this machine
                    num_cpus=resources.num_cpus if resources else None,
                    num_gpus=resources.num_gpus if resources else None,
                    include_dashboard=False if address is None else None,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env=None if address is None else environment_of_workers(),
                )
            return
        except (AuthenticationError, ConnectionError) as error:  # a refused token looks as if there were no cluster
            raise RayStartError(
                f"no Ray cluster lets us in at {address}; if one is there, it wants a token: {TOKEN_ADVICE}"
            ) from error
        except Exception as error:  # Ray has no class of its own for a start that timed out
            timed_out = "timed out" in str(error).lower()
            if address is None and not timed_out:
                raise
            # In a cluster also another version of Ray or Python, or a machine that is no node: no defect of ours.
            if not timed_out or attempt == START_ATTEMPTS:
                raise RayStartError(" ".join(str(error).split())) from error


@contextmanager
def groups_of_their_own() -> Iterator[None]:
    """Have Ray start its processes outside of this one's process group.

    `timeout` and batch systems send SIGTERM to the whole group. Ray's processes would end by that at once, and this one
    would wait for them in vain; alone, it stops in order.
    """
    import ray._private.services

    services: Any = ray._private.services
    popen = services.ConsolePopen
    services.ConsolePopen = functools.partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


def environment_of_workers() -> dict[str, Any]:
    """Return Ray's runtime environment for a cluster's workers: this project's code and Ray's settings.

    Nodes need the requirements, not the project: the two packages that trials import travel, whether they lie in a
    checkout or are installed. A working_dir would be the whole checkout but for what one thinks of excluding, and is
    what `ray job submit` sets: Ray refuses a search that sets again what its job has set, so that is left to the job.
    """
    import byot
    import search

    environment: dict[str, Any] = {
        "py_modules": [package.__path__[0] for package in (byot, search)],
        "excludes": ["__pycache__"],  # which Ray leaves out of a working_dir only
    }
    of_job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    environment = {name: value for name, value in environment.items() if name not in of_job}
    variables_of_job = of_job.get("env_vars") or {}
    return environment | {"env_vars": {n: v for n, v in RAY_ENVIRONMENT.items() if n not in variables_of_job}}


# ---------------------------------------------------------------- a cluster's nodes


def nodes_with_room(resources: Resources) -> list[dict[str, Any]]:
    """Return the nodes of the joined cluster on which a trial can run, as Ray describes them."""
    import ray

    asked = {"CPU": resources.cpus, "GPU": resources.gpus}
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [node for node in alive if all(node["Resources"].get(name, 0) >= n for name, n in asked.items())]


def check_nodes(store: Store, resources: Resources) -> None:
    """Raise ValueError unless every node on which a trial can run can write where the search is kept.

    That is its bucket; without one its folder, in which a node must see what the driver has written there. Raises it
    also where a node cannot run the code, or none has room.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes_with_room(resources)}
    if not nodes:
        raise ValueError(
            f"no node of the cluster has the {resources.cpus} CPUs and {resources.gpus:g} GPUs that a trial asks for"
        )
    sign = store.folder / "state" / f".{os.getpid()}.tmp"  # a name of those that are cleared away later
    if store.bucket is None:
        write_text(sign, "")
    place: Any = store.bucket or sign
    look = ray.remote(num_cpus=0, max_retries=0)(try_folder if store.bucket is None else try_bucket)
    try:
        on_node = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(place): node
            for node in nodes
        }
        answers, silent = ray.wait(list(on_node), num_returns=len(on_node), timeout=LOOK_TIMEOUT_S)
        troubles = {on_node[answer]: f"it did not answer within {LOOK_TIMEOUT_S} s" for answer in silent}
        for answer in answers:
            try:
                troubles[on_node[answer]] = ray.get(answer)
            except RayError as error:  # the task could not be run there
                troubles[on_node[answer]] = str(error).strip().splitlines()[-1]
    finally:
        remove_leftovers(sign.parent)
        with suppress(OSError):  # a search that goes on has more in it
            sign.parent.rmdir()
    still_there = {node["NodeID"] for node in nodes_with_room(resources)}  # one that is lost meanwhile is no trouble
    told = [f"{nodes[node]} ({trouble})" for node, trouble in troubles.items() if trouble and node in still_there]
    if told:
        where = store.bucket or f"{store.folder}, which must be a folder that all share"
        raise ValueError(f"{len(told)} of {len(nodes)} nodes cannot work on {where}: {', '.join(told)}")


def try_folder(sign: Path) -> str:
    """Return what is wrong, seen from here, with the folder that holds the driver's sign; nothing if nothing is."""
    if not sign.is_file():
        return "it does not see the folder" if not sign.parent.is_dir() else "it sees another folder of that name"
    try:
        write_text(sign.with_name(f".{socket.gethostname()}-{os.getpid()}.tmp"), "")
    except OSError as error:
        return f"it cannot write there: {error.strerror}"
    return ""


def describe_nodes(resources: Resources) -> dict[str, Any]:
    """Describe the cluster's hardware for a record: how many nodes can run trials, and on what trials are run."""
    nodes = nodes_with_room(resources)
    kinds = {
        name.partition(":")[2] for node in nodes for name in node["Resources"] if name.startswith("accelerator_type:")
    }
    return {"nodes": len(nodes), "device": (", ".join(sorted(kinds)) or "cuda") if resources.gpus else "cpu"}
