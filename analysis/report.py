"""One page on a search: what was searched, what it allows to say, tables, figures, retrained runs, how to reproduce it.

  python analysis/report.py                        the newest search, into outputs/reports/NAME.html
  python analysis/report.py NAME --output my.html  a named one, or a path to its folder

The page is one file with its figures inside. Reads files alone, also of a search that still runs or was killed.
"""

import base64
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byot.config import TrainConfig
from byot.system.files import write_text
from byot.system.flags import Parser, flag_name, one_sentence_errors
from byot.system.paths import check_writable_file, outputs_folder

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE = "report_page.html"
TOP = 10  # configurations in the ranking
FOLDED_FROM = 40  # trials: a longer table is folded away


def build_parser() -> Parser:
    parser = Parser(prog="report.py", description=__doc__)
    parser.add_argument("search", nargs="?", metavar="SEARCH", help="name of a search (default: the newest)")
    parser.add_argument("--output", metavar="FILE", help="the page (default: OUTPUTS/reports/NAME.html)")
    parser.add_argument("--outputs", metavar="DIR", help="where runs and searches are kept (default: outputs/)")
    return parser


def render_page(folder: Path, outputs: Path) -> str:
    """The page of a search as HTML. Raises ValueError if the search's files are missing or damaged."""
    from datetime import UTC, datetime

    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from analysis.figures import draw_pictures, to_svg
    from analysis.listing import ranking_table, summary_table, trials_table
    from analysis.trials import (
        last_sign_of_life,
        load_curves,
        load_runs,
        load_search,
        load_trials,
        rank,
        retrained_runs,
        summarise_runs,
    )
    from analysis.verdict import count_statuses, describe_status, judge_retrained, judge_search, next_commands
    from byot.search_files import load_confirmation

    search, trials = load_search(folder), load_trials(folder)
    confirmation = load_confirmation(folder)
    retrained = retrained_runs(load_runs(outputs), search, trials)
    summary = summarise_runs(retrained)
    ranked = rank(trials, search["metric"], search["mode"], search["config"]["epochs"])
    pictures = draw_pictures(search, trials, load_curves(folder), retrained, summary, confirmation)
    now = datetime.now(UTC)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(TEMPLATE).render(
        search=search,
        status=describe_status(search, last_sign_of_life(folder), now),
        counts=count_statuses(trials),
        verdict=judge_search(search, trials),
        confirmed_verdict=[] if confirmation is None else confirmation["verdict"],
        retrained_verdict=judge_retrained(search, trials, summary),
        facts=list_facts(search, trials),
        ranking=None if ranked.empty else ranking_table(search, trials, TOP),
        num_ranked=len(ranked),
        runs_a_trial=describe_runs(search),
        trials=trials_table(trials),
        folded=len(trials) >= FOLDED_FROM,
        failed=trials[trials["error"] != ""].to_dict("records"),
        retrained=None if summary.empty else summary_table(search, summary, trials),
        pictures=[(picture, data_address(to_svg(picture.figure))) for picture in pictures],
        space_file=space_file(search["space"]),
        commit=search.get("commit"),
        commands=[tune_command(search), *next_commands(folder, outputs)],
        written=now.strftime("%d %B %Y, %H:%M UTC"),
    )


def list_facts(search: dict[str, Any], trials: "pd.DataFrame") -> list[tuple[str, str]]:
    """What was searched, and where, as (name, value); what a record lacks is left out."""
    from analysis.verdict import describe_metric, format_duration, search_duration

    config, hardware = search["config"], search.get("hardware") or {}
    images = ""
    if search.get("num_train_images") and search.get("num_val_images"):
        images = (
            f": {search['num_train_images']:,} images to train on, {search['num_val_images']:,} of the training set "
            f"held out to compare on (split seed {config['split_seed']})"
        )
    duration = search_duration(search)
    worked = float(trials["seconds"].sum())
    times = [
        "" if duration is None else f"{format_duration(duration)} from start to end",
        f"{format_duration(worked)} of training, summed over the trials" if worked else "",
    ]
    at_once = f", {search['max_concurrent']} at a time" if search.get("max_concurrent") else ""
    machine = [hardware.get("device"), hardware.get("cpu") if hardware.get("cpu") != hardware.get("device") else None]
    cores = f"{hardware['cpu_cores']} cores" if hardware.get("cpu_cores") else None
    smoothing = f", label smoothing {config['label_smoothing']:g}" if config.get("label_smoothing") else ""
    teacher = ", taught by the ensemble" if config.get("teacher") == "ensemble" else ""
    facts = [
        ("network", f"{config['model']}, width {config['width']}, {config['loss_form']} form of the loss"),
        ("data", f"{config['dataset']}{images}"),
        ("budget", f"{search.get('num_samples', len(trials))} trials{at_once}, at most {config['epochs']} epochs each"),
        ("compared by", f"{describe_metric(search['metric'])}, {search['mode']}imum"),
        (
            "recipe",
            f"{config['recipe']}: batch {config['batch_size']}, learning rate {config['lr']:g}, momentum "
            f"{config['momentum']:g}, weight decay {config['weight_decay']:g}, seed {config['seed']}"
            f"{smoothing}{teacher}",
        ),
        ("searched", "; ".join(describe_range(name, bounds) for name, bounds in search["space"].items())),
        ("time", ", ".join(time for time in times if time)),
        ("hardware", ", ".join(str(part) for part in (*machine, cores) if part)),
        ("versions", ", ".join(f"{name} {number}" for name, number in (search.get("versions") or {}).items())),
        ("commit", search.get("commit") or ""),
    ]
    return [(name, value) for name, value in facts if value]


def describe_runs(search: dict[str, Any]) -> str:
    from analysis.verdict import seeds_per_trial

    num_seeds = seeds_per_trial(search)
    return "one run each" if num_seeds == 1 else f"each the mean of {num_seeds} runs"


def describe_range(name: str, bounds: dict[str, Any]) -> str:
    return f"{name} {bounds['low']:g} to {bounds['high']:g}{', logarithmic' if bounds.get('log') else ''}"


def space_file(space: dict[str, Any]) -> str:
    """The search space as the TOML file that search/tune.py --space reads."""
    lines = []
    for name, bounds in space.items():
        log = "true" if bounds.get("log") else "false"
        lines.append(f"{name} = {{ low = {bounds['low']!r}, high = {bounds['high']!r}, log = {log} }}")
    return "\n".join(lines)


def tune_command(search: dict[str, Any]) -> str:
    """The command that starts the same search: its settings, and of the trials' those that are not the defaults."""
    settings = {name: value for name, value in (search.get("settings") or {}).items() if value is not None}
    defaults = TrainConfig().to_dict()
    settings |= {
        name: value
        for name, value in search["config"].items()
        if name not in search["space"] and value != defaults[name] and value is not None
    }
    flags = [
        word
        for name, value in settings.items()
        for word in (flag_name(name), *map(str, value if isinstance(value, list) else [value]))
    ]
    return shlex.join(["python", "search/tune.py", "--space", "space.toml", *flags])


def data_address(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("report.py"):
        outputs = outputs_folder(arguments.outputs)
        page = None if arguments.output is None else check_writable_file(arguments.output)

        from analysis.trials import find_search

        folder = find_search(outputs, arguments.search)
        page = page or check_writable_file(outputs / "reports" / f"{folder.name}.html")
        html = render_page(folder, outputs)
        try:
            write_text(page, html)
        except OSError as error:
            raise ValueError(f"{page} cannot be written ({error.strerror})") from error
    print(page)


if __name__ == "__main__":
    main()
