"""The compiled module `fmft_fast._cpu`, for what torch does as well where it is not built."""

from __future__ import annotations

import importlib
from typing import Any

import torch

TYPE_CODES = {torch.float32: 0, torch.float64: 1}

CPU: Any
try:
    CPU = importlib.import_module("fmft_fast._cpu")
except ImportError:
    CPU = None
