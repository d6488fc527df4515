"""The discrete adjoint of implicit and multistep methods equals backpropagation through them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmft_fast import record_stats, solve
from fmft_fast.errors import GradientError, InputError
from fmft_fast.solvers.implicit import NOT_CONVERGED

METHODS = (
    "implicit_euler",
    "implicit_midpoint",
    "trapezoid",
    "radauIIA5",
    "gl6",
    "trbdf2",
    "bdf2",
    "explicit_adams",
    "implicit_adams",
)
F64 = torch.float64


class Field(nn.Module):
    """A small smooth field of time, state and condition."""

    def __init__(self, dim: int = 3, cond: int = 0, drop: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(dim + 1 + cond, 9), nn.Tanh(), nn.Dropout(drop), nn.Linear(9, dim)]
        self.net = nn.Sequential(*layers).double()

    def forward(self, t: Tensor, x: Tensor, *cond: Tensor) -> Tensor:
        return self.net(torch.cat([x, t.to(x.dtype).expand(*x.shape[:-1], 1), *cond], -1))


def uneven_grid(*, reverse: bool = False) -> Tensor:
    grid = torch.tensor([0.0, 0.1, 0.15, 0.4, 0.77, 1.0], dtype=F64)
    return (grid.flip(0) if reverse else grid).clone().requires_grad_()


def start(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))


def assert_equal_gradients(field, x0: Tensor, *more: Tensor, **kwargs: Any) -> None:
    """Values and gradients of one loss, by the discrete adjoint and by backpropagation."""
    x0 = x0.clone().requires_grad_()
    wanted = [x0, *more, *(field.parameters() if isinstance(field, nn.Module) else ())]
    results = []
    for gradient in ("discrete", "backprop"):
        torch.manual_seed(3)
        with warnings.catch_warnings():  # the corrector of implicit_adams stops after four rounds
            warnings.filterwarnings("ignore", message=NOT_CONVERGED)
            y = solve(field, x0, gradient=gradient, **kwargs).y
        weights = torch.linspace(-1, 2, y.numel(), dtype=F64)
        loss = (weights * y.reshape(-1)).sum() + y.square().sum()
        results.append([y.detach(), *torch.autograd.grad(loss, wanted, retain_graph=True)])
    for ours, reference in zip(*results, strict=True):
        assert reference.abs().max() > 1e-4
        assert (ours - reference).abs().max() <= 1e-13 * reference.abs().max()


@pytest.mark.parametrize("save", ["final", "all"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_equals_backpropagation_on_uneven_grids(method: str, reverse: bool, save: str) -> None:
    grid = uneven_grid(reverse=reverse)
    assert_equal_gradients(Field(), start(4, 3), grid, method=method, steps=grid, save=save)


@pytest.mark.parametrize("method", METHODS)
def test_equals_backpropagation_on_equal_steps(method: str) -> None:
    assert_equal_gradients(Field(), start(4, 3), method=method, steps=7)


def test_equals_backpropagation_where_iterations_stop_early() -> None:
    """The gradient is that of what was computed, converged or not."""
    kwargs = {"method": "bdf2", "steps": 3, "options": {"max_iters": 2}}
    assert_equal_gradients(Field(), start(4, 3), **kwargs)


@pytest.mark.parametrize("method", ["implicit_midpoint", "bdf2"])
def test_gradients_of_times_are_those_of_differences(method: str) -> None:
    field, x0 = Field(), start(1, 3)
    grid = uneven_grid()
    ours = torch.autograd.grad(solve(field, x0, method=method, steps=grid).y.sum(), grid)[0]
    step = 1e-3
    for n in range(len(grid)):
        ends = []
        for sign in (1, -1):
            moved = grid.detach().clone()
            moved[n] += sign * step
            ends.append(solve(field, x0, method=method, steps=moved, gradient="none").y.sum())
        assert ours[n].item() == pytest.approx((ends[0] - ends[1]).item() / (2 * step), abs=1e-4)


@pytest.mark.parametrize("method", ["implicit_midpoint", "bdf2"])
def test_gradients_of_conditions_and_closed_over_tensors(method: str) -> None:
    cond = start(4, 2).requires_grad_()
    assert_equal_gradients(Field(cond=2), start(4, 3), cond, method=method, steps=3, cond=cond)
    weight = start(3, 3).requires_grad_()
    encoded = (weight * 2).tanh()  # not a leaf

    def field(t: Tensor, x: Tensor) -> Tensor:
        return x @ encoded

    assert_equal_gradients(field, start(4, 3), weight, method=method, steps=3, params=[encoded])
    with pytest.raises(GradientError, match=r"shape \(3, 3\).*params="):
        solve(field, start(4, 3), method=method, steps=3)
    assert_equal_gradients(lambda t, x: x @ weight, start(4, 3), weight, method=method, steps=3)


@pytest.mark.parametrize("method", ["explicit_adams", "bdf2"])
def test_dropout_masks_are_repeated(method: str) -> None:
    """Masks that change within an iteration keep it from converging; the gradient stands."""
    options = {"max_iters": 2} if method == "bdf2" else {}
    assert_equal_gradients(Field(drop=0.2), start(4, 3), method=method, steps=4, options=options)


def test_fields_with_a_hidden_state_are_refused() -> None:
    class Counting(Field):
        calls = 0

        def forward(self, t: Tensor, x: Tensor, *cond: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(t, x) * (1 + 0.1 * (self.calls > 12))

    y = solve(Counting(), start(4, 3), method="bdf2", steps=4).y
    with pytest.raises(GradientError, match="hidden state"):
        y.sum().backward()


def test_second_derivatives_are_refused() -> None:
    x0 = start(4, 3).requires_grad_()
    y = solve(Field(), x0, method="bdf2", steps=3).y
    with pytest.raises(GradientError, match="create_graph"):
        torch.autograd.grad(y.sum(), x0, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_follows_float64(dtype: torch.dtype) -> None:
    field, x0 = Field(), start(4, 3)
    gradients = []
    for kind in (F64, dtype):
        field = Field().to(kind)
        leaf = x0.to(kind).requires_grad_()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=NOT_CONVERGED)
            y = solve(field, leaf, method="bdf2", steps=4, options={"max_iters": 4}).y
        assert y.dtype == kind
        gradients.append(torch.autograd.grad(y.double().square().sum(), leaf)[0])
    assert gradients[1].dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(gradients[1].double(), gradients[0], rtol=tolerance, atol=tolerance)


def test_what_it_does_not_take_is_named() -> None:
    field, x0 = Field(), start(4, 3)
    with pytest.raises(InputError, match="step_size"):
        solve(field, x0, method="bdf2", steps=2, options={"step_size": 0.1})
    with pytest.raises(InputError, match="checkpoint_every"):
        solve(field, x0, method="bdf2", steps=2, checkpoint_every=2)
    with pytest.raises(InputError, match="bdf2 has no step control"):
        solve(field, x0, method="bdf2", rtol=1e-3)
    with pytest.raises(GradientError, match='"continuous" or "none"'):
        solve(field, x0, method="scipy_solver", rtol=1e-3)


def test_memory_grows_with_steps_not_with_iterations() -> None:
    """What the graph of a solve holds: backpropagation keeps every evaluation of the field."""

    def saved(gradient: Any) -> int:
        total = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            solve(Field(), start(64, 3).requires_grad_(), method="bdf2", steps=8, gradient=gradient)
        return total

    assert saved("discrete") * 20 < saved("backprop")


def test_statistics() -> None:
    with record_stats() as log:
        stats = solve(Field(), start(4, 3), method="bdf2", steps=8).stats
        plain = solve(Field(), start(4, 3), method="bdf2", steps=8, gradient="none").stats
    assert stats == plain == log[0] and stats.accepted == 8 and stats.evaluations > 8
