"""Decoded images kept between runs: decoding CIFAR-100's files takes seconds, mapping what came of it a tenth of one.

One file for each split: the pixels [N, H, W, 3] uint8, the labels [N] int64, and the SHA-256 of both. Its name has the
SHA-256 of the files it was made from, so that other data never answers to it. It is mapped, not read: all processes of
a machine share one copy in memory. Any of these files may be deleted at any time; it is made again.
"""

import hashlib
import mmap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from byot.system.files import remove_leftovers, write_whole
from byot.system.paths import cache_folder

Decoded = tuple[np.ndarray, np.ndarray]  # uint8 [N, H, W, 3], int64 [N]

CHUNK = 1 << 20  # bytes


def kept(name: str, sources: list[Path], image_size: int, decode: Callable[[], Decoded]) -> Decoded:
    """What `decode` makes of the source files, from the file kept of it where there is one, else made and kept.

    Where nothing can be kept, it is made each time.
    """
    digest = digest_of(sources)
    if digest is None:
        return decode()
    path = cache_folder() / f"{name}-{digest[:32]}.bin"
    found = read_decoded(path, image_size)
    if found is None:
        found = images, labels = decode()
        with suppress(OSError):
            remove_leftovers(path.parent)
            pixels, numbers = (np.ascontiguousarray(part).data.cast("B") for part in (images, labels))
            checksum = hashlib.sha256(pixels)
            checksum.update(numbers)
            write_whole(path, pixels, numbers, checksum.digest())
    return found


def digest_of(sources: list[Path]) -> str | None:
    """SHA-256 of the contents of all these files; None where there are none, or one cannot be read to its end."""
    digest = hashlib.sha256()
    try:
        for source in sources:
            if not source.is_file():
                return None
            with open(source, "rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest() if sources else None


def read_decoded(path: Path, image_size: int) -> Decoded | None:
    """The arrays in a kept file, mapped and read-only; None where there is no such file or it is damaged."""
    pixels_each, checksum_size = image_size * image_size * 3, hashlib.sha256().digest_size
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # ValueError: empty
        return None
    number, rest = divmod(len(mapped) - checksum_size, pixels_each + np.dtype(np.int64).itemsize)
    content = memoryview(mapped)[:-checksum_size]
    if number < 1 or rest or hashlib.sha256(content).digest() != mapped[-checksum_size:]:
        return None
    images = np.frombuffer(mapped, np.uint8, number * pixels_each).reshape(number, image_size, image_size, 3)
    return images, np.frombuffer(mapped, np.int64, number, offset=number * pixels_each)
