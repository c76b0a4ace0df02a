"""Starts Ray clusters of several nodes on one machine."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from search.system.resources import RAY_ENVIRONMENT

ATTEMPTS = 3


@contextmanager
def running_cluster(num_nodes: int, **variables: str) -> Iterator[Cluster]:
    """Run a head that runs no trials, and this many nodes with room for one trial each."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (RAY_ENVIRONMENT | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables).items():
            patch.setenv(name, value)
        cluster = _start(Cluster, initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(num_nodes):
            add_node(cluster)
        yield cluster
        cluster.shutdown()


def add_node(cluster: Cluster, **settings: Any) -> None:
    _start(cluster.add_node, num_cpus=1, **settings)


def _start(start: Callable[..., Any], **settings: Any) -> Any:
    """Start a node, again where it does not come up within Ray's fixed 30 seconds."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return start(**settings)
        except Exception as error:  # Ray has no class of its own for a start that timed out
            if "timed out" not in str(error).lower() or attempt == ATTEMPTS:
                raise
    raise AssertionError


def hiding(folder: Path) -> list[str]:
    """Return what is typed before a command so that nobody else sees what it writes into the folder."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("a process can have no mounts of its own here")
    return ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(folder)]
