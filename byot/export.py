"""Write a trained network as files that other programs run: ONNX, or torch.export.

  python byot/export.py NAME --format onnx            one graph with the logits of all exits
  python byot/export.py NAME --format onnx --stages   one graph a stage, to stop early between them
  python byot/export.py NAME --format torch --exit 2  one exit, without the layers it does not need

Input: float images [N,3,H,W] from 0 to 1; they are normalised inside. manifest.json beside the graphs has the class
names, the image size, and each exit's temperature and threshold.
"""

from importlib.util import find_spec

if find_spec("byot") is None:
    raise SystemExit("byot is not installed for this Python: activate its .venv, or pip install -r requirements.txt")

import tempfile
from pathlib import Path

from byot.config import exit_numbers
from byot.console import waiting
from byot.system.files import UnreadableError, read_json, refusals_at, write_json, write_whole
from byot.system.flags import Parser, one_sentence_errors, tell
from byot.system.paths import check_writable

MANIFEST = "manifest.json"
NEEDED = {"onnx": ("onnx", "onnxscript"), "torch": ()}


def build_parser() -> Parser:
    parser = Parser(prog="export.py", description=__doc__)
    parser.add_argument("run", help="a run, by its name, folder or checkpoint file")
    parser.add_argument(
        "--format", choices=("onnx", "torch"), required=True, help="ONNX (.onnx) or torch.export (.pt2)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--stages", action="store_true", help="one graph a stage instead of one with all exits")
    what.add_argument("--exit", type=int, metavar="N", help="one exit alone, 1 to 4")
    parser.add_argument("--output", metavar="DIR", help="where the files go (default: RUN/export/FORMAT…)")
    return parser


def check_packages(file_format: str) -> None:
    """Raise ValueError where a package that the format needs is not installed."""
    missing = [package for package in NEEDED[file_format] if find_spec(package) is None]
    if missing:
        raise ValueError(f"--format {file_format} needs {' and '.join(missing)}: pip install 'byot[export]'")


def check_output(given: Path | str) -> Path:
    """Make a folder's path absolute. Raises ValueError unless it can be made, is empty or holds an earlier export."""
    folder = check_writable(given)
    check_writable(folder.parent)
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not found <= exported_files(folder):
        raise ValueError(f"{folder} holds other files than an export; name another folder with --output")
    return folder


def exported_files(folder: Path) -> set[str]:
    """List the files that a folder has where it holds an export, else none."""
    try:
        return {MANIFEST, *(graph["file"] for graph in read_json(folder / MANIFEST)["graphs"])}
    except (KeyError, TypeError, UnreadableError):
        return set()


def write_folder(folder: Path, files: dict[str, bytes], manifest: dict[str, object]) -> None:
    """Write the files and the manifest; the folder never has a part of them, or of those it had before."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new = Path(temporary) / "new"
        for name, content in files.items():
            write_whole(new / name, [content])
        write_json(new / MANIFEST, manifest)
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        new.rename(folder)


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("export.py"), waiting("loading PyTorch and the network"):
        check_packages(arguments.format)

        from byot.exits import exits_command, load_rule, warn_of_age
        from byot.graphs import render
        from byot.predictor import DEEPEST_ALONE
        from byot.runs import find_run, load_network

        saved = find_run(arguments.run)
        warn_of_age(saved.folder, saved.checkpoint)
        numbers = exit_numbers(saved.config.num_classifiers)
        if arguments.exit is not None and arguments.exit not in numbers:
            raise ValueError(f"--exit must be one of {', '.join(map(str, numbers))}, not {arguments.exit}")
        kind = "-stages" if arguments.stages else "" if arguments.exit is None else f"-exit-{arguments.exit}"
        default = saved.folder / "export" / f"{arguments.format}{kind}"
        output = check_output(default if arguments.output is None else arguments.output)
        rule, network = load_rule(saved.folder), load_network(saved)
    if arguments.stages and rule is None and len(numbers) > 1:
        command = exits_command(arguments.run)
        tell(
            "export.py",
            f"only the last exit will answer; after `{command}` an export has the thresholds to stop early",
        )
    with waiting("writing the graphs"):
        files, manifest = render(
            saved, network, rule or DEEPEST_ALONE, arguments.format, stages=arguments.stages, exit=arguments.exit
        )
    with one_sentence_errors("export.py"), refusals_at(output):
        write_folder(output, files, manifest)
    for file, content in files.items():
        print(f"{output / file}  {len(content) / 1e6:.2f} MB")
    print(output / MANIFEST)


if __name__ == "__main__":
    main()
