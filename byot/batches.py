"""Batches of a data set on the device, in an order and with an augmentation drawn from (seed, epoch) alone.

N images of a data set, B batch, H = W image size in pixels. Images are uint8 [N, H, W, 3]: with the channels last one
gather crops and flips a whole batch, and the batch comes out in the memory format the convolutions want.
"""

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from byot.config import DATASETS, Placement, TrainConfig, crop_padding, cutout_size
from byot.data import LabelledImages, Normalisation
from byot.system.distributed import ALONE, Processes

IMAGES_SHARE_OF_MEMORY = 0.5  # of what is free on the device; the rest is for the network
STREAM_WORKERS = 2  # processes that gather batches from main memory
BATCHES_AHEAD = 4  # that each of them prepares


class Batch(NamedTuple):
    """Images as they were read, and what is to be done to each. Row i of every tensor belongs to one image."""

    images: Tensor  # uint8 [B, H, W, 3]
    labels: Tensor  # [B]
    offsets: Tensor  # [B, 2]
    flips: Tensor | None  # [B] bool
    cutout_centres: Tensor | None  # [B, 2]


class DeviceImages:
    """A data set that lies on the device as a whole."""

    def __init__(self, data: LabelledImages, device: torch.device) -> None:
        self.device = device
        self.images, self.labels = (tensor.to(device) for tensor in as_tensors(data))

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, chosen: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each tensor of indices [B], on the CPU, give the images [B, H, W, 3] and labels [B] on the device."""
        sizes = [len(indices) for indices in chosen]
        for indices in torch.cat(chosen).to(self.device).split(sizes):  # one copy for all of them
            yield self.images[indices], self.labels[indices]


class StreamedImages(Dataset[tuple[Tensor, Tensor]]):
    """A data set in main memory, or in a file mapped into it, whose batches are gathered by other processes.

    As a torch data set its index is a tensor of indices and its item a batch.
    """

    def __init__(self, data: LabelledImages, device: torch.device) -> None:
        self.device = device
        self.images, self.labels = as_tensors(data)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]

    def fetch(self, chosen: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Give what DeviceImages.fetch does."""
        loader = DataLoader(
            self,
            batch_size=None,  # each item is a batch already
            sampler=chosen,
            num_workers=STREAM_WORKERS,
            prefetch_factor=BATCHES_AHEAD,
            pin_memory=self.device.type == "cuda",
        )
        for images, labels in loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


ImageSource = DeviceImages | StreamedImages


def as_tensors(data: LabelledImages) -> tuple[Tensor, Tensor]:
    """Give the arrays as tensors of the same memory, to which nothing is written: it may be shared and read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")
        return torch.from_numpy(data.images), torch.from_numpy(data.labels)


def place_images(data: LabelledImages, device: torch.device, placement: Placement) -> ImageSource:
    """Put a data set where the batches are to come from; `auto` streams what would crowd the device's memory."""
    if placement == "auto":
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
        placement = "device" if data.images.nbytes <= IMAGES_SHARE_OF_MEMORY * free else "streamed"
    return DeviceImages(data, device) if placement == "device" else StreamedImages(data, device)


def in_order(
    source: ImageSource, batch_size: int, normalisation: Normalisation, processes: Processes = ALONE
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each image of this process's shard once, unaltered but for normalisation: [B, 3, H, W] and labels [B]."""
    mean, std = mean_and_std(normalisation, source.device)
    for images, labels in source.fetch(list(processes.shard(torch.arange(len(source))).split(batch_size))):
        yield normalise(images, mean, std), labels


def shuffled(
    source: ImageSource, plan: "EpochPlan", batch_size: int, first: int = 0, processes: Processes = ALONE
) -> Iterator[Batch]:
    """Yield this process's shard of each batch of an epoch, in the plan's order, from batch number `first` on.

    A last batch of a single image is left out: batch normalisation has no variance to take there.
    """
    number = batches_per_epoch(len(source), batch_size)
    rows = [processes.shard(rows) for rows in torch.arange(len(source)).split(batch_size)[first:number]]
    if not rows:
        return
    choices = [None if values is None else values.to(source.device) for values in plan[1:]]
    for (images, labels), chosen in zip(source.fetch([plan.order[r] for r in rows]), rows, strict=True):
        shard = slice(int(chosen[0]), int(chosen[-1]) + 1)
        offsets, flips, centres = (None if values is None else values[shard] for values in choices)
        assert offsets is not None
        yield Batch(images, labels, offsets, flips, centres)


def batches_per_epoch(num_images: int, batch_size: int) -> int:
    return num_images // batch_size + (num_images % batch_size >= 2)


def augment(batch: Batch, config: TrainConfig, mean: Tensor, std: Tensor, size: int | None = None) -> Tensor:
    """Crop, mirror, normalise and blank as drawn, then resize: float32 [B, 3, size, size].

    The memory format is channels last, except where images are blanked and keep their size.
    """
    images = normalise(crop_and_flip(batch.images, batch.offsets, batch.flips, crop_padding(config)), mean, std)
    if batch.cutout_centres is not None:
        images = cut_out(images, batch.cutout_centres, cutout_size(config))
    return images if size in (None, images.shape[2]) else resize(images, size)


class EpochPlan(NamedTuple):
    """Every random choice of one epoch's batches. Row i of each tensor belongs to the i-th image drawn."""

    order: Tensor  # [N] image indices
    offsets: Tensor  # [N, 2] row and column of the crop in the padded image, 0 .. 2 * padding
    flips: Tensor | None  # [N] bool
    cutout_centres: Tensor | None  # [N, 2]


def draw_epoch(config: TrainConfig, num_images: int, epoch: int) -> EpochPlan:
    """Draw an epoch's order and augmentation from (seed, epoch) alone, on the CPU whatever the device.

    So a run looks the same on every device, runs with one seed see the same images in the same order whatever their
    loss weights, and resuming needs no generator state.
    """
    seed = int(np.random.SeedSequence((config.seed, epoch)).generate_state(1, np.uint32)[0])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_images, generator=generator)
    offsets = torch.randint(0, 2 * crop_padding(config) + 1, (num_images, 2), generator=generator)
    flips = torch.rand(num_images, generator=generator) < 0.5 if DATASETS[config.dataset].horizontal_flip else None
    blanks = cutout_size(config) > 0
    centres = torch.randint(0, config.image_size, (num_images, 2), generator=generator) if blanks else None
    return EpochPlan(order, offsets, flips, centres)


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor | None, padding: int) -> Tensor:
    """Pad each image with black, cut a window of the old size out of it at its own offset, mirror it where asked.

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


def mean_and_std(normalisation: Normalisation, device: torch.device) -> tuple[Tensor, Tensor]:
    """Give a normalisation's mean and standard deviation as tensors [3]."""
    return torch.tensor(normalisation.mean, device=device), torch.tensor(normalisation.std, device=device)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Scale uint8 [B, H, W, 3] to float32 [B, 3, H, W], channels last in memory."""
    return images.float().div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize [B, 3, H, W] to [B, 3, size, size], bilinear and antialiased, channels last in memory."""
    small = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return small.contiguous(memory_format=torch.channels_last)


def cut_out(batch: Tensor, centres: Tensor, size: int) -> Tensor:
    """Set a square of `size` pixels around each image's centre to 0, the mean colour (DeVries and Taylor, 2017).

    batch [B, 3, H, W], centres [B, 2] as (row, column); the square is cut off at the image's edge.
    """
    first = centres - size // 2  # [B, 2]
    rows = torch.arange(batch.shape[2], device=batch.device) - first[:, 0, None]  # [B, H]
    columns = torch.arange(batch.shape[3], device=batch.device) - first[:, 1, None]  # [B, W]
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    return batch.masked_fill(inside[:, None], 0)
