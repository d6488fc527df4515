"""How exactly torch is asked to multiply float32 matrices on a GPU."""

from __future__ import annotations

from typing import Any

import torch


def matmul_precision() -> str:
    """`torch.get_float32_matmul_precision()`, also where it fails as `fp32_precision` differs."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        own: Any = torch.backends.cuda.matmul
        return "high" if own.fp32_precision == "tf32" else "highest"


def convolution_precision() -> Any:
    """A mark of what cuDNN may do with float32."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # convolutions and recurrent layers differ
        own: Any = torch.backends.cudnn
        return own.conv.fp32_precision, own.rnn.fp32_precision
