"""Searches on a cluster: its nodes are given the code, all of them work, and a lost one costs nothing."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from byot.config import TrainConfig
from search.system.remote import Store
from search.system.resources import RAY_ENVIRONMENT, environment_of_workers, try_folder
from search.trial import UNWRITABLE, TrialSetup, run_trial
from tests.faults.conftest import LONG, TALLY
from tests.faults.searches import Search, add_node, hiding, running_cluster
from tests.helpers import PROJECT, assert_one_sentence, run_command

slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(1800)

NUM_NODES = 2
NODE_KILLS = 5 if LONG else 1
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # where `ray job submit` tells a driver its runtime environment
# Added to the code that is sent, and to no other: what imports it says where it runs and where it lies.
WITNESS = """
import os as _os, ray as _ray
if _ray.is_initialized() and _ray.get_runtime_context().worker.mode == _ray.WORKER_MODE:
    _node = _ray.get_runtime_context().get_node_id()
    open(f"{seen}/{_node}-{_os.getpid()}", "w").write(__file__)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs no trials, and two nodes with room for one each."""
    with running_cluster(NUM_NODES) as made:
        yield made


@slow
def test_all_nodes_run_code_that_they_do_not_have(tmp_path, cluster):
    project, seen = tmp_path / "project", tmp_path / "seen"
    for package in ("byot", "search"):
        shutil.copytree(PROJECT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    seen.mkdir()
    with open(project / "search" / "trial.py", "a") as file:
        file.write(WITNESS.replace("{seen}", str(seen)))
    search = Search(tmp_path / "outputs", "--address", cluster.address)
    script = str(project / "search" / "tune.py")
    run_command(search.flags, cwd=search.outputs, script=script, PYTHONPATH=str(project))
    search.check_whole()
    witnesses = {path.name.split("-")[0]: Path(path.read_text()) for path in seen.iterdir()}
    assert set(witnesses) == {node.node_id for node in cluster.worker_nodes}
    assert all("py_modules_files" in place.parts for place in witnesses.values()), witnesses


@slow
def test_a_folder_of_the_driver_alone(tmp_path, cluster):
    """As part of a job that has set what the search would set too."""
    search = Search(tmp_path / "outputs", "--address", cluster.address)
    job = {JOB_CONFIG: json.dumps({"runtime_env": {"env_vars": RAY_ENVIRONMENT}, "metadata": {}})}
    hidden = hiding(search.outputs)
    done = run_command(search.flags, cwd=tmp_path, script="search/tune.py", before=hidden, code=2, **job)
    address = cluster.address.partition(":")[0]
    named = f"{NUM_NODES} of {NUM_NODES} nodes cannot work on {search.folder}"
    assert_one_sentence(done.stderr, named, f"{address} (it does not see the folder)")


@slow
def test_lost_nodes(tmp_path, cluster, moments):
    """The trial on a lost node goes on from its checkpoint elsewhere."""
    search = Search(tmp_path / "outputs", "--address", cluster.address)
    process = search.start()
    with TALLY.attempt("kill -9 of a node of two", NODE_KILLS):
        for _ in range(NODE_KILLS):
            search.wait_for_work(process)
            time.sleep(moments.uniform(0, 1))
            assert process.poll() is None, search.log()
            cluster.remove_node(moments.choice(sorted(cluster.worker_nodes, key=id)), allow_graceful=False)
            add_node(cluster)
        assert process.wait(timeout=600) == 0, search.log()
        search.check_whole()


def test_what_a_node_says_of_a_folder(tmp_path):
    sign = tmp_path / "state" / ".1.tmp"
    assert try_folder(sign) == "it does not see the folder"
    sign.parent.mkdir()
    assert try_folder(sign) == "it sees another folder of that name"
    sign.touch()
    assert try_folder(sign) == ""


def test_a_trial_makes_no_folder_where_its_own_is_not_seen(tmp_path, monkeypatch):
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr("search.trial.tune.report", reports.append)
    setup = TrialSetup(TrainConfig(dataset="digits"), Store(tmp_path), "val_accuracy", threads=1, timed=None)
    no_images: Any = None
    run_trial({"trial_id": "t0000", "params": {}}, setup=setup, train=no_images, val=no_images)
    (report,) = reports
    assert str(tmp_path / "trials" / "t0000") in report[UNWRITABLE]
    assert "does not see it" in report[UNWRITABLE]
    assert not list(tmp_path.iterdir())


def test_a_job_has_the_first_word_on_its_environment(monkeypatch):
    monkeypatch.delenv(JOB_CONFIG, raising=False)
    alone = environment_of_workers()
    assert [Path(module).name for module in alone["py_modules"]] == ["byot", "search"]
    assert alone["env_vars"] == RAY_ENVIRONMENT
    name = next(iter(RAY_ENVIRONMENT))
    of_job = {"working_dir": "gcs://_ray_pkg_0.zip", "py_modules": [], "env_vars": {name: "x", "OTHER": "y"}}
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"runtime_env": of_job}))
    with_job = environment_of_workers()
    assert not set(with_job) & {"working_dir", "py_modules"}
    assert set(with_job["env_vars"]) == set(RAY_ENVIRONMENT) - {name}


@slow
@pytest.mark.parametrize(
    ("address", "word"), [("10.0.0.1:6379", "RAY_AUTH_TOKEN"), ("ray://10.0.0.1:10001", "ray job submit")]
)
def test_no_token_for_a_cluster_is_one_sentence(tmp_path, address, word):
    flags = ["--dataset", "digits", "--outputs", tmp_path, "--address", address]
    variables = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    done = run_command(flags, cwd=tmp_path, script="search/tune.py", code=1, **variables)
    assert_one_sentence(done.stderr, "Ray did not start", word)
