"""Says which networks tables.py trains, with which settings and seeds, and where their records lie."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.harder_images import ALL_IMAGES, TrainingImages
from byot.config import TrainConfig, work_after
from byot.search_files import find_choice, load_search, read_trials
from byot.system.files import errors_in, read_json
from byot.system.paths import PROJECT_ROOT
from search.space import DEFAULT_SPACE

Arm = Literal[
    "plain",
    "deep-supervision",
    "reference",
    "bf16",
    "searched",
    "label-smoothing",
    "no-hint",
    "no-distillation",
    "ensemble-teacher",
    "paper-form",
    "wide-branches",
]

RESULTS = PROJECT_ROOT / "results"
MOST_SEEDS = 100  # looked for of an arm
ARM_NAMES: dict[Arm, str] = {
    "plain": "plain cross-entropy (an ordinary ResNet)",
    "deep-supervision": "deep supervision alone",
    "reference": "self distillation, the reference's setting",
    "bf16": "self distillation, the reference's setting, in bf16",
    "searched": "self distillation, the searched setting",
    "label-smoothing": "deep supervision alone, labels smoothed by 0.1",
    "no-hint": "self distillation without the hint",
    "no-distillation": "the hint alone",
    "ensemble-teacher": "self distillation, the ensemble as teacher",
    "paper-form": "self distillation, the paper's form of the loss",
    "wide-branches": "self distillation, the reference's setting, wide branches",
}
FIXED_ARMS: dict[Arm, dict[str, Any]] = {
    "plain": {"alpha": 0.0, "beta": 0.0, "loss_form": "plain"},
    "deep-supervision": {"alpha": 0.0, "beta": 0.0},
    "reference": {},
    "bf16": {"precision": "bf16"},
    "label-smoothing": {"alpha": 0.0, "beta": 0.0, "label_smoothing": 0.1},
    "no-hint": {"beta": 0.0},
    "no-distillation": {"alpha": 0.0},
    "ensemble-teacher": {"teacher": "ensemble"},
    "paper-form": {"loss_form": "paper"},
    "wide-branches": {"branch": "wide"},
}


class TablePlan(NamedTuple):
    """Runs without validation images, each read on the test set once, after its last epoch."""

    base: TrainConfig
    search: str | None = None  # whose choice the arm `searched` trains: a name in results/searches or OUTPUTS/searches
    num_seeds: int = 3
    arms: tuple[Arm, ...] = ("plain", "deep-supervision", "reference", "searched")
    side_arms: tuple[Arm, ...] = ()  # trained after those, over half as many seeds
    images: TrainingImages = ALL_IMAGES


class SearchPlan(NamedTuple):
    """A search with the command line's own program."""

    base: TrainConfig
    flags: tuple[str, ...]


def epochs_of(work: float, base: TrainConfig) -> int:
    """Count the most whole epochs that take no more arithmetic than so many at full resolution."""
    return int(work * base.epochs / work_after(base, base.epochs))


R18, R50 = (TrainConfig(recipe="modern", model=model) for model in ("resnet18", "resnet50"))
W16 = R18.with_settings(width=16, precision="fp32")  # on any machine: runs of a plan must not differ in it
TABLE_PLANS = {
    "modern-r18": TablePlan(
        R18.with_settings(epochs=16),
        search="search-w16",
        arms=("reference",),
        side_arms=("plain", "deep-supervision", "searched"),
    ),
    "modern-r18-long": TablePlan(R18.with_settings(epochs=30), num_seeds=1, arms=("reference",)),
    # A guess at what fits into 2.5 hours on two cores.
    "modern-r50": TablePlan(R50.with_settings(epochs=6), num_seeds=1, arms=("reference",)),
    "modern-w16": TablePlan(W16.with_settings(epochs=epochs_of(8, W16)), num_seeds=5, arms=("reference", "bf16")),
    "modern-w16-short": TablePlan(W16.with_settings(epochs=epochs_of(3, W16)), arms=("reference",)),
    "answer-w16": TablePlan(
        R18.with_settings(width=16, epochs=8),
        search="search-w16",
        num_seeds=8,
        side_arms=("label-smoothing", "no-hint", "no-distillation", "ensemble-teacher", "paper-form", "wide-branches"),
    ),
    "answer-w16-long": TablePlan(R18.with_settings(width=16, epochs=24), search="search-w16"),
    "answer-w32": TablePlan(R18.with_settings(width=32, epochs=8), search="search-w16", num_seeds=4),
    # A part of the images, with as many epochs as the recipe has for a run.
    "images10-w16": TablePlan(W16, search="search-w16", num_seeds=8, images=TrainingImages(share=0.1)),
    "images30-w16": TablePlan(W16, search="search-w16", num_seeds=4, images=TrainingImages(share=0.3)),
    "noisy20-w16": TablePlan(
        W16.with_settings(epochs=8), search="search-w16", num_seeds=4, images=TrainingImages(wrong=0.2)
    ),
    "reference-r18": TablePlan(TrainConfig(recipe="reference", model="resnet18"), search="search-r18"),
    "reference-r50": TablePlan(TrainConfig(recipe="reference", model="resnet50"), search="search-r18"),
    "tiny": TablePlan(TrainConfig(recipe="reference", model="resnet18", width=16, epochs=6), search="search-tiny"),
}
SEARCHED = TrainConfig(
    recipe="reference",
    model="resnet18",
    val_fraction=0.1,
    seed=100,  # none of the tables': a setting that has luck with a seed is not measured with the same one
)
SEARCHED_MODERN = R18.with_settings(width=16, epochs=8, val_fraction=0.1, seed=SEARCHED.seed)
SEARCH_PLANS = {
    # A fifth of the epochs: the first rung, when the learning rate has dropped once, is at epoch 16.
    "search-r18": SearchPlan(SEARCHED.with_settings(epochs=40), ("--num-samples", "24", "--gpus-per-trial", "0.25")),
    "search-w16": SearchPlan(SEARCHED_MODERN, ("--num-samples", "24")),
    "search-exits-w16": SearchPlan(SEARCHED_MODERN, ("--num-samples", "24", "--metric", "val_exit_accuracy")),
    "search-tiny": SearchPlan(SEARCHED.with_settings(width=16, epochs=6), ("--num-samples", "16")),
}


class PlannedRun(NamedTuple):
    """One run of a plan."""

    name: str
    arm: Arm
    config: TrainConfig


def searched_settings(search: str | None, *folders: Path) -> dict[str, float] | None:
    """Read the loss weights that a search chose, confirmed if it was, in the first of the folders that has it.

    None where none is named, none has it, or not all of its trials have ended: what it would choose may change.
    """
    for folder in (searches / search for searches in folders if search is not None):
        if (folder / "best.json").is_file():
            ended = [trial for trial in read_trials(folder / "trials.csv") if trial.status != "running"]
            if len(ended) >= load_search(folder).num_samples:
                settings = find_choice(folder, folder.name).settings
                return {name: settings[name] for name in DEFAULT_SPACE}
    return None


def arms_of(plan: TablePlan, outputs: Path, results: Path = RESULTS) -> dict[Arm, TrainConfig]:
    """List the plan's arms that can be trained now: not the searched one if it equals another or is not known."""
    arms = {arm: plan.base.with_settings(**settings) for arm, settings in FIXED_ARMS.items()}
    searched = searched_settings(plan.search, outputs / "searches", results / "searches")
    if searched is not None and (config := plan.base.with_settings(**searched)) not in arms.values():
        arms["searched"] = config
    return {arm: config for arm, config in arms.items() if arm in plan.arms + plan.side_arms}


def planned_runs(name: str, plan: TablePlan, outputs: Path, results: Path = RESULTS) -> list[PlannedRun]:
    """List the arms of each seed in turn, so that a plan stopped early has as many runs of all; then the side arms."""
    found = arms_of(plan, outputs, results)
    rounds = [(plan.arms, seed) for seed in range(plan.num_seeds)]
    rounds += [(plan.side_arms, seed) for seed in range((plan.num_seeds + 1) // 2)]
    return [
        PlannedRun(f"{name}-{arm}-s{seed}", arm, config.with_settings(seed=seed))
        for arms, seed in rounds
        for arm, config in found.items()
        if arm in arms
    ]


def read_record(results: Path, run: PlannedRun) -> dict[str, Any] | None:
    """Read the record of a finished run, None where there is none. Raises ValueError if it is of another run."""
    path = results / "runs" / f"{run.name}.json"
    if not path.is_file():
        return None
    record = read_json(path)
    with errors_in(path):
        differences = run.config.differing_settings(TrainConfig.from_dict(record.get("config")))
    if differences:
        raise ValueError(f"{path} is of a run with other settings ({', '.join(differences)}): move it away")
    return record
