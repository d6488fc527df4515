"""A field beside which a second one is trained: dx/dt = v(t, x) + delta(t, x)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fmft_fast.errors import InputError, InputTypeError


class Residual(nn.Module):
    """The sum of a pre-trained field and a correction, with the pre-trained one frozen.

    A frozen base takes no gradient of its own (that of the state still goes through it) and stays
    as it is in evaluation: dropout off, running statistics fixed, also after `train()`.

    Args:
        base: module `v(t, x)` or `v(t, x, cond)`; its `requires_grad` is switched off in place,
            unless joint.
        branch: module of the same call, `delta`. One whose attribute `cond_dim` is 0 is not given
            the condition.
        joint: train the base as well. The two can then grow against each other: watch their
            cancellation, as `fmft_fast.train.MLEFineTuner` does.

    Attributes:
        recipe: how the branch was built (plain values), if it is to be built again from a
            checkpoint; see `fmft_fast.train.load_model`.

    Raises:
        InputTypeError: base or branch is no module.
        InputError: when called, base and branch give different shapes.

    Source: "Fine-Tuning Flow Matching via Maximum Likelihood Estimation of Reconstructions"
    (arXiv 2510.02081), residual fine-tuning.

    Example:
        >>> import torch
        >>> from fmft_fast.fields import MLP
        >>> field = Residual(MLP(2), MLP(2, hidden=(8,)))
        >>> field(torch.tensor(0.5), torch.zeros(7, 2)).shape
        torch.Size([7, 2])
        >>> sorted({name.split(".")[0] for name, p in field.named_parameters() if p.requires_grad})
        ['branch']
    """

    recipe: dict[str, Any] | None

    def __init__(self, base: nn.Module, branch: nn.Module, joint: bool = False) -> None:
        super().__init__()
        for name, part in (("base", base), ("branch", branch)):
            if not isinstance(part, nn.Module):
                raise InputTypeError(
                    f"expected {name} to be an nn.Module v(t, x), got {type(part).__name__}; "
                    f"wrap it in one"
                )
        self.base, self.branch, self.joint, self.recipe = base, branch, joint, None
        self._tells_branch = getattr(branch, "cond_dim", None) != 0
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
        told = cond is not None and self._tells_branch
        delta = self.branch(t, x, cond) if told else self.branch(t, x)
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
        return f"joint={self.joint}"
