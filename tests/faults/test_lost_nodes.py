"""A search on a cluster outlives its nodes: the trial on a lost one goes on from its checkpoint elsewhere."""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search.system.resources import RAY_ENVIRONMENT
from tests.faults.conftest import LONG
from tests.faults.nodes import add_node, start_cluster
from tests.faults.searches import Search
from tests.faults.tally import TALLY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NODE_KILLS = 5 if LONG else 1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that runs no trials, and two nodes with room for one each."""
    for name, value in (RAY_ENVIRONMENT | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}).items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    made = start_cluster(2)
    yield made
    made.shutdown()


def test_lost_nodes(tmp_path: Path, cluster: Any, moments: random.Random) -> None:
    search = Search(tmp_path / "outputs", "--address", cluster.address)
    process = search.start()
    with TALLY.attempt("kill -9 of a node of two", NODE_KILLS):
        for _ in range(NODE_KILLS):
            search.wait_for_work(process)
            time.sleep(moments.uniform(0, 1))
            assert process.poll() is None, (search.outputs / "driver.log").read_text()
            cluster.remove_node(moments.choice(sorted(cluster.worker_nodes, key=id)), allow_graceful=False)
            add_node(cluster)
        assert process.wait(timeout=600) == 0, (search.outputs / "driver.log").read_text()
        search.check_whole()
