"""The best configurations of a search, and which lie within its noise.

  python analysis/best.py                  the newest search
  python analysis/best.py NAME --top 10    a named one, or a path to its folder

Only trials that reached the last epoch are ranked. Reads files alone, also of a search that still runs.
"""

from importlib.util import find_spec

if find_spec("byot") is None:
    raise SystemExit("byot is not installed for this Python: activate its .venv, or pip install -r requirements.txt")

from byot.config import check_range
from byot.system.files import write_output
from byot.system.flags import Parser, one_sentence_errors
from byot.system.paths import check_writable_file, outputs_folder

MAY_GO = ("4/4", "± se", "ensemble", "1/4", "2/4", "3/4")  # of the columns, where a terminal is narrow


def build_parser() -> Parser:
    parser = Parser(prog="best.py", description=__doc__)
    parser.add_argument("search", nargs="?", metavar="SEARCH", help="name of a search (default: the newest)")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="configurations shown [5]")
    parser.add_argument("--csv", metavar="FILE", help="also write the whole ranking to this file")
    parser.add_argument("--outputs", metavar="DIR", help="where runs and searches are kept (default: outputs/)")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("best.py"):
        check_range("--top", arguments.top, low=1)
        outputs = outputs_folder(arguments.outputs, only_read=True)
        target = None if arguments.csv is None else check_writable_file(arguments.csv)

        from datetime import UTC, datetime

        from analysis.listing import bullets, ranking_table
        from analysis.trials import last_sign_of_life, load_trials, rank
        from analysis.verdict import count_statuses, describe_status, judge_search
        from byot.search_files import find_search, load_confirmation, load_search, next_commands

        folder = find_search(outputs, arguments.search)
        search, trials = load_search(folder), load_trials(folder)
        confirmation = load_confirmation(folder)
        ranked = rank(trials, search.metric)
        commands = [] if ranked.empty else next_commands(folder, outputs)
        if target is not None:
            write_output(target, ranked.to_csv(index=False))
    config = search.config
    print(f"search {search.name}: {describe_status(search, last_sign_of_life(folder), datetime.now(UTC))}")
    print(f"{config.model} width {config.width} on {config.dataset}, {config.epochs} epochs")
    print(count_statuses(trials))
    if not ranked.empty:
        print(f"\n{ranking_table(search, trials, arguments.top).to_text(MAY_GO)}")
    print(f"\n{bullets(judge_search(search, trials, confirmation is not None))}")
    if confirmation is not None:
        print(f"\nrun again over fresh seeds:\n{bullets(confirmation.sentences)}")
    if commands:
        print("\nnext:")
        print("\n".join(f"  {command}" for command in commands))


if __name__ == "__main__":
    main()
