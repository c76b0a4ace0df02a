"""Compares this project's early exit with earlyon's, on the same weights, images and processor.

  pip install earlyon
  python benchmarks/quality/early_exit.py --run results/networks/resnet18-w16-cifar100 --data-dir DIR --output FILE

The images that the run was not trained on are split at random, several times. On one part, of 5,000, both fit a
temperature for each exit and its threshold; on the rest they are measured: the accuracy below the deepest classifier's,
and the mean cost as byot/exits.py counts it, with the branches that are asked on the way. earlyon chooses among nine
thresholds, and counts the trunk alone where it keeps to a cost. In time both run the same network in float32, its batch
normalisation folded, each by its thresholds of the first split: image by image, and in batches, which earlyon's leave
as a whole.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import common
from byot.data import LabelledImages, load_images, split_validation
from byot.exit_report import collect_logits, make_answers
from byot.exits import (
    NEVER,
    ExitRule,
    fit_temperatures,
    fit_to_cost,
    fit_to_drop,
    measure_costs,
    predict_early,
)
from byot.graphs import Normalise, Section, cut_sections
from byot.model import fold_batch_norms
from byot.predictor import DEEPEST_ALONE
from byot.runs import find_run, load_network
from byot.system.flags import Parser, one_sentence_errors

ASKED = (("max_drop", 0.5), ("max_drop", 1.0), ("max_drop", 2.0), ("target_cost", 0.5), ("target_cost", 0.75))
NUM_FITTED_ON = 5_000
TIMED_IMAGES = {1: 300, 128: 2048}  # by the batch size


class Slice(nn.Module):
    """Gives one exit's logits of a batch of all exits' logits: a network whose answers are known."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.i = i

    def forward(self, logits: Tensor) -> Tensor:  # [B, K, C] -> [B, C]
        return logits[:, self.i]


def wrap(stages: Sequence[nn.Module], heads: Sequence[nn.Module], num_classes: int, image_size: int) -> Any:
    """Make earlyon's wrapper of a network in stages, of which the last has its classifier in itself."""
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint

    names = [f"stage{i}" for i in range(len(stages))]
    backbone = nn.Sequential()
    for name, stage in zip(names, stages, strict=True):
        backbone.add_module(name, stage)
    points = [ExitPoint(f"exit{i}", name, 1) for i, name in enumerate(names[:-1])]
    exits = {point.name: head for point, head in zip(points, heads, strict=True)}
    config = EarlyExitConfig("custom", num_classes, points)
    return EarlyExitWrapper(backbone, exits, nn.Identity(), config, (1, 3, image_size, image_size)).eval()


def wrap_sections(sections: Sequence[Section], num_classes: int, image_size: int) -> Any:
    *shallow, deepest = sections
    stages = [*(section.layers for section in shallow), nn.Sequential(deepest.layers, deepest.classifier)]
    return wrap(stages, [section.classifier for section in shallow], num_classes, image_size)


def fit_theirs(network: Any, logits: Tensor, labels: Tensor, name: str, value: float) -> ExitRule:
    """Let earlyon choose temperatures and thresholds for logits [K, N, C], and write them as this project does."""
    from earlyon.core.thresholds import calibrate_thresholds, calibrate_thresholds_for_budget

    num_exits, _, num_classes = logits.shape
    stages = [*(nn.Identity() for _ in range(num_exits - 1)), Slice(num_exits - 1)]
    known = wrap(stages, [Slice(i) for i in range(num_exits - 1)], num_classes, 0)
    known._flops_estimate = network.flops_estimate
    loader: Any = DataLoader(TensorDataset(logits.transpose(0, 1), labels), batch_size=1_000)
    given: dict[str, Any] = {"fit_temperature": True, "temperature_loader": loader}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a cost that it cannot keep to, which the table shows
        if name == "max_drop":
            calibrate_thresholds(known, loader, value / 100, **given)
        else:
            calibrate_thresholds_for_budget(known, loader, value, **given)
    config = known.config
    chosen = zip(config.confidence_thresholds, config.enabled_exits, strict=True)
    thresholds = (*(threshold if enabled else NEVER for threshold, enabled in chosen), 0.0)
    return ExitRule(tuple(config.temperatures[head] for head in config.head_names), thresholds)


def compare(run: Path, data_dir: str | None, num_splits: int) -> dict[str, Any]:
    saved = find_run(run)
    config = saved.config.with_settings(data_dir=data_dir, precision="fp32")
    model, normalisation = load_network(saved)
    model = fold_batch_norms(model).to(memory_format=torch.channels_last)
    train, test = (load_images(config.dataset, data_dir, part, config.image_size) for part in ("train", "test"))
    _, held_out = split_validation(train, fraction=config.val_fraction, seed=config.split_seed)
    parts = [collect_logits(model, normalisation, config, images) for images in (held_out, test) if images is not None]
    logits, labels = torch.cat([part[0] for part in parts], dim=1), torch.cat([part[1] for part in parts])
    if len(labels) <= NUM_FITTED_ON:
        raise ValueError(f"{run} was trained on all but {len(labels)} images, too few to fit on {NUM_FITTED_ON}")
    costs = measure_costs(model, config.image_size)
    network = wrap_sections(cut_sections(model, normalisation), model.trunk.fc.out_features, config.image_size)
    found: dict[tuple[str, float], dict[str, dict[str, list[float]]]] = {
        asked: {who: {"drop": [], "cost": []} for who in ("ours", "earlyon")} for asked in ASKED
    }
    rules: dict[str, ExitRule] = {}  # of what is asked first, of the first split
    for seed in range(num_splits):
        order = np.random.default_rng(seed).permutation(len(labels))
        fitted_on, judged_on = order[:NUM_FITTED_ON], order[NUM_FITTED_ON:]
        temperatures = fit_temperatures(logits[:, fitted_on], labels[fitted_on])
        answers = make_answers(logits[:, fitted_on], labels[fitted_on], temperatures)
        for name, value in ASKED:
            fit = fit_to_drop if name == "max_drop" else fit_to_cost
            chosen = {
                "ours": ExitRule(temperatures, fit(answers, costs, value).thresholds),
                "earlyon": fit_theirs(network, logits[:, fitted_on], labels[fitted_on], name, value),
            }
            for who, rule in chosen.items():
                judged = make_answers(logits[:, judged_on], labels[judged_on], rule.temperatures)
                outcome = judged.judge(rule.thresholds, costs)
                found[name, value][who]["drop"].append(100 * float(judged.correct[-1].mean()) - outcome.accuracy)
                found[name, value][who]["cost"].append(outcome.cost)
            rules = rules or chosen
    rows = [{"asked": name, "value": value, **of_both} for (name, value), of_both in found.items()]
    times = time_both(model, Normalise(normalisation), network, rules, test)
    about = {"run": saved.folder.name, "earlyon": version("earlyon"), "num_splits": num_splits}
    return {**about, "rows": rows, "ms": times}


# ---------------------------------------------------------------- time


def time_both(
    model: Any, normalised: Normalise, network: Any, rules: dict[str, ExitRule], test: LabelledImages
) -> dict[int, dict[str, float]]:
    """Time the plain network and both ways of leaving early, each by its own rule, at each batch size."""
    from earlyon.staged import staged_model

    config, theirs, ours = network.config, rules["earlyon"], rules["ours"]
    config.enabled_exits = [threshold < NEVER for threshold in theirs.thresholds[:-1]]
    config.confidence_thresholds = [min(1.0, threshold) for threshold in theirs.thresholds[:-1]]
    config.temperatures = dict(zip(config.head_names, theirs.temperatures, strict=True))
    images = torch.tensor(test.images[: max(TIMED_IMAGES.values())]).permute(0, 3, 1, 2).float() / 255

    def by_rule(rule: ExitRule) -> Callable[[Tensor], Any]:
        return lambda batch: predict_early(model, normalised(batch), rule)

    found = {}
    for size in TIMED_IMAGES:
        earlyon = network.forward_inference_batched if size > 1 else staged_model(network).infer
        methods = {"plain": by_rule(DEEPEST_ALONE), "ours": by_rule(ours), "earlyon": earlyon}
        found[size] = time_methods(methods, images, size)
    return found


@torch.inference_mode()
def time_methods(methods: dict[str, Callable[[Tensor], Any]], images: Tensor, batch_size: int) -> dict[str, float]:
    """Time them in turns on the same batches: milliseconds an image."""
    passed = dict.fromkeys(methods, 0.0)
    images = images[: TIMED_IMAGES[batch_size]]
    batches = images.split(batch_size)
    for i, batch in enumerate((batches[0], *batches)):
        for name, method in methods.items():
            started = time.perf_counter()
            method(batch)
            if i:  # the first calls are slower
                passed[name] += time.perf_counter() - started
    return {name: 1000 * seconds / len(images) for name, seconds in passed.items()}


# ---------------------------------------------------------------- telling


def table(record: dict[str, Any]) -> str:
    """Write what was asked, what both came to on the other images, and what they took; means ± sd of the splits."""
    rows = []
    for row in record["rows"]:
        cells = []
        for who in ("ours", "earlyon"):
            cells += [common.mean_and_sd(row[who]["drop"]), f"{statistics.mean(row[who]['cost']):.3f}"]
        rows.append([f"{row['asked'].replace('_', ' ')} {row['value']:g}", *cells])
    times = [[str(size), *(f"{ms:.3f}" for ms in of_size.values())] for size, of_size in record["ms"].items()]
    return "\n\n".join(
        [
            common.markdown(["asked", "ours: drop", "cost", "earlyon: drop", "cost"], rows),
            common.markdown(["batch", "plain, ms an image", "ours", "earlyon"], times),
        ]
    )


def main() -> None:
    parser = Parser(prog="early_exit.py", description=__doc__)
    parser.add_argument("--run", type=common.path, required=True, metavar="RUN", help="a run's folder")
    parser.add_argument("--data-dir", type=common.data_dir, metavar="DIR", help="where its data set is")
    parser.add_argument("--splits", type=common.number(2), default=20, metavar="S", help="random splits [20]")
    parser.add_argument("--output", type=common.file_to_write, metavar="FILE", help="write the record there, as JSON")
    arguments = parser.parse_args()
    with one_sentence_errors("early_exit.py"):
        try:
            import earlyon  # noqa: F401
        except ImportError as error:
            raise ValueError("earlyon is not installed: pip install earlyon") from error
        record = compare(arguments.run, arguments.data_dir, arguments.splits)
    common.save_record(arguments.output, record)
    print(table(record))


if __name__ == "__main__":
    main()
