"""Where a record comes from: commit, versions, hardware."""

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from byot.system.paths import IS_CHECKOUT, PROJECT_ROOT

PACKAGES = ("torch", "torchvision", "ray", "optuna", "numpy", "pandas")


def provenance(device: torch.device) -> dict[str, Any]:
    """Collect commit, versions and hardware as a plain dict for a record."""
    return {"commit": find_commit(), "versions": find_versions(), "hardware": describe_hardware(device)}


def find_commit() -> str | None:
    """Find the checked-out commit, with `-dirty` behind it if tracked files were changed.

    A copy of the files knows no commit: outside a checkout it is $BYOT_COMMIT, or None.
    """
    command = ("git", "-C", str(PROJECT_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    found = ""
    if IS_CHECKOUT:
        with suppress(OSError, subprocess.SubprocessError):  # no git, or a copy of the files
            found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return found or os.environ.get("BYOT_COMMIT") or None


def find_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def describe_hardware(device: torch.device) -> dict[str, Any]:
    models = read_cpu_info("model name")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": models[0].split(":", 1)[1].strip() if models else platform.processor() or platform.machine(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def read_cpu_info(*names: str) -> list[str]:
    """Read what the system says of the processor under these names, such as "model name"; nothing off Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line for line in lines if line.startswith(names)]
