"""Starts Ray clusters of several nodes on one machine."""

from collections.abc import Callable
from typing import Any

from ray.cluster_utils import Cluster

ATTEMPTS = 3


def start_cluster(num_nodes: int) -> Cluster:
    """Start a head that runs no trials, and this many nodes with room for one trial each."""
    cluster = _start(Cluster, initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(num_nodes):
        add_node(cluster)
    return cluster


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
