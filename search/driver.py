"""One search from its plan to its end: Ray started, the time estimated, the trials run, the result told."""

import logging
import shlex
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from byot.config import TrainConfig
from byot.data import LabelledImages, load_images, split_validation
from byot.files import read_json, write_json
from byot.provenance import find_commit, find_versions, provenance
from byot.trainer import choose_device
from search.cluster import RayStartError, Share, Slots, share, start_ray
from search.settings import SearchSettings, expected_epochs
from search.space import Space, first_points, space_to_dict

if TYPE_CHECKING:
    from search.trial import TrialSetup  # importing it imports Ray

EVALUATION_COST = 1 / 3  # of an image's training step: the forward pass alone
DAY_S = 86400
# Of a trial: Ray's snapshot of the search lags behind by an epoch or two, and one that names a removed checkpoint makes
# the trial fail when the search goes on after a kill.
CHECKPOINTS_KEPT = 4
QUICK_WIDTH = 16


class SearchData(NamedTuple):
    train: LabelledImages
    val: LabelledImages


def load_search_data(base: TrainConfig) -> SearchData:
    """The training images, cut in two; the test set is never opened. Raises ValueError for what is missing."""
    images = load_images(base.dataset, base.data_dir, "train")
    train, val = split_validation(images, fraction=base.val_fraction, seed=base.split_seed)
    assert val is not None
    return SearchData(train, val)


def run_search(
    folder: Path,
    base: TrainConfig,
    settings: SearchSettings,
    space: Space,
    data: SearchData,
    room: Slots | Share,
    *,
    address: str | None,
    resume: bool,
) -> int:
    """Run or go on with a search; returns the exit code: 0 finished, 1 no trial finished, 130 stopped on the way.

    `room` is what is asked for where the resources are known only once Ray has joined the cluster at `address`.
    """
    try:
        start_ray(room if isinstance(room, Slots) else None, address)
    except RayStartError as error:
        print(f"tune.py: Ray did not start ({error})", file=sys.stderr)
        return 1
    import ray

    try:
        if isinstance(room, Slots):
            slots = room
        else:
            found = ray.cluster_resources()
            slots = share(room, int(found.get("CPU", 0)), int(found.get("GPU", 0)), "the cluster")
        if slots.gpus == 0 and choose_device(base.device).type == "cuda":
            base = base.with_settings(device="cpu")  # asked for no GPU, Ray hides none from a trial
        return _run(folder, base, settings, space, data, slots, resume=resume)
    finally:
        ray.shutdown()


def _run(
    folder: Path,
    base: TrainConfig,
    settings: SearchSettings,
    space: Space,
    data: SearchData,
    slots: Slots,
    *,
    resume: bool,
) -> int:
    from ray import tune

    from search.records import SearchRecorder, now, read_rows, trials_table, update_search
    from search.study import BudgetAwareOptunaSearch, DurableAsha
    from search.trial import TrialSetup, run_trial

    folder.mkdir(parents=True, exist_ok=True)
    _log_to_file(folder / "search.log")
    setup = TrialSetup(base, folder / "trials", settings.metric, slots.cpus)
    parameters = list(space)
    if not resume:
        write_json(
            folder / "search.json",
            {
                "name": folder.name,
                "status": "running",
                "started_at": now(),
                "finished_at": None,
                "config": base.to_dict(),
                "settings": settings.to_dict(),
                "space": space_to_dict(space),
                "metric": settings.metric,
                "mode": settings.mode,
                "num_samples": settings.num_samples,
                "max_concurrent": slots.max_concurrent,
                "num_train_images": len(data.train.labels),
                "num_val_images": len(data.val.labels),
                **provenance(torch.device("cuda" if slots.gpus else "cpu")),
            },
        )
    else:
        update_search(folder, status="running", finished_at=None, commit=find_commit(), versions=find_versions())
    print(f"search {folder.name}: {settings.num_samples} trials of {base.model} width {base.width} on {base.dataset}")
    print(f"{len(data.train.labels)} images to train on, {len(data.val.labels)} to compare on, {folder}", flush=True)
    if not resume:
        speed = _measure(setup, slots, data.train)
        print(describe_time(speed, base, settings, slots, len(data.train.labels), len(data.val.labels)), flush=True)

    trainable = tune.with_resources(
        tune.with_parameters(run_trial, setup=setup, train=data.train, val=data.val),
        {"CPU": slots.cpus, "GPU": slots.gpus},
    )
    if resume:
        tuner = tune.Tuner.restore(str(folder / "ray"), trainable=trainable, resume_errored=False)
    else:
        searcher = BudgetAwareOptunaSearch(
            space,
            metric=settings.metric,
            mode=settings.mode,
            epochs=base.epochs,
            first=first_points(space, base),
            num_samples=settings.num_samples,
            seed=base.seed,
        )
        scheduler = DurableAsha(
            metric=settings.metric,
            mode=settings.mode,
            epochs=base.epochs,
            rungs_file=folder / "state" / "rungs.json",
        )
        recorder = SearchRecorder(
            folder,
            parameters=parameters,
            metric=settings.metric,
            mode=settings.mode,
            epochs=base.epochs,
            seed=base.seed,
        )
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=settings.num_samples,
                max_concurrent_trials=slots.max_concurrent,
                time_budget_s=settings.time_budget_s(),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="ray",
                storage_path=str(folder),
                verbose=0,
                callbacks=[recorder],
                failure_config=tune.FailureConfig(max_failures=2),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            ),
        )
    with open(folder / "search.log", "a", encoding="utf-8") as log, redirect_stdout(log):
        tuner.fit()

    rows = read_rows(folder / "trials.csv")
    ended = sum(row["status"] != "running" for row in rows)
    out_of_time = settings.time_budget is not None
    finished = ended >= settings.num_samples or out_of_time
    update_search(folder, status="finished" if finished else "interrupted", finished_at=now())
    print(f"\n{trials_table(rows, parameters, settings.metric, settings.mode)}\n")
    if not finished:
        command = shlex.join([sys.executable, *sys.argv[:1], "--name", folder.name, "--resume"])
        print(f"stopped with {ended} of {settings.num_samples} trials ended; go on with: {command}", flush=True)
        return 130
    if not (folder / "best.json").is_file():
        print(f"no trial reached its last epoch; what went wrong is in {folder}", flush=True)
        return 1
    print(_verdict(folder))
    return 0


def _measure(setup: "TrialSetup", slots: Slots, train: LabelledImages) -> float:
    """Images a second and trial, timed over a few steps on as many workers as will run at once."""
    import ray

    from search.trial import STEPS_TIMED, measure_images_per_s

    few = LabelledImages(*(part[: STEPS_TIMED * setup.base.batch_size] for part in train))
    measure = ray.remote(num_cpus=slots.cpus, num_gpus=slots.gpus)(measure_images_per_s)
    return min(ray.get([measure.remote(setup, few) for _ in range(slots.max_concurrent)]))


def describe_time(
    images_per_s: float,
    base: TrainConfig,
    settings: SearchSettings,
    slots: Slots,
    num_train: int,
    num_val: int,
) -> str:
    """How long a search will take at this speed, and, where that is days, what would make it hours."""
    epoch_s = (num_train + num_val * EVALUATION_COST) / images_per_s
    about = expected_epochs(settings.num_samples, base.epochs) * epoch_s / slots.max_concurrent
    at_most = settings.num_samples * base.epochs * epoch_s / slots.max_concurrent
    text = (
        f"{images_per_s:.0f} images/s a trial, {slots.max_concurrent} at a time: about {_duration(about)}, "
        f"at most {_duration(at_most)}"
    )
    budget = settings.time_budget_s()
    if budget is not None and budget < about:
        text += f"; it will stop after {settings.time_budget}"
    elif about > DAY_S:
        ways = [] if slots.gpus else ["a GPU"]
        if base.width > QUICK_WIDTH:
            ways.append(f"--width {QUICK_WIDTH} (about a tenth of the work of 64)")
        ways.append(f"fewer --epochs than {base.epochs}")
        text += f"\nto make that hours: {', '.join(ways)}"
    return text


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * DAY_S:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / DAY_S:.1f} days"


def _verdict(folder: Path) -> str:
    """The best configuration, what it is compared with, and the commands to run next."""
    best = read_json(folder / "best.json")
    metric = best["metric"]
    told = ", ".join(f"{name} {value:.4g}" for name, value in best["params"].items())
    lines = [f"best: trial {best['trial_id']}, {told}: {metric} {best['value']:.2f}"]
    for other in best["compared_with"]:
        name = "the reference's setting" if other["role"] == "reference" else "deep supervision alone"
        if other["role"] != best["role"]:
            lines.append(f"      {name}: {metric} {other['value']:.2f}")
    name = shlex.quote(folder.name)
    lines += [
        "one run each: whether the difference is more than noise, analysis/best.py says",
        "",
        f"python analysis/best.py {name}",
        f"python byot/train.py --best {name}",
        f"python analysis/retrain.py {name} --top 3 --seeds 3",
        f"python analysis/report.py {name}",
    ]
    return "\n".join(lines)


def _log_to_file(path: Path) -> None:
    """Send what Ray, Optuna and Python warnings have to say to a file; the terminal is for the trials."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    for name in ("ray", "optuna", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
