"""What is installed and what can run here: the report behind `fmft info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fmft_fast.ops import backend_report

PACKAGES = ("fmft-fast", "torch", "numpy", "triton", "safetensors", "scipy", "POT", "scikit-learn")
VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}
FLAGS = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512vl", "avx512_bf16", "amx_tile", "asimd")


def package_info() -> dict[str, Any]:
    """Return versions, devices and the status of every backend, ready for JSON.

    Keys: "python", "system", "packages" {name: version or None}, "cpu", "gpus" (a list) and
    "backends" (a list of the fields of `BackendStatus`).
    """
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "backends": [asdict(status) for status in backend_report()],
    }


def info_text() -> str:
    """Return `package_info()` laid out for people."""
    info = package_info()
    cpu = info["cpu"]
    lines = [f"Python {info['python']} on {info['system']}", "", "Packages"]
    lines += [f"  {name:<14}{v or 'not installed'}" for name, v in info["packages"].items()]
    lines += ["", "Devices"]
    lines.append(
        f"  CPU, {cpu['cores']} cores, {cpu['torch_threads']} threads, {cpu['capability']}"
    )
    for gpu in info["gpus"]:
        memory_gib = gpu["memory_bytes"] / 2**30
        lines.append(f"  {gpu['name']}, capability {gpu['capability']}, {memory_gib:.0f} GiB")
    if not info["gpus"]:
        lines.append("  no GPU that torch can see")
    lines += ["", "Backends"]
    for status in info["backends"]:
        lines.append(
            f"  {status['name']:<11}{'yes' if status['available'] else 'no':<5}{status['reason']}"
        )
        if status["cure"]:
            lines.append(f"{'':<18}cure: {status['cure']}")
    return "\n".join(lines)


def machine_class(device: str) -> str:
    """Name machines whose ratios of times can be compared: kind of CPU and instructions, or GPU."""
    if device == "cuda":
        return f"cuda {torch.cuda.get_device_name()}"
    found, isa = cpu(), torch.backends.cpu.get_cpu_capability()
    return f"{found['vendor']} family {found['family']} {isa}"


def cpu() -> dict[str, Any]:
    """Give model, vendor, cores and the instruction sets that matter."""
    found = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }
