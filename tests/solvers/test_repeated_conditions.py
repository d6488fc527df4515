"""Repeated solves with a condition and tables of time: right, and short, whatever changes."""

from __future__ import annotations

import functools
import gc
import threading
import weakref

import pytest
import torch
from solvers.repeating import D, T, needs_comparison
from torch import nn

from fmft_fast import fused, odeint, record_stats, solve
from fmft_fast.errors import NonFiniteError
from fmft_fast.flow import integrate

pytestmark = needs_comparison
C = 5


class Told(nn.Module):
    """Encodes its condition; waves of the time make tables; a scaled weight is computed first."""

    def __init__(self, derived=False):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(C, 6), nn.SiLU(), nn.Linear(6, 8))
        self.timed = nn.Linear(2, 8, bias=False)
        self.enter, self.leave = nn.Linear(D, 8), nn.Linear(8, D)
        self.register_buffer("angles", torch.tensor([1.0, 3.0]))
        self.gain = nn.Parameter(torch.ones(8, 1)) if derived else None
        self.flag = True

    def forward(self, t, x, cond):
        z = self.enter(x) + self.encoder(cond) + self.timed(torch.sin(t * self.angles))
        if self.gain is not None:
            z = z + nn.functional.linear(x, self.enter.weight * self.gain)
        out = self.leave(nn.functional.elu(z))
        return out - x if self.flag else out


class Observer(nn.Module):
    """Holds the condition of a field."""

    def __init__(self, field, obs):
        super().__init__()
        self.field, self.obs = field, obs

    def forward(self, t, x):
        return self.field(t, x, self.obs)


_observers: dict = {}


def by_cond(field, y, c):
    return solve(field, y, 0.0, 1.0, steps=4, save="all", cond=c).y


def by_final(field, y, c):
    return solve(field, y, steps=4, cond=c, method="midpoint").y


def by_lambda(field, y, c):
    return odeint(lambda t, x: field(t, x, c), y, T, method="euler")


def by_solved_lambda(field, y, c):
    return solve(lambda t, x: field(t, x, c), y, steps=4, gradient="backprop").y


def by_partial(field, y, c):
    return odeint(functools.partial(field, cond=c), y, T, method="euler")


def by_attribute(field, y, c):
    observer = _observers.setdefault(field, Observer(field, c))
    if isinstance(observer.obs, nn.Parameter):
        del observer.obs
    observer.obs = c
    return odeint(observer, y, T, method="euler")


CALLS = {
    f.__name__: f
    for f in (by_cond, by_final, by_lambda, by_solved_lambda, by_partial, by_attribute)
}


@pytest.fixture(params=CALLS)
def call(request):
    yield CALLS[request.param]
    _observers.clear()


@pytest.fixture(params=["by_cond", "by_lambda", "by_attribute"])
def way(request):
    """One of each kind of calls."""
    yield CALLS[request.param]
    _observers.clear()


@pytest.fixture(params=[1, 6], ids=["one row", "rows"])
def rows(request):
    return request.param


def numbers(call, field, y, c):
    """The solution, and the gradients of everything that requires grad."""
    leaves = [x for x in (*field.parameters(), y, c) if x.requires_grad]
    out = call(field, y, c)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    grads = [None] * len(leaves)
    if out.requires_grad:
        grads = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
    pairs = zip(grads, leaves, strict=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for g, x in pairs)]


def assert_right(call, field, y, c):
    found = numbers(call, field, y, c)
    with fused("off"):
        want = numbers(call, field, y, c)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def warm(call, field, y, c, short):
    for _ in range(2):
        call(field, y, c)
    assert not short
    call(field, y, c)
    assert short == [True]
    short.clear()


def data(rows, **kwargs):
    return torch.randn(rows, D, **kwargs), torch.randn(rows, C, **kwargs)


@pytest.mark.parametrize("wants", ["parameters", "condition", "all", "nothing"])
@pytest.mark.parametrize("derived", [False, True])
def test_the_third_call_is_the_same(call, rows, wants, derived, short):
    field, (y, c) = Told(derived), data(rows)
    field.requires_grad_(wants in ("parameters", "all"))
    c.requires_grad_(wants in ("condition", "all"))
    y.requires_grad_(wants == "all")
    with record_stats() as log:
        first, second = (numbers(call, field, y, c) for _ in range(2))
        assert not short
        third = numbers(call, field, y, c)
    assert short == [True]
    assert log[0] == log[1] == log[2]
    for a, b, e in zip(first, second, third, strict=True):
        assert a.equal(b)
        torch.testing.assert_close(a, e)
    assert_right(call, field, y, c)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("derived", [False, True])
def test_every_condition_is_read(call, rows, grad, derived, short):
    field = Told(derived).requires_grad_(grad)
    warm(call, field, *data(rows), short)
    y, c = data(rows)
    for change in range(6):
        if change < 3:
            y, c = data(rows)
        else:
            c.mul_(-1.5)
        assert_right(call, field, y, c)
    assert short == [True] * 6


@pytest.mark.parametrize("grad", [False, True])
def test_every_weight_is_read(call, rows, grad, short):
    field, (y, c) = Told(derived=True).requires_grad_(grad), data(rows)
    warm(call, field, y, c, short)
    for name, x in field.state_dict(keep_vars=True).items():
        for change in (
            lambda x: x.data.add_(0.25),
            lambda x: x.detach().numpy().__isub__(0.125),
            lambda x: setattr(x, "data", 0.5 * x.data),
        ):
            before = call(field, y, c)
            change(x)
            assert not call(field, y, c).equal(before), name
            assert_right(call, field, y, c)
    assert all(short)
    short.clear()
    field.load_state_dict(Told(derived=True).state_dict())
    assert_right(call, field, y, c)
    assert short == [True]


CHANGES = {
    "train": lambda f: f.train(False),
    "flag": lambda f: setattr(f, "flag", False),
    "parameter": lambda f: setattr(f.encoder[0], "weight", nn.Parameter(torch.randn(6, C))),
    "swapped": lambda f: f.encoder.__setitem__(0, nn.Linear(C, 6)),
    "no bias": lambda f: setattr(f.encoder[2], "bias", None),
    "buffer": lambda f: setattr(f, "angles", torch.tensor([2.0, 5.0])),
    "frozen": lambda f: f.encoder[0].weight.requires_grad_(False),
    "all frozen": lambda f: f.requires_grad_(False),
    "thawed": lambda f: f.timed.weight.requires_grad_(),
    "activation": lambda f: f.encoder.__setitem__(1, nn.Tanh()),
    "hook": lambda f: f.encoder[0].register_forward_hook(lambda m, i, o: 2 * o),
    "pre-hook": lambda f: f.timed.register_forward_pre_hook(lambda m, args: (-args[0],)),
    "own forward": lambda f: setattr(f.encoder[1], "forward", torch.tanh),
    "strides": lambda f: setattr(f.encoder[0].weight, "data", torch.randn(C, 6).T),
    "view": lambda f: setattr(f.timed.weight, "data", torch._neg_view(torch.randn(8, 2))),
    "zeros": lambda f: setattr(f.enter.bias, "data", torch._efficientzerotensor(8)),
    "parametrized": lambda f: nn.utils.parametrizations.weight_norm(f.encoder[0]),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_field_is_seen(change, way, grad, short):
    field, (y, c) = Told().requires_grad_(grad), data(2)
    warm(way, field, y, c, short)
    CHANGES[change](field)
    for _ in range(4):
        assert_right(way, field, y, c)
        y, c = data(2)


def test_a_module_that_moves_to_another_dtype(call, rows, short):
    field, (y, c) = Told(), data(rows)
    warm(call, field, y, c, short)
    field.double()
    for _ in range(4):
        assert_right(call, field, y.double(), c.double())
    assert short[-1:] == [True]
    field.float()
    short.clear()
    for _ in range(4):
        assert_right(call, field, y, c)
    assert short[-1:] == [True]
    with pytest.raises(RuntimeError):
        call(field, y, c.double())


OTHERS = {
    "requires grad": lambda c: c.clone().requires_grad_(),
    "parameter": lambda c: nn.Parameter(c),
    "of a graph": lambda c: c * torch.ones((), requires_grad=True),
    "by columns": lambda c: c.T.contiguous().T,
    "part of a larger one": lambda c: torch.cat((c, c), 1)[:, :C],
    "one row for all": lambda c: c[:1].expand(len(c), C),
    "negated view": lambda c: torch._neg_view(c),
    "zeros": lambda c: torch._efficientzerotensor(c.shape),
    "of a class": lambda c: c.as_subclass(type("Marked", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("make", OTHERS)
@pytest.mark.parametrize("grad", [False, True])
def test_other_conditions_are_told_apart(make, way, rows, grad, short):
    field, (y, c) = Told().requires_grad_(grad), data(rows)
    warm(way, field, y, c, short)
    for _ in range(4):
        other = OTHERS[make](torch.randn(rows, C))
        found = way(field, y, other)
        with fused("off"):
            want = way(field, y, other)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
        assert found.requires_grad == want.requires_grad
        if other.is_leaf and other.requires_grad:
            grads = [torch.autograd.grad(x.square().sum(), other)[0] for x in (found, want)]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
        way(field, y, c)


def test_other_batches_and_one_row_for_all(short):
    field, call = Told().requires_grad_(False), by_cond
    warm(call, field, *data(4), short)
    for _ in range(4):
        for rows in (1, 2, 4, 5, 7):
            assert_right(call, field, *data(rows))
            y, c = torch.randn(rows, D), torch.randn(1, C)
            assert_right(call, field, y, c)


def test_a_condition_that_is_the_state(short):
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, t, x, cond):
            return torch.tanh(self.one(x) + self.two(cond))

    field = Same()
    y, c = torch.randn(4, D), torch.randn(4, D)
    warm(by_cond, field, y, c, short)
    for _ in range(4):
        z = torch.randn(4, D, requires_grad=True)
        found, want = by_cond(field, z, z), None
        with fused("off"):
            want = by_cond(field, z, z)
        torch.testing.assert_close(found, want)
        grads = [torch.autograd.grad(x.square().sum(), z)[0] for x in (found, want)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert not short


class Doubling(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


SURROUNDINGS = {
    "off": lambda: fused("off"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "function mode": Doubling,
    "device": lambda: torch.device("cpu"),
    "forward AD": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_what_is_at_work_around_is_seen(around, call, short):
    field, (y, c) = Told(), data(2)
    warm(call, field, y, c, short)
    with SURROUNDINGS[around]():
        for _ in range(3):
            found = call(field, y, c)
            with fused("off"):
                torch.testing.assert_close(found, call(field, y, c), rtol=1e-4, atol=1e-5)
    assert not short


def test_transforms_of_the_condition_are_seen(short):
    field, (y, c) = Told().requires_grad_(False), data(2)
    warm(by_cond, field, y, c, short)
    batch = torch.randn(5, 2, C)
    found = torch.func.vmap(lambda c: by_cond(field, y, c))(batch)
    got = torch.func.grad(lambda c: by_cond(field, y, c).square().sum())(c)
    _, tangent = torch.func.jvp(lambda c: by_cond(field, y, c), (c,), (torch.ones_like(c),))
    assert not short
    torch.testing.assert_close(found[2], by_cond(field, y, batch[2]))
    leaf = c.clone().requires_grad_()
    want = torch.autograd.grad(by_cond(field, y, leaf).square().sum(), leaf)[0]
    torch.testing.assert_close(got, want)
    assert bool(tangent.isfinite().all()) and bool(tangent.any())


def test_parameters_that_are_replaced_for_a_call(short):
    field, (y, c) = Told(), data(2)
    warm(by_cond, field, y, c, short)

    class Solved(nn.Module):
        def __init__(self):
            super().__init__()
            self.field = field

        def forward(self, y, c):
            return by_cond(self.field, y, c)

    other = {f"field.{k}": 2 * v for k, v in field.state_dict().items()}
    found = torch.func.functional_call(Solved(), other, (y, c))
    assert not short
    with fused("off"):
        want = torch.func.functional_call(Solved(), other, (y, c))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert_right(by_cond, field, y, c)


@pytest.mark.parametrize("frozen", [True, False])
def test_inference_mode_and_grad_mode(call, rows, frozen, short):
    field, (y, c) = Told().requires_grad_(not frozen), data(rows)
    warm(call, field, y, c, short)
    with torch.inference_mode():
        inside = c.clone()
        for given in (c, inside):
            for _ in range(4):
                found = call(field, y, given)
                assert found.is_inference()
        assert short == [True] * 5  # those inside are others: noted, and repeated
    with torch.no_grad():
        for _ in range(3):
            assert not call(field, y, c).requires_grad
    assert call(field, y, c).requires_grad is not frozen
    for _ in range(4):
        if frozen:  # torch keeps no tensor of inference mode for a backward pass
            torch.testing.assert_close(call(field, y, inside), found.clone())
        assert_right(call, field, y, c)


def test_the_default_dtype_is_part_of_it(call, short):
    field, (y, c) = Told(), data(2)
    warm(call, field, y, c, short)
    torch.set_default_dtype(torch.float64)
    try:
        call(field, y, c)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not short


def test_changes_in_place_before_the_backward_pass_are_refused(call, short):
    for grad in (True, False):
        field, (y, c) = Told().requires_grad_(grad), data(2)
        c.requires_grad_(not grad)
        warm(call, field, y, c, short)
        out = call(field, y, c)
        with torch.no_grad():
            (field.leave.weight if not grad else c).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        short.clear()


def test_memory_that_is_replaced_before_the_backward_pass(call, rows, short):
    """The solve keeps what it has read, also if a parameter gets other memory in between."""
    field, (y, c) = Told(), data(rows)
    y.requires_grad_(), c.requires_grad_()
    warm(call, field, y, c, short)
    want = torch.autograd.grad(call(field, y, c).square().sum(), (y, c))
    out = call(field, y, c)
    junk = []
    for p in field.parameters():
        p.data = p.data.clone()
        junk += [torch.full_like(p, float("nan")) for _ in range(20)]
    found = torch.autograd.grad(out.square().sum(), (y, c))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)
    assert short == [True, True] and junk


def test_second_derivatives_and_many_gradients_at_once(short):
    field, (y, c) = Told(), data(2)
    c.requires_grad_()

    def second(gradient):
        out = solve(field, y, steps=4, gradient=gradient, cond=c).y
        (grad,) = torch.autograd.grad(out.square().sum(), c, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [c, field.encoder[0].weight])

    def many():
        out = solve(field, y, steps=4, cond=c, gradient="discrete").y
        seeds = torch.eye(D)[:, None].expand(D, 2, D)
        return torch.autograd.grad(out, [c, field.timed.weight], seeds, is_grads_batched=True)

    for _ in range(2):
        solve(field, y, steps=4, cond=c)
    found = *second("discrete"), *many()
    assert short == [True, True]
    with fused("off"):
        want = second("backprop")
        solve_ = functools.partial(solve, gradient="backprop")
        out = solve_(field, y, steps=4, cond=c).y
        seeds = torch.eye(D)[:, None].expand(D, 2, D)
        grads = torch.autograd.grad(out, [c, field.timed.weight], seeds, is_grads_batched=True)
    for a, b in zip(found, (*want, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_backward_passes_of_one_graph(call, short):
    field, (y, c) = Told(), data(2)
    c.requires_grad_()
    warm(call, field, y, c, short)
    out = call(field, y, c)
    weight = field.encoder[0].weight
    both = torch.autograd.grad(out.sum(), [weight, c], retain_graph=True)
    alone = torch.autograd.grad(out.sum(), [c], retain_graph=True)
    assert both[1].equal(alone[0])
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()
    assert c.grad is not None and c.grad.equal(both[1])


@pytest.mark.parametrize("steps", [1, 3])
def test_samples_without_gradient(rows, steps, short):
    field = Told()

    def draw(y, c):
        return integrate(field, y, steps=steps, cond=c)

    for i in range(5):
        y, c = data(rows)
        found = draw(y, c)
        with fused("off"):
            torch.testing.assert_close(found, draw(y, c), rtol=1e-4, atol=1e-5)
        assert len(short) == max(0, i - 1) and not found.requires_grad
    with torch.no_grad():
        field.timed.weight.mul_(3), field.encoder[0].bias.add_(1)
    found = draw(y, c)
    with fused("off"):
        torch.testing.assert_close(found, draw(y, c), rtol=1e-4, atol=1e-5)
    assert len(short) == 4


def test_what_is_not_finite_is_found_by_single_steps(rows, short):
    field, (y, c) = Told(), data(rows)
    calls = (
        lambda: solve(field, y, steps=4, cond=c),
        lambda: integrate(field, y, steps=4, cond=c),
    )
    for ask in calls:
        for _ in range(3):
            ask()
        assert short == [True]
        kept, c = c, c.clone()
        c[0, 1] = float("nan")
        with pytest.raises(NonFiniteError, match="step 0 of 4"):
            ask()
        assert short == [True, False]
        c = kept
        short.clear()


def test_threads_of_the_caller_do_not_meet(rows, short):
    field = Told()
    given = [data(rows) for _ in range(4)]
    for grad in (False, True):
        field.requires_grad_(grad)
        want = [numbers(by_cond, field, *pair) for pair in given]
        found: list = [None] * 4

        def work(i, found=found):
            for _ in range(30):
                found[i] = numbers(by_cond, field, *given[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for a, b in zip(want, found, strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y)
    assert all(short)


def test_conditions_are_not_held(call, rows, short):
    field, (y, c) = Told(), data(rows)
    warm(call, field, y, c, short)
    alive = [weakref.ref(x) for x in (y, c, field)]
    del y, c
    _observers.clear()
    gc.collect()
    assert alive[0]() is None and alive[1]() is None and alive[2]() is not None
    del field
    gc.collect()
    assert alive[2]() is None
