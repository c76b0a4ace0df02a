"""The plans behind the tables: what is run, what is kept of it, and what is made of the records."""

import shutil
import statistics
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from benchmarks.harder_images import TrainingImages, make_harder, write_harder
from benchmarks.plans import (
    RESULTS,
    TABLE_PLANS,
    PlannedRun,
    TablePlan,
    arms_of,
    planned_runs,
    read_record,
    searched_settings,
)
from benchmarks.readme_tables import plan_section
from benchmarks.tables import check_precision, keep_record
from byot.config import TrainConfig
from byot.data import load_images
from byot.system.files import read_json, write_json, write_text
from byot.system.paths import PROJECT_ROOT
from byot.trainer import choose_autocast_dtype
from search.system.tasks import Done
from tests.helpers import few_digits, picture_of, run_command

TABLES = "benchmarks/tables.py"
SMALL = TrainConfig(recipe="reference", dataset="digits", width=4, epochs=2, device="cpu")
NOWHERE = Path("nowhere")


def write_search(folder: Path, *, is_over: bool = True, **weights: float) -> None:
    """Write a search that chose these weights; one of its trials may still run."""
    shutil.copytree(RESULTS / "searches" / "search-tiny", folder, dirs_exist_ok=True)
    write_json(folder / "best.json", {"config": SMALL.with_settings(**weights).to_dict()})
    if not is_over:
        write_text(folder / "trials.csv", (folder / "trials.csv").read_text().replace(",stopped,", ",running,", 1))


# ---------------------------------------------------------------- what is run
def test_the_arms_differ_in_the_loss_alone():
    arms = arms_of(TablePlan(SMALL, search="none"), NOWHERE)
    assert list(arms) == ["plain", "deep-supervision", "reference"]
    reference = arms["reference"]
    assert (reference.alpha, reference.temperature, reference.beta) == (0.1, 3.0, 1e-6)
    assert reference.differing_settings(arms["deep-supervision"]) == {"alpha": (0.1, 0.0), "beta": (1e-6, 0.0)}
    assert set(reference.differing_settings(arms["plain"])) == {"alpha", "beta", "loss_form"}
    assert all(config.val_fraction == 0 for config in arms.values()), "all training images"


def test_a_plan_has_the_arms_that_it_names_and_each_with_one_seed_before_any_has_two():
    plan = TablePlan(SMALL, arms=("reference", "bf16"), num_seeds=2)
    arms = arms_of(plan, NOWHERE)
    assert arms["reference"].differing_settings(arms["bf16"]) == {"precision": ("auto", "bf16")}
    names = [run.name for run in planned_runs("x", plan, NOWHERE)]
    assert names == ["x-reference-s0", "x-bf16-s0", "x-reference-s1", "x-bf16-s1"]
    plan = TablePlan(SMALL, arms=("reference",), side_arms=("no-hint",), num_seeds=3)
    names = [run.name for run in planned_runs("x", plan, NOWHERE)]
    assert names == [*(f"x-reference-s{seed}" for seed in range(3)), "x-no-hint-s0", "x-no-hint-s1"]


def test_the_searched_arm_is_what_the_search_chose_unless_that_is_another_arm(tmp_path):
    plan, folder = TablePlan(SMALL, search="found"), tmp_path / "searches" / "found"
    write_search(folder, alpha=0.3, temperature=5.0, beta=1e-5, epochs=7)
    assert arms_of(plan, tmp_path)["searched"] == SMALL.with_settings(alpha=0.3, temperature=5.0, beta=1e-5)
    write_search(folder, alpha=0.1, temperature=3.0, beta=1e-6)
    assert "searched" not in arms_of(plan, tmp_path)
    write_search(folder, is_over=False, alpha=0.3)
    assert "searched" not in arms_of(plan, tmp_path), "another may be chosen yet"


def test_fewer_images_of_each_class_and_wrong_labels():
    digits = few_digits(1000)
    few = make_harder(digits, TrainingImages(share=0.3), 10)
    counts = np.bincount(digits.labels)
    assert np.bincount(few.labels).tolist() == [round(0.3 * count) for count in counts]
    noisy = make_harder(digits, TrainingImages(wrong=0.2), 10)
    wrong = np.flatnonzero(noisy.labels != digits.labels)
    assert np.bincount(digits.labels[wrong]).tolist() == [round(0.2 * count) for count in counts]
    assert set(noisy.labels) == set(range(10))
    assert noisy.images is digits.images
    again = make_harder(digits, TrainingImages(wrong=0.2), 10)
    assert again.labels.tolist() == noisy.labels.tolist(), "the same for every run"


def test_a_full_disk_is_told_in_one_sentence_where_harder_images_are_written(parquet_folder, monkeypatch):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("byot.system.files.write_whole", Mock(side_effect=full))
    with pytest.raises(ValueError, match=r"wrong-50 cannot be read or written \(No space left on device\)"):
        write_harder("cifar100", str(parquet_folder()), TrainingImages(wrong=0.5))


def test_harder_images_are_a_data_set_that_every_program_reads(parquet_folder):
    folder = str(parquet_folder())
    harder = write_harder("cifar100", folder, TrainingImages(wrong=1.0))
    for split in ("train", "test"):
        before, after = (load_images("cifar100", where, split) for where in (folder, harder))
        assert np.array_equal(before.images, after.images)
        assert np.array_equal(before.labels, after.labels) == (split == "test")
    assert not (
        load_images("cifar100", folder, "train").labels == load_images("cifar100", harder, "train").labels
    ).any()


def test_a_plan_does_not_mix_precisions(tmp_path):
    run = PlannedRun("run", "reference", SMALL)
    here, elsewhere = (
        ("fp32", "bf16") if choose_autocast_dtype("auto", torch.device("cpu")) is None else ("bf16", "fp32")
    )
    check_precision([run], tmp_path)
    write_json(tmp_path / "runs" / "run.json", {"config": SMALL.to_dict(), "precision": here})
    check_precision([run], tmp_path)
    write_json(tmp_path / "runs" / "run.json", {"config": SMALL.to_dict(), "precision": elsewhere})
    with pytest.raises(ValueError, match="runs that are compared must not differ in that"):
        check_precision([run], tmp_path)


# ---------------------------------------------------------------- what is kept
def test_what_is_finished_or_diverged_is_recorded_and_not_run_again(tmp_path):
    good, bad = (PlannedRun(name, "reference", SMALL) for name in ("good", "bad"))
    result = {"config": SMALL.with_settings(data_dir="/here").to_dict(), "test_accuracy": 1.5, "elapsed_s": 2.0}
    assert keep_record("plan", Done(good, result), tmp_path) == (True, "test accuracy 1.50 %, 2 s")
    kept = read_record(tmp_path, good)
    assert kept is not None
    assert (kept["plan"], kept["arm"], kept["config"]["data_dir"]) == ("plan", "reference", None)
    assert not keep_record("plan", Done(bad, None, "OutOfMemoryError: no room"), tmp_path)[0]
    assert read_record(tmp_path, bad) is None
    assert keep_record("plan", Done(bad, None, "DivergedError: the loss became nan"), tmp_path)[0]
    diverged = read_record(tmp_path, bad)
    assert diverged is not None
    assert "the loss became" in diverged["error"]
    (tmp_path / "file").write_text("")
    assert not keep_record("plan", Done(good, result), tmp_path / "file")[0], "nothing can be written there"
    changed = good._replace(config=SMALL.with_settings(lr=0.2))
    with pytest.raises(ValueError, match="other settings \\(lr\\)"):
        read_record(tmp_path, changed)


@pytest.mark.slow
def test_a_plan_from_the_command_line(tmp_path):
    """Stopped at once, it goes on; finished, it does nothing more; a record is enough, without its run."""
    command = ["tiny", "--toy", "--seeds", 1, "--outputs", tmp_path]
    records = tmp_path / "toy" / "results" / "runs"
    before = picture_of(PROJECT_ROOT / "results")
    stopped = run_command([*command, "--minutes", 0.001], cwd=tmp_path, script=TABLES)
    assert "0 of 3 runs are finished" in stopped.stdout
    assert "go on with:" in stopped.stdout
    finished = run_command(command, cwd=tmp_path, script=TABLES)
    assert "3 of 3 runs are finished" in finished.stdout
    names = ["tiny-deep-supervision-s0", "tiny-plain-s0", "tiny-reference-s0"]
    assert sorted(path.stem for path in records.iterdir()) == names
    record = read_json(records / "tiny-plain-s0.json")
    assert (record["plan"], record["arm"], record["config"]["loss_form"]) == ("tiny", "plain", "plain")
    assert {"commit", "versions", "hardware", "elapsed_s", "test_ece"} <= set(record)
    shutil.rmtree(tmp_path / "toy" / "runs")
    again = run_command(command, cwd=tmp_path, script=TABLES)
    assert "3 finished before" in again.stdout
    assert not (tmp_path / "toy" / "runs").exists()
    assert picture_of(PROJECT_ROOT / "results") == before


@pytest.mark.slow
def test_a_search_and_the_arm_that_it_chooses(tmp_path):
    command = ["search-r18", "--toy", "--outputs", tmp_path]
    run_command(command, cwd=tmp_path, script=TABLES)
    kept = tmp_path / "toy" / "results" / "searches"
    assert {path.name for path in (kept / "search-r18").iterdir()} == {"search.json", "trials.csv", "best.json"}
    assert "is finished already" in run_command(command, cwd=tmp_path, script=TABLES).stdout
    chosen = read_json(kept / "search-r18" / "best.json")["params"]
    plan = TABLE_PLANS["reference-r18"]
    assert searched_settings(plan.search, NOWHERE, kept) == chosen, "its records alone are enough"
    arms = arms_of(plan, NOWHERE, kept.parent)
    assert arms.get("searched", arms["reference"]) == plan.base.with_settings(**chosen)


# ---------------------------------------------------------------- tables from records
def write_runs(results: Path, **accuracies: list[float]) -> None:
    for run in planned_runs("tiny", TABLE_PLANS["tiny"], NOWHERE, NOWHERE):
        values = accuracies[run.arm.replace("-", "_")]
        if run.config.seed < len(values):
            value = values[run.config.seed]
            record: dict[str, Any] = {"config": run.config.to_dict(), "elapsed_s": 100.0, "commit": "0123456789"}
            record |= {f"test_accuracy_{i}": value - 4 + i for i in range(1, 5)} | {"test_accuracy_ensemble": value + 1}
            record |= {"versions": {"python": "3.11.7", "torch": "2.15.0"}}
            record |= {"hardware": {"device": "cpu", "cpu": "AMD EPYC", "threads": 1}}
            write_json(results / "runs" / f"{run.name}.json", record)


def test_a_table_from_records(tmp_path):
    """Means, standard deviations, and what is bold because it is resolved."""
    assert plan_section("tiny", TABLE_PLANS["tiny"], tmp_path) == "", "no record, no table"
    write_runs(tmp_path, plain=[30.0, 31.0], deep_supervision=[30.0, 31.0, 32.5], reference=[32.1, 33.0, 34.6])
    lines = plan_section("tiny", TABLE_PLANS["tiny"], tmp_path).splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines if "|" in line}
    sd = statistics.stdev([30.0, 31.0, 32.5])
    means = [f"{31.1666 + i - 4:.2f} ± {sd:.2f}" for i in range(1, 6)]
    assert cells["deep supervision alone"] == ["3", *means]
    assert cells["plain cross-entropy (an ordinary ResNet)"] == ["2", *"–––", "30.50 ± 0.71", "–"]  # noqa: RUF001
    (difference,) = set(cells["self distillation, the reference's setting minus deep supervision alone"][1:])
    assert difference == "**+2.07 ± 0.14***", "the star: also where all comparisons are to hold together"
    assert cells["deep supervision alone minus plain cross-entropy (an ordinary ResNet)"][:1] == ["2"]
    assert cells["deep supervision alone minus plain cross-entropy (an ordinary ResNet)"][4] == "+0.00 ± 0.00"
    assert "n = 2 to 3 seeds" in lines[0]
    assert "commit 0123456;" in lines[-1]


def test_a_run_that_diverged_is_named_under_the_table(tmp_path):
    write_runs(tmp_path, plain=[30.0], deep_supervision=[30.0], reference=[32.0, 33.0])
    path = tmp_path / "runs" / "tiny-reference-s1.json"
    write_json(path, {"config": read_json(path)["config"], "error": "the loss became nan in epoch 1"})
    text = plan_section("tiny", TABLE_PLANS["tiny"], tmp_path)
    assert "| self distillation, the reference's setting | 1 | 29.00 |" in text
    assert "Diverged, and left out above: self distillation, the reference's setting, seed 1." in text
