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
    """Collect commit, versions and hardware as a plain dict for a record."""
    return {"commit": find_commit(), "versions": find_versions(), "hardware": describe_hardware(device)}


def find_commit() -> str | None:
    """Find the checked-out commit, with `-dirty` behind it if tracked files were changed.

    A copy of the files knows no commit: outside a checkout it is $BYOT_COMMIT, or None.
    """
    command = ("git", "-C", str(PROJECT_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout
        found = ""
    return found or os.environ.get("BYOT_COMMIT") or None


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
