"""The discrete adjoint equals backpropagation through the same steps, and keeps little memory."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch import Tensor, nn

from fmft_fast import odeint, solve, stage_time_table
from fmft_fast.errors import GradientError, InputError, NonFiniteError

pytestmark = pytest.mark.usefixtures("step_by_step")

EXPLICIT = ("euler", "midpoint", "heun2", "heun3", "rk4", "bosh3", "dopri5", "tsit5", "dopri8")
ADAPTIVE = ("dopri5", "tsit5", "bosh3", "dopri8", "fehlberg2", "adaptive_heun")


class TimeMLP(nn.Module):
    """A small smooth field of time, state and condition."""

    def __init__(self, dim: int = 3, cond: int = 0, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(dim + 1 + cond, 17), nn.Tanh(), nn.Linear(17, dim)).to(
            dtype
        )

    def forward(self, t: Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        parts = [x, t.expand(*x.shape[:-1], 1)]
        if cond is not None:
            parts.append(cond)
        return self.net(torch.cat(parts, -1))


def gradients(field: nn.Module, x0: Tensor, loss: Tensor, *more: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x0, *field.parameters(), *more]))


def assert_close(a: list[Tensor], b: list[Tensor], rtol: float) -> None:
    for left, right in zip(a, b, strict=True):
        assert left.shape == right.shape and left.dtype == right.dtype
        assert (left - right).abs().max() <= rtol * max(right.abs().max().item(), 1e-3)


def pair(field, x0, *more, **kwargs) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of one loss by the discrete adjoint and by backpropagation."""
    results = []
    for gradient in ("discrete", "backprop"):
        solution = solve(field, x0, gradient=gradient, **kwargs)
        weights = torch.linspace(-1, 2, solution.y.numel(), dtype=x0.dtype)
        loss = (weights * solution.y.reshape(-1)).sum() + solution.y.square().sum()
        results.append([solution.y.detach(), *gradients(field, x0, loss, *more)])
    return results[0], results[1]


@pytest.mark.parametrize("save", ["final", "all"])
@pytest.mark.parametrize("method", EXPLICIT)
def test_equals_backpropagation_with_fixed_steps(method: str, save: str) -> None:
    x0 = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert_close(*pair(TimeMLP(), x0, method=method, steps=7, save=save), rtol=1e-12)


@pytest.mark.parametrize("save", ["final", "all"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_equals_backpropagation_over_the_accepted_steps(method: str, save: str) -> None:
    x0 = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    t1 = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert_close(
        *pair(TimeMLP(), x0, t1, t1=t1, method=method, rtol=1e-4, atol=1e-5, save=save),
        rtol=1e-12,
    )


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5"])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradient_of_a_non_uniform_grid(method: str, reverse: bool) -> None:
    grid = torch.tensor([0.0, 0.1, 0.15, 0.4, 0.77, 1.0], dtype=torch.float64)
    grid = (grid.flip(0) if reverse else grid).clone().requires_grad_()
    x0 = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    field = TimeMLP()
    assert_close(*pair(field, x0, grid, method=method, steps=grid, save="all"), rtol=1e-12)

    def end(grid: Tensor) -> Tensor:
        return solve(field, x0.detach(), method=method, steps=grid).y

    assert torch.autograd.gradcheck(end, grid)


def test_gradient_of_the_times_that_an_adaptive_solve_meets() -> None:
    times = torch.tensor([0.0, 0.31, 0.9], dtype=torch.float64, requires_grad=True)
    x0 = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    field = TimeMLP()
    kwargs = {"method": "dopri5", "steps": times, "rtol": 1e-9, "atol": 1e-9, "save": "all"}
    solution = solve(field, x0, **kwargs)
    assert torch.equal(solution.t, times.detach()) and solution.y.shape == (3, 4, 3)
    assert_close(*pair(field, x0, times, **kwargs), rtol=1e-12)
    exact = odeint(field, x0, times, rtol=1e-11, atol=1e-11)
    g, g_exact = (torch.autograd.grad(y.square().sum(), times)[0] for y in (solution.y, exact))
    assert torch.allclose(g, g_exact, rtol=1e-6)


def test_gradients_of_condition_and_of_closed_over_tensors() -> None:
    field, cond = TimeMLP(cond=2), torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    x0 = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert_close(*pair(field, x0, cond, method="rk4", steps=3, cond=cond), rtol=1e-12)

    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    encoded = (weight * 2).tanh()  # not a leaf
    results = []
    for gradient in ("discrete", "backprop"):
        y = solve(lambda t, x: x @ encoded, x0, steps=5, gradient=gradient, params=[encoded]).y
        results.append(list(torch.autograd.grad(y.sum(), [x0, weight], retain_graph=True)))
    assert_close(*results, rtol=1e-12)


def test_a_field_with_an_unknown_tensor_is_refused() -> None:
    x0 = torch.randn(4, 3)
    hidden = types.SimpleNamespace(weight=torch.randn(3, 3, requires_grad=True))
    with pytest.raises(GradientError, match=r"shape \(3, 3\).*params="):
        solve(lambda t, x: x @ hidden.weight, x0, steps=2)
    with pytest.raises(GradientError):
        solve(lambda t, x: x @ hidden.weight.tanh(), x0, steps=2, params=[torch.randn(1)])
    with torch.no_grad():
        solve(lambda t, x: x @ hidden.weight, x0, steps=2)


GLOBAL = nn.Linear(3, 3)


def of_global(t, x):
    return GLOBAL(x)


class Holder:
    def __init__(self):
        self.weight = torch.randn(3, 3, requires_grad=True)

    def field(self, t, x):
        return x @ self.weight

    def __call__(self, t, x):
        return self.field(t, x)


def test_what_a_function_holds_gets_its_gradient():
    weight, net = torch.randn(3, 3, requires_grad=True), nn.Linear(3, 3)
    holder, nets = Holder(), {"a": [nn.Linear(3, 3)]}

    def with_default(t, x, w=weight, *, scale=2.0):
        return scale * x @ w

    def without_value(t, x):
        return x @ weight if later else net(x)

    cases = [
        (lambda t, x: x @ weight, [weight]),
        (lambda t, x: net(nets["a"][0](x)), [*net.parameters(), *nets["a"][0].parameters()]),
        (with_default, [weight]),
        (functools.partial(with_default, scale=3.0), [weight]),
        (functools.partial(lambda m, t, x: m(x), net), list(net.parameters())),
        (of_global, list(GLOBAL.parameters())),
        (holder.field, [holder.weight]),
        (holder, [holder.weight]),
    ]
    x0 = torch.randn(4, 3, requires_grad=True)
    for field, leaves in cases:
        found, right = (
            torch.autograd.grad(solve(field, x0, steps=3, **how).y.sum(), [x0, *leaves])
            for how in ({}, {"gradient": "backprop"})
        )
        assert_close(found, right, rtol=1e-5)
    with pytest.raises(NameError, match="later"):
        solve(without_value, x0, steps=2)
    later = True  # noqa: F841


def test_time_table_replaces_the_time_and_gets_a_gradient() -> None:
    embed = nn.Linear(1, 4).double()
    mix = nn.Linear(7, 3).double()
    x0 = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def with_row(row: Tensor, x: Tensor) -> Tensor:
        return mix(torch.cat([x, row.expand(len(x), 4)], -1)).tanh()

    table = embed(stage_time_table("heun3", 4).unsqueeze(-1))
    y = solve(with_row, x0, method="heun3", steps=4, time_table=table, params=mix.parameters()).y
    got = torch.autograd.grad(y.square().sum(), [x0, *embed.parameters(), *mix.parameters()])
    direct = solve(
        lambda t, x: with_row(embed(t.reshape(1)), x), x0, method="heun3", steps=4,
        gradient="backprop",
    ).y  # fmt: skip
    want = torch.autograd.grad(direct.square().sum(), [x0, *embed.parameters(), *mix.parameters()])
    assert_close(list(got), list(want), rtol=1e-12)
    with pytest.raises(InputError, match=r"\[4, 3\]"):
        solve(with_row, x0, method="heun3", steps=4, time_table=table[:3], params=mix.parameters())


@pytest.mark.parametrize("every", [1, 3, 4, 100])
@pytest.mark.parametrize("save", ["final", "all"])
def test_checkpointing_changes_no_bit(every: int, save: str) -> None:
    field, x0 = TimeMLP(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for checkpoint_every in (0, every):
        solution = solve(
            field, x0, method="rk4", steps=10, save=save, checkpoint_every=checkpoint_every
        )
        results.append(gradients(field, x0, solution.y.square().sum()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_float32_error_is_within_four_times_torchs_own(method: str) -> None:
    double, single = TimeMLP(), TimeMLP(dtype=torch.float32)
    single.load_state_dict({k: v.float() for k, v in double.state_dict().items()})
    double.load_state_dict({k: v.double() for k, v in single.state_dict().items()})
    x0 = torch.randn(64, 3, requires_grad=True)
    x0_double = x0.detach().double().requires_grad_()
    discrete, backprop = pair(single, x0, method=method, steps=16)
    _, exact = pair(double, x0_double, method=method, steps=16)
    for ours, torchs, reference in zip(discrete, backprop, exact, strict=True):
        own = (torchs - reference).abs().max()
        assert (ours - reference).abs().max() <= 4 * own + 1e-7 * reference.abs().max()


def test_dropout_masks_repeat_in_the_backward_pass() -> None:
    torch.manual_seed(0)
    dropout, weight = nn.Dropout(0.5), nn.Linear(3, 3).double()
    field = nn.Sequential(weight, dropout)
    x0 = torch.randn(64, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for gradient, every in (("discrete", 0), ("discrete", 2), ("backprop", 0)):
        torch.manual_seed(7)
        y = solve(
            lambda t, x: field(x), x0, method="midpoint", steps=5, gradient=gradient,
            params=field.parameters(), checkpoint_every=every,
        ).y  # fmt: skip
        after = torch.get_rng_state()
        results.append(gradients(field, x0, y.square().sum()))
        assert torch.equal(after, torch.get_rng_state())
    assert_close(results[0], results[2], rtol=1e-12)
    assert_close(results[1], results[2], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_accumulate_in_float32(dtype: torch.dtype) -> None:
    x0 = torch.ones(8, dtype=dtype)
    y = solve(lambda t, x: torch.ones_like(x), x0, steps=1000, gradient="none").y
    assert y.dtype == dtype and torch.equal(y, torch.full_like(y, 2.0))
    field = TimeMLP(dtype=dtype)
    y = solve(field, torch.randn(4, 3, dtype=dtype), steps=4).y
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in field.parameters())


def test_complex_states() -> None:
    matrix = torch.randn(3, 3, dtype=torch.complex128).requires_grad_()
    x0 = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)
    grid = torch.linspace(0, 1, 5, dtype=torch.float64).requires_grad_()
    results = []
    for gradient in ("discrete", "backprop"):
        y = solve(lambda t, x: x @ matrix * (1 + t), x0, method="rk4", steps=grid,
                  gradient=gradient, params=[matrix]).y  # fmt: skip
        results.append(list(torch.autograd.grad(y.abs().square().sum(), [x0, matrix, grid])))
    assert_close(*results, rtol=1e-12)


def test_autocast_of_the_forward_pass_holds_in_the_backward_pass() -> None:
    field, x0 = TimeMLP(dtype=torch.float32), torch.randn(16, 3, requires_grad=True)
    results = []
    for gradient in ("discrete", "backprop"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = solve(field, x0, steps=4, gradient=gradient).y
        results.append(gradients(field, x0, y.square().sum()))
    assert_close(*results, rtol=1e-2)


def test_a_parameter_changed_between_forward_and_backward_is_noticed() -> None:
    field, x0 = TimeMLP(), torch.randn(5, 3, dtype=torch.float64)
    y = solve(field, x0, steps=3).y
    with torch.no_grad():
        next(field.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_unused_parameters_get_no_gradient() -> None:
    field = TimeMLP()
    field.unused = nn.Linear(2, 2)
    solve(field, torch.randn(5, 3, dtype=torch.float64), steps=3).y.sum().backward()
    assert field.unused.weight.grad is None


def test_second_derivatives_are_refused_clearly_and_backprop_has_them() -> None:
    field, x0 = TimeMLP(), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(GradientError, match="backprop"):
        torch.autograd.grad(solve(field, x0, steps=3).y.sum(), x0, create_graph=True)

    def end(x0: Tensor) -> Tensor:
        return solve(field, x0, steps=3, gradient="backprop").y

    assert torch.autograd.gradgradcheck(end, x0)


def test_non_finite_values_are_reported_with_their_step() -> None:
    def field(t: Tensor, x: Tensor) -> Tensor:
        return torch.where(t > 0.55, torch.nan, 1.0) * x

    with pytest.raises(NonFiniteError, match="step 6 of 10"):
        solve(field, torch.ones(3), steps=10)
    with pytest.raises(NonFiniteError, match="x0"):
        solve(lambda t, x: x, torch.tensor([1.0, torch.inf]), steps=2)


def test_continuous_gradient_is_approximate_and_discrete_is_exact() -> None:
    field, x0 = TimeMLP(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    exact = gradients(field, x0, solve(field, x0, steps=8, gradient="backprop").y.sum())
    approximate = gradients(field, x0, solve(field, x0, steps=8, gradient="continuous").y.sum())
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(approximate, exact, strict=True)]
    assert 1e-6 < max(errors) < 0.5


@pytest.mark.parametrize("method", ["implicit_midpoint", "implicit_adams", "trbdf2", "bdf2"])
def test_other_methods_solve_by_backpropagation(method: str) -> None:
    field, x0 = TimeMLP(), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = solve(field, x0, method=method, steps=8, gradient="backprop").y
    reference = solve(field, x0, method="rk4", steps=8, gradient="none").y
    assert (y - reference).abs().max() < 1e-2 and y.requires_grad
    assert not solve(field, x0, method=method, steps=8, gradient="none").y.requires_grad


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "steps=N"),
        ({"steps": 0}, "positive int"),
        ({"steps": 2.5}, "positive int"),
        ({"steps": 2, "t1": 0.0}, "strictly"),
        ({"steps": torch.tensor([0.0, 0.5, 0.5])}, r"t\[1\] = 0.5"),
        ({"steps": 2, "rtol": 1e-3, "method": "dopri5"}, "not both"),
        ({"rtol": 1e-3, "method": "rk4"}, "no step control"),
        ({"steps": 2, "gradient": "exact"}, "gradient must be"),
        ({"steps": 2, "save": "some"}, "save must be"),
        ({"steps": 2, "checkpoint_every": -1}, "checkpoint_every"),
        ({"steps": 2, "method": "rk5"}, "Invalid method"),
    ],
)
def test_wrong_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(lambda t, x: -x, torch.ones(2), **kwargs)


def test_statistics() -> None:
    field, x0 = TimeMLP(), torch.randn(2, 3, dtype=torch.float64)
    stats = solve(field, x0, method="rk4", steps=5).stats
    assert (stats.evaluations, stats.accepted, stats.rejected) == (20, 5, 0)
    assert stats.last_step == pytest.approx(0.2)
    adaptive = solve(field, x0, method="dopri5", rtol=1e-8, atol=1e-8)
    assert adaptive.stats.accepted == len(adaptive.t) - 1
    assert adaptive.stats.evaluations >= 6 * (adaptive.stats.accepted + adaptive.stats.rejected)


def test_compiles_without_a_graph_break() -> None:
    field, x0 = TimeMLP(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def end(x0: Tensor) -> Tensor:
        return solve(field, x0, method="midpoint", steps=3).y

    want = gradients(field, x0, end(x0).square().sum())
    compiled = torch.compile(end, fullgraph=True, backend="aot_eager")
    assert_close(gradients(field, x0, compiled(x0).square().sum()), want, rtol=1e-12)
