"""The settings of one training run: frozen, validated when built, plain JSON on disk.

A setting has one name everywhere: field here, command-line flag, Optuna parameter, column of a table.
Only the standard library is imported, so that `--help` answers at once.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from types import NoneType
from typing import Any, Literal, NamedTuple, Self, get_args, get_origin

ModelName = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "resnext50_32x4d",
    "resnext101_32x8d",
]
DatasetName = Literal["cifar100", "cifar10", "digits", "imagefolder"]
BranchKind = Literal["reference", "lean", "wide"]
LossForm = Literal["reference", "paper", "plain"]
RecipeName = Literal["modern", "reference"]
Teacher = Literal["deepest", "ensemble"]
Precision = Literal["auto", "fp32", "bf16"]
DeviceName = Literal["auto", "cuda", "mps", "cpu"]
BatchNorm = Literal["global", "local"]
Acceleration = Literal["auto", "none", "graph", "compile"]
Placement = Literal["auto", "device", "streamed"]

LARGEST_COUNT = 1_000_000  # of epochs, images a step, trials: more is a slip of the hand
NUM_CLASSIFIERS = 4  # one after each stage of a ResNet; the plain loss form has the deepest alone
# A classifier's suffix in the names of a record, as in val_accuracy_1, and its name in tables. Shallow to deep.
CLASSIFIERS = {str(i): f"{i}/{NUM_CLASSIFIERS}" for i in range(1, NUM_CLASSIFIERS + 1)} | {"ensemble": "ensemble"}


class DatasetInfo(NamedTuple):
    """What is known about a data set before any file is opened."""

    num_classes: int  # of imagefolder 0: they are those of its folder
    image_size: int  # pixels, height = width; imagefolder may have others
    horizontal_flip: bool  # False where a mirrored image is another class or none
    num_train_images: int  # of imagefolder 0 likewise


DATASETS: dict[str, DatasetInfo] = {
    "cifar100": DatasetInfo(num_classes=100, image_size=32, horizontal_flip=True, num_train_images=50_000),
    "cifar10": DatasetInfo(num_classes=10, image_size=32, horizontal_flip=True, num_train_images=50_000),
    "digits": DatasetInfo(num_classes=10, image_size=8, horizontal_flip=False, num_train_images=1_438),
    "imagefolder": DatasetInfo(num_classes=0, image_size=32, horizontal_flip=True, num_train_images=0),
}
SMALLEST_IMAGE, LARGEST_IMAGE = 16, 1024  # pixels a side of an imagefolder
LARGEST_CIFAR_STEM = 64  # pixels a side; larger images have the ImageNet stem


class Recipe(NamedTuple):
    """How a network is trained, apart from the loss weights. Results of two recipes never share a table."""

    epochs: int  # of a run where none are given
    trial_epochs: int  # of a search's trial where none are given
    lr: float  # likewise
    label_smoothing: float  # likewise
    schedule: Literal["multistep", "linear"]
    dataset_normalisation: bool  # the data set's own mean and deviation, not the reference's constants
    optimizer: Literal["sgd", "muon"]
    resolutions: tuple[tuple[float, float], ...]  # (share of the image's side, up to this share of the run)
    augmentation: Literal["reference", "by epochs"]


RECIPES: dict[str, Recipe] = {
    # Spends any budget well: results/recipe-levers.md has what was tried for it.
    "modern": Recipe(
        epochs=30,
        trial_epochs=16,
        lr=0.2,
        label_smoothing=0.0,
        schedule="linear",
        dataset_normalisation=True,
        optimizer="muon",
        resolutions=((0.5, 0.4), (0.75, 0.75), (1.0, 1.0)),
        augmentation="by epochs",
    ),
    # luanyunteng/pytorch-be-your-own-teacher: step schedule, crop and flip, CIFAR-10's normalisation.
    "reference": Recipe(
        epochs=200,
        trial_epochs=200,
        lr=0.1,
        label_smoothing=0.0,
        schedule="multistep",
        dataset_normalisation=False,
        optimizer="sgd",
        resolutions=((1.0, 1.0),),
        augmentation="reference",
    ),
}
RECIPES_OWN = ("epochs", "lr", "label_smoothing")  # settings that are the recipe's where they are not given

# Limits that two places need.
ALPHA = {"low": 0, "high": 1}
TEMPERATURE = {"above": 0}
BETA = {"low": 0}
SEED = {"low": 0, "high": 2**32 - 1}

# The reference drops its learning rate at epochs 75, 130 and 180 of 200.
MULTISTEP_MILESTONES = (75 / 200, 130 / 200, 180 / 200)
MULTISTEP_FACTOR = 0.1
LINEAR_WARMUP = 0.15  # share of the run
WARMUP_START = 0.05  # of the peak: at 0 the first steps would be lost
LONG_RUN_EPOCHS = 30  # from more epochs on, an image is seen so often that it has to be varied more


def exit_numbers(num_classifiers: int) -> range:
    """Number K exits: 1 to 4, or 4 for a network with the deepest classifier alone."""
    return range(NUM_CLASSIFIERS + 1 - num_classifiers, NUM_CLASSIFIERS + 1)


def setting(default: Any, help: str, **limits: float) -> Any:
    """Declare a field with the help text of its flag and, for a number, its limits: see check_range."""
    return field(default=default, metadata={"help": help, "limits": limits})


def check_fields(settings: Any, *names: str) -> None:
    """Check the fields of a settings dataclass, all or those named, against their types and limits.

    A field's type is a Literal, int, float or str, or one of these and None; fields of other types are left to their
    class. An int in a float's place becomes a float: 0 and 0.0 are one setting and give one run name. An int whose
    field has no upper limit is at most LARGEST_COUNT. Raises ValueError.
    """
    for f in fields(settings):
        if not names or f.name in names:
            value = _check_value(f.name, getattr(settings, f.name), f.type, f.metadata["limits"])
            object.__setattr__(settings, f.name, value)


def _check_value(name: str, value: Any, kind: Any, limits: dict[str, float]) -> Any:
    if NoneType in get_args(kind):
        if value is None:
            return None
        kind = next(other for other in get_args(kind) if other is not NoneType)
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {value!r:.40}")
    if kind is str and not (isinstance(value, str) and value):
        raise ValueError(f"{name} must be a text that is not empty, not {value!r:.40}")
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            raise ValueError(f"{name} must be a {'whole ' if kind is int else ''}number, not {value!r:.40}")
        if kind is int and "high" not in limits and value > LARGEST_COUNT:
            raise ValueError(f"{name} must be at most {LARGEST_COUNT}, not {value!r:.40}")
        try:
            value = kind(value)
        except OverflowError:  # an int of hundreds of digits, which JSON allows
            value = math.inf
        check_range(name, value, **limits)
    return value


def check_range(
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raise ValueError unless low <= value <= high and above < value < below. NaN and infinity are in no range."""
    if low <= value <= high and above < value < below:
        return
    if low > -math.inf and high < math.inf:
        limits = f"lie between {low} and {high}"
    elif below < math.inf:
        limits = f"be at least {low} and below {below}"
    elif above > -math.inf:
        limits = f"be a finite number above {above}"
    elif isinstance(value, int):
        limits = f"be at least {low}"
    else:
        limits = f"be a finite number of at least {low}"
    shown = f"{value:g}" if isinstance(value, float) else f"{value!r:.40}"
    raise ValueError(f"{name} must {limits}, not {shown}")


def recipe_defaults(epochs: Literal["epochs", "trial_epochs"] = "epochs") -> dict[str, str]:
    """Write what each recipe has where a setting is not given, for the help of the flags."""
    fields_of = {name: epochs if name == "epochs" else name for name in RECIPES_OWN}
    return {
        name: ", ".join(f"{recipe} {getattr(own, field)}" for recipe, own in RECIPES.items())
        for name, field in fields_of.items()
    }


def known_settings(settings_class: Any, values: Any) -> dict[str, Any]:
    """Check that values read from a file are a dict of settings of this dataclass. Raises ValueError."""
    if not isinstance(values, dict):
        raise ValueError(f"the settings must be a table of names and values, not {values!r:.40}")
    unknown = sorted(str(name) for name in set(values) - {f.name for f in fields(settings_class)})
    if unknown:
        raise ValueError(f"unknown setting {', '.join(unknown)}")
    return values


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every setting of one run. Building one with a value out of range raises ValueError."""

    model: ModelName = setting("resnet18", "network")
    width: int = setting(
        64, "channels of the first stage (64 is the published network, 16 a quick one)", low=1, high=1024
    )
    branch: BranchKind = setting(
        "reference",
        "the layers before a shallow classifier: the reference's; 'lean' ones, which in resnet50 and deeper have a "
        "quarter of the channels; or 'wide' ones, lean with one more 3x3 convolution",
    )
    dataset: DatasetName = setting("cifar100", "data set")
    data_dir: str | None = setting(
        None,
        "folder with the data set: parquet files, or the unpacked archive's cifar-100-python or cifar-10-batches-py "
        "(default: data/, downloaded); of imagefolder train/CLASS/* and test/CLASS/*, or CLASS/*",
    )
    image_size: int = setting(
        None,  # the data set's own
        "pixels a side of an imagefolder's images, a multiple of 8 [32]; other data sets have their own",
    )
    recipe: RecipeName = setting("modern", "optimizer, schedule, image sizes, normalisation and augmentation")
    epochs: int = setting(None, "passes over the training images; the schedule scales with it", low=1)
    batch_size: int = setting(128, "images a step", low=2)  # batch normalisation needs two
    lr: float = setting(None, "peak learning rate", above=0)
    momentum: float = setting(0.9, "momentum", low=0, below=1)
    weight_decay: float = setting(
        5e-4, "L2 penalty; with the modern recipe of the first convolution and the classifiers alone", low=0
    )
    alpha: float = setting(0.1, "weight of the distillation loss, 0 to 1", **ALPHA)
    temperature: float = setting(3.0, "softens the softmax of teacher and students, above 0", **TEMPERATURE)
    beta: float = setting(1e-6, "weight of the hint loss, at least 0", **BETA)
    loss_form: LossForm = setting(
        "reference",
        "'paper' keeps the deepest classifier's label loss at weight 1; 'plain' is that loss alone: an ordinary ResNet",
    )
    label_smoothing: float = setting(
        None, "share of each label that is spread evenly over all classes, in the label loss", low=0, below=1
    )
    teacher: Teacher = setting(
        "deepest", "who teaches: the deepest classifier the shallow ones, or the mean of all logits every classifier"
    )
    seed: int = setting(0, "seed of the weights, the data order and the augmentation", **SEED)
    val_fraction: float = setting(0.0, "share of the training images held out for validation", low=0, high=0.5)
    split_seed: int = setting(0, "seed of the validation split", **SEED)
    device: DeviceName = setting("auto", "where to train")
    precision: Precision = setting("auto", "arithmetic of the forward and backward pass; auto: bf16 where it is fast")
    batch_norm: BatchNorm = setting(
        "global", "over several processes: statistics of the whole batch, or each process's part alone"
    )
    acceleration: Acceleration = setting(
        "auto", "how steps are done: recorded as a CUDA graph, or compiled before; auto: a graph on one CUDA device"
    )
    placement: Placement = setting(
        "auto", "where the images lie: on the device, or in main memory, streamed; auto: on the device if they fit"
    )

    def __post_init__(self) -> None:
        check_fields(self, "recipe", "dataset")
        own = RECIPES[self.recipe]._asdict() | DATASETS[self.dataset]._asdict()
        for name in (*RECIPES_OWN, "image_size"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, own[name])
        check_fields(self)
        self._check_image_size()
        if self.loss_form == "plain" and self.branch != "reference":
            raise ValueError(f"branch {self.branch} is of the shallow classifiers, which loss_form plain does not have")
        if self.loss_form == "plain" and self.teacher == "ensemble":
            raise ValueError("teacher ensemble needs the shallow classifiers, which loss_form plain does not have")

    def _check_image_size(self) -> None:
        own, asked = DATASETS[self.dataset].image_size, self.image_size
        if self.dataset != "imagefolder":
            if asked != own:
                raise ValueError(f"image_size must be {own} with dataset {self.dataset}, not {asked}")
        elif asked % 8 or not SMALLEST_IMAGE <= asked <= LARGEST_IMAGE:
            limits = f"a multiple of 8 between {SMALLEST_IMAGE} and {LARGEST_IMAGE}"
            raise ValueError(f"image_size must be {limits}, not {asked}")

    @property
    def has_imagenet_stem(self) -> bool:
        return self.image_size > LARGEST_CIFAR_STEM

    @property
    def num_classifiers(self) -> int:
        return 1 if self.loss_form == "plain" else NUM_CLASSIFIERS

    @property
    def num_students(self) -> int:
        """Classifiers that are taught by another or by the ensemble."""
        return self.num_classifiers - (self.teacher == "deepest")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Build from a plain dict; settings it lacks take their defaults, unknown ones raise ValueError."""
        known = known_settings(cls, values)
        for name in RECIPES_OWN:
            if name in known and known[name] is None:  # in a record nothing is left open
                raise ValueError(f"{name} must be a number, not None")
        return cls(**known)

    def with_settings(self, **changes: Any) -> Self:
        if changes.get("dataset", self.dataset) != self.dataset:
            changes.setdefault("image_size", None)  # the other data set's own
        return replace(self, **changes)

    def differing_settings(self, other: "TrainConfig") -> dict[str, tuple[Any, Any]]:
        """Find the settings in which two runs differ, apart from where the data lies and what device computes."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {k: (mine[k], theirs[k]) for k in mine if k not in NOT_IDENTITY and mine[k] != theirs[k]}

    def run_name(self) -> str:
        """Make a folder name that two different runs never share: the same command finds its own run again."""
        identity = {k: v for k, v in self.to_dict().items() if k not in NOT_IDENTITY}
        if self.dataset == "imagefolder":  # its name says nothing of what is in it
            identity["data_dir"] = self.data_dir
        own = RECIPES[self.recipe]._asdict() | DATASETS[self.dataset]._asdict()
        for name, default in LATER_SETTINGS.items():  # older runs keep the names that they have
            if identity[name] == (own[name] if default is None else default):
                del identity[name]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.model}-w{self.width}-{self.dataset}-e{self.epochs}-s{self.seed}-{digest}"


NOT_IDENTITY = ("data_dir", "device", "acceleration", "placement")
# Settings added since the first runs, with their defaults; None stands for the recipe's or the data set's own.
LATER_SETTINGS = {
    "batch_norm": "global",
    "teacher": "deepest",
    "label_smoothing": None,
    "image_size": None,
    "branch": "reference",
}


def comparable_after(config: TrainConfig) -> float:
    """Find the share of the run before which runs cannot be compared.

    That is until a stepwise schedule first lowers the learning rate; else until the warm-up is over and images, if they
    grow, have grown once.
    """
    if RECIPES[config.recipe].schedule == "multistep":
        return MULTISTEP_MILESTONES[0]
    first_size = resolution(config, 0.0)
    ends = (until for _, until in RECIPES[config.recipe].resolutions)
    return max(LINEAR_WARMUP, next((end for end in ends if resolution(config, end) > first_size), 0.0))


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Compute the learning rate at `progress`, the share of the run already done (0 <= progress < 1).

    multistep: lr * 0.1^m after m milestones, at 75/200, 130/200 and 180/200 of the run; one may fall within an epoch.
    linear: up from a twentieth of lr over the first 15 % of the run, then down to 0.
    """
    if RECIPES[config.recipe].schedule == "multistep":
        passed = sum(progress >= milestone for milestone in MULTISTEP_MILESTONES)
        return config.lr * MULTISTEP_FACTOR**passed
    up = WARMUP_START + (1 - WARMUP_START) * progress / LINEAR_WARMUP
    down = (1 - progress) / (1 - LINEAR_WARMUP)
    return config.lr * min(up, down)


def resolution(config: TrainConfig, progress: float) -> int:
    """Compute the side in pixels to which images are resized at `progress`, the share of the run already done.

    It is a multiple of the network's stride, 8 with the CIFAR stem and 32 with ImageNet's, and at least 16; smaller
    images stay as they are.
    """
    full, stride = config.image_size, 32 if config.has_imagenet_stem else 8
    share = next(share for share, until in RECIPES[config.recipe].resolutions if progress < until or until == 1)
    return full if share == 1 else min(full, max(16, stride * round(share * full / stride)))


def work_after(config: TrainConfig, epochs: float) -> float:
    """Compute the arithmetic of a run's first `epochs`, in epochs at full resolution: it grows with the pixels."""
    done, start, full = 0.0, 0.0, config.image_size
    for _, until in RECIPES[config.recipe].resolutions:
        share = max(0.0, min(until, epochs / config.epochs) - start)
        done += share * config.epochs * (resolution(config, start) / full) ** 2
        start = until
    return done


def varies_more(config: TrainConfig) -> bool:
    """Tell whether the augmentation is that of a long run: with crops from a wider margin and Cutout."""
    return RECIPES[config.recipe].augmentation == "by epochs" and config.epochs > LONG_RUN_EPOCHS


def crop_padding(config: TrainConfig) -> int:
    """Compute the pixels added on each side before the random crop: an eighth of the image's side.

    Half of that in a short run of the modern recipe.
    """
    usual = config.image_size // 8
    short = RECIPES[config.recipe].augmentation == "by epochs" and not varies_more(config)
    return max(1, usual // 2) if short else usual


def cutout_size(config: TrainConfig) -> int:
    """Compute the side in pixels of the square that is blanked in each image: a quarter of the image's, or 0."""
    return config.image_size // 4 if varies_more(config) else 0
