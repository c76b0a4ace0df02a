"""A process that keeps freed memory is not given new pages for every tensor."""

import platform
import subprocess
import sys

import pytest

COUNT_PAGES = """
import resource, sys
import torch
from byot.system.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for turn in range(16):
    if turn == 8:  # by then the process has what it needs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2, 1024, 1024) for _ in range(3)]  # 8 MiB each
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_kept_memory_is_used_again():
    given_back, kept = (
        int(subprocess.run([sys.executable, "-c", COUNT_PAGES, how], check=True, capture_output=True).stdout)
        for how in ("given back", "kept")
    )
    assert kept < 100 < given_back
