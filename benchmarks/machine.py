"""What the numbers were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from fmft_fast.ops import backend_report

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("fmft-fast", "torch", "numpy", "triton", "torchdiffeq", "torchdyn", "torchode"),
    *("jax", "jaxlib", "diffrax", "equinox"),
)
VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}
FLAGS = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512vl", "avx512_bf16", "amx_tile", "asimd")


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


def machine_class(device: str) -> str:
    """Machines whose ratios of times can be compared: vendor and instruction set, or the GPU."""
    if device == "cuda":
        return f"cuda {torch.cuda.get_device_name()}"
    return f"{cpu()['vendor']} {torch.backends.cpu.get_cpu_capability()}"


def cpu() -> dict[str, Any]:
    """Model, vendor, cores and the instruction sets that matter."""
    found = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    flags = found.get("flags", found.get("Features", "")).split()
    vendor = found.get("vendor_id", platform.machine())
    return {
        "model": found.get("model name", platform.processor() or "unknown"),
        "vendor": VENDORS.get(vendor, vendor.lower()),
        "family": found.get("cpu family"),
        "number": found.get("model"),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
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
