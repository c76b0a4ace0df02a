"""A search on a cluster: its nodes are given the code, all of them work, and one without the folder is named."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from search.cluster import (
    RAY_ENVIRONMENT,
)
from tests.faults.searches import Search
from tests.helpers import PROJECT, command_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_NODES = 3
TOKEN = "f" * 64
# Added to the code that is sent, and to no other: what imports it says where it runs and where it lies.
WITNESS = """
import os as _os, ray as _ray
if _ray.is_initialized() and _ray.get_runtime_context().worker.mode == _ray.WORKER_MODE:
    _node = _ray.get_runtime_context().get_node_id()
    open(f"{seen}/{_node}-{_os.getpid()}", "w").write(__file__)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs no trials, and three nodes with room for one each."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (RAY_ENVIRONMENT | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}).items():
            patch.setenv(name, os.environ.get(name, value))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(NUM_NODES):
            made.add_node(num_cpus=1)
        yield made
        made.shutdown()


def test_three_nodes_run_code_that_they_do_not_have(tmp_path: Path, cluster: Any) -> None:
    project, seen = tmp_path / "project", tmp_path / "seen"
    for package in ("byot", "search"):
        shutil.copytree(PROJECT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    seen.mkdir()
    with open(project / "search" / "trial.py", "a") as file:
        file.write(WITNESS.replace("{seen}", str(seen)))
    search = Search(tmp_path / "outputs", "--address", cluster.address)
    done = subprocess.run(
        [sys.executable, str(project / "search" / "tune.py"), *map(str, search.flags)],
        cwd=search.outputs,
        env=command_environment(PYTHONPATH=str(project)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    search.check_whole()
    witnesses = {path.name.split("-")[0]: Path(path.read_text()) for path in seen.iterdir()}
    assert set(witnesses) == {node.node_id for node in cluster.worker_nodes}
    assert all("py_modules_files" in place.parts for place in witnesses.values()), witnesses
