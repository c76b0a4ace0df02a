"""The command `byot`: each of its commands is the main() of a module, which also says what its flags are.

byot COMMAND --help explains a command.
"""

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

COMMANDS = {  # name: the module, and what it does
    "search": ("search.tune", "search the loss weights with Optuna on Ray Tune"),
    "train": ("byot.train", "train one network, also with what a search found best"),
    "evaluate": ("byot.evaluate", "test a trained network, and its early exits"),
    "predict": ("byot.predict", "classify images"),
    "export": ("byot.export", "write a trained network as ONNX or torch.export"),
    "best": ("analysis.best", "the best configurations of a search, and which lie within its noise"),
    "retrain": ("analysis.retrain", "retrain the best of a search over several seeds"),
    "report": ("analysis.report", "write an HTML report on a search or a run"),
    "compare": ("analysis.compare", "runs or searches side by side, with intervals"),
    "list": ("byot.list_outputs", "the searches and runs there are: state, result, size on disk"),
    "clean": ("byot.clean_outputs", "remove what is no longer needed, after asking"),
}

# Arguments, by metavar or name, that take the name of something in the outputs folder, and where that lies.
NAMED = {
    "RUN": ["runs"],
    "run": ["runs"],
    "SEARCH": ["searches"],
    "warm_start": ["searches"],
    "NAME": ["runs", "searches"],
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {words}" for name, (_, words) in COMMANDS.items()]
    return "\n".join(["usage: byot COMMAND …", "", *lines, "", "byot COMMAND --help explains a command."])


def refusal(word: str) -> str:
    """Say that there is no such command, and which is nearest."""
    from difflib import get_close_matches

    nearest = get_close_matches(word, COMMANDS, n=1)
    return f"there is no command {word!r}" + (f": did you mean {nearest[0]}?" if nearest else "; byot alone lists them")


def complete() -> None:
    """Tell the shell what may follow what was typed so far: argcomplete asks by environment variables."""
    import argcomplete

    from byot.system.flags import Parser
    from byot.system.paths import default_outputs

    typed = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    found = re.match(r"\s*\S+\s+(\S+)\s", typed)  # a command and the space after it
    if found and found[1] in COMMANDS:
        sys.argv = [f"byot {found[1]}"]
        parser = import_module(COMMANDS[found[1]][0]).build_parser()
        os.environ["_ARGCOMPLETE"] = "2"  # the words of the command begin at the second one
    else:
        parser = Parser(prog="byot")
        parser.add_argument("command", choices=COMMANDS)
    for action in parser._actions:
        if folders := NAMED.get(action.dest) or NAMED.get(str(action.metavar)):
            names = names_in(default_outputs(), folders)
            setattr(action, "completer", lambda names=names, **_: names)  # noqa: B010, an attribute of argcomplete's
    argcomplete.autocomplete(parser, always_complete_options="long")


def names_in(outputs: Path, folders: Sequence[str]) -> list[str]:
    return sorted({path.parent.name for kind in folders for path in outputs.glob(f"{kind}/*/*.json")})


def main() -> None:
    if "_ARGCOMPLETE" in os.environ:
        complete()
    word, *arguments = sys.argv[1:] or ["--help"]
    if word in ("-h", "--help"):
        print(usage())
        return
    if word not in COMMANDS:
        print(f"byot: {refusal(word)}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"byot {word}", *arguments]  # the program's name, in usage and in errors
    import_module(COMMANDS[word][0]).main()
