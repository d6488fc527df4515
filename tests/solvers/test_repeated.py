"""A solve that is asked for again takes the short way, with the same result."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from solvers.repeating import (
    D,
    Field,
    T,
    assert_right,
    by_odeint,
    by_solve,
    needs_comparison,
    numbers,
    warm,
)
from torch import nn

from fmft_fast import fused, odeint, record_stats, solve
from fmft_fast.errors import InputError, InputTypeError, NonFiniteError
from fmft_fast.solvers import repeated

pytestmark = needs_comparison


@pytest.mark.parametrize("wants", ["parameters", "state", "both", "nothing"])
def test_the_third_call_is_the_same(call, wants, short):
    field, y = Field(), torch.randn(4, D)
    field.requires_grad_(wants in ("parameters", "both"))
    y.requires_grad_(wants in ("state", "both"))
    with record_stats() as log:
        first = numbers(call, field, y)
        second = numbers(call, field, y)
        assert not short
        third = numbers(call, field, y)
    assert short == [True]
    assert log[0] == log[1] == log[2] and log[2].evaluations == 4
    for a, b, c in zip(first, second, third, strict=True):
        assert a.equal(b) and a.equal(c)
    assert_right(call, field, y)


def test_numbers_are_read_anew(call, short):
    field = Field()
    warm(call, field, torch.randn(4, D), short)
    for _ in range(3):
        with torch.no_grad():
            for parameter in field.parameters():
                parameter.add_(torch.randn_like(parameter))
            field.shift.normal_()
        field.net[0].weight.data = torch.randn(8, D)
        assert_right(call, field, torch.randn(4, D))
    assert short == [True] * 3
    field.load_state_dict(Field().state_dict())
    for _ in range(3):
        assert_right(call, field, torch.randn(4, D))
    assert short == [True] * 6


def test_times_are_compared_by_value(short):
    field, y, t = Field(), torch.randn(4, D), T.clone()
    warm(by_odeint, field, y, short, t=t)
    t[1:4] += torch.tensor([0.01, 0.02, -0.03])
    assert_right(by_odeint, field, y, t=t)
    t.copy_(T)
    by_odeint(field, y, t)
    assert short == [True]
    short.clear()
    for other in (T.flip(0), T.double(), T[:4], -T):
        for _ in range(3):
            assert_right(by_odeint, field, y, t=other)
    short.clear()
    by_odeint(field, y, T.clone().requires_grad_())
    for wrong in (T[[0, 2, 1, 3, 4]], T * float("nan"), T.long(), T[None], T[0], T.tolist()):
        with pytest.raises((InputError, InputTypeError)):
            by_odeint(field, y, wrong)
    assert not short


def test_times_that_require_grad_get_one(short):
    field, y = Field(), torch.randn(4, D)
    warm(by_odeint, field, y, short)
    t = T.clone().requires_grad_()
    for _ in range(3):
        (grad,) = torch.autograd.grad(by_odeint(field, y, t)[-1].sum(), t)
        assert grad.abs().sum() > 0
    assert not short


def test_wrong_arguments_are_still_refused(short):
    field, y = Field(), torch.randn(4, D)
    warm(by_odeint, field, y, short)
    for kwargs in ({"rtol": "much"}, {"atol": [1, 2]}, {"method": "oiler"}, {"method": ["euler"]}):
        with pytest.raises((InputError, ValueError, TypeError, KeyError)):
            odeint(field, y, T, **{"method": "euler", **kwargs})
    with pytest.warns(UserWarning, match="Unexpected"):
        odeint(field, y, T, method="euler", options={"unknown": 1})
    assert not short
    odeint(field, y, T, method="euler", options={}, rtol=1e-3)
    assert short == [True]


def test_wrong_arguments_of_solve_are_still_refused(short):
    field, y = Field(), torch.randn(4, D)
    warm(by_solve, field, y, short)
    for kwargs in (
        {"steps": True},
        {"steps": 0},
        {"save": "some"},
        {"save": ["all"]},
        {"gradient": "exact"},
        {"backend": "gpu"},
        {"checkpoint_every": 0.0},
        {"params": field},
        {"options": {"safety": 1}},
    ):
        with pytest.raises((InputError, TypeError)):
            solve(field, y, **{"steps": 4, "save": "all", **kwargs})
    assert not short


@pytest.mark.parametrize("gradient", ["discrete", "backprop", "none"])
@pytest.mark.parametrize("save", ["final", "all"])
def test_solutions_are_the_same(gradient, save, short):
    field, y = Field(), torch.randn(4, D)

    def ask(**kwargs):
        return solve(field, y, 1.0, 0.25, method="midpoint", save=save, **kwargs)

    first, second, third = (ask(steps=3, gradient=gradient) for _ in range(3))
    assert short == [True]
    assert third.y.equal(first.y) and third.t.equal(first.t) and third.stats == first.stats
    assert third.y.shape == second.y.shape and third.t.dtype == torch.float64
    assert third.y.requires_grad == (gradient != "none")
    assert third.t is not first.t and third.t.data_ptr() != ask(steps=3).t.data_ptr()
    if gradient != "none":
        grads = [
            torch.autograd.grad(s.y.square().sum(), list(field.parameters()))
            for s in (first, third)
        ]
        assert all(a.equal(b) for a, b in zip(*grads, strict=True))
    short.clear()
    assert not ask(steps=4, gradient=gradient).y.equal(first.y) and not short


def test_callbacks_that_come_later_are_called(short):
    calls = []

    def note(*args):
        calls.append(args)

    for give in (
        lambda f: setattr(f, "callback_step", note),
        lambda f: (delattr(f, "unread"), setattr(f, "callback_step", note)),
        lambda f: f.add_module("callback_step", type("N", (nn.Module,), {"forward": note})()),
        lambda f: setattr(type(f), "callback_step", note),
    ):
        calls.clear()
        field, y = type("Own", (Field,), {})(), torch.randn(4, D)
        warm(by_odeint, field, y, short)
        give(field)
        by_odeint(field, y)
        assert len(calls) == len(T) - 1 and not short


def test_methods_and_lambdas_take_the_short_way(call, short):
    field, y = Field(), torch.randn(4, D)
    for ask in (
        lambda: call(lambda t, x: field(t, x), y),
        lambda: call(field.forward, y),
    ):
        found = [ask() for _ in range(4)]
        assert short == [True, True] and found[0].equal(found[3])
        short.clear()
    others = [Field(), Field()]
    for other in others:
        torch.testing.assert_close(call(lambda t, x, f=other: f(t, x), y), call(other, y))


@pytest.mark.parametrize("weight", ["parameter", "state"])
def test_changes_in_place_before_the_backward_pass_are_refused(weight, call, short):
    field, y = Field(), torch.randn(4, D)
    warm(call, field, y, short)
    out = call(field, y)
    assert short == [True]
    with torch.no_grad():
        (field.net[0].weight if weight == "parameter" else y).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_many_gradients_at_once(call, short):
    field, y = Field(), torch.randn(4, D, requires_grad=True)
    warm(call, field, y, short)

    def many(call):
        out = call(field, y)
        seeds = torch.eye(D)[:, None, None].expand(D, *out.shape[:-1], D)
        return torch.autograd.grad(out, [y, field.net[0].bias], seeds, is_grads_batched=True)

    found = many(call)
    assert short == [True]
    with fused("off"):
        want = many(by_odeint)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("save", ["final", "all"])
def test_second_derivatives(save, short):
    field, y = Field(), torch.randn(4, D, requires_grad=True)

    def second(gradient):
        out = solve(field, y, steps=4, gradient=gradient, save=save).y
        (grad,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [y, field.net[0].weight])

    for _ in range(2):
        solve(field, y, steps=4, save=save)
    found = second("discrete")
    assert short == [True]
    with fused("off"):
        want = second("backprop")
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_backward_passes_of_one_graph(call, short):
    field, y = Field(), torch.randn(4, D)
    warm(call, field, y, short)
    out = call(field, y)
    weight, bias = field.net[0].weight, field.net[0].bias
    both = torch.autograd.grad(out.sum(), [weight, bias], retain_graph=True)
    alone = torch.autograd.grad(out.sum(), [bias], retain_graph=True)
    assert both[1].equal(alone[0])
    out[-1].sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()
    field.zero_grad()
    call(field, y)[-1].sum().backward()
    assert weight.grad is not None and bias.grad is not None


def test_solutions_do_not_share_memory(call, short):
    field, y = Field(), torch.randn(4, D)
    warm(call, field, y, short)
    first = call(field, y)
    kept = first.detach().clone()
    second = call(field, 2 * y)
    assert first.data_ptr() != second.data_ptr() and first.detach().equal(kept)
    with torch.no_grad():
        call(field, y).zero_()
    assert call(field, y).detach().equal(kept)


def test_saved_tensors_may_be_packed(call, short):
    """What the kernels point to stays, even if torch keeps copies and the field is gone."""
    field, y = Field(), torch.randn(4, D, requires_grad=True)
    warm(call, field, y, short)
    (want,) = torch.autograd.grad(call(field, y).square().sum(), y)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        out = call(field, y)
    sizes = [x.shape for x in field.parameters()]
    del field
    gc.collect()
    junk = [torch.full(size, float("nan")) for size in sizes for _ in range(20)]
    (grad,) = torch.autograd.grad(out.square().sum(), y)
    assert grad.equal(want) and junk
    assert short == [True, True]


def test_a_state_that_is_a_parameter(call, short):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(0.3 * torch.randn(D, D))

        def forward(self, t, x):
            return nn.functional.linear(x, self.weight)

    field = Tied()
    warm(call, field, nn.Parameter(torch.randn(D, D)), short)
    for _ in range(4):
        assert_right(call, field, field.weight)
    assert not short


def test_what_is_not_finite_is_found_by_single_steps(short):
    field, y = Field(), torch.randn(4, D)
    for _ in range(3):
        solve(field, y, steps=4)
    assert short == [True]
    with torch.no_grad():
        field.shift[1] = float("inf")
    with pytest.raises(NonFiniteError, match="step 0 of 4"):
        solve(field, y, steps=4)
    assert short == [True, False]


def test_threads_may_change(call, short):
    field, y = Field(), torch.randn(64, D)
    warm(call, field, y, short)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert_right(call, field, y)
    finally:
        torch.set_num_threads(threads)
    assert short == [True] * 3


def test_threads_of_the_caller_do_not_meet(call, short):
    field, states = Field(), [torch.randn(4, D) for _ in range(4)]
    want = [numbers(call, field, y) for y in states]
    found: list = [None] * 4

    def work(i):
        for _ in range(50):
            found[i] = numbers(call, field, states[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(short)
    for a, b in zip(want, found, strict=True):
        assert all(x.equal(y) for x, y in zip(a, b, strict=True))


def test_nothing_is_held(call, short):
    field, y = Field(), torch.randn(4, D)
    warm(call, field, y, short)
    alive = [weakref.ref(x) for x in (field, field.net[0].weight, y)]
    del y
    gc.collect()
    assert alive[2]() is None and alive[0]() is not None
    del field
    gc.collect()
    assert alive[0]() is None and alive[1]() is None


def test_kinds_are_limited(call, short, monkeypatch):
    monkeypatch.setattr(repeated, "KINDS", 3)
    field = Field()
    states = [torch.randn(n, D) for n in range(2, 8)]
    for _ in range(3):
        for y in states:
            call(field, y)
    assert not short
    for _ in range(3):
        call(field, states[0])
    assert short == [True]


def test_torch_without_the_comparison(call, short, monkeypatch):
    monkeypatch.setattr(repeated, "likeness", lambda tensors: None)
    field, y = Field(), torch.randn(4, D)
    for _ in range(4):
        assert_right(call, field, y)
    assert not short
