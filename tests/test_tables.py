"""The plans behind the tables: what is run, done in pieces, and what is made of the records."""

import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plans import (
    PLANS,
    TABLE_PLANS,
    PlannedRun,
    TablePlan,
    arms_of,
    planned_runs,
    read_record,
    searched_settings,
)
from benchmarks.readme_tables import BEGIN, END, load_runs, origin, paired_difference, plan_section, with_tables
from benchmarks.speed import devices
from benchmarks.tables import TOY, Places, keep_record, run_pieces, train_piece
from byot.config import TrainConfig, work_after
from byot.loss import self_distillation_loss
from byot.system.files import read_json, write_json, write_text
from byot.system.paths import PROJECT_ROOT
from tests.helpers import assert_one_sentence, command_environment, command_line, picture_of, run_command

TABLES = "benchmarks/tables.py"
SMALL = TrainConfig(recipe="reference", dataset="digits", width=4, epochs=2, device="cpu")


def write_search(folder: Path, num_ended: int = 2, **weights: float) -> None:
    """A search of two trials."""
    write_json(folder / "best.json", {"config": SMALL.with_settings(**weights).to_dict()})
    write_json(folder / "search.json", {"num_samples": 2})
    statuses = [*["completed"] * num_ended, *["running"] * (2 - num_ended)]
    write_text(folder / "trials.csv", "\n".join(["trial_id,status", *(f"t{i},{s}" for i, s in enumerate(statuses))]))


# ---------------------------------------------------------------- what is run


def test_the_arms_differ_in_the_loss_alone():
    arms = arms_of(TablePlan(SMALL, search="none"), Path("nowhere"))
    assert list(arms) == ["plain", "deep-supervision", "reference"]
    reference = arms["reference"]
    assert (reference.alpha, reference.temperature, reference.beta) == (0.1, 3.0, 1e-6)
    assert reference.differing_settings(arms["deep-supervision"]) == {"alpha": (0.1, 0.0), "beta": (1e-6, 0.0)}
    assert set(reference.differing_settings(arms["plain"])) == {"alpha", "beta", "loss_form"}
    assert all(config.val_fraction == 0 for config in arms.values()), "all training images"


def test_the_searched_arm_is_what_the_search_chose_unless_that_is_another_arm(tmp_path: Path):
    plan = TablePlan(SMALL, search="found")
    write_search(tmp_path / "searches" / "found", alpha=0.3, temperature=5.0, beta=1e-5, epochs=7)
    arms = arms_of(plan, tmp_path)
    assert arms["searched"] == SMALL.with_settings(alpha=0.3, temperature=5.0, beta=1e-5), "its weights, no more"
    write_search(tmp_path / "searches" / "found", alpha=0.1, temperature=3.0, beta=1e-6)
    assert "searched" not in arms_of(plan, tmp_path)
    write_search(tmp_path / "searches" / "found", num_ended=1, alpha=0.3)
    assert "searched" not in arms_of(plan, tmp_path), "another may be chosen yet"


def test_a_plan_has_the_arms_that_it_names():
    plan = TablePlan(SMALL, arms=("reference", "bf16"))
    arms = arms_of(plan, Path("nowhere"))
    assert list(arms) == ["reference", "bf16"]
    assert arms["reference"].differing_settings(arms["bf16"]) == {"precision": ("auto", "bf16")}
    assert arms_of(plan._replace(arms=("searched",)), Path("nowhere")) == {}


@pytest.mark.parametrize(("name", "work"), [("modern-w16", 8), ("modern-w16-short", 3)])
def test_plans_of_so_much_arithmetic(name: str, work: int):
    base = TABLE_PLANS[name].base
    of_an_epoch = work_after(base, base.epochs) / base.epochs
    assert work - of_an_epoch < work_after(base, base.epochs) <= work
    assert base.precision == "fp32", "the partner of the arm bf16"


def test_all_arms_have_one_seed_before_any_has_two():
    runs = planned_runs(TablePlan(SMALL, search="none", num_seeds=2), Path("nowhere"))
    assert [run.config.seed for run in runs] == [0, 0, 0, 1, 1, 1]
    assert len({run.name("plan") for run in runs}) == 6


def test_a_record_of_other_settings_is_not_taken_for_a_run(tmp_path: Path):
    run = planned_runs(TablePlan(SMALL, search="none"), Path("nowhere"))[0]
    assert read_record(tmp_path / "none.json", run) is None
    write_json(tmp_path / "same.json", {"config": {**run.config.to_dict(), "data_dir": None}})
    assert read_record(tmp_path / "same.json", run) is not None
    write_json(tmp_path / "other.json", {"config": run.config.with_settings(lr=0.2).to_dict()})
    with pytest.raises(ValueError, match="other settings \\(lr\\)"):
        read_record(tmp_path / "other.json", run)


# ---------------------------------------------------------------- pieces


def test_a_run_done_in_pieces_is_the_run_done_at_once(tmp_path: Path):
    whole = train_piece(SMALL, tmp_path / "whole", 1, None)
    assert whole is not None
    assert train_piece(SMALL, tmp_path / "pieces", 1, time.time()) is None
    saved = sorted((tmp_path / "pieces" / "checkpoints").glob("*.pt"))
    assert [path.name for path in saved] == ["epoch-0000-step-000001.pt"]
    found = train_piece(SMALL, tmp_path / "pieces", 1, time.time() + 600)
    assert found is not None
    same = [name for name in whole if name.startswith("test_") or name == "config"]
    assert {name: found[name] for name in same} == {name: whole[name] for name in same}
    assert train_piece(SMALL, tmp_path / "pieces", 1, time.time()) == found, "a finished run is not run again"


@pytest.mark.slow
def test_a_plan_from_the_command_line(tmp_path: Path):
    """Stopped at once, it goes on; finished, it does nothing more; a record is enough, without its run."""
    command = ["tiny", "--toy", "--seeds", 1, "--outputs", tmp_path]
    records = tmp_path / "toy" / "results" / "runs"
    before = picture_of(PROJECT_ROOT / "results")
    stopped = run_command([*command, "--minutes", 0.01], cwd=tmp_path, script=TABLES)
    assert stopped.returncode == 0, stopped.stderr
    assert "0 of 3 runs are finished" in stopped.stdout
    assert "go on with:" in stopped.stdout
    finished = run_command(command, cwd=tmp_path, script=TABLES)
    assert finished.returncode == 0, finished.stderr
    assert "3 of 3 runs are finished" in finished.stdout
    assert sorted(path.stem for path in records.iterdir()) == [
        "tiny-deep-supervision-s0",
        "tiny-plain-s0",
        "tiny-reference-s0",
    ]
    record = read_json(records / "tiny-plain-s0.json")
    assert (record["plan"], record["arm"], record["config"]["loss_form"]) == ("tiny", "plain", "plain")
    assert (record["num_train_images"], record["num_test_images"]) == (1438, 359)
    assert {"commit", "versions", "hardware", "elapsed_s", "test_ece"} <= set(record)
    assert "test_ece_ensemble" in read_json(records / "tiny-reference-s0.json")
    assert "test_ece_ensemble" not in record, "it has one classifier"
    run_folder = tmp_path / "toy" / "runs" / "tiny-plain-s0"
    run_folder.rename(tmp_path / "gone")
    again = run_command(command, cwd=tmp_path, script=TABLES)
    assert "3 finished before" in again.stdout
    assert not run_folder.exists()
    assert picture_of(PROJECT_ROOT / "results") == before


def test_a_run_that_fails_is_told_and_does_not_stop_the_others(tmp_path: Path):
    """One diverges, one finds its folder in the way of a file."""
    good = PlannedRun("reference", SMALL)
    bad = PlannedRun("searched", SMALL.with_settings(lr=1e30))
    blocked = PlannedRun("plain", SMALL.with_settings(lr=0.2))
    places = Places(tmp_path / "outputs", tmp_path / "results")
    places.run("plan", blocked).parent.mkdir(parents=True)
    places.run("plan", blocked).write_text("a file")
    ended = {one.run.arm: one for one in run_pieces("plan", [bad, blocked, good], places, 1, 1, None)}
    assert ended["reference"].result is not None
    assert "the loss became" in ended["searched"].error
    assert ended["searched"].result is None
    assert ended["plain"].error
    assert [keep_record("plan", ended[arm], places) for arm in ("reference", "searched", "plain")] == [
        True,
        True,
        False,
    ]
    diverged = read_record(places.record("plan", bad), bad)
    assert diverged is not None
    assert "the loss became" in diverged["error"], "it would diverge again: it is not run again"


@pytest.mark.slow
@pytest.mark.parametrize("lines_before", [1, 2])
def test_ctrl_c_saves_what_runs(tmp_path: Path, lines_before: int):
    """Also a run whose process has only just begun to start, as after the first line."""
    command = command_line(TABLES, "tiny", "--toy", "--seeds", 200, "--concurrent", 1, "--outputs", tmp_path)
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=command_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(lines_before)]
        assert "600 runs, 0 finished before" in lines[0]
        os.killpg(process.pid, signal.SIGINT)
        try:
            rest, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 128 + signal.SIGINT
    assert "of 600 runs are finished" in rest
    assert "go on with:" in rest
    assert "Traceback" not in rest


@pytest.mark.slow
def test_a_search_and_the_arm_that_it_chooses(tmp_path: Path):
    found = run_command(["search-r18", "--toy", "--outputs", tmp_path], cwd=tmp_path, script=TABLES)
    assert found.returncode == 0, found.stderr
    kept = tmp_path / "toy" / "results" / "searches" / "search-r18"
    assert {path.name for path in kept.iterdir()} == {"search.json", "trials.csv", "best.json"}
    again = run_command(["search-r18", "--toy", "--outputs", tmp_path], cwd=tmp_path, script=TABLES)
    assert again.returncode == 0, again.stderr
    assert "is finished already" in again.stdout
    chosen = read_json(kept / "best.json")["params"]
    (tmp_path / "toy" / "searches" / "search-r18").rename(tmp_path / "toy" / "searches" / "search-of-before")
    copied = tmp_path / "toy" / "searches" / "search-r18"
    kept.rename(copied)  # its records alone are enough
    plan = TABLE_PLANS["reference-r18"]
    assert searched_settings(plan.search, tmp_path / "toy" / "searches") == chosen
    arms = arms_of(plan, tmp_path / "toy", tmp_path)
    taken = arms.get("searched", arms["reference"])  # it may have chosen the reference's
    assert taken == plan.base.with_settings(**chosen)


@pytest.mark.slow
def test_the_speed_plan(tmp_path: Path):
    command = ["speed", "--toy", "--outputs", tmp_path]
    first = run_command([*command, "--minutes", 0.01], cwd=tmp_path, script=TABLES)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "toy" / "results" / "benchmarks" / "cpu"
    assert [path.name for path in folder.iterdir()] == ["devices.json"], "one part, then the time was over"
    found = run_command(command, cwd=tmp_path, script=TABLES)
    assert found.returncode == 0, found.stderr
    assert "devices.json is there already" in found.stdout
    assert sorted(path.stem for path in folder.iterdir()) == ["concurrent-trials", "devices", "r18-w4"]


@pytest.mark.slow
def test_runs_end_with_a_program_that_is_killed(tmp_path: Path):
    """And go on from where they were."""
    folder = tmp_path / "run"
    program = (
        "from pathlib import Path; from benchmarks.quality.pool import make_pool\n"
        "from benchmarks.tables import train_piece\n"
        "from byot.config import TrainConfig\n"
        "if __name__ == '__main__':\n"
        "    config = TrainConfig(recipe='reference', dataset='digits', width=4, epochs=2000, device='cpu')\n"
        f"    make_pool(1).submit(train_piece, config, Path({str(folder)!r}), 1, None).result()\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    process = subprocess.Popen([sys.executable, str(script)], cwd=PROJECT_ROOT, env=command_environment())
    give_up_at = time.monotonic() + 120
    while not (folder / "metrics.jsonl").is_file() and time.monotonic() < give_up_at:
        time.sleep(0.2)
    (worker,) = children_of(process.pid, "multiprocessing.spawn")
    process.kill()
    process.wait()
    give_up_at = time.monotonic() + 120
    while Path(f"/proc/{worker}").exists() and time.monotonic() < give_up_at:
        time.sleep(0.2)
    assert not Path(f"/proc/{worker}").exists()
    assert list((folder / "checkpoints").glob("epoch-*.pt"))


def children_of(parent: int, word: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status, command = (path / "stat").read_text(), (path / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if int(status.rpartition(")")[2].split()[1]) == parent and word in command and "spawn_main" in command:
            found.append(int(path.name))
    return found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["plan"]),
        (["large"], ["large", *PLANS]),
        (["tiny", "--minutes", "0"], ["--minutes", "above 0"]),
        (["tiny", "--minutes", "nan"], ["--minutes", "above 0"]),
        (["tiny", "--seeds", "0"], ["--seeds"]),
        (["tiny", "--arms", "searched", "--toy"], ["search-tiny"]),
        (["modern-r18", "--arms", "searched", "--toy"], ["modern-r18", "names no search"]),
        (["tiny", "--toy", "--data-dir", "."], ["--toy", "--data-dir"]),
        (["tiny", "--data-dir", "nowhere"], ["nowhere"]),
        (["speed", "--seeds", "3"], ["--seeds", "tiny"]),
        (["search-r18", "--concurrent", "2"], ["--concurrent"]),
    ],
)
def test_bad_command_lines_are_one_sentence(tmp_path: Path, arguments: list[str], words: list[str]):
    result = run_command([*arguments, "--outputs", tmp_path / "outputs"], cwd=tmp_path, script=TABLES)
    assert result.returncode == 2, result.stdout + result.stderr
    assert_one_sentence(result.stderr, *words)
    assert picture_of(tmp_path) == {}


# ---------------------------------------------------------------- devices


def test_a_device_that_computes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch):
    config = SMALL.with_settings(batch_size=32, epochs=10_000, lr=1e-3, dataset="cifar100")
    images = devices.some_images(None, 96)
    rows = devices.compare(config, images)
    assert [(row["way"], row["precision"], row["agrees"]) for row in rows] == [
        ("none", "fp32", True),
        ("none", "bf16", True),
    ]
    assert rows[1]["largest_difference"] > 0

    def slightly_wrong(*args: Any, **kwargs: Any) -> Any:
        terms = self_distillation_loss(*args, **kwargs)
        calls.append(terms)
        return terms if len(calls) <= 3 else terms._replace(label=terms.label * 1.01)  # the CPU's three steps are right

    calls: list[Any] = []
    monkeypatch.setattr("byot.step.self_distillation_loss", slightly_wrong)
    assert not devices.compare(config, images)[0]["agrees"]


# ---------------------------------------------------------------- tables from records


def write_runs(results: Path, accuracies: dict[str, list[float]]) -> None:
    for run in planned_runs(TABLE_PLANS["tiny"], Path("nowhere"), Path("nowhere")):
        if run.config.seed < len(accuracies[run.arm]):
            value = accuracies[run.arm][run.config.seed]
            record: dict[str, Any] = {"config": run.config.to_dict(), "elapsed_s": 100.0, "commit": "0123456789"}
            record |= {f"test_accuracy_{i}": value - 4 + i for i in range(1, 5)} | {"test_accuracy_ensemble": value + 1}
            record |= {"versions": {"python": "3.11.7", "torch": "2.15.0"}}
            record |= {"hardware": {"device": "cpu", "cpu": "AMD EPYC", "threads": 1}}
            write_json(results / "runs" / f"{run.name('tiny')}.json", record)


def test_a_table_from_records(tmp_path: Path):
    """Means, standard deviations, and what is bold because it is resolved."""
    write_runs(
        tmp_path, {"plain": [30.0, 31.0], "deep-supervision": [30.0, 31.0, 32.5], "reference": [32.1, 33.0, 34.6]}
    )
    lines = plan_section("tiny", TABLE_PLANS["tiny"], tmp_path).splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines if "|" in line}
    sd = statistics.stdev([30.0, 31.0, 32.5])
    assert cells["deep supervision alone"] == [
        "3",
        *(f"{31.1666 + i - 4:.2f} ± {sd:.2f}" for i in range(1, 5)),
        f"32.17 ± {sd:.2f}",
    ]
    assert cells["plain cross-entropy (an ordinary ResNet)"] == ["2", *"–––", "30.50 ± 0.71", "–"]  # noqa: RUF001
    (difference,) = set(cells["self distillation, the reference's minus deep supervision"][1:])
    assert difference == "**+2.07 ± 0.14**"
    assert cells["deep supervision minus plain cross-entropy"][:1] == ["2"]
    assert cells["deep supervision minus plain cross-entropy"][4] == "+0.00 ± 0.00"
    assert "n = 2 to 3 seeds" in lines[0]
    assert "commit 0123456;" in lines[-1]


def test_a_run_that_diverged_is_named_under_the_table(tmp_path: Path):
    write_runs(tmp_path, {"plain": [30.0], "deep-supervision": [30.0], "reference": [32.0, 33.0]})
    path = tmp_path / "runs" / "tiny-reference-s1.json"
    write_json(path, {"config": read_json(path)["config"], "error": "the loss became nan in epoch 1"})
    text = plan_section("tiny", TABLE_PLANS["tiny"], tmp_path)
    assert "| self distillation, the reference's setting | 1 | 29.00 |" in text
    assert "Diverged, and left out above: self distillation, the reference's setting, seed 1." in text


def test_seeds_of_different_searched_settings_share_no_row(tmp_path: Path):
    base = TABLE_PLANS["tiny"].base
    for seed, alpha in enumerate((0.3, 0.3, 0.4)):
        config = base.with_settings(alpha=alpha, seed=seed)
        write_json(tmp_path / "runs" / f"tiny-searched-s{seed}.json", {"config": config.to_dict()})
    with pytest.raises(ValueError, match=r"tiny-searched-s2\.json is not of the plan"):
        load_runs("tiny", tmp_path)


def test_a_commit_keeps_the_word_that_files_were_changed():
    record = {"versions": {"python": "3.12.1", "torch": "2.11.0"}, "hardware": {"device": "NVIDIA H200", "cpu": "Xeon"}}
    told = origin([record | {"commit": "0123456789-dirty", "precision": "bf16"}, record | {"commit": None}])
    assert told == "NVIDIA H200; NVIDIA H200, bf16; python 3.12.1, torch 2.11.0; commit 0123456-dirty, unknown."


def test_no_record_no_table(tmp_path: Path):
    assert plan_section("tiny", TABLE_PLANS["tiny"], tmp_path) == ""


def test_records_of_other_settings_make_no_table(tmp_path: Path):
    write_runs(tmp_path, {"plain": [30.0], "deep-supervision": [30.0], "reference": [32.1]})
    path = tmp_path / "runs" / "tiny-reference-s0.json"
    record = read_json(path)
    write_json(path, record | {"config": {**record["config"], **TOY}})
    with pytest.raises(ValueError, match=r"tiny-reference-s0\.json is not of the plan tiny"):
        load_runs("tiny", tmp_path)


def test_paired_differences():
    found = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.difference == 2.0
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6), "Student's t with two degrees"
    assert not found.resolved
    assert paired_difference([2.0, 2.1], [1.0, 1.1]).resolved


def test_tables_go_between_their_marks():
    readme = f"# a\n\n{BEGIN}\n\nold\n\n{END}\n\nb\n"
    assert with_tables(readme, "new") == f"# a\n\n{BEGIN}\n\nnew\n\n{END}\n\nb\n"
    assert with_tables(with_tables(readme, "new"), "old") == readme
    with pytest.raises(ValueError, match="for the tables to go between"):
        with_tables("# a\n", "new")


def test_no_signal_is_left_caught(tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM)
    train_piece(SMALL, tmp_path / "run", 1, time.time())
    assert signal.getsignal(signal.SIGTERM) is before
