"""Keeps freed memory for the next tensor, where the C library is glibc."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # in malloc.h
MOST_TRIMMED = 2**31 - 1
LARGEST_OF_HEAP = 32 * 2**20  # the most that glibc takes


def keep_freed_memory() -> None:
    """Let this process keep what it frees, but for blocks above 32 MiB, until it ends.

    Otherwise glibc gives the larger tensors back to the system, which fills each page of the next one with zeros: on a
    CPU that takes a tenth of a training step. The most memory held grows by up to a tenth.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_OF_HEAP)
        mallopt(M_TRIM_THRESHOLD, MOST_TRIMMED)
