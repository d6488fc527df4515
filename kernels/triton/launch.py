"""How the kernels of whole trajectories are launched: configurations, precision, arguments.

Launch configurations (samples of a program, warps, columns of a tile, pipeline stages) are pinned
in `CONFIGS`, the first of a list being the default. With FMFT_TRITON_AUTOTUNE=1 the list is timed
once for a kind of solve and the fastest remembered in fmft_fast/triton.json in the user's cache
folder ($XDG_CACHE_HOME, else ~/.cache), by device, version of Triton, and the sizes of the solve.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from fmft_fast.kernels.writer import padded, used
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fmft_fast.ops.network import Inputs, Network
from fmft_fast.ops.precision import matmul_precision
from fmft_fast.ops.trajectory import Program

PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


@dataclass(frozen=True)
class Config:
    """How a kernel is launched: samples of a program, warps, and stages of Triton's pipeline."""

    block: int
    warps: int
    tile: int = 64
    pipeline: int = 1


# By direction, precision of `tl.dot` and widest padded layer. Small blocks keep the products in
# float32 out of local memory; on tensor cores 64 rows are what a warp group multiplies at once.
# What is not listed takes "ieee": three products in TF32 need more registers there than there are.
CONFIGS = {
    ("forward", "ieee", 32): (Config(32, 4), Config(16, 4), Config(64, 4)),
    ("forward", "ieee", 64): (Config(16, 8), Config(64, 8)),
    ("forward", "ieee", 128): (Config(16, 8), Config(64, 8)),
    ("forward", "tf32x3", 32): (Config(32, 2), Config(64, 4)),
    ("forward", "tf32x3", 64): (Config(64, 4), Config(32, 2, 32)),
    ("forward", "tf32", 32): (Config(32, 2), Config(64, 4)),
    ("forward", "tf32", 64): (Config(64, 4), Config(32, 2), Config(32, 2, 32)),
    ("forward", "tf32", 128): (Config(64, 8), Config(64, 4)),
    ("backward", "ieee", 32): (Config(16, 4), Config(32, 4)),
    ("backward", "ieee", 64): (Config(16, 8), Config(32, 8, 32)),
    ("backward", "ieee", 128): (Config(16, 8),),
    ("backward", "tf32x3", 32): (Config(32, 2), Config(64, 4)),
    ("backward", "tf32", 32): (Config(32, 2), Config(64, 4)),
    ("backward", "tf32", 64): (Config(32, 4), Config(64, 4)),
    ("backward", "tf32", 128): (Config(64, 8), Config(32, 8)),
}


def arguments(network: Network, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """The state and the other tensors in the order of a kernel's arguments."""
    tables, conds = used(network)
    tensors = [
        *inputs.parameters,
        *(inputs.tables[i] for i in tables),
        *(inputs.conds[i] for i in conds),
    ]
    assert inputs.y0 is not None
    return inputs.y0.contiguous(), [x.contiguous() for x in tensors]


def precision(direction: str, network: Network) -> str:
    """What `tl.dot` does with float32."""
    found = PRECISIONS[matmul_precision()]
    is_listed = (direction, found, max(32, _widest(network))) in CONFIGS
    return found if is_listed and torch.version.hip is None else "ieee"


def _widest(network: Network) -> int:
    return max(padded(network.width(i)) for i in range(len(network.layers) + 1))


def options(config: Config, how: str) -> dict[str, Any]:
    """What a launch takes besides arguments, with the precision of `tl.dot`."""
    return {
        "BLOCK": config.block,
        "PRECISION": how,
        "num_warps": config.warps,
        "num_stages": config.pipeline,
        "enable_fp_fusion": True,
    }


def configs(direction: str, network: Network, how: str) -> tuple[Config, ...]:
    """The launch configurations of a network in a precision, the default first."""
    return CONFIGS[direction, how, max(32, _widest(network))]


def choose_config(
    direction: str, program: Program, y0: Tensor, launch: Callable[[Config], None]
) -> Config:
    """The default, or where FMFT_TRITON_AUTOTUNE=1 the fastest configuration of this kind."""
    network = program.network
    candidates = configs(direction, network, how := precision(direction, network))
    if os.environ.get("FMFT_TRITON_AUTOTUNE") != "1" or y0.device.type != "cuda":
        return candidates[0]
    sizes = [padded(network.width(i)) for i in range(len(network.layers) + 1)]
    device = torch.cuda.get_device_name(y0.device)
    kind = f"{direction} {sizes} {program.stages} {triton.next_power_of_2(y0.shape[0])}"
    key = f"{device}, triton {triton.__version__}, {how}, {kind}"
    winners = remembered()
    if key not in winners:
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        winners[key] = min(candidates, key=lambda config: _time(launch, config))
        remember(winners)
    return winners[key]


def _time(launch: Callable[[Config], None], config: Config) -> float:
    """Milliseconds of a launch; infinity where the device has no room for it."""
    try:
        launch(config)
    except OutOfResources:
        return float("inf")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        launch(config)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _cache() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "fmft_fast" / "triton.json"


@lru_cache(1)
def remembered() -> dict[str, Config]:
    """The fastest configurations that were found before."""
    try:
        found = json.loads(_cache().read_text())
        return {key: Config(*numbers) for key, numbers in found.items()}
    except (OSError, ValueError, TypeError):
        return {}


def remember(winners: dict[str, Config]) -> None:
    """Leave them to later processes."""
    path = _cache()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({key: astuple(config) for key, config in winners.items()}, indent=1))
    part.replace(path)
