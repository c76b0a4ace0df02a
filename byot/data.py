"""Images from files to augmented batches on the device.

N images of a data set, B batch, H = W image size in pixels. Images are uint8 [N, H, W, 3]: with the channels last one
gather crops and flips a whole batch, and the batch comes out in the memory format the convolutions want.
"""

import io
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from byot.config import DATASETS, PROJECT_ROOT, RECIPES, TrainConfig, absolute_path

Split = Literal["train", "test"]
DEFAULT_DATA_DIR = PROJECT_ROOT / "data"
DOWNLOAD_TIMEOUT_S = 20

# Hugging Face layout: the label's column; the image's is `img` in both.
LABEL_COLUMNS = {"cifar100": "fine_label", "cifar10": "label"}
FORMATS = ("PNG", "JPEG", "WEBP")  # of those images; Pillow would hand others, such as EPS, to another program
# torchvision's official archives: the folder each unpacks to.
ARCHIVE_FOLDERS = {"cifar100": "cifar-100-python", "cifar10": "cifar-10-batches-py"}

# CIFAR-10's constants, which the reference implementation uses for CIFAR-100 as well.
REFERENCE_MEAN = (0.4914, 0.4822, 0.4465)
REFERENCE_STD = (0.2023, 0.1994, 0.2010)


class LabelledImages(NamedTuple):
    """Decoded images in main memory."""

    images: np.ndarray  # uint8 [N, H, W, 3]
    labels: np.ndarray  # int64 [N]


class Normalisation(NamedTuple):
    """Per channel, of pixels scaled to [0, 1]."""

    mean: tuple[float, ...]  # [3]
    std: tuple[float, ...]  # [3]


# ---------------------------------------------------------------- files


def load_images(dataset: str, data_dir: str | None, split: Split) -> LabelledImages:
    """Read and decode one split. Raises ValueError, in one sentence, for whatever is missing or unreadable."""
    if dataset == "digits":
        return _load_digits(split)
    folder = DEFAULT_DATA_DIR if data_dir is None else absolute_path(data_dir)
    if files := find_parquet(dataset, data_dir, split):
        return _load_parquet(dataset, files)
    return _load_archive(dataset, folder, split, download=data_dir is None)


def check_dataset(dataset: str, data_dir: str | None) -> None:
    """Raise ValueError where a test set will be wanted later and is not there; reads no label and no image."""
    if dataset == "digits":
        return
    if find_parquet(dataset, data_dir, "train"):
        files = find_parquet(dataset, data_dir, "test")
        if not files:
            raise ValueError(f"{data_dir} has train*.parquet but no test*.parquet, which the run reads at its end")
        for file in files:
            _check_parquet(file, dataset)


def find_parquet(dataset: str, data_dir: str | None, split: Split) -> list[Path]:
    """The parquet files of a split, in order, or none where the folder holds the official archive instead.

    Looks in the folder itself and in the subfolders the Hugging Face hub uses. Raises ValueError for a folder that is
    not there or has neither form of the data set.
    """
    if data_dir is None:
        return []
    folder = absolute_path(data_dir)
    if not folder.is_dir():
        raise ValueError(f"the data folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    for candidate in (folder, folder / dataset, folder / "data", folder / "plain_text"):
        if files := sorted(candidate.glob(f"{split}*.parquet")):
            return files
    if not (folder / ARCHIVE_FOLDERS[dataset]).is_dir() and not any(folder.glob("train*.parquet")):
        raise ValueError(
            f"{folder} has neither {split}*.parquet files nor the folder {ARCHIVE_FOLDERS[dataset]}: "
            f"--data-dir must name a folder with {dataset}"
        )
    return []


@contextmanager
def _parquet_errors(file: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"{file} cannot be read as parquet ({reason})") from error


def _check_parquet(file: Path, dataset: str) -> None:
    """Raise ValueError unless the file has images, and labels that are whole numbers; reads its footer alone."""
    import pyarrow.parquet

    with _parquet_errors(file), pyarrow.parquet.ParquetFile(file) as parquet:
        schema, num_rows = parquet.schema_arrow, parquet.metadata.num_rows
    for column in ("img", LABEL_COLUMNS[dataset]):
        if column not in schema.names:
            raise ValueError(f"{file} lacks the column {column!r}; it has {', '.join(schema.names) or 'none'}")
        if schema.names.count(column) > 1:
            raise ValueError(f"{file} has a column twice: {column!r}")
    if num_rows == 0:
        raise ValueError(f"{file} has no rows")
    if not pyarrow.types.is_integer(schema.field(LABEL_COLUMNS[dataset]).type):
        raise ValueError(f"{file}: column {LABEL_COLUMNS[dataset]!r} must hold whole numbers only")


def _load_parquet(dataset: str, files: list[Path]) -> LabelledImages:
    import pyarrow.parquet

    info, label_column = DATASETS[dataset], LABEL_COLUMNS[dataset]
    images, labels = [], []
    for file in files:
        _check_parquet(file, dataset)
        with _parquet_errors(file):
            table = pyarrow.parquet.read_table(file, columns=["img", label_column])
        if table.column(label_column).null_count:
            raise ValueError(f"{file}: column {label_column!r} must hold whole numbers only, and some are missing")
        column = table.column(label_column).to_numpy().astype(np.int64)
        if column.min() < 0 or column.max() >= info.num_classes:
            raise ValueError(
                f"{file}: labels run from {column.min()} to {column.max()}, "
                f"but {dataset} has the classes 0 to {info.num_classes - 1}"
            )
        images.append(_decode(table.column("img"), info.image_size, file))
        labels.append(column)
    return LabelledImages(np.concatenate(images), np.concatenate(labels))


def _decode(column: Any, image_size: int, file: Path) -> np.ndarray:
    from PIL import Image

    with _parquet_errors(file):
        cells = column.to_pylist()
    pixels = np.empty((len(cells), image_size, image_size, 3), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of an image that its size refuses anyway
        for i, cell in enumerate(cells):
            pixels[i] = _decode_cell(cell, image_size, f"{file}: row {i}")
    return pixels


def _decode_cell(cell: Any, image_size: int, where: str) -> np.ndarray:
    from PIL import Image

    encoded = cell.get("bytes") if isinstance(cell, dict) else None
    if not isinstance(encoded, bytes):
        raise ValueError(f"{where} of column 'img' has no bytes")
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        decoded = np.asarray(image.convert("RGB")) if image.size == (image_size, image_size) else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} of column 'img' is not an image, as PNG, JPEG or WebP") from error
    if decoded is None:
        raise ValueError(f"{where} is {image.size[0]}x{image.size[1]} pixels, not {image_size}x{image_size}")
    return decoded


def _load_archive(dataset: str, folder: Path, split: Split, *, download: bool) -> LabelledImages:
    """The official archive through torchvision, which checks its MD5; downloaded where that is wanted and possible."""
    from torchvision.datasets import CIFAR10, CIFAR100

    archive = CIFAR100 if dataset == "cifar100" else CIFAR10
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        with redirect_stdout(io.StringIO()):
            found = archive(str(folder), train=split == "train", download=download)
    except (RuntimeError, OSError) as error:  # torchvision raises RuntimeError for a missing or damaged archive
        if download:
            with suppress(OSError):
                folder.rmdir()  # torchvision made it; it stays where it holds anything
            message = (
                f"{dataset} is not in {folder} and could not be downloaded: give its folder with --data-dir, "
                "or try --dataset digits, which needs no download"
            )
        else:
            message = f"the archive of {dataset} in {folder} is incomplete or damaged: it lacks the published checksums"
        raise ValueError(message) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return LabelledImages(found.data, np.asarray(found.targets, dtype=np.int64))


def _load_digits(split: Split) -> LabelledImages:
    """scikit-learn's 1,797 handwritten digits: a fixed, stratified fifth is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8], stored as 0..16
    images = np.repeat(grey[..., None], 3, axis=3)
    labels = bunch.target.astype(np.int64)
    train, test = stratified_split(labels, fraction=0.2, seed=0)
    chosen = train if split == "train" else test
    return LabelledImages(images[chosen], labels[chosen])


# ---------------------------------------------------------------- splits


def stratified_split(labels: np.ndarray, *, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of (the rest, the held-out `fraction`), in rising order; every class gives the same share of its own.

    Depends on labels, fraction and seed alone. RandomState's stream is frozen by NumPy's compatibility policy, so the
    split stays the same with every version.
    """
    random_state = np.random.RandomState(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        random_state.shuffle(members)
        held_out[members[: round(len(members) * fraction)]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def split_validation(
    data: LabelledImages, *, fraction: float, seed: int
) -> tuple[LabelledImages, LabelledImages | None]:
    """Cut the training images into those trained on and those held out (None where the fraction is 0)."""
    if fraction == 0:
        return data, None
    train, val = stratified_split(data.labels, fraction=fraction, seed=seed)
    if len(val) == 0:
        raise ValueError(f"val_fraction {fraction:g} of {len(data.labels)} images holds out none; give more")
    return (
        LabelledImages(data.images[train], data.labels[train]),
        LabelledImages(data.images[val], data.labels[val]),
    )


def find_normalisation(config: TrainConfig, images: np.ndarray) -> Normalisation:
    """The recipe's normalisation: the reference's constants for CIFAR, else mean and deviation of `images`."""
    if not RECIPES[config.recipe].dataset_normalisation and config.dataset != "digits":
        return Normalisation(REFERENCE_MEAN, REFERENCE_STD)
    levels = np.arange(256) / 255
    mean, std = [], []
    for channel in range(3):
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        mean.append(float(share @ levels))
        std.append(float(np.sqrt(share @ (levels - mean[-1]) ** 2)))
    return Normalisation(tuple(mean), tuple(std))


# ---------------------------------------------------------------- batches


class DeviceImages:
    """A data set that lives on the device as uint8, ready to be cut into batches there."""

    def __init__(self, data: LabelledImages, normalisation: Normalisation, device: torch.device) -> None:
        with warnings.catch_warnings():
            # Ray hands out arrays in shared, read-only memory; nothing here writes to them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self.images = torch.from_numpy(data.images).to(device)  # [N, H, W, 3]
            self.labels = torch.from_numpy(data.labels).to(device)  # [N]
        self.mean = torch.tensor(normalisation.mean, device=device)
        self.std = torch.tensor(normalisation.std, device=device)

    def __len__(self) -> int:
        return len(self.labels)

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, unaltered but for normalisation: pairs of [B, 3, H, W] and [B]."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield normalise(images, self.mean, self.std), labels

    def augmented(self, plan: "EpochPlan", batch_size: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from number `first` on, in the plan's order. A last batch of a single image is
        left out: batch normalisation has no variance to take there."""
        plan = plan.to(self.labels.device)
        for i in range(first * batch_size, len(self), batch_size):
            chosen = plan.order[i : i + batch_size]
            if len(chosen) < 2:
                return
            flips = None if plan.flips is None else plan.flips[i : i + batch_size]
            images = crop_and_flip(self.images[chosen], plan.offsets[i : i + batch_size], flips, plan.padding)
            batch = normalise(images, self.mean, self.std)
            if plan.cutout_centres is not None:
                batch = cut_out(batch, plan.cutout_centres[i : i + batch_size], plan.cutout_size)
            yield batch, self.labels[chosen]

    def batches_per_epoch(self, batch_size: int) -> int:
        return len(self) // batch_size + (len(self) % batch_size >= 2)


class EpochPlan(NamedTuple):
    """Every random choice of one epoch's batches. Row i of each tensor belongs to the i-th image drawn."""

    order: Tensor  # [N] image indices
    offsets: Tensor  # [N, 2] row and column of the crop in the padded image, 0 .. 2 * padding
    flips: Tensor | None  # [N] bool
    cutout_centres: Tensor | None  # [N, 2]
    padding: int  # pixels
    cutout_size: int  # pixels

    def to(self, device: torch.device) -> "EpochPlan":
        flips = None if self.flips is None else self.flips.to(device)
        centres = None if self.cutout_centres is None else self.cutout_centres.to(device)
        return self._replace(
            order=self.order.to(device), offsets=self.offsets.to(device), flips=flips, cutout_centres=centres
        )


def draw_epoch(config: TrainConfig, num_images: int, epoch: int) -> EpochPlan:
    """Draw an epoch's order and augmentation from (seed, epoch) alone.

    Drawn on the CPU whatever the device, and anew for every epoch: so a run looks the same on every device, runs with
    one seed see the same images in the same order whatever their loss weights, and resuming needs no generator state.
    """
    info = DATASETS[config.dataset]
    seed = int(np.random.SeedSequence((config.seed, epoch)).generate_state(1, np.uint32)[0])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_images, generator=generator)
    offsets = torch.randint(0, 2 * info.crop_padding + 1, (num_images, 2), generator=generator)
    flips = torch.rand(num_images, generator=generator) < 0.5 if info.horizontal_flip else None
    cutout_size = round(RECIPES[config.recipe].cutout * info.image_size)
    centres = torch.randint(0, info.image_size, (num_images, 2), generator=generator) if cutout_size else None
    return EpochPlan(order, offsets, flips, centres, info.crop_padding, cutout_size)


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor | None, padding: int) -> Tensor:
    """Pad each image with black, cut a window of the old size out at its own offset, mirror it where asked.

    images [B, H, W, 3], offsets [B, 2] as (row, column), flips [B] bool or None -> [B, H, W, 3]
    """
    batch_size, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    columns = torch.arange(width, device=images.device).expand(batch_size, width)
    if flips is not None:
        columns = torch.where(flips[:, None], width - 1 - columns, columns)
    rows = offsets[:, 0, None] + torch.arange(height, device=images.device)  # [B, H]
    columns = offsets[:, 1, None] + columns  # [B, W]
    image = torch.arange(batch_size, device=images.device)
    return padded[image[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], channels last in memory."""
    return images.float().div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2)


def cut_out(batch: Tensor, centres: Tensor, size: int) -> Tensor:
    """Set a square of `size` pixels around each image's centre to 0, the mean colour (DeVries and Taylor, 2017).

    batch [B, 3, H, W], centres [B, 2] as (row, column); the square is cut off at the image's edge.
    """
    first = centres - size // 2  # [B, 2]
    rows = torch.arange(batch.shape[2], device=batch.device) - first[:, 0, None]  # [B, H]
    columns = torch.arange(batch.shape[3], device=batch.device) - first[:, 1, None]  # [B, W]
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    return batch.masked_fill(inside[:, None], 0)
