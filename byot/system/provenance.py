"""Where a record comes from: commit, versions, hardware."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from byot.system.paths import PROJECT_ROOT

PACKAGES = ("torch", "torchvision", "ray", "optuna", "numpy", "pandas")


def provenance(device: torch.device) -> dict[str, Any]:
    """Commit, versions and hardware as a plain dict for a record."""
    return {"commit": find_commit(), "versions": find_versions(), "hardware": describe_hardware(device)}


def find_commit() -> str | None:
    """The checked-out commit, with `-dirty` behind it if tracked files were changed.

    Outside a checkout what $BYOT_COMMIT says: a copy of the files knows no commit. None where that is not set.
    """

    def git(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", "-C", str(PROJECT_ROOT), *arguments], capture_output=True, text=True, check=False, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):  # no git here
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return os.environ.get("BYOT_COMMIT") or None
    if git("status", "--porcelain", "--untracked-files=no"):
        commit += "-dirty"
    return commit


def find_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def describe_hardware(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
