"""What researchers do to a solver in practice: no gradient may be silently wrong or missing."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fmft_fast import odeint, odeint_adjoint, odeint_dense, patched_torchdiffeq, solve
from fmft_fast.errors import FmftError, GradientError, InputError, InputTypeError

F64 = torch.float64
TIMES = torch.tensor([0.0, 1.0], dtype=F64)


class Field(nn.Module):
    """A module as a field of time and state."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.net = nn.Sequential(*(layers or (nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))))
        self.double()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(x) * (1 + t)


def start(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 3)), dtype=F64)


def spectral() -> Field:
    return Field(parametrizations.spectral_norm(nn.Linear(3, 5), n_power_iterations=1), nn.Tanh(),
                 nn.Linear(5, 3))  # fmt: skip


def batch_norm() -> Field:
    return Field(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def weight_norm() -> Field:
    return Field(parametrizations.weight_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 3))


def doubled_by_hook() -> Field:
    field = Field()
    field.net[0].weight.register_hook(lambda g: 2 * g)
    return field


def half_frozen() -> Field:
    field = Field()
    field.net[0].requires_grad_(False)
    return field


@pytest.mark.parametrize(
    "make", (Field, spectral, batch_norm, weight_norm, doubled_by_hook, half_frozen)
)
@pytest.mark.parametrize("extra", ({}, {"checkpoint_every": 2}, {"save": "all"}))
def test_modules_with_state_hooks_and_parametrisations_get_the_gradient_and_buffers_of_backprop(
    make, extra
):
    def run(gradient):
        torch.manual_seed(1)
        field, x = make(), start().requires_grad_()
        y = solve(field, x, method="heun2", steps=3, gradient=gradient, **extra).y
        y.square().sum().backward()
        return [x.grad, *(p.grad for p in field.parameters()), *field.buffers()]

    torch.testing.assert_close(run("discrete"), run("backprop"), rtol=1e-10, atol=1e-10)


def test_a_hook_on_a_parameter_sees_the_whole_gradient_of_the_continuous_adjoint():
    field, x, seen = Field(), start(), []
    field.net[0].weight.register_hook(seen.append)
    solve(field, x, method="rk4", steps=3, gradient="continuous").y.sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], field.net[0].weight.grad)


def test_retain_grad_of_a_closed_over_tensor_counts_once():
    def run(gradient):
        w = torch.eye(3, dtype=F64, requires_grad=True) * 0.3
        w.retain_grad()
        y = solve(lambda t, x: x @ w, x0, steps=3, params=[w], gradient=gradient).y
        y.sum().backward()
        return w.grad

    x0 = start()
    torch.testing.assert_close(run("discrete"), run("backprop"))


def late_branch(w):
    hidden = SimpleNamespace(w=w)
    return (lambda t, x: x @ hidden.w if t > 0.5 else -x), {}


def second_chunk(w):
    a, b = w.split([2, 1])
    return (lambda t, x: x * a.sum() + b.sum()), {"params": [a]}


def computed_from_known(w):
    e = w * 2
    return (lambda t, x: x @ w + x @ e), {"params": [w, e], "steps": 1}


def computed_before(w):
    e = w.sin() @ w
    return (lambda t, x: x @ w + x @ e), {"params": [w]}


def continuous_closure(w):
    hidden = SimpleNamespace(w=w)
    return (lambda t, x: x @ hidden.w), {"gradient": "continuous"}


def own_generator(w):
    generator = torch.Generator()
    return (lambda t, x: x * torch.rand(3, generator=generator)), {}


def late_noise(w):
    return (lambda t, x: x + torch.randn_like(x) if t > 0.5 else -x), {}


def adaptive_noise(w):
    return (lambda t, x: x + 0.01 * torch.rand_like(x)), {
        "steps": None, "rtol": 0.1, "method": "bosh3",
    }  # fmt: skip


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.parametrize(
    "make",
    (late_branch, second_chunk, computed_from_known, computed_before, continuous_closure,
     own_generator, late_noise, adaptive_noise),
)  # fmt: skip
def test_a_gradient_that_cannot_be_exact_is_refused_and_not_returned(make):
    w = torch.eye(3, dtype=F64, requires_grad=True)
    field, kwargs = make(w)
    with pytest.raises(GradientError, match=r"params=|cond=|gradient=|steps="):
        x = start().requires_grad_()
        solve(field, x, **({"steps": 4} | kwargs)).y.sum().backward()


def test_the_continuous_adjoint_refuses_a_second_derivative():
    x = start().requires_grad_()
    y = odeint_adjoint(lambda t, x: x.sin(), x, TIMES, adjoint_params=())
    with pytest.raises(GradientError, match="use odeint"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_the_event_time_of_the_adjoint_has_its_gradient():
    x = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    event_t, y = odeint_adjoint(
        lambda t, x: -x, x, TIMES, adjoint_params=(), event_fn=lambda t, y: y[0] - 0.5
    )
    assert event_t.item() == pytest.approx(math.log(4), abs=1e-6)
    assert torch.autograd.grad(event_t, x)[0].item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("gradient", ("discrete", "backprop", "none"))
@pytest.mark.parametrize("target", ("t", "x"))
def test_a_field_that_writes_to_its_arguments_is_refused(gradient, target):
    def field(t, x):
        (t if target == "t" else x).mul_(2)
        return x * t

    with pytest.raises((InputError, RuntimeError), match="in.place"):
        solve(field, start().requires_grad_(gradient == "discrete") * 1, steps=2, gradient=gradient)


def test_a_state_that_is_overwritten_before_the_backward_pass_is_refused():
    x, w = start(), torch.eye(3, dtype=F64, requires_grad=True)
    y = solve(lambda t, x: x @ w, x, steps=2, params=w).y
    x.zero_()
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


@pytest.mark.parametrize(
    "transform",
    (
        lambda f, x: torch.vmap(f)(x),
        lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
        lambda f, x: torch.autograd.functional.jacobian(f, x),
    ),
)
def test_function_transforms_run_through_the_default_gradient(transform):
    def by(gradient):
        return lambda x: solve(lambda t, x: x.sin(), x, steps=3, gradient=gradient).y

    x = start()
    torch.testing.assert_close(transform(by("discrete"), x), transform(by("backprop"), x))


@pytest.mark.parametrize("method, options", (("dopri5", None), ("rk4", {"step_size": 0.1})))
def test_dense_output_has_the_gradient_of_its_initial_time(method, options):
    def value(t0):
        y0, t1 = torch.ones(1, dtype=F64), torch.tensor(1.5, dtype=F64)
        dense = odeint_dense(lambda t, y: y * t.cos(), y0, t0, t1, method=method, options=options)
        return dense(1.0).sum()

    t0 = torch.tensor(0.3, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(t0), t0)
    exact = -t0.cos() * (torch.sin(torch.tensor(1.0, dtype=F64)) - t0.sin()).exp()
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=0)


def test_the_adjoint_of_a_complex_state_has_real_gradients_of_the_times():
    def run(interface, **kwargs):
        t = torch.tensor([0.0, 0.5, 1.0], dtype=F64, requires_grad=True)
        y0 = torch.tensor([1 + 0.5j], dtype=torch.complex128)
        y = interface(lambda t, y: (1j - 0.3) * t.cos() * y, y0, t, **kwargs)
        return torch.autograd.grad(y.abs().square().sum() + y.real.sum(), t)

    torch.testing.assert_close(run(odeint_adjoint, adjoint_params=()), run(odeint), rtol=1e-6,
                               atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("kwargs", ({"steps": 3}, {"rtol": 1e-4, "method": "dopri5"}))
@pytest.mark.parametrize("gradient", ("discrete", "backprop", "none"))
def test_states_of_any_shape_and_layout_keep_them(kwargs, gradient):
    states = (
        start(1).reshape(()), start(0, 3), start(1, 3).expand(5, 3), start(3, 5).T,
        start(2, 3, 4, 4).to(memory_format=torch.channels_last),
    )  # fmt: skip
    for x in states:
        assert solve(lambda t, x: -x * t, x, gradient=gradient, **kwargs).y.shape == x.shape


def test_a_state_from_inference_mode_can_be_trained_on():
    with torch.inference_mode():
        x = start()
    field = Field()
    solve(field, x, steps=2).y.sum().backward()
    assert field.net[0].weight.grad is not None


W = torch.eye(3, dtype=F64)
MISTAKES = (
    ({"cond": (W, W), "steps": 2}, InputTypeError, "concatenate"),
    ({"params": nn.Linear(3, 3), "steps": 2}, InputTypeError, r"module.parameters\(\)"),
    ({"params": {"w": W}, "steps": 2}, InputTypeError, r"module.parameters\(\)"),
    ({"steps": 2.5}, InputError, "positive int"),
    ({"steps": True}, InputError, "positive int"),
    ({"steps": np.int64(2), "rtol": 0.1, "method": "dopri5"}, InputError, "not both"),
    ({"steps": 2, "options": {"perturb": True}}, InputError, "perturb"),
    ({"steps": 2, "time_table": W, "gradient": "continuous"}, InputError, "time table"),
    ({"steps": 2, "time_table": W, "method": "gl4", "gradient": "none"}, InputError, "time table"),
    ({"rtol": 0.1, "method": "scipy_solver", "gradient": "backprop"}, GradientError, "continuous"),
    ({"rtol": 0.0, "atol": 0.0, "method": "dopri5"}, InputError, "atol > 0"),
)


@pytest.mark.parametrize("kwargs, error, words", MISTAKES)
def test_a_mistake_is_named_with_its_remedy_and_never_ignored(kwargs, error, words):
    with pytest.raises(error, match=words) as caught:
        solve(lambda t, x: -x, start(), **kwargs)
    assert isinstance(caught.value, FmftError)


def test_numbers_of_steps_from_numpy_and_a_single_parameter_are_taken():
    w = torch.eye(3, dtype=F64, requires_grad=True)
    assert solve(lambda t, x: x @ w, start(), steps=np.int64(2), params=w).y.requires_grad


@pytest.mark.parametrize("wrong", (lambda s: (s[0],), lambda s: (s[0], s[1][:1])))
def test_a_tuple_field_with_wrong_parts_is_told_which(wrong):
    with pytest.raises(InputError, match=r"expected \[\(4, 3\), \(4, 1\)\]"):
        odeint(lambda t, s: wrong(s), (start(4, 3), start(4, 1)), TIMES)


def test_a_tuple_field_may_drop_a_dimension_as_in_torchdiffeq():
    y = odeint(lambda t, s: (s[0], s[1][:, 0]), (start(4, 3), start(4, 1)), TIMES)
    assert y[1].shape == (2, 4, 1)


def test_the_alias_is_found_by_those_who_look_before_they_import():
    with patched_torchdiffeq():
        assert importlib.util.find_spec("torchdiffeq") is not None


def test_the_first_solve_of_a_process_may_be_compiled():
    script = """
import torch, fmft_fast
x = torch.randn(4, 3)
run = lambda x: fmft_fast.solve(lambda t, x: x.sin(), x, method="dopri5", steps=2).y
compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
torch.testing.assert_close(compiled, run(x))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_random_numbers_of_another_thread_do_not_disturb_a_solve():
    stop = threading.Event()

    def draw():
        while not stop.is_set():
            torch.randn(1000)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for kwargs in ({"steps": 4}, {"rtol": 1e-3, "method": "dopri5"}) * 30:
            solve(Field(), start(), **kwargs).y.sum().backward()
    finally:
        stop.set()
        thread.join()
