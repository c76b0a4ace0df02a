"""How much a short run tells of a long one: rank correlations of the same configurations, recorded by curves.py.

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
import torch
from scipy.stats import rankdata

from benchmarks.quality.curves import FOLDER, TRANSFER, Curves, curves_path, load_curves
from byot.config import TrainConfig, work_after
from byot.system.files import write_json
from byot.system.flags import Parser, one_sentence_errors
from byot.system.paths import absolute_path, check_writable_file
from byot.system.provenance import provenance

RESAMPLES, BOOTSTRAP_SEED = 10_000, 0
LONG = ("modern-e24", "reference-e40")
LEAST = 4  # configurations
Values = dict[int, list[float]]  # number of the configuration -> accuracy, one value a seed


def values_after(recorded: Curves, epoch: int) -> Values:
    found: Values = {}
    for curve in recorded.curves:
        accuracies = curve.values["val_accuracy"]
        found.setdefault(curve.number, []).append(accuracies[epoch - 1] if epoch <= len(accuracies) else 0.0)
    return found


def spread(values: Values) -> dict[str, float | None]:
    """Standard deviations in points: between configurations, and between seeds of one, pooled over those with several.

    None where there is none such.
    """
    means = [np.mean(same) for same in values.values()]
    several = [same for same in values.values() if len(same) > 1]
    squares = sum(float(np.var(same)) * len(same) for same in several)
    return {
        "sd_between_configurations": float(np.std(means, ddof=1)) if len(means) > 1 else None,
        "sd_between_seeds": math.sqrt(squares / sum(len(same) - 1 for same in several)) if several else None,
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's along the last axis, ties at their mean rank; NaN where all values of one are equal."""
    a, b = (rankdata(x, axis=-1) - (x.shape[-1] + 1) / 2 for x in (a, b))
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.divide((a * b).sum(-1), scale, out=np.full(scale.shape, np.nan), where=scale > 0)


def within_better_half(short: np.ndarray, long: np.ndarray) -> np.ndarray:
    better = np.argsort(-long, axis=-1, kind="stable")[..., : (long.shape[-1] + 1) // 2]
    return rank_correlation(*(np.take_along_axis(x, better, axis=-1) for x in (short, long)))


def agreement(short: Values, long: Values) -> dict[str, Any]:
    """Both rank correlations over the configurations that both have, each with its interval."""
    both = sorted(set(short) & set(long))
    means = [np.array([np.mean(values[number]) for number in both]) for values in (short, long)]
    drawn = np.random.default_rng(BOOTSTRAP_SEED).integers(len(both), size=(RESAMPLES, len(both)))
    found: dict[str, Any] = {"configurations": len(both)}
    for name, correlate in (("all", rank_correlation), ("better_half", within_better_half)):
        resampled = correlate(*(x[drawn] for x in means))
        low, high = np.quantile(resampled[np.isfinite(resampled)], (0.025, 0.975)).tolist()
        found[name] = {"rank_correlation": float(correlate(*means)), "low": low, "high": high}
    return found


def compare(folder: Path) -> dict[str, dict[str, Any]]:
    """For each long run one row for each that is shorter in arithmetic, and one for the long run cut off there."""
    names = [f"{recipe}-e{epochs}" for recipe, epochs in TRANSFER]
    recorded = {name: load_curves(path) for name in names if (path := curves_path(name, folder)).exists()}
    configs = {name: TrainConfig.from_dict(one.header["config"]) for name, one in recorded.items()}
    work = {name: work_after(config, config.epochs) for name, config in configs.items()}
    found = {}
    for long in LONG:
        if long not in recorded:
            continue
        whole = values_after(recorded[long], configs[long].epochs)
        rows = []
        for short in recorded:
            own = values_after(recorded[short], configs[short].epochs)
            if work[short] >= work[long] or len(set(own) & set(whole)) < LEAST:
                continue
            cut_at = min(range(1, configs[long].epochs), key=lambda n: abs(work_after(configs[long], n) - work[short]))
            cut = {n: same for n, same in values_after(recorded[long], cut_at).items() if n in own}
            for ended, values in ((short, own), (f"{long} cut at epoch {cut_at}", cut)):
                arithmetic = {"short": short, "arithmetic": work[short] / work[long]}
                rows.append({"ended": ended, **arithmetic, **agreement(values, whole), **spread(values)})
        found[long] = {"configurations": len(whole), **spread(whole), "rows": rows}
    return found


def to_text(found: dict[str, dict[str, Any]]) -> str:
    def sd(value: float | None) -> str:
        return "unknown" if value is None else f"{value:.2f}"

    def interval(of: dict[str, float]) -> str:
        return f"{of['rank_correlation']:.2f} [{of['low']:.2f}, {of['high']:.2f}]"

    lines = []
    for long, one in found.items():
        lines.append(
            f"{long}: {one['configurations']} configurations; sd in points between them "
            f"{sd(one['sd_between_configurations'])}, between seeds {sd(one['sd_between_seeds'])}"
        )
        head = f"  {'rank correlation with it of':31}{'its arithmetic':>14}{'n':>4}{'all':>22}{'better half':>22}"
        lines.append(f"{head}{'sd of seeds':>13}")
        for row in one["rows"]:
            lines.append(
                f"  {row['ended']:31}{row['arithmetic']:>14.0%}{row['configurations']:>4}{interval(row['all']):>22}"
                f"{interval(row['better_half']):>22}{sd(row['sd_between_seeds']):>13}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = Parser(prog="transfer.py", description=__doc__)
    parser.add_argument("--curves", metavar="DIR", default=str(FOLDER), help="recorded curves [results/curves]")
    parser.add_argument("--output", metavar="FILE", help="write the record here as JSON")
    arguments = parser.parse_args()
    with one_sentence_errors("transfer.py"):
        folder = absolute_path(arguments.curves)
        output = None if arguments.output is None else check_writable_file(arguments.output)
        found = compare(folder)
        if not any(one["rows"] for one in found.values()):
            raise ValueError(f"{folder} has no long and short runs of {LEAST} configurations yet: run curves.py first")
    print(to_text(found))
    if output is not None:
        write_json(
            output,
            {"resamples": RESAMPLES, "seed": BOOTSTRAP_SEED, "families": found, **provenance(torch.device("cpu"))},
        )


if __name__ == "__main__":
    main()
