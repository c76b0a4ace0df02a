"""Shows accuracy against time: each recipe at several budgets of epochs, recorded by `curves.py time` on a CPU.

  python benchmarks/quality/time_to_accuracy.py                          of what is recorded so far in results/curves

A tenth of the training images is held out, and accuracy is measured on it after each epoch; the test set is not read.
CPU seconds are the process's own, which other work on the machine changes least, and those of training alone, without
these measurements.
"""

from statistics import fmean

from benchmarks import common
from benchmarks.quality.curves import FOLDER, TIME, Curves, load_all
from byot.config import work_after
from byot.system.flags import Parser, one_sentence_errors


def to_table(recorded: dict[str, Curves]) -> str:
    """Tabulate mean ± standard deviation after the last epoch; the arithmetic is in epochs at full resolution."""
    rows = []
    for config, curves in ((one.config, one.curves) for one in recorded.values()):
        work = work_after(config, config.epochs)
        identity = [f"`{config.recipe}`", str(config.epochs), f"{work:.1f}", str(len(curves))]
        names = ("val_accuracy", "val_accuracy_ensemble")
        accuracies = (common.mean_and_sd([curve.values[name][-1] for curve in curves]) for name in names)
        rows.append([*identity, *accuracies, f"{fmean(curve.cpu_s[-1] for curve in curves):,.0f}"])
    return common.markdown(["recipe", "epochs", "in full epochs", "n", "4/4", "ensemble", "CPU s"], rows)


def main() -> None:
    parser = Parser(prog="time_to_accuracy.py", description=__doc__)
    parser.add_argument("--curves", type=common.path, metavar="DIR", default=FOLDER, help="[results/curves]")
    arguments = parser.parse_args()
    with one_sentence_errors("time_to_accuracy.py"):
        recorded = load_all(TIME, arguments.curves)
        if not recorded:
            raise ValueError(f"{arguments.curves} has no runs to compare yet: run curves.py time first")
    print(to_table(recorded))


if __name__ == "__main__":
    main()
