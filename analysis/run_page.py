"""The page of one run: its settings, its classifiers, how it trained and, where they were measured, its exits.

Reads the run's files: config.json, metrics.jsonl, result.json and exits-test.json. No network is run.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from analysis.listing import NOTHING, Table
from analysis.page import fill_template
from analysis.run_figures import draw_run
from analysis.verdict import accuracy_standard_error
from byot.config import CLASSIFIERS, NUM_CLASSIFIERS, TrainConfig
from byot.console import format_duration
from byot.exit_report import SEEN, TEST_FILE
from byot.exits import describe_age, exits_command
from byot.runs import read_result
from byot.search_files import find_folder, read_epochs
from byot.system.files import errors_in, read_json

TEMPLATE = "run_page.html"
DEEPEST = CLASSIFIERS[str(NUM_CLASSIFIERS)]
FITTED = {"checkpoint", "fitted_on", "num_images", "hardware"}  # of the exits
MEASURED = {"num_images", "exits", "table", "curve", "oracle", "overthinking", "classes", "time"}  # likewise


def find_run_folder(outputs: Path, name: str) -> Path:
    """Find the folder of the named run, or of a path to one. Raises ValueError where there is none."""
    folder = find_folder(outputs / "runs", name, "config.json")
    if folder is None:
        raise ValueError(f"there is no run {name} in {outputs / 'runs'}, nor a run's folder at that path")
    return folder


def render_run_page(folder: Path) -> str:
    """Render the page of a run as HTML. Raises ValueError if the run's files are missing or damaged."""
    with errors_in(folder / "config.json"):
        config = TrainConfig.from_dict(read_json(folder / "config.json"))
    result, epochs, exits = read_result(config, folder), read_epochs(folder / "metrics.jsonl"), load_exits(folder)
    test = None if exits is None else exits["test"]
    return fill_template(
        TEMPLATE,
        draw_run(epochs, test),
        name=folder.name,
        config=config,
        settings=config.to_dict(),
        result=result,
        format_duration=format_duration,
        num_epochs=max(epochs, default=0),
        findings=list(describe_run(config, result, exits)),
        classifiers=None if result is None else classifier_cells(result),
        exits=exits,
        seen=exits is not None and exits["fitted_on"] == SEEN,
        age=None if exits is None else describe_age(folder, exits),
        tables={} if test is None else exit_tables(test),
        command=exits_command(folder),
    )


def load_exits(folder: Path) -> dict[str, Any] | None:
    """Read what evaluate.py --exits left; None where it never ran. Raises ValueError where the file is damaged."""
    path = folder / TEST_FILE
    if not path.is_file():
        return None
    record = read_json(path)
    test = record.get("test")
    missing = (FITTED - record.keys()) | (MEASURED - test.keys() if isinstance(test, dict) else {"test"})
    if missing:
        raise ValueError(f"{path} has no {min(missing)}: {exits_command(folder)} writes it again")
    return record


def describe_run(
    config: TrainConfig, result: Mapping[str, Any] | None, exits: Mapping[str, Any] | None
) -> Iterator[str]:
    """Say in sentences what the test set says of the run; the accuracy comes first."""
    if result is None:
        yield f"This run has no result: it has not finished its {config.epochs} epochs."
    else:
        sentence = f"{DEEPEST} is right on {result['test_accuracy']:.2f} % of {result['num_test_images']:,} test images"
        if "test_accuracy_ensemble" in result:
            sentence += f", the ensemble on {result['test_accuracy_ensemble']:.2f} %"
        yield f"{sentence}."
    if exits is not None:
        test = exits["test"]
        asked, deepest = test["table"][0], test["exits"][-1]
        yield (
            f"Early exit ({asked['asked']}) is right on {asked['accuracy']:.2f} % at {asked['cost']:.3f} of the plain "
            f"network's multiply-adds, {asked['accuracy'] - deepest['accuracy']:+.2f} points from {deepest['exit']}."
        )
        for timed in test["time"]:
            saved = 1 - timed["early_ms"] / timed["plain_ms"]
            yield (
                f"With {timed['batch_size']} image{'s' * (timed['batch_size'] > 1)} at a time it took "
                f"{100 * abs(saved):.0f} % {'less' if saved > 0 else 'more'} time than the plain network: "
                f"{timed['early_ms']:.3f} against {timed['plain_ms']:.3f} ms an image."
            )


def classifier_cells(result: Mapping[str, Any]) -> Table:
    """List accuracy, its binomial standard error, NLL and ECE of every classifier and of the ensemble."""
    rows = []
    for suffix, name in CLASSIFIERS.items():
        if f"test_accuracy_{suffix}" in result:
            accuracy, nll, ece = (result[f"test_{measure}_{suffix}"] for measure in ("accuracy", "nll", "ece"))
            error = accuracy_standard_error(accuracy, result["num_test_images"])
            rows.append([name, f"{accuracy:.2f}", f"{error:.2f}", f"{nll:.4f}", f"{ece:.2f}"])
    return Table(["classifier", "accuracy %", "± se", "NLL", "ECE %"], rows, num_text=1)


def exit_tables(test: Mapping[str, Any]) -> dict[str, Table]:
    """Make the tables of the exits: alone, as asked, calibration, classes."""
    exits, names = test["exits"], [row["exit"] for row in test["exits"]]
    alone = [
        [
            *(row["exit"], f"{row['accuracy']:.2f}", f"{row['cost']:.3f}"),
            *(f"{row['ensemble_accuracy']:.2f}", f"{row['ensemble_cost']:.3f}"),
            "never asked" if row["threshold"] > 1 else f"{row['threshold']:.4f}",
        ]
        for row in exits
    ]
    calibration = [
        [row["exit"], f"{row['temperature']:.3f}"]
        + [
            NOTHING if row[f"{measure}{when}"] is None else f"{row[f'{measure}{when}']:.{digits}f}"
            for measure, digits in (("ece", 2), ("auroc", 4), ("aurc", 2))
            for when in ("_before", "")
        ]
        for row in exits
    ]
    asked = []
    for i, row in enumerate(test["table"]):
        if "accuracy" in row:
            cells = [f"{row['accuracy']:.2f}", f"{row['cost']:.3f}", *(f"{share:.1f}" for share in row["left"])]
            times = [f"{timed['table_ms'][i]:.3f}" for timed in test["time"]]
        else:
            cells, times = ["no exit so cheap", *[NOTHING] * (1 + len(names))], [NOTHING] * len(test["time"])
        asked.append([row["asked"], *cells, *times])
    times = [f"ms, {timed['batch_size']} at a time" for timed in test["time"]]
    classes = [
        [end, one["class"], f"{one['mean_exit']:.2f}"] for end, chosen in test["classes"].items() for one in chosen
    ]
    return {
        "alone": Table(["exit", "accuracy %", "cost", "ensemble so far %", "its cost", "threshold"], alone, 1),
        "asked": Table(["asked", "accuracy %", "cost got", *(f"at {name} %" for name in names), *times], asked, 1),
        "calibration": Table(
            ["exit", "temperature", "ECE % before", "after", "AUROC before", "after", "AURC % before", "after"],
            calibration,
            1,
        ),
        "classes": Table(["leaves", "class", "mean exit"], classes, 2),
    }
