"""What the drop-in face does beyond torchdiffeq: clear failures, statistics, no syncs, compile."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmft_fast import odeint, odeint_adjoint, odeint_dense, odeint_event, record_stats
from fmft_fast.errors import MaxStepsError, NonFiniteError, NonFiniteWarning, StepUnderflowError

FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


# Failures


def test_underflow_in_float32_names_time_and_cause() -> None:
    def jump(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 0.3, 1.0, 1e12) * torch.ones_like(y)

    for error in (StepUnderflowError, AssertionError):  # the latter is torchdiffeq's type
        with pytest.raises(error, match=r"underflow in dt .* t = 0\.[23].*below the resolution"):
            odeint(jump, torch.zeros(4), UNIT, rtol=1e-12, atol=1e-12)


def test_times_in_float32_are_named_as_cause() -> None:
    def jump(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 0.3, 1.0, 1e6) * torch.ones_like(y)

    with pytest.raises(StepUnderflowError, match=r"t = 0\.(29|30)\d*.*float32.*jump_t"):
        odeint(jump, torch.zeros(2), UNIT.float(), rtol=0.0, atol=1e-9,
               options={"dtype": torch.float32})  # fmt: skip


def test_a_field_that_becomes_nan_is_named_with_time_and_step() -> None:
    def broken(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t > 0.5, torch.nan, 1.0) * y

    with pytest.raises(NonFiniteError, match=r"t = 0\.(4999|5)\d*, step \d+"):
        odeint(broken, torch.ones(2, dtype=torch.float64), UNIT)
    with pytest.raises(NonFiniteError, match="field.*t = 0.0, step 0"):
        odeint(lambda t, y: y / 0, torch.ones(2), UNIT)
    with pytest.raises(NonFiniteError, match="state"):
        odeint(decay, torch.tensor([torch.nan, 1.0]), UNIT)


def test_a_first_step_that_overflows_is_retried_with_a_smaller_one() -> None:
    def stiff(t: Tensor, y: Tensor) -> Tensor:
        return -torch.exp(y) * y

    y = odeint(stiff, torch.full((1,), 5.0), UNIT, options={"first_step": 100.0})
    assert 0 < y[-1].item() < 1


@pytest.mark.parametrize("method", [*FIXED, "explicit_adams", "implicit_midpoint", "bdf2"])
def test_a_fixed_grid_warns_with_the_step_that_broke(method: str) -> None:
    def broken(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t > 0.62, torch.inf, 1.0) * torch.ones_like(y)

    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    y0 = torch.ones(2, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = odeint(broken, y0, t, method=method, options={"step_size": 0.1})
    messages = [str(w.message) for w in caught if w.category is NonFiniteWarning]
    assert len(messages) == 1 and "in step" in messages[0] and "of 10" in messages[0]
    assert "step 6" in messages[0] or "step 7" in messages[0]
    assert torch.isfinite(y[1]).all() and not torch.isfinite(y[2]).any()


def test_max_num_steps() -> None:
    with pytest.raises(MaxStepsError, match=r"max_num_steps exceeded \(3>=3\) at t = "):
        odeint(lambda t, y: torch.cos(50 * t) * y, torch.ones(1), UNIT,
               options={"max_num_steps": 3})  # fmt: skip


@pytest.mark.parametrize("place", ["class", "instance", "submodule"])
def test_callbacks_are_found_wherever_a_module_keeps_them(place: str) -> None:
    seen: list[float] = []

    class Decay(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

    class Note(nn.Module):
        def forward(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
            seen.append(t.item())

    class Noting(Decay):
        def callback_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
            seen.append(t.item())

    field: Any = Noting() if place == "class" else Decay()
    if place == "instance":
        field.callback_step = lambda t, y, dt: seen.append(t.item())
    elif place == "submodule":
        field.callback_step = Note()
    odeint(field, torch.ones(2), torch.linspace(0, 1, 3), method="euler")
    assert seen == [0.0, 0.5]


# Statistics


def test_statistics_match_what_the_field_and_callbacks_saw() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = self.accepted = self.rejected = 0

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return torch.cos(30 * t) * y

        def callback_accept_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
            self.accepted += 1

        def callback_reject_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
            self.rejected += 1

    field = Counting()
    with record_stats() as log:
        odeint(field, torch.ones(3), UNIT, rtol=1e-6, atol=1e-6)
        odeint(decay, torch.ones(3), torch.linspace(0, 1, 5), method="rk4")
    adaptive, fixed = log
    assert (adaptive.evaluations, adaptive.accepted, adaptive.rejected) == (
        field.calls,
        field.accepted,
        field.rejected,
    )
    assert adaptive.rejected > 0 and adaptive.last_step is not None
    assert (fixed.method, fixed.evaluations, fixed.accepted) == ("rk4", 16, 4)
    assert fixed.last_step == pytest.approx(0.25)


# No host synchronisation, torch.compile


@pytest.mark.parametrize("method", FIXED)
def test_no_step_of_a_fixed_grid_reads_the_device(method: str) -> None:
    # Reading a value of a meta tensor is an error, so a solve on meta has read none.
    weight = torch.empty(3, 3, device="meta", requires_grad=True)
    y0 = torch.empty(5, 3, device="meta", requires_grad=True)
    with pytest.warns(UserWarning, match="same device"):
        y = odeint(lambda t, y: t * (y @ weight), y0, torch.linspace(0, 1, 9), method=method)
    assert y.shape == (9, 5, 3)
    y.sum().backward()
    assert weight.grad is not None and weight.grad.device.type == "meta"


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_fixed_grids_compile_without_a_graph_break(method: str, requires_grad: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    t = torch.linspace(0, 1, 4, dtype=torch.float64, requires_grad=requires_grad)
    y0 = torch.randn(5, 3, dtype=torch.float64)

    def end(y0: Tensor, t: Tensor) -> Tensor:
        return odeint(lambda t, y: net(y) * t, y0, t, method=method)[-1]

    torch.compiler.reset()
    compiled = torch.compile(end, fullgraph=True, backend="aot_eager")
    results = []
    for run in (end, compiled):
        loss = run(y0, t).square().sum()
        inputs = [*net.parameters(), *([t] if requires_grad else [])]
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_function_transforms_of_a_fixed_grid() -> None:
    matrix = torch.randn(3, 3, dtype=torch.float64)

    def end(y0: Tensor) -> Tensor:
        return odeint(lambda t, y: torch.tanh(y @ matrix), y0, UNIT, method="rk4")[-1]

    y0 = torch.randn(5, 3, dtype=torch.float64)
    assert torch.allclose(torch.func.vmap(end)(y0), end(y0), rtol=1e-14)
    jacobian = torch.autograd.functional.jacobian(end, y0[0])
    assert torch.allclose(torch.func.jacrev(end)(y0[0]), jacobian, rtol=1e-12)
    assert torch.allclose(torch.func.jacfwd(end)(y0[0]), jacobian, rtol=1e-12)


# Low precision, dense output, events


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_half_precision_is_integrated_in_float32(dtype: torch.dtype, method: str) -> None:
    seen: set = set()

    def field(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        seen.update((t.dtype, *(part.dtype for part in y)))
        return torch.ones_like(y[0]), -y[1]

    y0 = (torch.ones(4, dtype=dtype), torch.ones(2, dtype=dtype))
    t = torch.linspace(0, 1, 1001) if method != "dopri5" else UNIT
    rise, fall = odeint(field, y0, t, method=method, rtol=1e-4, atol=1e-4)
    assert seen == {dtype} and rise.dtype == fall.dtype == dtype
    assert torch.equal(rise[-1], torch.full_like(rise[-1], 2.0))  # bf16 sums would stop at 1.25
    assert fall[-1].float().sub(0.3679).abs().max() < 3e-3
    layer = nn.Linear(4, 4).to(dtype)
    solution = odeint_adjoint(lambda t, y: layer(y), y0[0], UNIT, method="rk4",
                              adjoint_params=layer.parameters())  # fmt: skip
    solution.float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8", "rk4", "implicit_adams"])
@pytest.mark.parametrize("direction", [1, -1])
def test_dense_output_of_every_family(method: str, direction: int) -> None:
    y0 = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    adaptive = method in ("dopri5", "tsit5", "bosh3", "dopri8")
    options = {"max_step": 0.2} if adaptive else {"step_size": 0.01}
    t0, t1 = torch.tensor(0.0, dtype=torch.float64), torch.tensor(float(direction))
    y = odeint_dense(decay, y0, t0, t1, method=method, rtol=1e-8, atol=1e-8, options=options)
    t = direction * torch.linspace(0, 1, 37, dtype=torch.float64)
    assert torch.allclose(y(t), y0 * torch.exp(-t)[:, None], atol=2e-6)
    assert torch.equal(y(t[5]), y(t)[5]) and y(0.5 * direction).shape == (2,)
    assert torch.autograd.grad(y(t[9]).sum(), y0)[0][0].item() == pytest.approx(
        torch.exp(-t[9]).item(), abs=2e-5
    )
    with pytest.raises(ValueError, match="between t ="):
        y(1.5 * direction)


@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradient_of_an_event(interface, method: str) -> None:
    """A ball thrown up falls back to the ground: t = (v + sqrt(v^2 + 2 g h)) / g."""
    gravity = torch.tensor(9.8, dtype=torch.float64)
    height = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    speed = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    ground = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)

    class Fall(nn.Module):
        def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return y[1], -gravity * torch.ones_like(y[1])

    options = {"step_size": 0.01, "interp": "cubic"} if method == "rk4" else None
    event_t, (x, v) = odeint_event(
        Fall(), (height, speed), torch.tensor(0.0, dtype=torch.float64),
        event_fn=lambda t, y: y[0] - ground, method=method, options=options, atol=1e-12,
        odeint_interface=interface,
    )  # fmt: skip
    exact_t = (speed + (speed**2 + 2 * gravity * (height - ground)).sqrt()) / gravity
    exact_v = speed - gravity * exact_t
    assert event_t.item() == pytest.approx(exact_t.item(), abs=1e-9)
    assert x[-1].item() == pytest.approx(0.0, abs=1e-8)
    for ours, exact in ((event_t, exact_t), (v[-1], exact_v)):
        wanted = (height, speed, ground)
        got = torch.autograd.grad(ours, wanted, retain_graph=True)
        want = torch.autograd.grad(exact, wanted, retain_graph=True)
        assert [g.item() for g in got] == pytest.approx([w.item() for w in want], rel=1e-6)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_an_event_at_the_start_ends_the_solve_there(method: str) -> None:
    y0 = torch.tensor([0.0, 1.0], dtype=torch.float64)
    event_t, y = odeint(decay, y0, UNIT, method=method, event_fn=lambda t, y: y[0],
                        options={"step_size": 0.1} if method == "rk4" else None)  # fmt: skip
    assert event_t.item() == 0.0 and torch.equal(y[1], y0)


def test_tolerances_per_part_reach_the_adjoint() -> None:
    parts = tuple(torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (2, 3))
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y = odeint_adjoint(lambda t, y: (-rate * y[0], y[1] * t), parts, UNIT,
                       rtol=(1e-7, 1e-8), atol=(1e-8, 1e-9), adjoint_params=(rate,))  # fmt: skip
    grads = torch.autograd.grad(y[0][-1].sum() + y[1][-1].sum(), (*parts, rate))
    exact = torch.exp(-rate.detach())
    assert torch.allclose(grads[0], exact, rtol=1e-6)
    assert torch.allclose(grads[1], torch.tensor(0.5).double().exp(), rtol=1e-6)
    assert torch.allclose(grads[2], -2 * exact, rtol=1e-6)
