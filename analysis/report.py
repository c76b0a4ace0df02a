"""One page on a search: what was searched, what it allows to say, tables, figures, retrained runs, how to reproduce it.

  python analysis/report.py                        the newest search, into outputs/reports/NAME.html
  python analysis/report.py NAME --output my.html  a named one, or a path to its folder
  python analysis/report.py --run NAME             a run and its exits, into outputs/reports/run-NAME.html

The page is one file with its figures inside. Reads files alone, also of a search or run that goes on or was killed.
"""

from importlib.util import find_spec

if find_spec("byot") is None:
    raise SystemExit("byot is not installed for this Python: activate its .venv, or pip install -r requirements.txt")

import shlex
from pathlib import Path

from byot.config import TrainConfig
from byot.console import waiting
from byot.search_files import (
    ROLE_SETTINGS,
    Range,
    SearchRecord,
    Space,
    find_search,
    load_confirmation,
    load_search,
    next_commands,
)
from byot.system.files import write_output
from byot.system.flags import Parser, as_called, flag_name, one_sentence_errors
from byot.system.paths import check_writable_file, outputs_folder

TEMPLATE = "report_page.html"
TOP = 10  # configurations in the ranking
FOLDED_FROM = 40  # trials: a longer table is folded away


def build_parser() -> Parser:
    parser = Parser(prog="report.py", description=__doc__)
    of = parser.add_mutually_exclusive_group()
    of.add_argument("search", nargs="?", metavar="SEARCH", help="name of a search (default: the newest)")
    of.add_argument("--run", metavar="RUN", help="name of a run, or its folder")
    parser.add_argument("--output", metavar="FILE", help="the page (default: OUTPUTS/reports/NAME.html)")
    parser.add_argument("--outputs", metavar="DIR", help="where runs and searches are kept (default: outputs/)")
    return parser


def render_page(folder: Path, outputs: Path) -> str:
    """Render the page of a search as HTML. Raises ValueError if the search's files are missing or damaged."""
    from datetime import UTC, datetime

    from analysis import trials as files
    from analysis.explore import draw_interactive, packed_plotly
    from analysis.figures import draw_pictures
    from analysis.listing import ranking_table, summary_table, trials_table
    from analysis.page import fill_template
    from analysis.verdict import (
        count_statuses,
        describe_metric,
        describe_status,
        judge_retrained,
        judge_search,
    )
    from byot.console import format_duration

    search, trials, confirmation = load_search(folder), files.load_trials(folder), load_confirmation(folder)
    retrained = files.retrained_runs(files.load_runs(outputs), search, trials)
    summary = files.summarise_runs(retrained)
    verdicts = [
        confirmation.sentences if confirmation else [],
        judge_search(search, trials, confirmation is not None),
        judge_retrained(search, trials, retrained, confirmation.final_choice if confirmation else ""),
    ]
    curves, num_ranked = files.load_curves(folder), len(files.rank(trials, search.metric))
    interactive = draw_interactive(search, trials, curves)
    return fill_template(
        TEMPLATE,
        draw_pictures(search, trials, curves, retrained, summary, confirmation),
        interactive=interactive,
        plotly=packed_plotly() if interactive else "",
        search=search,
        status=describe_status(search, files.last_sign_of_life(folder), datetime.now(UTC)),
        counts=count_statuses(trials),
        verdicts=[sentences for sentences in verdicts if sentences],
        metric=describe_metric(search.metric),
        seconds=float(trials["seconds"].sum()),
        format_duration=format_duration,
        num_ranked=num_ranked,
        ranking=ranking_table(search, trials, TOP),
        retrained=summary_table(summary, trials),
        trials=trials_table(trials),
        folded=len(trials) >= FOLDED_FROM,
        failed=trials[trials["error"] != ""].to_dict("records"),
        commands=[tune_command(search), *(next_commands(folder, outputs) if num_ranked else [])],
        space_file=space_file(search.space),
    )


def space_file(space: Space) -> str:
    """Write the search space as the TOML file that search/tune.py --space reads."""
    lines = []
    for name, bounds in space.items():
        if isinstance(bounds, Range):
            table = f"low = {bounds.low!r}, high = {bounds.high!r}, log = {str(bounds.log).lower()}"
        else:
            table = f"choices = {bounds.choices!r}"
        lines.append(f"{name} = {{ {table} }}")
    return "\n".join(lines)


def tune_command(search: SearchRecord) -> str:
    """Write the command that starts the same search: its settings, and those of the trials that are no defaults."""
    # A trial has other epochs than a run where none are given, and the recipe decides what the other defaults are.
    defaults = TrainConfig(recipe=search.config.recipe).to_dict() | {"recipe": TrainConfig().recipe, "epochs": None}
    fixed = set(ROLE_SETTINGS["reference"]) - set(search.space)
    config = {n: value for n, value in search.config.to_dict().items() if value != defaults[n] or n in fixed}
    words = [*as_called("python search/tune.py").split(), "--space", "space.toml"]
    for name, value in (search.settings | config).items():
        if value not in (None, []) and name not in search.space:
            words += [flag_name(name), *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("report.py"), waiting("drawing the figures"):
        outputs = outputs_folder(arguments.outputs)
        page = None if arguments.output is None else check_writable_file(arguments.output)

        if arguments.run is None:
            folder = find_search(outputs, arguments.search)
            name = folder.name
        else:
            from analysis.run_page import find_run_folder, render_run_page

            folder = find_run_folder(outputs, arguments.run)
            name = f"run-{folder.name}"  # a search may have the same
        page = page or check_writable_file(outputs / "reports" / f"{name}.html")
        write_output(page, render_page(folder, outputs) if arguments.run is None else render_run_page(folder))
    print(page)


if __name__ == "__main__":
    main()
