"""Images from files to arrays in main memory, and their splits.

N images of a data set, H = W image size in pixels. Images are uint8 [N, H, W, 3].
"""

import hashlib
import io
import math
import mmap
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal, NamedTuple

import numpy as np

from byot.config import DATASETS, RECIPES, TrainConfig
from byot.image_files import FORMATS, ImageFiles, list_classes, read_square
from byot.system.files import remove_leftovers, write_whole
from byot.system.lock import lock_folder
from byot.system.paths import PROJECT_ROOT, absolute_path, cache_folder

Split = Literal["train", "test"]
DEFAULT_DATA_DIR = PROJECT_ROOT / "data"
DOWNLOAD_TIMEOUT_S = 20
IMAGES_AT_A_TIME = 256
LARGE = 1 << 30  # bytes of pixels; a larger cache file's checksum is not verified, larger selections are mapped
TEST_FRACTION = 0.2  # of a data set that has no test set of its own
MOST_NAMED = 10  # files that a warning names
MANY = 5000  # files that take so long to decode that it is told

LABEL_COLUMNS = {"cifar100": "fine_label", "cifar10": "label"}  # in the Hugging Face layout; the images' is `img`
# The folders to which the official archives unpack.
ARCHIVE_FOLDERS = {"cifar100": "cifar-100-python", "cifar10": "cifar-10-batches-py"}
# CIFAR-10's constants, which the reference implementation uses for CIFAR-100 as well.
REFERENCE_MEAN = (0.4914, 0.4822, 0.4465)
REFERENCE_STD = (0.2023, 0.1994, 0.2010)


class LabelledImages(NamedTuple):
    """Decoded images in main memory."""

    images: np.ndarray  # uint8 [N, H, W, 3]
    labels: np.ndarray  # int64 [N]
    class_names: tuple[str, ...] = ()  # of imagefolder alone; those of other data sets are known


class Normalisation(NamedTuple):
    """Per channel, of pixels scaled to [0, 1]."""

    mean: tuple[float, ...]  # [3]
    std: tuple[float, ...]  # [3]


# ---------------------------------------------------------------- files


def load_images(dataset: str, data_dir: str | None, split: Split, image_size: int | None = None) -> LabelledImages:
    """Read and decode one split, or map what was decoded before; the arrays may be read-only.

    `image_size` is needed for imagefolder alone, whose files that cannot be read are left out, with a warning. Raises
    ValueError, in one sentence, for whatever else is missing or unreadable.
    """
    if dataset == "digits":
        return _load_digits(split)
    if dataset == "imagefolder":
        assert image_size is not None
        return _load_image_files(find_image_files(data_dir, split), split, image_size)
    folder = DEFAULT_DATA_DIR if data_dir is None else absolute_path(data_dir)
    if sources := find_parquet(dataset, data_dir, split):
        decode = partial(_load_parquet, dataset, sources)
    else:
        sources = sorted(path for path in (folder / ARCHIVE_FOLDERS[dataset]).glob("*") if path.is_file())
        decode = partial(_load_archive, dataset, folder, split, download=data_dir is None)
    return cached(f"{dataset}-{split}", sources, DATASETS[dataset].image_size, decode)


def check_dataset(dataset: str, data_dir: str | None, image_size: int | None = None) -> None:
    """Raise ValueError where the test set, which is read last, is missing or broken.

    Reads no label and no image, but for imagefolder, whose test images are decoded into the cache.
    """
    if dataset == "imagefolder":
        load_images(dataset, data_dir, "test", image_size)
        return
    if dataset == "digits" or not find_parquet(dataset, data_dir, "train"):
        return
    files = find_parquet(dataset, data_dir, "test")
    if not files:
        raise ValueError(f"{data_dir} has train*.parquet but no test*.parquet, which the run reads at its end")
    for file in files:
        _check_parquet(file, LABEL_COLUMNS[dataset])


def find_parquet(dataset: str, data_dir: str | None, split: Split) -> list[Path]:
    """List the parquet files of a split, in order; none where the folder holds the official archive instead.

    Looks in the folder itself and in the subfolders the Hugging Face hub uses. Raises ValueError for a folder that is
    not there or has neither form of the data set.
    """
    if data_dir is None:
        return []
    folder = _find_folder(data_dir)
    for candidate in (folder, folder / dataset, folder / "data", folder / "plain_text"):
        if files := sorted(candidate.glob(f"{split}*.parquet")):
            return files
    if not (folder / ARCHIVE_FOLDERS[dataset]).is_dir() and not any(folder.glob("train*.parquet")):
        raise ValueError(
            f"{folder} has neither {split}*.parquet files nor the folder {ARCHIVE_FOLDERS[dataset]}: "
            f"--data-dir must name a folder with {dataset}"
        )
    return []


def _find_folder(data_dir: str) -> Path:
    folder = absolute_path(data_dir)
    if not folder.is_dir():
        raise ValueError(f"the data folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    return folder


@contextmanager
def _parquet_errors(file: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"{file} cannot be read as parquet ({reason})") from error


def _check_parquet(file: Path, label_column: str) -> None:
    """Raise ValueError unless the file has images, and labels that are whole numbers; reads its footer alone."""
    import pyarrow.parquet

    with _parquet_errors(file), pyarrow.parquet.ParquetFile(file) as parquet:
        schema, num_rows = parquet.schema_arrow, parquet.metadata.num_rows
    for column in ("img", label_column):
        if column not in schema.names:
            others = [name for name, its_column in LABEL_COLUMNS.items() if its_column in schema.names]
            if column != "img" and others:
                raise ValueError(f"{file} is of {others[0]}: give --dataset {others[0]} or another --data-dir")
            raise ValueError(f"{file} lacks the column {column!r}; it has {', '.join(schema.names) or 'none'}")
        if schema.names.count(column) > 1:
            raise ValueError(f"{file} has a column twice: {column!r}")
    if num_rows == 0:
        raise ValueError(f"{file} has no rows")
    if not pyarrow.types.is_integer(schema.field(label_column).type):
        raise ValueError(f"{file}: column {label_column!r} must hold whole numbers only")


def _load_parquet(dataset: str, files: list[Path]) -> LabelledImages:
    import pyarrow.parquet
    from PIL import Image

    info, label_column = DATASETS[dataset], LABEL_COLUMNS[dataset]
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for file in files:
        _check_parquet(file, label_column)
        with _parquet_errors(file):
            table = pyarrow.parquet.read_table(file, columns=["img", label_column])
            cells = table.column("img").to_pylist()
        if table.column(label_column).null_count:
            raise ValueError(f"{file}: column {label_column!r} must hold whole numbers only, and some are missing")
        column = table.column(label_column).to_numpy().astype(np.int64)
        if column.min() < 0 or column.max() >= info.num_classes:
            raise ValueError(
                f"{file}: labels run from {column.min()} to {column.max()}, "
                f"but {dataset} has the classes 0 to {info.num_classes - 1}"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of an image that its size refuses anyway
            images += [_decode(cell, info.image_size, f"{file}: row {i}") for i, cell in enumerate(cells)]
        labels.append(column)
    return LabelledImages(np.stack(images), np.concatenate(labels))


def _decode(cell: Any, image_size: int, where: str) -> np.ndarray:
    """Decode one cell of the column `img`, {"bytes": …, "path": …}, to pixels [H, W, 3]."""
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
    """Read the official archive through torchvision, which checks its MD5; download it where asked and possible."""
    from torchvision.datasets import CIFAR10, CIFAR100

    archive = CIFAR100 if dataset == "cifar100" else CIFAR10
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        with redirect_stdout(io.StringIO()):
            found = archive(str(folder), train=split == "train", download=download)
    except (RuntimeError, OSError) as error:  # torchvision raises RuntimeError for a missing or damaged archive
        if not download:
            raise ValueError(
                f"the archive of {dataset} in {folder} is incomplete or damaged: it lacks the published checksums"
            ) from error
        with suppress(OSError):
            folder.rmdir()  # torchvision made it; it stays where it holds anything
        raise ValueError(
            f"{dataset} is not in {folder} and could not be downloaded: give its folder with --data-dir, "
            "or try --dataset digits, which needs no download"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return LabelledImages(found.data, np.asarray(found.targets, dtype=np.int64))


def _load_digits(split: Split) -> LabelledImages:
    """Read scikit-learn's 1,797 handwritten digits, of which a fixed, stratified fifth is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8], stored as 0..16
    labels = bunch.target.astype(np.int64)
    train, test = stratified_split(labels, fraction=TEST_FRACTION, seed=0)
    chosen = train if split == "train" else test
    return LabelledImages(np.repeat(grey[chosen, ..., None], 3, axis=3), labels[chosen])


# ---------------------------------------------------------------- folders of image files


def find_image_files(data_dir: str | None, split: Split) -> ImageFiles:
    """List the files of a split: those in train/ or test/, or a part of those in one folder of classes.

    Raises ValueError for a folder that is not there, lacks classes or images, or has other classes in test/.
    """
    layout = "a folder with train/CLASS/* and test/CLASS/*, or with CLASS/*"
    if data_dir is None:
        raise ValueError(f"dataset imagefolder needs --data-dir: {layout}")
    folder = _find_folder(data_dir)
    train, test = folder / "train", folder / "test"
    if test.is_dir() and train.is_dir():
        found = {"train": list_classes(train), "test": list_classes(test)}
        if differing := set(found["train"].class_names) ^ set(found["test"].class_names):
            raise ValueError(f"{train} and {test} must have the same classes; one of them lacks {min(differing)!r}")
        return found[split]
    if train.is_dir() and any(path.is_dir() for path in train.glob("[!.]*")):
        raise ValueError(f"{folder} has train/ but no test/: --data-dir must name {layout}")
    class_names, paths, labels = list_classes(folder)
    parts = stratified_split(labels, fraction=TEST_FRACTION, seed=0)
    if len(parts[1]) == 0:
        raise ValueError(f"{folder} has too few images to keep {TEST_FRACTION:.0%} of each class for the test")
    chosen = parts[split == "test"]
    return ImageFiles(class_names, [paths[i] for i in chosen], labels[chosen])


def _load_image_files(files: ImageFiles, split: Split, image_size: int) -> LabelledImages:
    """Map what was decoded from these files before, else decode them into the cache: see cached.

    The name of a cache file has a digest of the files' names, sizes and times of change: their contents would take too
    long to read at each start. While one process decodes, others that want the same wait for it.
    """
    path = cache_folder() / "imagefolder" / f"{split}-{image_size}-{_digest_of_stats(files)}.bin"
    found = read_cached(path, image_size)
    if found is None:
        try:
            with lock_folder(path.parent, wait_s=math.inf):
                found = read_cached(path, image_size)
                if found is None:
                    if len(files.paths) > MANY:
                        print(f"decoding {len(files.paths)} {split} images, once", file=sys.stderr, flush=True)
                    remove_leftovers(path.parent)
                    write_whole(path, _decode_files(files, image_size))
                    found = read_cached(path, image_size)
        except OSError:  # nothing can be written, or the disk is full
            found = parse_cached(b"".join(_decode_files(files, image_size)), image_size)
    if found is None:
        raise ValueError(f"no file of the {split} images can be read as PNG, JPEG or WebP, such as {files.paths[0]}")
    lacking = set(range(len(files.class_names))) - set(np.unique(found.labels).tolist())
    if split == "train" and lacking:
        name = files.class_names[min(lacking)]
        raise ValueError(f"no training image of the class {name!r} can be read as PNG, JPEG or WebP")
    return found._replace(class_names=files.class_names)


def _digest_of_stats(files: ImageFiles) -> str:
    digest = hashlib.sha256()
    for path, label in zip(files.paths, files.labels.tolist(), strict=True):
        with suppress(OSError):  # a link to nothing
            stat = path.stat()
            digest.update(f"{stat.st_size} {stat.st_mtime_ns} ".encode())
        digest.update(f"{label} {path.name}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _decode_files(files: ImageFiles, image_size: int) -> Iterator[bytes | memoryview]:
    """Yield what a cache file holds, image by image; at the end, warn of the files that cannot be read."""

    def read(path: Path) -> np.ndarray | None:
        try:
            return read_square(path, image_size)
        except ValueError:
            return None

    checksum, readable = hashlib.sha256(), np.zeros(len(files.paths), dtype=bool)
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow says of odd files that it can read
        for start in range(0, len(files.paths), IMAGES_AT_A_TIME):
            for i, pixels in enumerate(pool.map(read, files.paths[start : start + IMAGES_AT_A_TIME]), start):
                if pixels is not None:
                    readable[i] = True
                    checksum.update(pixels.data)
                    yield pixels.data
    labels = files.labels[readable].tobytes()
    checksum.update(labels)
    yield labels
    yield checksum.digest()
    if not readable.all():
        unreadable = [str(files.paths[i]) for i in np.flatnonzero(~readable)]
        more = f" and {len(unreadable) - MOST_NAMED} more" if len(unreadable) > MOST_NAMED else ""
        listed = ", ".join(unreadable[:MOST_NAMED]) + more
        warnings.warn(f"left out, since they cannot be read as PNG, JPEG or WebP: {listed}", stacklevel=2)


# ---------------------------------------------------------------- the cache of decoded images


def cached(name: str, sources: list[Path], image_size: int, decode: Callable[[], LabelledImages]) -> LabelledImages:
    """Map what was decoded from these files before, else decode them and keep the result.

    Decoding CIFAR-100 takes seconds, mapping it a tenth of one, and all processes of a machine share the mapped copy.
    The name of a cache file has the SHA-256 of the sources' contents, so other data has another file. Where nothing can
    be written, images are decoded each time. Any cache file may be deleted at any time.
    """
    digest = hashlib.sha256()
    try:
        for source in sources:
            with open(source, "rb") as file:
                hashlib.file_digest(file, lambda: digest)
    except OSError:  # the decoder says what is wrong with the file
        sources = []
    if not sources:
        return decode()
    path = cache_folder() / f"{name}-{digest.hexdigest()[:32]}.bin"
    found = read_cached(path, image_size)
    if found is None:
        found = decode()
        with suppress(OSError):
            remove_leftovers(path.parent)
            pixels, labels = (np.ascontiguousarray(part).data.cast("B") for part in found[:2])
            checksum = hashlib.sha256(pixels)
            checksum.update(labels)
            write_whole(path, [pixels, labels, checksum.digest()])
    return found


def read_cached(path: Path, image_size: int) -> LabelledImages | None:
    """Map a cache file, read-only. Returns None where there is no such file or it is damaged."""
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # ValueError: empty
        return None
    return parse_cached(mapped, image_size)


def parse_cached(content: bytes | mmap.mmap, image_size: int) -> LabelledImages | None:
    """Find the arrays in what a cache file holds: pixels uint8 [N, H, W, 3], labels int64 [N], the SHA-256 of both.

    Returns None where the size is wrong, or the sum, which is not computed of large files.
    """
    pixels_each, checksum_size = image_size * image_size * 3, hashlib.sha256().digest_size
    number, rest = divmod(len(content) - checksum_size, pixels_each + np.dtype(np.int64).itemsize)
    if number < 1 or rest:
        return None
    view = memoryview(content)
    if len(view) <= LARGE and hashlib.sha256(view[:-checksum_size]).digest() != view[-checksum_size:]:
        return None
    images = np.frombuffer(content, np.uint8, number * pixels_each).reshape(number, image_size, image_size, 3)
    return LabelledImages(images, np.frombuffer(content, np.int64, number, offset=number * pixels_each))


# ---------------------------------------------------------------- splits


def stratified_split(labels: np.ndarray, *, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a held-out `fraction`, the same of every class; give the indices of the rest and of it, in rising order.

    Depends on labels, fraction and seed alone: the stream of RandomState is the same in every version of NumPy.
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
    return take(data, train), take(data, val)


def take(data: LabelledImages, rows: np.ndarray) -> LabelledImages:
    """Copy the images with these indices, many of them into a mapped file without a name, where one can be written."""
    images = None
    if len(rows) * data.images[0].nbytes > LARGE:
        with suppress(OSError), TemporaryFile(dir=cache_folder()) as file:
            for start in range(0, len(rows), IMAGES_AT_A_TIME):
                file.write(data.images[rows[start : start + IMAGES_AT_A_TIME]].data)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            images = np.frombuffer(mapped, np.uint8).reshape(len(rows), *data.images.shape[1:])
    return data._replace(images=data.images[rows] if images is None else images, labels=data.labels[rows])


def fingerprint(data: LabelledImages) -> str:
    """Compute a SHA-256 of the labels and of about a hundred images, by which other data is told apart."""
    digest = hashlib.sha256(data.labels.tobytes())
    digest.update(data.images[:: max(1, len(data.labels) // 100)].tobytes())
    return digest.hexdigest()


def find_normalisation(config: TrainConfig, images: np.ndarray) -> Normalisation:
    """Give the recipe's normalisation: the reference's constants for CIFAR, else mean and deviation of `images`."""
    from PIL import Image

    if not RECIPES[config.recipe].dataset_normalisation and config.dataset in LABEL_COLUMNS:
        return Normalisation(REFERENCE_MEAN, REFERENCE_STD)
    counts = np.zeros(3 * 256, dtype=np.int64)
    for start in range(0, len(images), IMAGES_AT_A_TIME):
        part = images[start : start + IMAGES_AT_A_TIME]
        counts += Image.fromarray(part.reshape(-1, part.shape[2], 3)).histogram()  # four times as fast as NumPy's
    levels = np.arange(256) / 255
    mean, std = [], []
    for of_channel in counts.reshape(3, 256):
        share = of_channel / of_channel.sum()
        mean.append(float(share @ levels))
        std.append(float(np.sqrt(share @ (levels - mean[-1]) ** 2)) or 1.0)  # a channel may be one level everywhere
    return Normalisation(tuple(mean), tuple(std))
