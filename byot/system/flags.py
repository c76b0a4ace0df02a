"""Command-line flags made from the fields of a settings dataclass, and errors told in one sentence.

Flags that were not given stay out of the parsed result, so that a caller can lay those that were over the
settings of a search or of an earlier run.
"""

import argparse
import atexit
import os
import re
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import MappingProxyType, NoneType, TracebackType
from typing import Any, Literal, NoReturn, get_args, get_origin

from byot.system.files import describe_refusal

INDENT = " " * 6  # of what an example does, where that is below it
MANY_CHOICES = 6  # more are named in a flag's help, not beside the flag
# Errors of the system that are the command line's fault; a full or broken disk is not.
REFUSED = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Fills the paragraphs of a description. Examples keep their lines: two spaces, a command, what it does."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        def lay_out(part: str) -> str:
            if not part.startswith(" "):
                return textwrap.fill(" ".join(part.split()), width, break_on_hyphens=False)
            if max(map(len, part.splitlines())) <= width:
                return part
            lines = []
            for line in re.sub(r"\n {3,}", " ", part).splitlines():  # what each does goes below it
                command, *told = re.split(r"(?<=\S) {2,}", line)
                lines.append(command)
                lines += textwrap.wrap(" ".join(told), width, initial_indent=INDENT, subsequent_indent=INDENT)
            return "\n".join(lines)

        return "\n\n".join(map(lay_out, text.strip("\n").split("\n\n")))


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a bad command line with one sentence and exit code 2."""

    def __init__(self, *, prog: str, description: str | None = None, **kwargs: Any) -> None:
        super().__init__(
            prog=program_name(prog),
            description=as_called(description or ""),
            allow_abbrev=False,
            formatter_class=HelpFormatter,
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            flags = re.findall(r"--[\w-]+", self.format_help())
            near = [get_close_matches(unknown, flags, n=1) for unknown in re.findall(r"--[\w-]+", message)]
            if meant := " and ".join(found[0] for found in near if found):
                message += f": did you mean {meant}?"
        self.exit(2, f"{self.prog}: {one_line(message)}\n")


def program_name(script: str) -> str:
    """Name the program as it was called: `train.py`, or `byot train`."""
    return sys.argv[0] if sys.argv[0].startswith("byot ") else script


def tell(script: str, message: str) -> None:
    """Print a line on standard error, with the program's name before it."""
    print(f"{program_name(script)}: {message}", file=sys.stderr)


def this_command() -> list[str]:
    """Return the words that call this program again, from any folder."""
    if sys.argv[0].startswith("byot "):
        return [sys.executable, "-m", *sys.argv[0].split()]
    return [sys.executable, *map(os.path.abspath, sys.argv[:1])]


def as_called(text: str) -> str:
    """Write the commands in a text as this one was called: where that was `byot`, without the scripts' paths."""
    if not sys.argv[0].startswith("byot "):
        return text
    text = re.sub(r"(torchrun .*)byot/train\.py", r"\1-m byot train", text)
    return re.sub(
        r"(?:python |(?<![\w/]))(?:byot|search|analysis)/(\w+)\.py",
        lambda found: f"byot {'search' if found[1] == 'tune' else found[1]}",
        text,
    )


def one_line(message: str) -> str:
    """Write line breaks, and all else that a terminal would obey and not print, as escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)


def flag_name(setting: str) -> str:
    """Write the flag of a setting; one that is a word of Python ends in an underscore, which the flag leaves out."""
    return "--" + setting.rstrip("_").replace("_", "-")


def add_settings(
    parser: argparse.ArgumentParser,
    settings_class: Any,
    *,
    omit: tuple[str, ...] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Add one flag for each field of a dataclass whose fields carry `metadata={"help": …}`.

    `defaults` are shown in the help in place of the dataclass's own, where the command has others.
    """
    group = parser.add_argument_group("settings")
    for f in fields(settings_class):
        if f.name in omit:
            continue
        kind: Any = f.type
        if NoneType in get_args(kind):  # `str | None`: the flag takes the str
            kind = next(other for other in get_args(kind) if other is not NoneType)
        several = get_origin(kind) is tuple  # `tuple[str, ...]`: the flag takes one or more
        if several:
            kind = get_args(kind)[0]
        default = defaults.get(f.name, f.default)
        shown = " ".join(default) if several else default
        text = f.metadata["help"] + ("" if default is None else f" [{shown}]")
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        are_many = not several and len(choices) > MANY_CHOICES
        if are_many:
            text += f": {', '.join(choices)}"
        group.add_argument(
            flag_name(f.name),
            dest=f.name,
            default=argparse.SUPPRESS,
            nargs="+" if several else None,
            action="extend" if several else "store",
            type=str if choices else kind,
            choices=choices or None,
            metavar=f.name.rstrip("_").upper() if several or are_many else None if choices else kind.__name__.upper(),
            help=text.replace("%", "%%"),
        )


def given_settings(arguments: argparse.Namespace, settings_class: Any) -> dict[str, Any]:
    """Collect the settings named on the command line, and only those."""
    names = {f.name for f in fields(settings_class)}
    return {name: value for name, value in vars(arguments).items() if name in names}


@contextmanager
def one_sentence_errors(program: str) -> Iterator[None]:
    """Turn what a user got wrong into one sentence on standard error and exit code 2.

    That is a ValueError, or what the system refuses: a folder that may not be read, a file where a folder is to be.
    Wrap it around the reading of arguments and inputs only: a later ValueError is a defect and keeps its traceback.
    Ctrl-C ends the program at once, as nothing has begun. Warnings are printed as one line each. From here on, the
    program also ends quietly at Ctrl-C, and once the reader of its output, such as `head`, has gone.
    """
    program = program_name(program)
    _end_quietly()

    def as_one_line(message: Warning | str, *_: Any, **__: Any) -> str:
        return f"{program}: {one_line(str(message))}\n"

    formatted, warnings.formatwarning = warnings.formatwarning, as_one_line
    try:
        yield
    except KeyboardInterrupt:
        print(f"{program}: stopped before it began", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except ValueError as error:
        message = str(error)
    except REFUSED as error:
        message = describe_refusal(error, "a file")
    else:
        return
    finally:
        warnings.formatwarning = formatted
    print(f"{program}: {one_line(as_called(message))}", file=sys.stderr)
    raise SystemExit(2)


@cache
def _end_quietly() -> None:
    """Let neither Ctrl-C nor a pipe that nobody reads any more, at a print or at the last flush, give a traceback."""

    def reader_is_gone(text: str = "") -> bool:
        try:
            print(text, end="", flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return True
        return False

    def on_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if kind is KeyboardInterrupt:
            tell(Path(sys.argv[0]).name, "stopped")
        elif not (kind is BrokenPipeError and reader_is_gone("\n")):  # any text will do
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = on_error
    atexit.register(reader_is_gone)
