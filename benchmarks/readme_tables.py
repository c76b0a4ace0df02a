"""Makes the tables of docs/results.md and the README's short one from the records in results/.

  python benchmarks/readme_tables.py             print them
  python benchmarks/readme_tables.py --write     put them into both files, and draw docs/exits.svg and docs/effects.svg

What has no record is left out. Runs are those of the plans of tables.py. Differences are paired: two runs of one seed
begin with the same weights and see the same images in the same order.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.verdict import accuracy_standard_error, describe_metric
from benchmarks.common import format_difference, markdown, mean_and_sd
from benchmarks.plans import (
    ARM_NAMES,
    MOST_SEEDS,
    RESULTS,
    SEARCH_PLANS,
    TABLE_PLANS,
    Arm,
    TablePlan,
    planned_runs,
    read_record,
    searched_settings,
)
from byot.config import CLASSIFIERS, TrainConfig, work_after
from byot.search_files import ROLE_NAMES, format_parameter, format_value, load_confirmation, load_search, read_trials
from byot.system.files import read_json, write_output
from byot.system.flags import Parser, one_sentence_errors
from byot.system.paths import PROJECT_ROOT
from search.space import DEFAULT_SPACE

if TYPE_CHECKING:  # importing it takes a second
    from analysis.figures import Drawing

README, RESULTS_PAGE = PROJECT_ROOT / "README.md", PROJECT_ROOT / "docs" / "results.md"
EXITS_FIGURE, SHIPPED_NETWORK = PROJECT_ROOT / "docs" / "exits.svg", "resnet18-w16-cifar100"
EFFECTS_FIGURE, EFFECTS_SEARCH = PROJECT_ROOT / "docs" / "effects.svg", "search-w16"
BEGIN, END = "<!-- tables: made by benchmarks/readme_tables.py from results/ -->", "<!-- end of the tables -->"
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
Pair = tuple[Arm, Arm]
COMPARED: tuple[Pair, ...] = (
    ("reference", "deep-supervision"),
    ("searched", "deep-supervision"),
    ("searched", "reference"),
    ("deep-supervision", "plain"),
    ("reference", "plain"),
    ("bf16", "reference"),
    ("label-smoothing", "deep-supervision"),
    ("no-hint", "reference"),
    ("no-distillation", "deep-supervision"),
    ("ensemble-teacher", "reference"),
    ("paper-form", "deep-supervision"),
    ("wide-branches", "reference"),
)


class Column(NamedTuple):
    """A measure of a run's record."""

    title: str
    key: str  # in the record
    digits: int = 2


def by_classifier(measure: str, digits: int = 2) -> tuple[Column, ...]:
    return tuple(Column(title, f"test_{measure}_{i}", digits) for i, title in CLASSIFIERS.items())


ACCURACIES = (*by_classifier("accuracy"), Column("half the cost", "test_exit_accuracy"))
COLUMNS = {  # of a plan's tables, one each
    "Accuracy in percent": ACCURACIES,
    "Calibration error (ECE) in percent": by_classifier("ece"),
    "Negative log-likelihood (NLL) in nats": by_classifier("nll", 3),
}
ANSWER = "answer-w16"  # the plan of the README's first table, and its arms
ANSWER_ARMS: dict[Arm, tuple[str, str]] = {  # in a row of its own, and in one of differences
    "plain": ("an ordinary ResNet", "ordinary ResNet"),
    "deep-supervision": ("deep supervision alone", "deep supervision"),
    "reference": ("self distillation, the reference's setting", "reference's setting"),
    "searched": ("self distillation, the searched setting", "searched setting"),
}
ANSWER_PAIRS: tuple[Pair, ...] = (("reference", "deep-supervision"), ("searched", "reference"))
CALIBRATED: Pair = ("reference", "deep-supervision")  # whose calibration is compared, too
Runs = dict[Arm, dict[int, dict[str, Any]]]  # arm -> seed -> record


def network(config: TrainConfig) -> str:
    return f"ResNet{config.model.removeprefix('resnet')} of width {config.width}, recipe `{config.recipe}`"


def format_weights(params: dict[str, Any], names: Sequence[str] = tuple(DEFAULT_SPACE)) -> str:
    return ", ".join(f"`{name}` {params[name]:.3g}" for name in names)


def origin(records: Sequence[dict[str, Any]]) -> str:
    """Name hardware, versions and commits of the records, each once, and what a run took."""
    machines, versions, commits = set(), set(), set()
    for record in records:
        hardware, (name, dash, changed) = record["hardware"], (record.get("commit") or "unknown").partition("-")
        machine = str(hardware["cpu" if hardware["device"] == "cpu" else "device"])
        if hardware["device"] == "cpu" and "elapsed_s" in record:  # of a search they are the driver's threads
            machine += f", {hardware['threads']} thread{'s' * (hardware['threads'] > 1)} a run"
        machines.add(machine + (f", {record['precision']}" if "precision" in record else ""))
        versions.add(", ".join(f"{package} {record['versions'][package]}" for package in ("python", "torch")))
        commits.add(f"{name[:7]}{dash}{changed}")
    text = f"{'; '.join([*sorted(machines), *sorted(versions)])}; commit {', '.join(sorted(commits))}"
    if times := [record["elapsed_s"] for record in records if "elapsed_s" in record]:
        text += f"; {statistics.median(times):,.0f} s a run (median)"
    return f"{text}."


# ---------------------------------------------------------------- runs


def load_runs(name: str, results: Path = RESULTS) -> Runs:
    """Load a plan's runs that have ended, also those that diverged. Raises ValueError for a run of other settings."""
    found: Runs = {}
    for run in planned_runs(name, TABLE_PLANS[name]._replace(num_seeds=MOST_SEEDS), results, results):
        if (record := read_record(results, run)) is not None:
            found.setdefault(run.arm, {})[run.config.seed] = record
    return found


def without_diverged(ended: Runs) -> Runs:
    runs = {arm: {s: r for s, r in of_arm.items() if "error" not in r} for arm, of_arm in ended.items()}
    return {arm: of_arm for arm, of_arm in runs.items() if of_arm}


def plan_section(name: str, plan: TablePlan, results: Path = RESULTS) -> str:
    """Write a plan's heading, table, paired differences and their origin; nothing without records."""
    ended = load_runs(name, results)
    runs = without_diverged(ended)
    if not runs:
        return ""
    base = plan.base
    numbers = sorted({len(of_arm) for of_arm in runs.values()})
    n = " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))
    work = work_after(base, base.epochs)
    told = f", the arithmetic of {work:.1f} at full resolution" if work < base.epochs else ""
    heading = (
        f"**CIFAR-100, {network(base)}, {base.epochs} epochs{told}** (plan `{name}`): test accuracy "
        f"in percent, mean ± standard deviation of n = {n} seeds, trained on "
        f"{plan.images.describe(base.dataset)}, the test set read once a run, after its last epoch."
    )
    published = PUBLISHED.get(base.model, {}) if base.width == PUBLISHED_WIDTH else {}
    if published:
        heading += (
            " Published: single runs of 200 epochs, the reference implementation's with the epoch that is best on the "
            "test set."
        )
    tables = {title: [c for c in columns if is_measured(runs, c)] for title, columns in COLUMNS.items()}
    cells = compare_arms(runs, product(COMPARED, [column for columns in tables.values() for column in columns]))
    parts = [heading]
    for title, columns in tables.items():
        if not columns:
            continue
        header = [title, "n", *(column.title for column in columns)]
        rows = [
            [f"published: {source}", "1", *(f"{v:.2f}" for v in values), *[NOTHING] * (len(columns) - len(values))]
            for source, values in published.items()
            if columns[: len(values)] == list(ACCURACIES[: len(values)])
        ]
        for arm, of_arm in runs.items():
            label = ARM_NAMES[arm]
            if arm == "searched":
                label += f" (by `{plan.search}`: {format_weights(next(iter(of_arm.values()))['config'])})"
            rows.append([label, str(len(of_arm)), *(describe(list(of_arm.values()), column) for column in columns)])
        parts.append(markdown(header, rows))
        header[0] = f"{title}: difference"
        rows = [
            [
                f"{ARM_NAMES[arm]} minus {ARM_NAMES[other]}",
                str(len(common_seeds(runs, (arm, other)))),
                *(cells.get(((arm, other), column), NOTHING) for column in columns),
            ]
            for arm, other in COMPARED
            if any(((arm, other), column) in cells for column in columns)
        ]
        if rows:
            parts.append(markdown(header, rows))
    if cells:
        parts.append(
            "Differences are paired by seed, ± half of a 95 % interval (Student's t, each by itself). Bold: resolved, "
            f"the interval leaves out 0. Star: it still does when corrected for all {len(cells)} comparisons of these "
            "tables (Bonferroni)."
        )
    diverged = [f"{ARM_NAMES[arm]}, seed {s}" for arm, found in ended.items() for s in found if "error" in found[s]]
    if diverged:
        parts.append(f"Diverged, and left out above: {'; '.join(diverged)}.")
    weights = searched_settings(plan.search, results / "searches")
    if weights is not None and base.with_settings(**weights) == base:
        parts.append(f"The search `{plan.search}` chose the reference's setting itself: there is no other arm to run.")
    parts.append(origin([record for of_arm in runs.values() for record in of_arm.values()]))
    return "\n\n".join(parts)


def has(record: dict[str, Any], column: Column) -> bool:
    """Tell whether a run measured this; the early classifiers of a plain run, in older records, were not trained."""
    plain = record["config"]["loss_form"] == "plain"
    return column.key in record and not (plain and not column.key.endswith("_4"))


def describe(records: Sequence[dict[str, Any]], column: Column) -> str:
    if not all(has(record, column) for record in records):
        return NOTHING
    return mean_and_sd([record[column.key] for record in records], column.digits)


def is_measured(runs: Runs, column: Column) -> bool:
    return any(has(record, column) for of_arm in runs.values() for record in of_arm.values())


def common_seeds(runs: Runs, pair: Pair) -> list[int]:
    return sorted(set(runs.get(pair[0], {})) & set(runs.get(pair[1], {})))


def compare_arms(runs: Runs, cases: Iterable[tuple[Pair, Column]]) -> dict[tuple[Pair, Column], str]:
    """Write by how much a measure of the first arm is above the second's, where both have it and two seeds in common.

    All of the cases that can be compared are corrected for together.
    """
    compared = {
        (pair, column): [[runs[arm][seed][column.key] for seed in common_seeds(runs, pair)] for arm in pair]
        for pair, column in cases
        if len(common_seeds(runs, pair)) > 1
        and all(has(record, column) for arm in pair for record in runs[arm].values())
    }
    return {
        (pair, column): format_difference(*values, digits=column.digits, bold=True, num_compared=len(compared))
        for (pair, column), values in compared.items()
    }


# ---------------------------------------------------------------- searches


def search_section(name: str, results: Path = RESULTS) -> str:
    """List the trials that reached a search's last epoch, and what its confirmation says; nothing without records."""
    folder = results / "searches" / name
    if not (folder / "search.json").is_file():
        return ""
    search, trials = load_search(folder), read_trials(folder / "trials.csv")
    config, space, num_images = search.config, list(search.space), search.num_val_images
    whole = [trial for trial in trials if trial.status == "completed" and trial.measures[search.metric] is not None]
    if not whole:
        return ""
    whole.sort(key=lambda trial: trial.measures[search.metric] or 0.0, reverse=search.mode == "max")
    shown = {f"val_accuracy_{i}": title for i, title in CLASSIFIERS.items()}
    if search.metric not in ("val_accuracy", *shown):
        shown[search.metric] = describe_metric(search.metric)
    lines = [
        [
            ROLE_NAMES.get(trial.role, "sampled"),
            *(format_parameter(trial.params[parameter]) for parameter in space),
            *(format_value(name, trial.measures[name]) for name in shown),
        ]
        for trial in whole[:MOST_TRIALS]
    ]
    error = accuracy_standard_error(whole[0].measures["val_accuracy"] or 0.0, num_images)
    more = f", the best {MOST_TRIALS} of them" if len(whole) > MOST_TRIALS else ""
    others = Counter(trial.status for trial in trials if trial not in whole)
    told = ", ".join(f"{number} {'unfinished' if status == 'running' else status}" for status, number in others.items())
    heading = (
        f"**Search `{name}`**: CIFAR-100, {network(config)}, {len(trials)} trials of up to "
        f"{config.epochs} epochs, one run each; accuracy in percent on {num_images:,} held-out training images "
        f"(standard error near {error:.1f} points), of those that reached the last epoch{more}"
        f"{f'; the others: {told}' if told else ''}."
    )
    parts = [heading, markdown(["", *(f"`{p}`" for p in space), *shown.values()], lines)]
    records = [search.fields]
    if (confirmation := load_confirmation(folder)) is not None:
        records.append(confirmation.fields)
        values = []
        for arm in confirmation.arms:
            label = ROLE_NAMES.get(arm.role) or f"trial {arm.trial_id} ({format_weights(arm.params, space)})"
            values.append(f"{label} {', '.join('diverged' if v is None else f'{v:.2f}' for v in arm.values)}")
        status = "" if confirmation.status == "finished" else f" ({confirmation.status})"
        parts.append(
            f"Run again over {confirmation.num_rounds} fresh seeds{status}, each with its own validation split: "
            f"{'; '.join(values)}. {' '.join(confirmation.verdict)}"
        )
    return "\n\n".join([*parts, origin(records)])


# ---------------------------------------------------------------- the pages


def all_sections(results: Path = RESULTS) -> str:
    sections = [plan_section(name, plan, results) for name, plan in TABLE_PLANS.items()]
    sections += [search_section(name, results) for name in (*SEARCH_PLANS, CONFIRMED_SEARCH)]
    if (drawing := effects_figure(results)) is not None:
        sections.append(f"**What the settings do**, by the trials of `{EFFECTS_SEARCH}`. {drawing[1]}")
        sections.append(f"![{drawing[1]}]({EFFECTS_FIGURE.name})")
    return "\n\n".join(filter(None, sections))


def summary(results: Path = RESULTS) -> str:
    """Make the README's tables: the published network, what self distillation gives, and what else was measured."""
    return "\n\n".join([*published_network(results), *answer(results), other_answers(results)])


def published_network(results: Path) -> Iterator[str]:
    """Write the accuracies of the published ResNet18 beside those that others publish; nothing where it was not run."""
    groups: dict[tuple[int, float, str], list[dict[str, Any]]] = {}  # epochs, share held out, where -> records
    for path in sorted((results / "runs").glob("*.json")):
        record = read_json(path)
        config = record["config"]
        trained = config["model"], config["dataset"], config["width"], config["recipe"]
        is_published = trained == ("resnet18", "cifar100", PUBLISHED_WIDTH, "modern")
        if is_published and record.get("arm", "reference") == "reference" and "error" not in record:
            hardware = record["hardware"]
            device = hardware["device"] if hardware["device"] != "cpu" else f"{hardware['threads']} CPU threads"
            where = f"{device}, {record['precision']}"
            groups.setdefault((config["epochs"], config["val_fraction"], where), []).append(record)
    if not groups:
        return
    columns = by_classifier("accuracy")
    rows = [
        [source, "200", "1", *(f"{v:.2f}" for v in values), *[NOTHING] * (len(columns) - len(values)), NOTHING]
        for source, values in PUBLISHED["resnet18"].items()
    ]
    for (epochs, held_out, where), records in sorted(groups.items()):
        hours = statistics.median(record["elapsed_s"] for record in records) / 3600
        name = "byot" + (f", trained on {100 * (1 - held_out):.0f} % of the images" if held_out else "")
        measured = [describe(records, column) for column in columns]
        rows.append([name, str(epochs), str(len(records)), *measured, f"{where}, {hours:.1f} h"])
    yield (
        "The published ResNet18 (width 64) on CIFAR-100: test accuracy in percent after the last epoch; the reference "
        "implementation's are of the epoch that is best on the test set."
    )
    yield markdown(["", "epochs", "n", *(column.title for column in columns), "on"], rows)


def answer(results: Path) -> Iterator[str]:
    """Write the main arms' accuracies and their differences; nothing where not even the reference's was run."""
    runs = {arm: of_arm for arm, of_arm in without_diverged(load_runs(ANSWER, results)).items() if arm in ANSWER_ARMS}
    if "reference" not in runs:
        return
    base = TABLE_PLANS[ANSWER].base
    errors = by_classifier("ece")
    cells = compare_arms(runs, [*product(ANSWER_PAIRS, ACCURACIES), *product([CALIBRATED], errors)])

    def difference(pair: Pair, columns: Sequence[Column]) -> list[str]:
        (_, arm), (_, other) = (ANSWER_ARMS[one] for one in pair)
        return [f"{arm} minus {other}", *(cells.get((pair, column), NOTHING) for column in columns)]

    rows = [
        [ANSWER_ARMS[arm][0], *(describe(list(of_arm.values()), column) for column in ACCURACIES)]
        for arm, of_arm in runs.items()
    ]
    rows += [difference(pair, ACCURACIES) for pair in ANSWER_PAIRS if len(common_seeds(runs, pair)) > 1]
    label, *values = difference(CALIBRATED, errors)
    rows.append([f"calibration error: {label}", *values, ""])
    yield (
        f"CIFAR-100, {network(base)}, {base.epochs} epochs, {len(runs['reference'])} seeds: test accuracy in percent, "
        "mean ± standard deviation. Differences are paired by seed, ± half of a 95 % interval. Bold: the interval "
        f"leaves out 0. Star: it still does when corrected for all {len(cells)} comparisons. "
        '"Half the cost": early exit at half of the multiply-adds, its thresholds cross-fitted on the test images.'
    )
    yield markdown(["", *(column.title for column in ACCURACIES)], rows)


def other_answers(results: Path) -> str:
    speed = read_json(results / "benchmarks" / "r18-w64-2-threads.json")["rows"][0]
    methods = read_json(results / "benchmarks" / "search-quality.json")["families"]["digits"]["methods"]
    ours, stock, unstopped = (
        "{mean:.2f} ± {half:.2f}".format(**methods[name]["final"]) for name in ("ours", "stock", "tpe")
    )
    rows = [
        [
            "training speed",
            f"ResNet18 of width 64, {speed['threads']} CPU threads",
            f"{speed['images_per_s']:.1f} images/s in bf16; {speed['reference_images_per_s']:.1f} by a plain loop in "
            "float32 with PIL transforms, as the reference's",
        ],
        [
            "points between the best setting and the one found",
            "replayed runs on the digits, 30 seeds; the early stopping was designed on these runs",
            f"ours {ours} (half of a 95 % interval); Optuna, nothing stopped, {unstopped}; Optuna and Ray's ASHA "
            f"{stock}",
        ],
        ["anything on a GPU", "", "never run; in the tests a CPU plays the CUDA graphs"],
    ]
    return markdown(["what else", "measured on", "result"], rows)


def make_pages() -> dict[Path, str]:
    """Make each page's tables anew."""
    made = {README: summary(), RESULTS_PAGE: all_sections()}
    return {path: with_tables(path.read_text(encoding="utf-8"), tables) for path, tables in made.items()}


def with_tables(page: str, tables: str) -> str:
    """Put new tables between a page's two marks. Raises ValueError where a mark is missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN} and {END} for the tables to go between")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def exits_figure() -> bytes:
    """Draw accuracy against cost of the network that ships, as SVG."""
    from analysis.figures import to_svg
    from analysis.run_figures import draw_run

    test = read_json(RESULTS / "networks" / SHIPPED_NETWORK / "exits-test.json")["test"]
    return to_svg(draw_run({}, test)["cost"][0])


def effects_figure(results: Path = RESULTS) -> "Drawing | None":
    """Draw what each searched parameter does; None without the search's records, or where it has too few trials."""
    folder = results / "searches" / EFFECTS_SEARCH
    if not folder.is_dir():
        return None
    import matplotlib as mpl

    from analysis.figures import STYLE, draw_effects
    from analysis.trials import load_trials

    with mpl.rc_context(STYLE):
        return draw_effects(load_search(folder), load_trials(folder))


def main() -> None:
    parser = Parser(prog="readme_tables.py", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into README.md and docs/results.md")
    arguments = parser.parse_args()
    with one_sentence_errors("readme_tables.py"):
        if arguments.write:
            for path, page in make_pages().items():
                write_output(path, page)
            from analysis.figures import to_svg

            write_output(EXITS_FIGURE, exits_figure().decode())
            if (drawing := effects_figure()) is not None:
                write_output(EFFECTS_FIGURE, to_svg(drawing[0]).decode())
        else:
            print(summary(), all_sections(), sep="\n\n")


if __name__ == "__main__":
    main()
