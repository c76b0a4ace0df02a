"""The command `byot`: each of its commands is the main() of a module, which also says what its flags are.

byot COMMAND --help explains a command.
"""

import sys
from importlib import import_module

COMMANDS = {  # name: the module, and what it does
    "search": ("search.tune", "search the loss weights with Optuna on Ray Tune"),
    "train": ("byot.train", "train one network, also with what a search found best"),
    "evaluate": ("byot.evaluate", "test a trained network, and its early exits"),
    "predict": ("byot.predict", "classify images"),
    "export": ("byot.export", "write a trained network as ONNX or torch.export"),
    "best": ("analysis.best", "the best configurations of a search, and what the noise allows to say"),
    "retrain": ("analysis.retrain", "retrain the best of a search over several seeds"),
    "report": ("analysis.report", "write one page on a search"),
    "compare": ("analysis.compare", "runs or searches side by side, with intervals"),
    "list": ("byot.list_outputs", "the searches and runs there are: state, result, size on disk"),
    "clean": ("byot.clean_outputs", "remove what is no longer needed, after asking"),
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


def main() -> None:
    word, *arguments = sys.argv[1:] or ["--help"]
    if word in ("-h", "--help"):
        print(usage())
        return
    if word not in COMMANDS:
        print(f"byot: {refusal(word)}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"byot {word}", *arguments]  # the program's name, in usage and in errors
    import_module(COMMANDS[word][0]).main()
