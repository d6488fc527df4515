"""Whole solves in one call: the same values, gradients, counts and complaints as single steps."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from fmft_fast import METHODS, explain, fused, odeint, odeint_dense, record_stats, solve
from fmft_fast.errors import InputError, MaxStepsError, NonFiniteError
from fmft_fast.fields import MLP

FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
EXPLICIT = (*FIXED, "bosh3", "dopri5", "tsit5")


def field_and_state(dtype=torch.float64, batch=15, dim=3, cond=0):
    torch.manual_seed(0)
    field = MLP(dim, hidden=(9, 17), activation="silu", cond_dim=cond).to(dtype)
    return field, torch.randn(batch, dim, dtype=dtype)


def gradients(y, tensors):
    return torch.autograd.grad(y.square().mean(), tensors)


def both(compute):
    """The same computation in one call and step by step."""
    with fused("require"):
        one = compute()
    with fused("off"):
        return one, compute()


def assert_same(one, steps, tol=1e-12):
    for a, b in zip(one, steps, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("t", ["grid", "backwards", "step_size"])
def test_odeint_computes_the_same_by_one_call(method, t):
    field, x0 = field_and_state()
    x0.requires_grad_()
    times = torch.linspace(0, 1, 6, dtype=torch.float64)
    times = times.flip(0) if t == "backwards" else times
    options = {"step_size": 0.3} if t == "step_size" else None

    def compute():
        y = odeint(field, x0, times, method=method, options=options)
        return y, *gradients(y, [x0, *field.parameters()])

    assert_same(*both(compute))


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize("gradient", ["discrete", "backprop"])
@pytest.mark.parametrize("save", ["final", "all"])
def test_solve_computes_the_same_by_one_call(method, gradient, save):
    field, x0 = field_and_state(cond=4)
    cond = torch.randn(15, 4, dtype=torch.float64, requires_grad=True)
    x0.requires_grad_()

    def compute():
        y = solve(field, x0, steps=5, method=method, gradient=gradient, save=save, cond=cond).y
        return y, *gradients(y, [x0, cond, *field.parameters()])

    assert_same(*both(compute))


def test_the_state_may_have_any_number_of_axes():
    field = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    for shape in ((3,), (2, 5, 3)):
        x0 = torch.randn(shape, dtype=torch.float64)
        assert_same(
            *both(lambda x0=x0: (solve(lambda t, x: field(x), x0, steps=3, gradient="backprop").y,))
        )


def test_second_derivatives_exist():
    field, x0 = field_and_state(batch=4)
    x0.requires_grad_()

    def compute():
        y = odeint(field, x0, torch.linspace(0, 1, 4, dtype=torch.float64), method="midpoint")
        (g,) = torch.autograd.grad(y[-1].square().sum(), x0, create_graph=True)
        return gradients(g, [x0, *field.parameters()])

    assert_same(*both(compute))


def test_a_subset_of_tensors_gets_gradients_and_the_graph_can_be_used_again():
    field, x0 = field_and_state()
    for p in list(field.parameters())[:2]:
        p.requires_grad_(False)
    wanted = [p for p in field.parameters() if p.requires_grad]
    with fused("require"):
        y = solve(field, x0, steps=4).y
    first = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    again = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with torch.no_grad():
        wanted[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), wanted)


def test_what_is_seen_follows_the_parameters():
    field, x0 = field_and_state()
    for _ in range(3):
        one, steps = both(lambda: (solve(field, x0, steps=4, gradient="none").y,))
        assert_same(one, steps)
        with torch.no_grad():
            for p in field.parameters():
                p.add_(0.1)


def test_no_graph_without_need():
    field, x0 = field_and_state()
    t = torch.linspace(0, 1, 4, dtype=torch.float64)
    with fused("require"):
        with torch.no_grad():
            assert not odeint(field, x0, t, method="euler").requires_grad
        with torch.inference_mode():
            odeint(field, x0, t, method="euler")
        field.requires_grad_(False)
        assert not odeint(field, x0, t, method="euler").requires_grad


def test_stats_count_what_single_steps_count():
    field, x0 = field_and_state()
    logs = []
    for mode in ("require", "off"):
        with fused(mode), record_stats() as log:
            odeint(field, x0, torch.linspace(0, 1, 4, dtype=torch.float64), method="rk4")
            solve(field, x0, steps=7, method="dopri5")
        logs.append(log)
    assert logs[0] == logs[1]


def test_nan_is_reported_as_by_single_steps():
    field, x0 = field_and_state()
    with torch.no_grad():
        field.linears[-1].bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="step 0 of 4, stage 0"):
        solve(field, x0, steps=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        odeint(field, x0, torch.linspace(0, 1, 4, dtype=torch.float64), method="euler")
    assert any("NaN" in str(w.message) for w in caught)


def test_fields_with_effects_are_called_as_often_as_before():
    class Counting(MLP):
        calls = 0

        def forward(self, t, x):
            self.calls += 1
            return super().forward(t, x)

    field = Counting(2)
    solve(field, torch.zeros(3, 2), steps=5, gradient="none")
    with torch.no_grad():
        odeint(field, torch.zeros(3, 2), torch.linspace(0, 1, 6), method="euler")
    assert field.calls == 10


@pytest.mark.parametrize(
    ("why", "compute"),
    [
        ("tuple", lambda f, x, t: odeint(lambda t, y: (f(t, y[0]),), (x,), t, method="euler")),
        ("requires grad", lambda f, x, t: odeint(f, x, t.requires_grad_(), method="euler")),
        ("perturb", lambda f, x, t: odeint(f, x, t, method="euler", options={"perturb": True})),
        ("time table", lambda f, x, t: solve(f, x, steps=2, time_table=torch.zeros(2, 1))),
        ("checkpoint_every", lambda f, x, t: solve(f, x, steps=2, checkpoint_every=1)),
        ("plain torch", lambda f, x, t: solve(f, x, steps=2, backend="reference")),
        ("bfloat16", lambda f, x, t: solve(f.bfloat16(), x.bfloat16(), steps=2)),
    ],
)
def test_what_is_required_and_impossible_says_why(why, compute):
    field, x0 = field_and_state(torch.float32)
    with fused("require"), pytest.raises(InputError, match=why):
        compute(field, x0, torch.linspace(0, 1, 4))
    field, x0 = field_and_state(torch.float32)
    compute(field, x0, torch.linspace(0, 1, 4))


def test_the_mode_is_checked_and_the_environment_counts(monkeypatch):
    with pytest.raises(InputError, match="mode must be one of"), fused("on"):
        pass
    field, x0 = field_and_state()
    monkeypatch.setenv("FMFT_FUSED", "0")
    assert "FMFT_FUSED" in explain(field, x0).reason
    with fused("require"):
        solve(field, x0, steps=2)


def test_explain_shows_the_plan_or_the_line():
    field, x0 = field_and_state()
    found = explain(field, x0)
    assert found.fused and found.backend == "cpu"
    assert "silu" in str(found)

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(3).double()

        def forward(self, t, x):
            return self.norm(x)

    found = explain(Normed(), x0)
    assert not found.fused
    assert "self.norm(x)" in str(found) and "test_fused.py" in str(found)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
@pytest.mark.parametrize("t", [(0.0, 1.0), (1.0, 0.7, -0.5)])
def test_adaptive_steps_are_those_of_the_single_steps(method, t):
    field, x0 = field_and_state()
    x0.requires_grad_()
    times = torch.tensor(t, dtype=torch.float64)

    def by_odeint():
        y = odeint(field, x0, times, method=method, rtol=1e-6, atol=1e-7)
        return y, *gradients(y, [x0, *field.parameters()])

    def by_solve():
        save = "all" if len(t) > 2 else "final"
        y = solve(field, x0, steps=times, method=method, rtol=1e-6, save=save)
        return y.y, y.t, *gradients(y.y, [x0, *field.parameters()])

    for compute in (by_odeint, by_solve):
        logs = []

        def counted(compute=compute, logs=logs):
            with record_stats() as log:
                found = compute()
            logs.append((log[0].accepted, log[0].rejected))
            return found

        assert_same(*both(counted), tol=1e-10)
        assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("why", "options"),
    [("step_t", {"step_t": [0.5]}), ("norm", {"norm": torch.norm}), ("dtype", {"dtype": "f32"})],
)
def test_options_of_step_control_that_kernels_do_not_have_take_single_steps(why, options):
    field, x0 = field_and_state()
    options = {key: torch.float32 if value == "f32" else value for key, value in options.items()}
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    odeint(field, x0, t, options=options)
    with fused("require"), pytest.raises(InputError, match=why):
        odeint(field, x0, t, options=options)


def test_an_adaptive_solve_that_gives_up_says_why():
    field, x0 = field_and_state()
    with pytest.raises(MaxStepsError, match="max_num_steps"):
        solve(field, x0, rtol=1e-9, atol=1e-9, method="dopri5", options={"max_num_steps": 2})
    with torch.no_grad():
        field.linears[0].bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        odeint(field, x0, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_second_derivatives_where_one_tensor_is_made_from_another():
    torch.manual_seed(0)
    w = nn.Parameter(0.3 * torch.randn(3, 3, dtype=torch.float64))
    s = nn.Parameter(0.3 * torch.randn(3, 3, dtype=torch.float64))
    x0, t = torch.randn(5, 3, dtype=torch.float64), torch.linspace(0, 1, 4, dtype=torch.float64)

    def field(t, x):
        return torch.tanh(x @ w.T) @ (w - w.T - s @ s.T).T

    def compute():
        y = odeint(field, x0 * w[0], t, method="midpoint")
        first = torch.autograd.grad(y.square().sum(), (w, s), create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (w, s))

    assert_same(*both(compute))


def test_many_gradients_at_once():
    field, x0 = field_and_state(batch=2)
    x0.requires_grad_()
    t, eye = torch.linspace(0, 1, 4, dtype=torch.float64), torch.eye(6, dtype=torch.float64)

    def compute():
        y = odeint(field, x0, t, method="rk4")[-1]
        directions = eye.reshape(6, 2, 3)
        return torch.autograd.grad(y, [x0, *field.parameters()], directions, is_grads_batched=True)

    assert_same(*both(compute))


@pytest.mark.parametrize("gradient", ["discrete", "backprop"])
def test_a_state_from_inference_mode_and_one_that_is_learned(gradient):
    field, x0 = field_and_state()
    with torch.inference_mode():
        frozen = x0 + 1
    learned = nn.Parameter(x0)
    for x in (frozen, learned):
        leaves = [*field.parameters(), *([x] if x.requires_grad else [])]

        def compute(x=x, leaves=leaves):
            y = solve(field, x, steps=3, gradient=gradient).y
            return y, *gradients(y, leaves)

        assert_same(*both(compute))


def test_what_ends_at_an_event_or_is_a_function_of_time_is_not_fused():
    field, x0 = field_and_state()
    t = torch.linspace(0, 1, 2, dtype=torch.float64)
    with fused("require"):
        with pytest.raises(InputError, match="event"):
            odeint(field, x0, t, event_fn=lambda t, y: y.sum() - 100)
        with pytest.raises(InputError, match="function of time"):
            odeint_dense(field, x0, t[0], t[1])


def test_explain_takes_what_odeint_takes():
    field, x0 = field_and_state()
    assert "tuple" in str(explain(lambda t, y: (-y[0],), (x0,)))
    assert "to fuse it" in str(explain(lambda t, x: x - x.mean(0), x0))
    t = torch.linspace(0, 1, 3, dtype=torch.float64)
    for method in METHODS:
        found = explain(field, x0, t, method=method)
        with fused("require"):
            if found.fused:
                odeint(field, x0, t, method=method)
            else:
                with pytest.raises(InputError, match="cannot be fused"):
                    odeint(field, x0, t, method=method)


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_lazily_negated_states_keep_their_sign(method):
    state = torch.complex(torch.tensor([[0.5]]), torch.tensor([[2.0]])).conj().imag
    assert state.is_neg() and state.is_contiguous()
    t, usual = torch.linspace(0, 1, 5), state.resolve_neg()
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def field(t, x):
        return net(x)

    def negated(t, x):
        return torch.complex(x, net(x)).conj().imag

    expected = odeint(field, usual, t, method=method)
    torch.testing.assert_close(odeint(field, state, t, method=method), expected)
    expected = odeint(lambda t, x: -net(x), usual, t, method=method)
    torch.testing.assert_close(odeint(negated, state, t, method=method), expected)
