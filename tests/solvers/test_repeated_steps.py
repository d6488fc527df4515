"""Single steps that are asked for again, of fields that no kernel takes whole."""

from __future__ import annotations

import pytest
import torch
from solvers.repeating import needs_comparison
from torch import nn

from fmft_fast import fused, record_stats, solve
from fmft_fast.errors import InputError, NonFiniteError
from fmft_fast.flow import integrate
from fmft_fast.fusion import find
from fmft_fast.solvers.single_steps import RepeatedSteps

pytestmark = needs_comparison
D, C = 3, 2


class Marked(torch.Tensor):
    """Tensors of another class."""


class Product(nn.Module):
    """Multiplies two values that depend on the state, unless it is told not to."""

    def __init__(self):
        super().__init__()
        self.layer, self.told = nn.Linear(D, D), nn.Linear(C, D)
        self.dropout, self.square, self.spoil = nn.Dropout(0.5), True, None

    def forward(self, t, x, cond=None):
        z = self.dropout(torch.tanh(self.layer(x))) + t
        if cond is not None:
            z = z + self.told(cond)
        if self.spoil is not None:
            self.spoil(t, x, z)
        return z * x if self.square else z


@pytest.fixture
def short(monkeypatch):
    """Counts the solves that took the short way."""
    taken, whole = [], RepeatedSteps.solve

    def run(self, field, given):
        taken.append(True)
        return whole(self, field, given)

    monkeypatch.setattr(RepeatedSteps, "solve", run)
    return taken


def final(field, x, cond):
    return solve(field, x, steps=3, cond=cond, gradient="none").y


def every(field, x, cond):
    return solve(field, x, 1.0, 0.0, steps=2, cond=cond, gradient="none", save="all").y


def frozen(field, x, cond):
    with torch.no_grad():
        return solve(field, x, steps=2, method="rk4", cond=cond).y


def drawn(field, x, cond):
    return integrate(field, x, steps=3, cond=cond)


CALLS = {f.__name__: f for f in (final, every, frozen, drawn)}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


@pytest.fixture(params=[False, True], ids=["alone", "told"])
def data(request):
    cond = torch.randn(4, C) if request.param else None
    return 0.3 * torch.randn(4, D), cond


def warm(call, field, data, short):
    for _ in range(2):
        call(field, *data)
    assert not short
    call(field, *data)
    assert short
    short.clear()


def assert_right(call, field, x, cond):
    found = call(field, x, cond)
    with fused("off"):
        assert found.equal(call(field, x, cond))
    assert not found.requires_grad


def test_the_third_call_is_the_same(call, data, short):
    field = Product().eval()
    with record_stats() as log:
        first, second = (call(field, *data) for _ in range(2))
        assert not short
        third = call(field, *data)
    assert short and first.equal(second) and first.equal(third)
    assert log[0] == log[1] == log[2]


def test_everything_is_read_anew(call, data, short):
    field, (x, cond) = Product().eval(), data
    warm(call, field, data, short)
    changes = (
        lambda: field.layer.weight.data.mul_(1.1),
        lambda: setattr(field, "layer", nn.Linear(D, D)),
        lambda: field.requires_grad_(False),
        lambda: x.mul_(-0.5),
        lambda: None if cond is None else cond.add_(1),
        lambda: field.layer.register_forward_hook(lambda m, i, o: 2 * o),
        lambda: setattr(field, "square", False),
        lambda: setattr(field, "forward", lambda t, x, cond=None: -x),
    )
    for change in changes:
        change()
        assert_right(call, field, x, cond)
    assert len(short) == len(changes)


def test_other_tensors_are_other_kinds(call, data, short):
    field, (x, cond) = Product().eval(), data
    warm(call, field, data, short)
    for make in (
        lambda z: z[:2],
        lambda z: z.T.contiguous().T,
        lambda z: z[:1].expand(4, -1),
        lambda z: z.clone().requires_grad_(),
        lambda z: nn.Parameter(z),
        lambda z: torch._neg_view(z),
        lambda z: z.as_subclass(Marked),
    ):
        assert_right(call, field, make(x), None if cond is None else make(cond))
    assert not short
    field.double()
    for _ in range(3):
        assert_right(call, field, x.double(), None if cond is None else cond.double())


def test_what_is_at_work_around_is_seen(call, data, short):
    field = Product().eval()
    warm(call, field, data, short)
    with torch.autocast("cpu", torch.bfloat16):
        assert_right(call, field, *data)
    with fused("require"), pytest.raises(InputError, match="multiplied by a value"):
        call(field, *data)
    x, cond = data
    if call is not drawn:
        found = torch.func.vmap(lambda x: call(field, x, cond))(torch.stack((x, 2 * x)))
        torch.testing.assert_close(found[1], call(field, 2 * x, cond))
        short.clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert_right(call, field, *data)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        assert call(field, *data).is_inference()
    assert not short


def test_dropout_is_drawn_anew(call, data, short):
    field = Product()
    warm(call, field, data, short)
    torch.manual_seed(1)
    found = call(field, *data), call(field, *data)
    assert not found[0].equal(found[1]) and len(short) == 2
    torch.manual_seed(1)
    with fused("off"):
        assert found[0].equal(call(field, *data)) and found[1].equal(call(field, *data))


def test_errors_are_those_of_the_whole_way(call, data, short):
    field, (x, cond) = Product().eval(), data
    warm(call, field, data, short)
    for spoil, error, message in (
        (lambda t, x, z: t.add_(1), InputError, "in place"),
        (lambda t, x, z: z.fill_(float("nan")), NonFiniteError, "step 0 of"),
    ):
        field.spoil = spoil
        for _ in range(2):
            with pytest.raises(error, match=message):
                call(field, x, cond)
        field.spoil = None
        assert_right(call, field, x, cond)
    with pytest.raises(RuntimeError):
        call(field, x[:, :2], cond)


def test_the_times_of_later_solves_are_not_spoiled(data, short):
    field = Product().eval()
    warm(final, field, data, short)
    want = final(field, *data)
    for _ in range(2):
        solution = solve(field, data[0], steps=3, cond=data[1], gradient="none")
        assert solution.t.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
        solution.t.zero_()
    assert final(field, *data).equal(want)


def test_the_whole_way_is_gone_now_and_then(call, data, short):
    field = Product().eval()
    count = 3 * find._TRUST
    for _ in range(count):
        call(field, *data)
    assert count - 8 <= len(short) < count - 2
    field.square = False
    short.clear()
    for _ in range(count):
        call(field, *data)
    assert len(short) < find._TRUST
