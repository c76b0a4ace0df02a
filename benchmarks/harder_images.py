"""Writes CIFAR-100 made harder for the plans of tables.py: few of its training images, or some with a wrong label."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from byot.config import DATASETS
from byot.system.paths import cache_folder

if TYPE_CHECKING:  # importing it imports pyarrow
    from byot.data import LabelledImages

SEED = 0


class TrainingImages(NamedTuple):
    """What of a data set's training images is trained on. The test set is always whole and right."""

    share: float = 1.0  # of each class
    wrong: float = 0.0  # share of each class that has the label of another class, every other one equally likely

    def describe(self, dataset: str) -> str:
        total = DATASETS[dataset].num_train_images
        kept = f"{total * self.share:,.0f} of the {total:,}" if self.share < 1 else f"all {total:,}"
        return f"{kept} training images" + (f", {self.wrong:.0%} of them with a wrong label" if self.wrong else "")


ALL_IMAGES = TrainingImages()


def make_harder(images: "LabelledImages", asked: TrainingImages, num_classes: int) -> "LabelledImages":
    """Take the images that are asked for and give some their wrong labels, both drawn by a fixed seed."""
    from byot.data import stratified_split, take

    if asked.share < 1:
        images = take(images, stratified_split(images.labels, fraction=asked.share, seed=SEED)[1])
    _, wrong = stratified_split(images.labels, fraction=asked.wrong, seed=SEED)
    labels = images.labels.copy()
    labels[wrong] += np.random.RandomState(SEED).randint(1, num_classes, size=len(wrong))
    return images._replace(labels=labels % num_classes)


def write_harder(dataset: str, data_dir: str | None, asked: TrainingImages) -> str:
    """Write the harder data set as parquet beside the decoded images and return its folder, for `data_dir`.

    A folder that is there is kept. Raises ValueError where it cannot be written.
    """
    from byot.data import load_images
    from byot.system.files import refusals_at

    folder = cache_folder() / f"{dataset}-{asked.share:.0%}-wrong-{asked.wrong:.0%}".replace("%", "")
    if not (folder / "train.parquet").is_file():
        for split in ("test", "train"):  # in this order: the second says that both are there
            images = load_images(dataset, data_dir, split)
            if split == "train":
                images = make_harder(images, asked, DATASETS[dataset].num_classes)
            with refusals_at(folder):
                write_parquet(folder / f"{split}.parquet", dataset, images)
    return str(folder)


def write_parquet(path: Path, dataset: str, images: "LabelledImages") -> None:
    """Write images as the Hugging Face hub keeps them: without loss."""
    import pyarrow.parquet
    from PIL import Image

    from byot.data import LABEL_COLUMNS
    from byot.system.files import write_whole

    def encode(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    cells = [{"bytes": encode(pixels), "path": None} for pixels in images.images]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"img": cells, LABEL_COLUMNS[dataset]: images.labels}), buffer)
    write_whole(path, [buffer.getvalue()])
