"""A training step on a CPU is not given new pages by the system."""

import platform
import subprocess
import sys

import pytest

# ResNet18 of width 16 and images of 32 pixels: 15,000 to 20,000 pages a step where freed memory is given back.
PAGES_A_STEP = """
import resource
import numpy as np
from byot.batches import draw_epoch, shuffled
from byot.config import TrainConfig
from byot.data import LabelledImages
from byot.trainer import Trainer

images = LabelledImages(np.zeros((128, 32, 32, 3), np.uint8), np.arange(128) % 100)
trainer = Trainer(TrainConfig(recipe="reference", width=16, device="cpu"), images)
(batch,) = shuffled(trainer.train_images, draw_epoch(trainer.config, 128, 0), 128)
for step in range(6):
    if step == 3:  # by then the process has what it needs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    trainer.train_step(batch, 32, 128)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 3)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept_for_the_next_step():
    done = subprocess.run([sys.executable, "-c", PAGES_A_STEP], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 3_000
