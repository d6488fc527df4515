"""The numbers of fixed steps on a GPU: brought there once, and kept for the next solve."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fmft_fast.errors import InputError
from fmft_fast.ops.cuda_support import Same
from fmft_fast.ops.trajectory import Program

_UPLOADS: dict[Any, Tensor] = {}
_CAPTURED: dict[Any, Tensor] = {}


@functools.lru_cache(maxsize=64)
def _host_steps(same: Same) -> tuple[Tensor, bytes, tuple[int, ...]]:
    """Return times, h, first outputs and dense weights in one, its bytes, and where each begins."""
    program: Program = same.it
    states = [sum(o < n for o in program.outputs) for n in range(program.steps + 2)]
    first = torch.tensor(states, dtype=torch.int32).view(torch.float32)
    parts = [program.times.flatten().float(), program.h.float(), first]
    if program.weights is not None:
        parts.append(program.weights.flatten().float())
    host = torch.cat(parts)
    starts = tuple(4 * sum(p.numel() for p in parts[:i]) for i in range(len(parts)))
    return host, host.numpy().tobytes(), starts


@functools.cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _upload(host: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device that every stream may read; only the copy is waited for."""
    if device.type != "cuda":
        return host.to(device)
    with torch.cuda.stream(_upload_stream(device)):
        return host.to(device)


def upload_steps(program: Program, y: Tensor, device: int) -> list[int]:
    """Return the addresses of times, h, first outputs and dense weights on the device.

    They are kept for the next solve of the same steps, and for good once a graph reads them.
    """
    host, content, starts = _host_steps(Same(program))
    key = content, device
    found = _CAPTURED.get(key, _UPLOADS.pop(key, None))
    captured = y.is_cuda and torch.cuda.is_current_stream_capturing()
    if found is None and captured:
        raise InputError(
            "expected a captured solve to take steps that ran before, got new ones; "
            "run the solve once before the capture"
        )
    if found is None:
        found = _upload(host, y.device)
    if captured:
        _CAPTURED[key] = found
    elif key not in _CAPTURED:
        if y.is_cuda:
            found.record_stream(torch.cuda.current_stream(y.device))
        while len(_UPLOADS) >= 64:
            del _UPLOADS[next(iter(_UPLOADS))]
        _UPLOADS[key] = found
    return [found.data_ptr() + at for at in starts] + [0] * (4 - len(starts))
