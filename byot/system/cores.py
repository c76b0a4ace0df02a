"""Tells how many CPU cores other processes keep busy, where the system is Linux."""

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
SHORTEST_S = 0.5  # the system counts in hundredths of a second


class OtherWork:
    """Measures how many cores other processes keep busy, from when it is made."""

    def __init__(self) -> None:
        self.began_s, self.others_s = time.monotonic(), self._others_s()

    def cores(self) -> float:
        """Return the mean since it was made, 0 where that is not known or too short a time."""
        passed_s, others_s = time.monotonic() - self.began_s, self._others_s()
        return max(0.0, others_s - self.others_s) / passed_s if passed_s > SHORTEST_S else 0.0

    @staticmethod
    def _others_s() -> float:
        """Return for how many seconds of a core other processes have computed since the machine was started."""
        try:
            user, nice, system, _, _, interrupts, soft_interrupts, *_ = STAT.read_text().split("\n")[0].split()[1:]
        except (OSError, ValueError):
            return 0.0
        all_s = sum(map(int, (user, nice, system, interrupts, soft_interrupts))) / os.sysconf("SC_CLK_TCK")
        return all_s - sum(os.times()[:4])


def advise_threads(num_threads: int, other_cores: float) -> str | None:
    """Say so where so many threads of PyTorch would wait for other processes, which takes many times as long."""
    num_cores = os.cpu_count() or 1
    free = num_cores - other_cores
    if num_threads == 1 or free > num_threads - 0.5:
        return None
    return (
        f"other processes keep {other_cores:.1f} of {num_cores} cores busy, and {num_threads} threads that wait for "
        f"each other may be many times slower than fewer: --threads {max(1, round(free))}"
    )
