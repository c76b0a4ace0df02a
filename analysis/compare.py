"""Put runs, or searches, side by side, and say how far they differ, with 95 % intervals.

  python analysis/compare.py RUN RUN …          runs by name, by folder, or by a result.json
  python analysis/compare.py 'a-s*' 'b-s*'      a pattern stands for all finished runs whose names fit it
  python analysis/compare.py SEARCH SEARCH …    searches by name or by folder

Runs that differ in nothing but the seed are one row, their mean. Each row is compared with the first, over the seeds
that both have. Accuracies, of the test set, are in percent; NLL and ECE are those of the deepest classifier. Reads
files only.
"""

from importlib.util import find_spec

if find_spec("byot") is None:
    raise SystemExit("byot is not installed for this Python: activate its .venv, or pip install -r requirements.txt")

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from byot.search_files import find_folder
from byot.system.flags import Parser, one_sentence_errors
from byot.system.paths import absolute_path, outputs_folder

if TYPE_CHECKING:
    import pandas as pd

COMPARED = ("test_accuracy", "test_accuracy_ensemble", "test_nll")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of the rows


class Group(NamedTuple):
    """Finished runs that differ in nothing but the seed."""

    settings: dict[str, Any]  # but for the seed
    runs: "pd.DataFrame"


def build_parser() -> Parser:
    parser = Parser(prog="compare.py", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="runs, patterns of runs, or searches")
    parser.add_argument("--outputs", metavar="DIR", help="where runs and searches are kept (default: outputs/)")
    return parser


# ---------------------------------------------------------------- what was named


def find_results(outputs: Path, name: str) -> list[Path]:
    """Find the result.json of the named run, or of each finished run that a pattern fits; none where it is no run."""
    runs = outputs / "runs"
    if "/" not in name and any(letter in name for letter in "*?["):
        return sorted(runs.glob(f"{name}/result.json"))
    if name.endswith(".json") and (path := absolute_path(name)).is_file():
        return [path]
    if folder := find_folder(runs, name, "result.json"):
        return [folder / "result.json"]
    if folder := find_folder(runs, name, "config.json"):
        raise ValueError(f"the run {folder.name} has not finished: it has no result.json")
    return []


def find_named(outputs: Path, names: list[str]) -> tuple[list[Path], list[Path]]:
    """Find the result.json of each run, and the folder of each search, that was named."""
    results: list[Path] = []
    searches: list[Path] = []
    for name in names:
        found = find_results(outputs, name)
        search = find_folder(outputs / "searches", name, "search.json")
        if found and search:
            raise ValueError(f"{name} is a run and a search: give the path of one")
        if not found and not search:
            raise ValueError(f"there is no finished run and no search {name} in {outputs}")
        results += found
        searches += [search] if search else []
    if results and searches:
        raise ValueError("runs are compared with runs, and searches with searches: name one kind")
    if len(searches) > len(LETTERS):
        raise ValueError(f"these are {len(searches)} searches: at most {len(LETTERS)} can be compared")
    return list(dict.fromkeys(results)), list(dict.fromkeys(searches))


# ---------------------------------------------------------------- runs


def load_groups(paths: list[Path]) -> list[Group]:
    """Read runs and group those that differ in the seed alone, in the order in which they were named."""
    from analysis.trials import SETTINGS, read_run, run_table
    from byot.config import NOT_IDENTITY

    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    names = [name for name in SETTINGS if name == "data_dir" or name not in (*NOT_IDENTITY, "seed")]
    for path in paths:
        row = read_run(path)
        for name in ("test_accuracy", "elapsed_s"):
            if name not in row:
                raise ValueError(f"{path} has no number as {name}")
        if row["dataset"] != "imagefolder":
            row["data_dir"] = None  # other data sets are the same everywhere
        if row["val_fraction"] == 0:
            row["split_seed"] = None  # nothing is split
        key = tuple(row[name] for name in names)
        groups.setdefault(key, []).append(row)
    if len(groups) > len(LETTERS):
        raise ValueError(f"these runs have {len(groups)} different settings: at most {len(LETTERS)} can be compared")
    return [Group({name: rows[0][name] for name in names}, run_table(rows)) for rows in groups.values()]


def runs_table(groups: list[Group]) -> str:
    """Write the means of each group."""
    import pandas as pd

    from byot.config import CLASSIFIERS
    from byot.console import text_table
    from byot.search_files import format_value

    columns = {f"test_accuracy_{suffix}": name for suffix, name in CLASSIFIERS.items()}
    columns |= {"test_nll": "NLL", "test_ece": "ECE %"}
    rows = []
    for letter, group in zip(LETTERS, groups, strict=False):
        means = group.runs.mean(numeric_only=True)
        cells = ["-" if pd.isna(means[name]) else format_value(name, means[name]) for name in columns]
        rows.append((letter, str(len(group.runs)), *cells, str(group.settings["epochs"]), f"{means['elapsed_s']:.0f}"))
    return text_table(("", "runs", *columns.values(), "epochs", "seconds"), rows)


def describe_group(letter: str, group: Group) -> str:
    settings, seeds = group.settings, ", ".join(map(str, sorted(set(group.runs["seed"]))))
    what = f"{settings['model']} width {settings['width']} on {settings['dataset']}, {settings['precision']}"
    more = f" and {len(group.runs) - 1} more" if len(group.runs) > 1 else ""
    return f"{letter}  {group.runs['run'].iloc[0]}{more}\n   {what}, seed{'s' * (len(group.runs) > 1)} {seeds}"


def shown(setting: Any) -> str:
    return f"{setting:.4g}" if isinstance(setting, float) else str(setting)


def compare_groups(first: Group, letter: str, other: Group) -> list[str]:
    """Say in what a group differs from the first, and what the seeds that both have allow to say."""
    from analysis.verdict import describe_metric, judge_pairs

    changed = [name for name, value in other.settings.items() if value != first.settings[name]]
    listed = ", ".join(f"{name} {shown(other.settings[name])} ({shown(first.settings[name])})" for name in changed)
    sentences = [f"{letter} differs from A in {listed}."]
    if confounded := [name for name in ("epochs", "precision") if name in changed]:
        sentences.append(f"{' and '.join(confounded).capitalize()} alone may make a difference between {letter} and A.")
    if {"dataset", "data_dir"} & set(changed):
        perhaps = "" if "dataset" in changed else "perhaps "
        return [*sentences, f"{letter} was {perhaps}tested on other images than A: there is nothing to compare."]
    if len(set(first.runs["seed"]) & set(other.runs["seed"])) < 2:
        return [*sentences, f"It takes two seeds that {letter} and A both have to say whether a difference is real."]
    for metric in COMPARED:
        if first.runs[metric].notna().all() and other.runs[metric].notna().all():
            verdict = judge_pairs(metric, other.runs, first.runs)
            sentences.append(f"{letter} against A, {describe_metric(metric)}: {verdict}")
    return sentences


def describe_runs(paths: list[Path]) -> str:
    from analysis.listing import bullets

    first, *others = groups = load_groups(paths)
    lines = [describe_group(letter, group) for letter, group in zip(LETTERS, groups, strict=False)]
    lines += ["", runs_table(groups)]
    for letter, group in zip(LETTERS[1:], others, strict=False):
        lines += ["", bullets(compare_groups(first, letter, group))]
    return "\n".join(lines)


# ---------------------------------------------------------------- searches


def describe_searches(folders: list[Path]) -> str:
    """Write the best single run of each search, what was confirmed over fresh seeds, and the verdict on it."""
    from statistics import fmean

    from analysis.listing import NOTHING, bullets
    from byot.console import text_table
    from byot.search_files import format_value, load_confirmation, load_search, ranked, read_trials

    rows, verdicts = [], []
    for letter, folder in zip(LETTERS, folders, strict=False):
        search, confirmation = load_search(folder), load_confirmation(folder)
        trials = read_trials(folder / "trials.csv")
        config, metric = search.config, search.metric
        single = confirmed = (NOTHING, NOTHING)
        if best := ranked(trials, metric):
            single = (best[0].trial_id, format_value(metric, best[0].measures[metric]))
        sentences = ["Nothing was run again over fresh seeds."]
        if confirmation is not None:
            sentences = confirmation.sentences
            chosen = [arm.values for arm in confirmation.arms if arm.trial_id == confirmation.final_choice]
            if values := [value for arm in chosen for value in arm if value is not None]:
                confirmed = (confirmation.final_choice, f"{format_value(metric, fmean(values))} ({len(values)})")
        rows.append((letter, metric, str(len(trials)), *single, *confirmed))
        what = f"{config.model} width {config.width} on {config.dataset}, {config.epochs} epochs"
        verdicts.append(f"{letter}  {folder.name}: {what}, {search.status}\n{bullets(sentences)}")
    header = ("", "metric", "trials", "best", "single run", "confirmed", "mean (seeds)")
    return "\n\n".join([text_table(header, rows, num_text=2), *verdicts])


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("compare.py"):
        outputs = outputs_folder(arguments.outputs, only_read=True)
        results, searches = find_named(outputs, arguments.names)
        text = describe_runs(results) if results else describe_searches(searches)
    print(text)


if __name__ == "__main__":
    main()
