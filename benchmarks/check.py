"""Correctness before speed: values and gradients against float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .cases import Case, Operation, Problem
from .peers import LEARNING_RATE, PEERS, Peer

# Relative errors (2-norm) of float32 results that pass. With fixed steps the reference takes the
# same steps, so only rounding is left; with adaptive steps the reference has tolerances of 1e-11,
# what is left is what tolerances of 1e-5 allow (torchdiffeq: 8e-5 and 2e-3 on the case dopri5).
# Where torch may round the factors of a product, to 8 bits at the least, they are rounded.
BOUNDS = {
    "fixed": {"forward": 1e-5, "gradient": 1e-4, "training": 5e-2},
    "adaptive": {"forward": 5e-4, "gradient": 2e-2, "training": 2e-1},
    "rounded": {"forward": 1e-2, "gradient": 5e-2, "training": 5e-1},
}


@dataclass(frozen=True)
class Errors:
    """Relative errors; None where the operation has no such result."""

    value: float | None = None
    gradient: float | None = None
    update: float | None = None

    def fault(self, case: Case, peer: Peer) -> str | None:
        """What is out of bounds; the gradient of an approximate peer never is."""
        kind = "fixed" if case.steps else "adaptive"
        exact = torch.get_float32_matmul_precision() == "highest"
        bounds = BOUNDS[kind if exact else "rounded"]
        checks = [("value", self.value, bounds["forward"])]
        if not peer.approximate:
            checks.append(("gradient", self.gradient, bounds["gradient"]))
            checks.append(("update", self.update, bounds["training"]))
        for what, error, bound in checks:
            if error is not None and not error <= bound:
                return f"wrong: {what} error {error:.1e}, expected at most {bound:.0e}"
        return None


class Reference:
    """The final state, the gradient and AdamW's first update of a case in float64."""

    def __init__(self, case: Case, device: str = "cpu"):
        exact = case if case.steps else replace(case, tol=1e-11)
        problem = Problem(exact, torch.float64, device)
        peer = PEERS["plain loop" if case.steps else 'fmft_fast.solve(gradient="backprop")']
        state, *grads = peer.prepare(problem, "gradient")()
        self.start = flat(problem.parameters)
        self.state, self.gradient = flat([state]), flat(grads)
        # AdamW's first step: the moments, corrected for their start, are g and g^2.
        self.update = -LEARNING_RATE * self.gradient / (np.abs(self.gradient) + 1e-8)

    def errors(self, operation: Operation, found: Sequence[Any]) -> Errors:
        """Errors of what a call has returned the first time."""
        if operation == "forward":
            return Errors(value=relative(flat(found), self.state))
        if operation == "gradient":
            state, *grads = found
            return Errors(relative(flat([state]), self.state), relative(flat(grads), self.gradient))
        # The weights are those of float32, so the update is seen through their rounding.
        start = self.start.astype(np.float32).astype(np.float64)
        return Errors(update=relative(flat(found) - start, self.update))


def flat(parts: Sequence[Any]) -> np.ndarray:
    """All numbers of some tensors or arrays, copied to float64."""
    arrays = [p.detach().cpu().numpy() if isinstance(p, torch.Tensor) else p for p in parts]
    return np.concatenate([np.array(a, dtype=np.float64).reshape(-1) for a in arrays])


def relative(found: np.ndarray, exact: np.ndarray) -> float:
    """Relative error in the 2-norm; infinite for another shape or for NaN."""
    if found.shape != exact.shape:
        return math.inf
    error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    return error if math.isfinite(error) else math.inf
