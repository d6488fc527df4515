"""Activations that torch does not have."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def clipped_cube(z: Tensor) -> Tensor:
    """z^3 for |z| <= 1, and its tangent sign(z) (3 |z| - 2) beyond: slope in [0, 3].

    To a `TorchFunctionMode`, and so to the tracer of fields, this is one call.

    Args:
        z: of any shape and floating dtype.

    Returns:
        The values, of the shape and dtype of `z`; differentiable twice where |z| is not 1.

    Example:
        >>> import torch
        >>> from fmft_fast.ops.activations import clipped_cube
        >>> clipped_cube(torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0]))
        tensor([-4.0000, -0.1250,  0.0000,  1.0000,  7.0000])
    """
    if has_torch_function_unary(z):
        return handle_torch_function(clipped_cube, (z,), z)
    # With the clipped argument nothing overflows, and the slope at |z| = 1 is 3 from both sides.
    inner = z.clamp(-1, 1)
    return inner * inner * inner + 3 * (z - inner)
