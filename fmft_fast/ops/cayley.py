"""The Cayley map, from skew matrices to orthogonal ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from ..errors import NonFiniteError


def cayley(k: Tensor) -> Tensor:
    """The orthogonal matrix (I - K)(I + K)^-1 of a skew matrix K, both [n, n].

    I + K has no singular value below 1, so that the LU solve cannot fail while the identity is not
    lost next to K. It runs in float64, in which the result is orthogonal to about 2e-16 |K|.

    Raises:
        NonFiniteError: K has a NaN or an infinite entry, or entries beyond 1e15.

    Source: Cayley (1846); Golub, Van Loan, "Matrix Computations", 4th edition, problem 2.5.

    Example:
        >>> from fmft_fast.ops.cayley import cayley
        >>> q = cayley(torch.tensor([[0.0, 1e6], [-1e6, 0.0]]))
        >>> bool((q.T @ q - torch.eye(2)).abs().max() < 1e-6)
        True
    """
    if has_torch_function_unary(k):
        return handle_torch_function(cayley, (k,), k)
    one = torch.eye(len(k), dtype=torch.float64, device=k.device)
    wide = k.double()
    # (I - K) and (I + K)^-1 commute, so that one solve from the left is enough.
    q = torch.linalg.solve_ex(one + wide, one - wide).result
    readable = not k.is_meta and not torch.compiler.is_compiling()
    if readable and not (k.is_cuda and torch.cuda.is_current_stream_capturing()):
        if not torch.isfinite(q).all():  # sync: once per solve; unseen it would be a NaN of x
            cause = f"its norm is {float(k.norm()):.3g}, next to which the identity is rounded away"
            if not torch.isfinite(k).all():
                cause = "it has NaN or infinite entries"
            raise NonFiniteError(
                "expected a skew matrix whose Cayley map is finite, got none: "
                f"{cause}; lower the learning rate, clip the gradient, or go back to a checkpoint"
            )
    return q.to(k.dtype)
