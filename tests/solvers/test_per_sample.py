"""`solve` with the option per_sample: steps of every row's own."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from fmft_fast import explain, fused, record_stats, solve
from fmft_fast.errors import InputError, MaxStepsError, NonFiniteError, StepUnderflowError
from fmft_fast.fields import MLP

pytest.importorskip("fmft_fast._cpu")
OWN = {"per_sample": True}
TOLERANCES = {"rtol": 1e-5, "atol": 1e-5}


def field_and_state(dtype=torch.float64, batch=15, cond=0):
    torch.manual_seed(0)
    field = MLP(3, hidden=(9, 17), activation="silu", cond_dim=cond).to(dtype)
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(2.5)
    return field, torch.randn(batch, 3, dtype=dtype) * torch.linspace(0.1, 3, batch, dtype=dtype)[
        :, None
    ]


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, -0.5)])
def test_rows_are_solved_as_if_they_were_alone(method, times):
    field, x0 = field_and_state(cond=4)
    cond = torch.randn(15, 4, dtype=torch.float64, requires_grad=True)
    x0.requires_grad_()
    tensors = [x0, cond, *field.parameters()]
    own = solve(field, x0, *times, method=method, cond=cond, options=OWN, **TOLERANCES)
    alone = [
        solve(field, x0[r : r + 1], *times, method=method, cond=cond[r : r + 1], **TOLERANCES)
        for r in range(15)
    ]
    y = torch.cat([s.y for s in alone])
    torch.testing.assert_close(own.y, y, rtol=1e-6, atol=1e-7)
    for a, b in zip(
        torch.autograd.grad(own.y.square().mean(), tensors),
        torch.autograd.grad(y.square().mean(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    counts = [(s.stats.evaluations, s.stats.accepted, s.stats.rejected) for s in alone]
    rows = (own.stats.rows_evaluations, own.stats.rows_accepted, own.stats.rows_rejected)
    assert [tuple(map(int, row)) for row in zip(*rows, strict=True)] == counts
    most = tuple(max(x) for x in zip(*counts, strict=True))
    assert (own.stats.evaluations, own.stats.accepted, own.stats.rejected) == most
    assert len({accepted for _, accepted, _ in counts}) > 1


def test_second_derivatives_are_those_of_rows_alone():
    field, x0 = field_and_state(batch=4)
    x0.requires_grad_()

    def second(solutions):
        y = torch.cat([s.y for s in solutions])
        (g,) = torch.autograd.grad(y.square().sum(), x0, create_graph=True)
        return g, *torch.autograd.grad(g.square().sum(), [x0, *list(field.parameters())[:-1]])

    own = second([solve(field, x0, method="dopri5", options=OWN, **TOLERANCES)])
    rows = [solve(field, x0[r : r + 1], method="dopri5", **TOLERANCES) for r in range(4)]
    for a, b in zip(own, second(rows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_any_leading_axes_types_and_no_graph():
    layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def field(t, x):
        return layers(x)

    for shape in ((3,), (2, 5, 3)):
        x0 = torch.randn(shape)
        own = solve(field, x0, method="dopri5", gradient="none", options=OWN, **TOLERANCES)
        assert own.y.shape == shape and not own.y.requires_grad and own.y.dtype == torch.float32
        assert own.t.tolist() == [0.0, 1.0]
        flat = x0.reshape(-1, 3)
        rows = solve(field, flat, method="dopri5", gradient="none", options=OWN, **TOLERANCES).y
        assert torch.equal(own.y.reshape(-1, 3), rows)


def test_false_is_as_if_the_option_were_absent():
    field, x0 = field_and_state()
    one = solve(field, x0, method="dopri5", options={"per_sample": False}, **TOLERANCES)
    other = solve(field, x0, method="dopri5", **TOLERANCES)
    assert torch.equal(one.y, other.y) and one.stats == other.stats


def test_the_log_and_other_options():
    field, x0 = field_and_state()
    with record_stats() as log:
        solve(field, x0, method="dopri5", options=OWN | {"max_step": 0.05}, **TOLERANCES)
    assert len(log) == 1 and log[0].accepted >= 20


@pytest.mark.parametrize(
    ("why", "arguments"),
    [
        ("no tolerances", {"steps": 4}),
        ('save is "all"', {**TOLERANCES, "save": "all"}),
        ("grid of times", {**TOLERANCES, "steps": torch.tensor([0.0, 0.5, 1.0])}),
        ("continuous", {**TOLERANCES, "gradient": "continuous"}),
        ("checkpoint_every", {**TOLERANCES, "checkpoint_every": 2}),
        ("times require grad", {**TOLERANCES, "t1": torch.tensor(1.0, requires_grad=True)}),
        ("reference", {**TOLERANCES, "backend": "reference"}),
        ("fehlberg2", {**TOLERANCES, "method": "fehlberg2"}),
        ("jump_t|jumps", {**TOLERANCES, "options": OWN | {"jump_t": [0.5]}}),
        ("step_t", {**TOLERANCES, "options": OWN | {"step_t": [0.5]}}),
    ],
)
def test_what_does_not_go_with_it(why, arguments):
    field, x0 = field_and_state()
    with pytest.raises(InputError, match=why):
        solve(field, x0, **{"method": "dopri5", "options": OWN, **arguments})


def test_fields_that_cannot_be_fused_are_refused():
    _, x0 = field_and_state()
    layer = nn.LayerNorm(3).double()
    with pytest.raises(InputError, match=r"per_sample expects .* but .*layer"):
        solve(lambda t, x: layer(x), x0, method="dopri5", options=OWN, gradient="none", rtol=1e-5)
    field, x0 = field_and_state()
    with fused("off"), pytest.raises(InputError, match="fusion is off"):
        solve(field, x0, method="dopri5", options=OWN, **TOLERANCES)
    with pytest.raises(InputError, match="bfloat16"):
        solve(field.bfloat16(), x0.bfloat16(), method="dopri5", options=OWN, **TOLERANCES)


def test_explain_takes_the_option():
    field, x0 = field_and_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain(field, x0, method="dopri5", options=OWN).fused


def test_the_row_that_fails_is_named():
    field, x0 = field_and_state()

    def run(x, **options):
        return solve(field, x, method="dopri5", options=OWN | options, **TOLERANCES)

    bad = x0.clone()
    bad[7, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="in the state in row 7 at t = 0.0, step 0"):
        run(bad)
    with pytest.raises(MaxStepsError, match=r"exceeded \(2\) in row 0"):
        run(x0, max_num_steps=2, max_step=0.1)
    with pytest.raises(StepUnderflowError, match="underflow in dt in row 0"):
        run(x0, first_step=0.0)
    zero = x0.clone()
    zero[3] = 0
    with pytest.raises(InputError, match="smallest .y. of 0 in row 3"):
        solve(field, zero, method="dopri5", rtol=1e-5, atol=0.0, options=OWN)
    with torch.no_grad():
        field.linears[-1].bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="in the field in row 0"):
        run(x0)
