"""Images from files to arrays in main memory, and their splits.

N images of a data set, H = W image size in pixels. Images are uint8 [N, H, W, 3].
"""

import io
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from byot.config import DATASETS, RECIPES, TrainConfig
from byot.decoded import kept
from byot.system.paths import PROJECT_ROOT, absolute_path

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
    """One split, read and decoded, or as decoded before; the arrays may be read-only.

    Raises ValueError, in one sentence, for whatever is missing or unreadable.
    """
    if dataset == "digits":
        return _load_digits(split)
    folder = DEFAULT_DATA_DIR if data_dir is None else absolute_path(data_dir)
    if sources := find_parquet(dataset, data_dir, split):
        decode = partial(_load_parquet, dataset, sources)
    else:
        sources = sorted(path for path in (folder / ARCHIVE_FOLDERS[dataset]).glob("*") if path.is_file())
        decode = partial(_load_archive, dataset, folder, split, download=data_dir is None)
    return LabelledImages(*kept(f"{dataset}-{split}", sources, DATASETS[dataset].image_size, decode))


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
