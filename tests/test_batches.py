"""Holds byot/batches.py to per-image loops, and its random draws to (seed, epoch).

N images, B batch, H = W image size in pixels.
"""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import functional as transforms

from byot import batches
from byot.batches import (
    DeviceImages,
    EpochPlan,
    StreamedImages,
    augment,
    batches_per_epoch,
    draw_epoch,
    in_order,
    mean_and_std,
    place_images,
    shuffled,
)
from byot.config import DATASETS, TrainConfig, crop_padding, cutout_size
from byot.data import LabelledImages, Normalisation
from byot.system.distributed import Processes
from tests.helpers import random_pixels

CPU = torch.device("cpu")
PLAIN = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CONFIGS = {
    "cifar100": TrainConfig(recipe="reference", seed=3),
    "digits": TrainConfig(dataset="digits", seed=3),
    "short": TrainConfig(recipe="modern", epochs=30, seed=3),
    "long": TrainConfig(recipe="modern", epochs=31, seed=3),
    "long digits": TrainConfig(dataset="digits", recipe="modern", epochs=31, seed=3),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def numbered_images(num_images: int, size: int = 8) -> LabelledImages:
    """Random images whose label is their number, read-only as Ray hands them out."""
    pixels = random_pixels(num_images, size)
    pixels.flags.writeable = False
    return LabelledImages(pixels, np.arange(num_images))


# ---------------------------------------------------------------- augmentation
def slow_crop_and_flip(pixels: np.ndarray, offset: list[int], flip: bool, padding: int) -> np.ndarray:
    """One image through Pillow: black border, crop at (row, column), mirror."""
    size = pixels.shape[0]
    row, column = offset
    image = ImageOps.expand(Image.fromarray(pixels), border=padding, fill=0)
    image = image.crop((column, row, column + size, row + size))
    return np.asarray(ImageOps.mirror(image) if flip else image)


def slow_cut_out(image: torch.Tensor, centre: list[int], size: int) -> torch.Tensor:
    image = image.clone()
    for row in range(centre[0] - size // 2, centre[0] - size // 2 + size):
        for column in range(centre[1] - size // 2, centre[1] - size // 2 + size):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                image[:, row, column] = 0
    return image


# ---------------------------------------------------------------- an epoch's draws
def same_plan(a: EpochPlan, b: EpochPlan) -> bool:
    pairs: list[tuple[Any, Any]] = list(zip(a, b, strict=True))
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


@each_config
def test_epoch_is_drawn_from_seed_and_number_alone(config):
    torch.manual_seed(1)
    first = draw_epoch(config, 2000, epoch=5)
    torch.manual_seed(2)
    other_weights = config.with_settings(alpha=0.7, temperature=1.0, beta=0.1, lr=0.5, batch_size=7)
    assert same_plan(first, draw_epoch(other_weights, 2000, epoch=5))
    assert not same_plan(first, draw_epoch(config, 2000, epoch=6))
    assert not same_plan(first, draw_epoch(config.with_settings(seed=4), 2000, epoch=5))
    # not even by adding up to the same
    assert not torch.equal(first.order, draw_epoch(config.with_settings(seed=4), 2000, epoch=4).order)


@each_config
def test_draws_cover_what_they_should(config):
    plan = draw_epoch(config, 2000, epoch=0)
    assert sorted(plan.order.tolist()) == list(range(2000))
    assert plan.order.tolist() != list(range(2000))
    for axis in (0, 1):
        counts = Counter(plan.offsets[:, axis].tolist())
        assert set(counts) == set(range(2 * crop_padding(config) + 1))
        assert min(counts.values()) > 0.7 * 2000 / len(counts)
    if config.dataset == "digits":
        assert plan.flips is None, "a mirrored digit is another digit or none"
    else:
        assert plan.flips is not None
        assert 0.45 < plan.flips.float().mean() < 0.55
    if config.epochs == 31:
        size = DATASETS[config.dataset].image_size
        assert plan.cutout_centres is not None
        assert cutout_size(config) == size / 4
        assert set(plan.cutout_centres.flatten().tolist()) == set(range(size))
    else:
        assert plan.cutout_centres is None


@pytest.mark.parametrize("placement", ["device", "streamed"])
@each_config
def test_batches_are_the_plan_image_by_image(config, placement):
    info = DATASETS[config.dataset]
    data = numbered_images(70, info.image_size)
    plan = draw_epoch(config, 70, epoch=1)
    batches = list(shuffled(place_images(data, CPU, placement), plan, 16))
    assert [len(batch.labels) for batch in batches] == [16, 16, 16, 16, 6]
    assert torch.cat([batch.labels for batch in batches]).tolist() == plan.order.tolist()
    normalisation = Normalisation((0.4914, 0.3, 0.5), (0.2, 0.25, 0.3))
    found = torch.cat([augment(batch, config, *mean_and_std(normalisation, CPU)) for batch in batches])
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last) == (plan.cutout_centres is None)
    for i, number in enumerate(plan.order.tolist()):
        flip = bool(plan.flips[i]) if plan.flips is not None else False
        pixels = slow_crop_and_flip(data.images[number], plan.offsets[i].tolist(), flip, crop_padding(config))
        expected = transforms.normalize(transforms.to_tensor(pixels.copy()), *normalisation)
        if plan.cutout_centres is not None:
            expected = slow_cut_out(expected, plan.cutout_centres[i].tolist(), cutout_size(config))
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("num_images", "batch_size", "sizes"),
    [(8, 4, [4, 4]), (9, 4, [4, 4]), (10, 4, [4, 4, 2]), (3, 4, [3]), (2, 2, [2]), (1, 4, []), (129, 128, [128])],
)
def test_a_last_batch_of_one_image_is_left_out(num_images, batch_size, sizes):
    source = DeviceImages(numbered_images(num_images), CPU)
    plan = draw_epoch(CONFIGS["digits"], num_images, epoch=0)
    batches = list(shuffled(source, plan, batch_size))
    assert [len(batch.labels) for batch in batches] == sizes
    assert batches_per_epoch(num_images, batch_size) == len(sizes)
    seen = [int(label) for batch in batches for label in batch.labels]
    assert len(set(seen)) == len(seen) == sum(sizes)


@pytest.mark.parametrize(("num_processes", "batch_size"), [(2, 16), (3, 16), (4, 70), (5, 7)])
def test_processes_share_every_batch_without_loss(num_processes, batch_size):
    source = DeviceImages(numbered_images(70), CPU)
    plan = draw_epoch(CONFIGS["long"], 70, epoch=0)
    shares = [list(shuffled(source, plan, batch_size, 1, Processes(r, num_processes))) for r in range(num_processes)]
    whole = list(shuffled(source, plan, batch_size, 1))
    assert [len(share) for share in shares] == [len(whole)] * num_processes
    for i, batch in enumerate(whole):
        for part, *theirs in zip(batch, *(share[i] for share in shares), strict=True):
            assert part is not None
            assert torch.equal(part, torch.cat([their for their in theirs if their is not None]))
        sizes = [len(share[i].labels) for share in shares]
        assert max(sizes) - min(sizes) <= 1
    seen = [
        labels
        for r in range(num_processes)
        for _, labels in in_order(source, batch_size, PLAIN, Processes(r, num_processes))
    ]
    assert torch.cat(seen).tolist() == list(range(70))


@pytest.mark.parametrize("placement", ["device", "streamed"])
@pytest.mark.parametrize("batch_size", [1, 3, 10, 50])
def test_in_order_gives_every_image_once_and_unaltered(batch_size, placement):
    data = numbered_images(10)
    batches = list(in_order(place_images(data, CPU, placement), batch_size, PLAIN))
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))
    found = torch.cat([batch for batch, _ in batches])
    assert np.array_equal((found * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), data.images)


@pytest.mark.parametrize(("free_bytes", "kind"), [(24_000, DeviceImages), (23_999, StreamedImages)])
def test_what_would_crowd_a_gpu_is_streamed(free_bytes, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 80_000))
    monkeypatch.setattr(batches, "DeviceImages", lambda data, device: DeviceImages(data, CPU))
    data = LabelledImages(np.zeros((1, 20, 200, 3), dtype=np.uint8), np.zeros(1))
    assert type(place_images(data, torch.device("cuda"), "auto")) is kind
