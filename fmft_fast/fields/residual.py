"""A field beside which a second one is trained: dx/dt = v(t, x) + delta(t, x)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fmft_fast.errors import InputError, InputTypeError


class Residual(nn.Module):
    """The sum of a pre-trained field and a correction, with the pre-trained one frozen.

    A frozen base takes no gradient of its own (that of the state still goes through it) and stays
    as it is in evaluation: dropout off, running statistics fixed, also after `train()`.

    Args:
        base: module `v(t, x)` or `v(t, x, cond)`; its `requires_grad` is switched off in place,
            unless joint.
        branch: module of the same call, `delta`. Its attribute `cond_dim`, if it has one, tells
            whether it takes the condition.
        joint: train the base as well. The two can then grow against each other: watch their
            cancellation, as `fmft_fast.train.MLEFineTuner` does.
        show_velocity: give the branch v(t, x), flattened, as its condition or in front of that: it
            can then correct with few weights what depends on features that the base knows.

    Attributes:
        recipe: how the branch was built (plain values), if it is to be built again from a
            checkpoint; see `fmft_fast.train.load_model`.

    Raises:
        InputTypeError: base or branch is no module.
        InputError: when called, base and branch give different shapes.

    Source: "Fine-Tuning Flow Matching via Maximum Likelihood Estimation of Reconstructions"
    (arXiv 2510.02081), residual fine-tuning.

    Example:
        >>> from fmft_fast.fields import MLP
        >>> field = Residual(MLP(2), MLP(2, hidden=(8,)))
        >>> field(torch.tensor(0.5), torch.zeros(7, 2)).shape
        torch.Size([7, 2])
        >>> sorted({name.split(".")[0] for name, p in field.named_parameters() if p.requires_grad})
        ['branch']
    """

    recipe: dict[str, Any] | None

    def __init__(
        self,
        base: nn.Module,
        branch: nn.Module,
        joint: bool = False,
        *,
        show_velocity: bool = False,
    ) -> None:
        super().__init__()
        for name, part in (("base", base), ("branch", branch)):
            if not isinstance(part, nn.Module):
                raise InputTypeError(
                    f"expected {name} to be an nn.Module v(t, x), got {type(part).__name__}; "
                    f"wrap it in one"
                )
        self.base, self.branch, self.joint, self.recipe = base, branch, joint, None
        self.show_velocity = show_velocity
        self._told = getattr(branch, "cond_dim", None)
        for name in ("dim", "cond_dim"):
            # What the base tells about its states, the sum tells, too.
            if hasattr(base, name):
                setattr(self, name, getattr(base, name))
        if not joint:
            base.requires_grad_(False)
        self.train(base.training)

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return v + delta, of x's shape; arguments as base and branch take them."""
        v, delta = self.parts(t, x, cond)
        return v + delta

    def parts(self, t: Tensor, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return v and delta, each of x's shape."""
        v = self.base(t, x) if cond is None else self.base(t, x, cond)
        told = [v if v.ndim == 2 else v.flatten(1)] if self.show_velocity else []
        seen = told[0].shape[1] if told else 0
        if cond is not None and (self._told is None or self._told > seen):
            told.append(cond)
        if len(told) == 2:
            told = [torch.cat(told, 1)]
        delta = self.branch(t, x, *told)
        if v.shape != delta.shape:
            raise InputError(
                f"expected base and branch to give the same shape, got {list(v.shape)} and "
                f"{list(delta.shape)} for x {list(x.shape)}; build the branch for that state"
            )
        return v, delta

    def train(self, mode: bool = True) -> Residual:
        """Switch between training and evaluation; a frozen base stays in evaluation."""
        super().train(mode)
        if not self.joint:
            self.base.eval()
        return self

    def extra_repr(self) -> str:
        """Show what is trained."""
        return f"joint={self.joint}, show_velocity={self.show_velocity}"
