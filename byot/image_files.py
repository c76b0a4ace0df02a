"""Image files in folders, one folder a class: found, read, and cut to squares.

N files, S = side of the squares in pixels.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow would hand others, such as EPS, to another program


class ImageFiles(NamedTuple):
    """Files that should be images, ordered by class and name."""

    class_names: tuple[str, ...]  # of the folders, sorted: a class's label is its place here
    paths: list[Path]  # N
    labels: np.ndarray  # int64 [N]


def list_classes(folder: Path) -> ImageFiles:
    """List a folder that has a folder for each class, as torchvision's ImageFolder does: with all below each.

    Hidden files and folders are left out. Raises ValueError where there are not two classes, or one is empty.
    """
    class_names = tuple(sorted(path.name for path in folder.glob("[!.]*") if path.is_dir()))
    if len(class_names) < 2:
        found = f"only the class {class_names[0]!r}" if class_names else "no folder in it"
        raise ValueError(f"{folder} has {found}: two classes are the least, each a folder of images")
    if odd := [name for name in class_names if not name.isprintable()]:
        raise ValueError(f"{folder} has a class folder whose name cannot be printed, {odd[0]!r}; give it another")
    files = [list_files(folder / name) for name in class_names]
    for name, inside in zip(class_names, files, strict=True):
        if not inside:
            raise ValueError(f"the class folder {folder / name} holds no file")
    labels = np.repeat(np.arange(len(files)), [len(inside) for inside in files])
    return ImageFiles(class_names, [path for inside in files for path in inside], labels)


def list_files(folder: Path) -> list[Path]:
    """List the files in a folder, in those below it and where links lead; a folder met again is left out."""
    seen = {_identity(path) for path in folder.parents}
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        here = _identity(place)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in sorted(files) if not name.startswith(".")]
    return found


def _identity(path: Path | str) -> tuple[int, int]:
    stat = Path(path).stat()
    return stat.st_dev, stat.st_ino


def read_square(path: Path, size: int) -> np.ndarray:
    """Read the first image of a file and make it a square: see to_square.

    Raises ValueError, in one sentence, for what is no PNG, JPEG or WebP or is damaged.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is not a file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            return to_square(image, size)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds for a damaged file
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({getattr(error, 'strerror', None) or error})"
        raise ValueError(f"{path} cannot be read as PNG, JPEG or WebP{reason}") from error


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """Make the square in the middle of an image an array uint8 [S, S, 3]; one of that size keeps its pixels.

    Turned as its EXIF says, of 16 bits the upper 8, on white where it is transparent; resized with Pillow's bicubic
    filter, which takes all pixels into account where it makes an image smaller.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
