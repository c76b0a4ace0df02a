"""Measures how much a short run tells of a long one, by rank correlations of what `curves.py transfer` recorded.

  python benchmarks/quality/transfer.py                                  of what is recorded so far in results/curves
  python benchmarks/quality/transfer.py --output FILE

A short run with a schedule of its own is set beside the long run cut off after the same arithmetic. Cut off it has an
advantage: it is the same run, with the same luck. A configuration's value is the mean over its seeds of the deepest
classifier's validation accuracy, 0 % for a run that diverged. Rank correlations are Spearman's, over all configurations
and within the better half by the long run. Intervals: 95 %, percentile bootstrap over configurations.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from benchmarks import common
from benchmarks.quality.curves import FOLDER, TRANSFER, Curves, load_all
from byot.config import work_after
from byot.console import text_table
from byot.system.flags import Parser, one_sentence_errors

RESAMPLES, BOOTSTRAP_SEED = 10_000, 0
LONG = ("modern-e24", "reference-e40")
LEAST = 4  # configurations
Values = dict[int, list[float]]  # number of the configuration -> accuracy, one value a seed


def values_after(recorded: Curves, epoch: int) -> Values:
    return {
        number: [dict(enumerate(curve.values["val_accuracy"], start=1)).get(epoch, 0.0) for curve in same]
        for number, same in recorded.by_number().items()
    }


def spread(values: Values) -> dict[str, float | None]:
    """Compute standard deviations in points, between configurations and between seeds of one; None where unknown."""
    several = [same for same in values.values() if len(same) > 1]
    squares = sum(float(np.var(same)) * len(same) for same in several)
    between = float(np.std([np.mean(same) for same in values.values()], ddof=1)) if len(values) > 1 else None
    return {
        "sd_between_configurations": between,
        "sd_between_seeds": math.sqrt(squares / sum(len(same) - 1 for same in several)) if several else None,
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute Spearman's along the last axis, ties at their mean rank; NaN where all values of one are equal."""
    a, b = (rankdata(x, axis=-1) - (x.shape[-1] + 1) / 2 for x in (a, b))
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.divide((a * b).sum(-1), scale, out=np.full(scale.shape, np.nan), where=scale > 0)


def within_better_half(short: np.ndarray, long: np.ndarray) -> np.ndarray:
    better = np.argsort(-long, axis=-1, kind="stable")[..., : (long.shape[-1] + 1) // 2]
    return rank_correlation(*(np.take_along_axis(x, better, axis=-1) for x in (short, long)))


def agreement(short: Values, long: Values) -> dict[str, Any]:
    """Compute both rank correlations over the configurations that both have, each with its interval."""
    both = sorted(set(short) & set(long))
    means = [np.array([np.mean(values[number]) for number in both]) for values in (short, long)]
    drawn = np.random.default_rng(BOOTSTRAP_SEED).integers(len(both), size=(RESAMPLES, len(both)))
    found: dict[str, Any] = {"configurations": len(both)}
    for name, correlate in (("all", rank_correlation), ("better_half", within_better_half)):
        low, high = np.nanquantile(correlate(*(x[drawn] for x in means)), (0.025, 0.975)).tolist()
        found[name] = {"rank_correlation": float(correlate(*means)), "low": low, "high": high}
    return found


def compare(folder: Path) -> dict[str, dict[str, Any]]:
    """Compare each long run with each that is shorter in arithmetic, and with itself cut off there."""
    recorded = load_all(TRANSFER, folder)
    work = {name: work_after(one.config, one.config.epochs) for name, one in recorded.items()}
    found = {}
    for long in filter(recorded.__contains__, LONG):
        config = recorded[long].config
        whole, rows = values_after(recorded[long], config.epochs), []
        for short in recorded:
            own = values_after(recorded[short], recorded[short].config.epochs)
            if work[short] >= work[long] or len(set(own) & set(whole)) < LEAST:
                continue
            cut_at = min(range(1, config.epochs), key=lambda n: abs(work_after(config, n) - work[short]))
            cut = {n: same for n, same in values_after(recorded[long], cut_at).items() if n in own}
            for ended, values in ((short, own), (f"{long} cut at epoch {cut_at}", cut)):
                arithmetic = {"short": short, "arithmetic": work[short] / work[long]}
                rows.append({"ended": ended, **arithmetic, **agreement(values, whole), **spread(values)})
        found[long] = {"configurations": len(whole), **spread(whole), "rows": rows}
    return found


def to_text(long: str, found: dict[str, Any]) -> str:
    def sd(value: float | None) -> str:
        return "unknown" if value is None else f"{value:.2f}"

    title = (
        f"{long}: {found['configurations']} configurations; sd in points between them "
        f"{sd(found['sd_between_configurations'])}, between seeds {sd(found['sd_between_seeds'])}"
    )
    rows = [
        [
            f"  {row['ended']}",
            f"{row['arithmetic']:.0%}",
            str(row["configurations"]),
            *("{rank_correlation:.2f} [{low:.2f}, {high:.2f}]".format(**row[of]) for of in ("all", "better_half")),
            sd(row["sd_between_seeds"]),
        ]
        for row in found["rows"]
    ]
    header = ["  rank correlation with it of", "its arithmetic", "n", "all", "better half", "sd of seeds"]
    return f"{title}\n{text_table(header, rows)}"


def main() -> None:
    parser = Parser(prog="transfer.py", description=__doc__)
    parser.add_argument("--curves", type=common.path, metavar="DIR", default=FOLDER, help="[results/curves]")
    parser.add_argument("--output", type=common.file_to_write, metavar="FILE", help="write the record here as JSON")
    arguments = parser.parse_args()
    with one_sentence_errors("transfer.py"):
        found = compare(arguments.curves)
        if not any(one["rows"] for one in found.values()):
            raise ValueError(
                f"{arguments.curves} has no long and short runs of {LEAST} configurations yet: run curves.py first"
            )
    for long, one in found.items():
        print(to_text(long, one))
    common.save_record(arguments.output, {"resamples": RESAMPLES, "seed": BOOTSTRAP_SEED, "families": found})


if __name__ == "__main__":
    main()
