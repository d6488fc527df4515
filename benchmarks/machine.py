"""What the numbers were measured on."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from fmft_fast.info import cpu, machine_class
from fmft_fast.ops import backend_report

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("fmft-fast", "torch", "numpy", "triton", "torchdiffeq", "torchdyn", "torchode"),
    *("jax", "jaxlib", "diffrax", "equinox"),
)


def describe(device: str) -> dict[str, Any]:
    """The machine, what is installed, the commit and the date."""
    return {
        "class": machine_class(device),
        "device": device,
        "cpu": cpu(),
        "gpu": gpu() if device == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "backends": {s.name: s.reason for s in backend_report() if s.available},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def gpu() -> dict[str, Any]:
    """Device and clocks."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "clocks": clocks(),
    }


def clocks() -> str:
    """What nvidia-smi says of the clocks, or why it says nothing."""
    query = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,driver_version"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"


def commit() -> str:
    """The commit of the checkout, marked if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:  # a copy of the files on a machine without git
        return "unknown"
    return found.stdout.strip() or "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
