"""The README's tables of results, made from the records in results/; what has no record is left out.

  python benchmarks/readme_tables.py             print them
  python benchmarks/readme_tables.py --write     put them into README.md

Runs are those of the plans of tables.py. Differences are paired: two runs of one seed begin with the same weights and
see the same images in the same order.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.trials import CLASSIFIER_NAMES, SUFFIXES
from analysis.verdict import CONFIDENCE, Interval, accuracy_standard_error
from benchmarks.plans import (
    ARM_NAMES,
    FIXED_ARMS,
    RESULTS,
    TABLE_PLANS,
    Arm,
    TablePlan,
    searched_settings,
)
from byot.config import TrainConfig, work_after
from byot.search_files import load_confirmation
from byot.system.files import read_json, write_text
from byot.system.flags import Parser, one_sentence_errors
from byot.system.paths import PROJECT_ROOT
from search.records import read_rows
from search.space import DEFAULT_SPACE, ROLE_NAMES

README = PROJECT_ROOT / "README.md"
BEGIN, END = "<!-- tables: made by benchmarks/readme_tables.py from results/ -->", "<!-- end of the tables -->"
CLASSIFIERS = dict(zip(SUFFIXES, CLASSIFIER_NAMES, strict=True))
NOTHING = "\N{EN DASH}"
MOST_TRIALS = 8  # listed of a search
CONFIRMED_SEARCH = "cifar100-w16-e6"  # shown beside those of the plans

# Accuracies that others publish, percent, single runs; the reference implementation's: the best epoch on the test set.
PUBLISHED_WIDTH = 64
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "resnet18": {
        "the paper": (67.85, 74.57, 78.23, 78.64, 79.67),
        "the reference implementation": (66.57, 74.69, 78.04, 78.73),
    },
    "resnet50": {
        "the paper": (68.23, 74.21, 75.23, 80.56, 81.04),
        "the reference implementation": (71.84, 77.75, 80.14, 80.64),
    },
}
SHORT_NAMES: dict[Arm, str] = {
    "plain": "plain cross-entropy",
    "deep-supervision": "deep supervision",
    "reference": "self distillation, the reference's",
    "bf16": "self distillation, the reference's, in bf16",
    "searched": "self distillation, searched",
}
COMPARED: tuple[tuple[Arm, Arm], ...] = (
    ("reference", "deep-supervision"),
    ("searched", "deep-supervision"),
    ("searched", "reference"),
    ("deep-supervision", "plain"),
    ("reference", "plain"),
    ("bf16", "reference"),
)


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Interval:
    """The mean of the differences of at least two pairs, with its 95 % interval (Student's t)."""
    from scipy.special import stdtrit

    differences = [a - b for a, b in zip(values, others, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    quantile = float(stdtrit(len(differences) - 1, (1 + CONFIDENCE) / 2))
    return Interval(statistics.mean(differences), quantile * error)


def load_runs(name: str, results: Path = RESULTS) -> dict[Arm, dict[int, dict[str, Any]]]:
    """Arm -> seed -> record of a plan's runs that have ended, also of those that diverged.

    Raises ValueError for records with settings that are not the plan's, or not the same with every seed.
    """
    base = TABLE_PLANS[name].base
    found: dict[Arm, dict[int, dict[str, Any]]] = {}
    for arm in ARM_NAMES:
        for path in sorted((results / "runs").glob(f"{name}-{arm}-s*.json")):
            record = read_json(path)
            config = TrainConfig.from_dict(record["config"])
            first = next(iter(found[arm].values())) if arm in found else record
            weights = {weight: first["config"][weight] for weight in DEFAULT_SPACE}
            expected = base.with_settings(seed=config.seed, **FIXED_ARMS.get(arm, weights))
            if config.differing_settings(expected):
                raise ValueError(f"{path} is not of the plan {name}")
            found.setdefault(arm, {})[config.seed] = record
    return found


# ---------------------------------------------------------------- tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_sd(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def plan_section(name: str, plan: TablePlan, results: Path = RESULTS) -> str:
    """A plan's heading, its table, the paired differences and where all that comes from; empty without records."""
    ended = load_runs(name, results)
    runs = {arm: {s: r for s, r in of_arm.items() if "error" not in r} for arm, of_arm in ended.items()}
    runs = {arm: of_arm for arm, of_arm in runs.items() if of_arm}
    if not runs:
        return ""
    base = plan.base
    network = f"ResNet{base.model.removeprefix('resnet')} of width {base.width}"
    numbers = sorted({len(of_arm) for of_arm in runs.values()})
    n = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    work = work_after(base, base.epochs)
    told = f", the arithmetic of {work:.1f} at full resolution" if work < base.epochs else ""
    heading = (
        f"**CIFAR-100, {network}, recipe `{base.recipe}`, {base.epochs} epochs{told}** (plan `{name}`): test accuracy "
        f"in percent, mean ± standard deviation of n = {n} seeds, trained on all 50,000 training images, the test set "
        "read once a run, after its last epoch."
    )
    published = PUBLISHED.get(base.model, {}) if base.width == PUBLISHED_WIDTH else {}
    if published:
        heading += (
            " Published: single runs of 200 epochs, the reference implementation's with the epoch that is best on the "
            "test set."
        )
    rows = []
    for source, values in published.items():
        rows.append([f"published: {source}", "1", *(f"{v:.2f}" for v in values), *[NOTHING] * (5 - len(values))])
    for arm, of_arm in runs.items():
        rows.append([_arm_name(arm, of_arm, plan), str(len(of_arm)), *(_cell(arm, of_arm, i) for i in CLASSIFIERS)])
    parts = [heading, table(["", "n", *CLASSIFIERS.values()], rows)]
    if differences := difference_rows(runs):
        parts += [
            "Paired differences in points, ± half of a 95 % interval (Student's t, each by itself); bold: resolved, "
            "the interval does not hold 0.",
            table(["", "n", *CLASSIFIERS.values()], differences),
        ]
    if diverged := [
        f"{ARM_NAMES[arm]}, seed {s}" for arm, of_arm in ended.items() for s, r in of_arm.items() if "error" in r
    ]:
        parts.append(f"Diverged, and left out above: {'; '.join(diverged)}.")
    weights = searched_settings(plan.search, results / "searches")
    if weights is not None and base.with_settings(**weights) == base:
        parts.append(f"The search `{plan.search}` chose the reference's setting itself: there is no other arm to run.")
    parts.append(origin([record for of_arm in runs.values() for record in of_arm.values()]))
    return "\n\n".join(parts)


def _arm_name(arm: Arm, of_arm: dict[int, dict[str, Any]], plan: TablePlan) -> str:
    if arm != "searched":
        return ARM_NAMES[arm]
    config = next(iter(of_arm.values()))["config"]
    told = ", ".join(f"`{name}` {config[name]:.3g}" for name in DEFAULT_SPACE)
    return f"{ARM_NAMES[arm]} (by `{plan.search}`: {told})"


def _cell(arm: Arm, of_arm: dict[int, dict[str, Any]], classifier: str) -> str:
    if arm == "plain" and classifier != "4":  # the others are not trained
        return NOTHING
    return mean_and_sd([record[f"test_accuracy_{classifier}"] for record in of_arm.values()])


def difference_rows(runs: dict[Arm, dict[int, dict[str, Any]]]) -> list[list[str]]:
    rows = []
    for arm, other in COMPARED:
        seeds = sorted(set(runs.get(arm, {})) & set(runs.get(other, {})))
        if len(seeds) < 2:
            continue
        cells = []
        for i in CLASSIFIERS:
            if "plain" in (arm, other) and i != "4":
                cells.append(NOTHING)
                continue
            found = paired_difference(*([runs[a][s][f"test_accuracy_{i}"] for s in seeds] for a in (arm, other)))
            text = f"{found.difference:+.2f} ± {found.half_width:.2f}"
            cells.append(f"**{text}**" if found.resolved else text)
        rows.append([f"{SHORT_NAMES[arm]} minus {SHORT_NAMES[other]}", str(len(seeds)), *cells])
    return rows


def origin(records: Sequence[dict[str, Any]]) -> str:
    """Hardware, versions and commits of the records, each named once, and what a run took."""
    devices = sorted({_hardware(record) for record in records})
    versions = sorted({", ".join(f"{n} {record['versions'][n]}" for n in ("python", "torch")) for record in records})
    commits = sorted({_short(record.get("commit")) for record in records})
    text = f"{'; '.join(devices)}; {'; '.join(versions)}; commit {', '.join(commits)}"
    if times := [record["elapsed_s"] for record in records if "elapsed_s" in record]:
        text += f"; {statistics.median(times):,.0f} s a run (median)"
    return f"{text}."


def _short(commit: str | None) -> str:
    """The first letters of a commit, and whether files were changed."""
    number, _, changed = (commit or "unknown").partition("-")
    return number[:7] + ("-" + changed if changed else "")


def _hardware(record: dict[str, Any]) -> str:
    """The device, the threads of a run on a CPU, and the precision where it is recorded."""
    hardware = record["hardware"]
    told = str(hardware["cpu"] if hardware["device"] == "cpu" else hardware["device"])
    if hardware["device"] == "cpu" and "elapsed_s" in record:  # of a search they are the driver's threads
        told += f", {hardware['threads']} thread{'s' * (hardware['threads'] > 1)} a run"
    return told + (f", {record['precision']}" if "precision" in record else "")


# ---------------------------------------------------------------- searches


def search_section(name: str, results: Path = RESULTS) -> str:
    """The trials of a search that reached its last epoch, and what its confirmation says; empty without records."""
    folder = results / "searches" / name
    if not (folder / "search.json").is_file():
        return ""
    search = read_json(folder / "search.json")
    config, metric = search["config"], search["metric"]
    rows, num_images = read_rows(folder / "trials.csv"), search["num_val_images"]
    whole = [row for row in rows if row["epochs_done"] == config["epochs"] and row[metric] is not None]
    if not whole:
        return ""
    whole.sort(key=lambda row: row[metric], reverse=search["mode"] == "max")
    space = list(search["space"])
    lines = [
        [
            ROLE_NAMES.get(row["role"], "sampled"),
            *(f"{row[parameter]:.3g}" for parameter in space),
            *(f"{row[f'val_accuracy_{i}']:.2f}" for i in CLASSIFIERS),
        ]
        for row in whole[:MOST_TRIALS]
    ]
    network = f"ResNet{config['model'].removeprefix('resnet')} of width {config['width']}"
    error = accuracy_standard_error(whole[0]["val_accuracy"], num_images)
    more = f", the best {MOST_TRIALS} of them" if len(whole) > MOST_TRIALS else ""
    others = Counter(row["status"] for row in rows if row not in whole)
    told = ", ".join(f"{number} {'unfinished' if status == 'running' else status}" for status, number in others.items())
    heading = (
        f"**Search `{name}`**: CIFAR-100, {network}, recipe `{config['recipe']}`, {len(rows)} trials of up to "
        f"{config['epochs']} epochs, one run each; accuracy in percent on {num_images:,} held-out training images "
        f"(standard error near {error:.1f} points), of those that reached the last epoch{more}"
        f"{f'; the others: {told}' if told else ''}."
    )
    parts = [heading, table(["", *(f"`{p}`" for p in space), *CLASSIFIERS.values()], lines)]
    records = [search]
    if (confirmation := load_confirmation(folder)) is not None:
        records.append(confirmation)
        values = "; ".join(
            f"{_arm_label(arm, space)} {', '.join('diverged' if v is None else f'{v:.2f}' for v in arm['values'])}"
            for arm in confirmation["arms"]
        )
        status = "" if confirmation["status"] == "finished" else f" ({confirmation['status']})"
        parts.append(
            f"Run again over {confirmation['num_rounds']} fresh seeds{status}, each with its own validation split: "
            f"{values}. {' '.join(confirmation['verdict'])}"
        )
    parts.append(origin(records))
    return "\n\n".join(parts)


def _arm_label(arm: dict[str, Any], space: Sequence[str]) -> str:
    if arm["role"] in ROLE_NAMES:
        return ROLE_NAMES[arm["role"]]
    return "trial " + arm["trial_id"] + " (" + ", ".join(f"`{p}` {arm['params'][p]:.3g}" for p in space) + ")"


# ---------------------------------------------------------------- the README


def all_sections(results: Path = RESULTS) -> str:
    sections = [plan_section(name, plan, results) for name, plan in TABLE_PLANS.items()]
    searches = dict.fromkeys([*(plan.search for plan in TABLE_PLANS.values() if plan.search), CONFIRMED_SEARCH])
    sections += [search_section(name, results) for name in searches]
    return "\n\n".join(filter(None, sections))


def with_tables(readme: str, tables: str) -> str:
    """The README with new tables between its two marks. Raises ValueError where a mark is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no lines {BEGIN} and {END} for the tables to go between")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def main() -> None:
    parser = Parser(prog="readme_tables.py", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    arguments = parser.parse_args()
    with one_sentence_errors("readme_tables.py"):
        tables = all_sections()
        if arguments.write:
            write_text(README, with_tables(README.read_text(encoding="utf-8"), tables))
        else:
            print(tables)


if __name__ == "__main__":
    main()
