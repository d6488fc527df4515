"""A repeated solve sees every change of its field, its state and what is at work around it."""

from __future__ import annotations

import warnings

import pytest
import torch
from solvers.repeating import (
    D,
    Field,
    T,
    assert_right,
    by_odeint,
    needs_comparison,
    warm,
)
from torch import nn
from torch.nn.modules import module as torch_module

from fmft_fast import fused, odeint

pytestmark = needs_comparison


def replace_class(field):
    field.__class__ = type("Other", (Field,), {"forward": lambda self, t, x: -x})


CHANGES = {
    "train": lambda f: f.train(False),
    "slope": lambda f: setattr(f.net[1], "alpha", 0.3),
    "flag": lambda f: setattr(f, "skip", False),
    "parameter": lambda f: setattr(f.net[0], "weight", nn.Parameter(torch.randn(8, D))),
    "swapped": lambda f: f.net.__setitem__(0, nn.Linear(D, 8)),
    "no bias": lambda f: setattr(f.net[0], "bias", None),
    "buffer": lambda f: setattr(f, "shift", torch.zeros(D)),
    "frozen": lambda f: f.net[0].weight.requires_grad_(False),
    "all frozen": lambda f: f.requires_grad_(False),
    "activation": lambda f: f.net.__setitem__(1, nn.Tanh()),
    "order": lambda f: f.net._modules.update({"1": f.net._modules.pop("1")}),
    "hook": lambda f: f.net[0].register_forward_hook(lambda m, i, o: 2 * o),
    "pre-hook": lambda f: f.register_forward_pre_hook(lambda m, args: (args[0], -args[1])),
    "backward hook": lambda f: f.net[2].register_full_backward_hook(lambda m, i, o: (2 * i[0],)),
    "own forward": lambda f: setattr(f.net[2], "forward", lambda x: x[:, :D]),
    "field's forward": lambda f: setattr(f, "forward", lambda t, x: -x),
    "class": replace_class,
    "strides": lambda f: setattr(f.net[0].weight, "data", torch.randn(D, 8).T),
    "view": lambda f: setattr(f.net[0].weight, "data", torch._neg_view(torch.randn(8, D))),
    "spectral norm": lambda f: nn.utils.parametrizations.spectral_norm(f.net[0]),
    "unread": lambda f: setattr(f, "unread", 5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_field_is_seen(change, call, short):
    field, y = Field(), torch.randn(4, D)
    warm(call, field, y, short)
    CHANGES[change](field)
    if change == "order":
        assert list(field.net._modules) == ["0", "2", "1"]
    if change == "spectral norm":
        field.eval()  # power iterations change buffers
    for _ in range(4):
        assert_right(call, field, y)
        with torch.no_grad():
            for parameter in field.parameters():
                parameter.add_(0.01)


def test_a_change_of_the_class_is_seen(call, short, monkeypatch):
    field, y = Field(), torch.randn(4, D)
    warm(call, field, y, short)
    monkeypatch.setattr(Field, "forward", lambda self, t, x: -x)
    assert_right(call, field, y)
    assert not short


@pytest.mark.parametrize(
    "make",
    [
        lambda y: y.double(),
        lambda y: y.repeat(2, 1),
        lambda y: y[:1],
        lambda y: y.T.contiguous().T,
        lambda y: y.expand(2, 4, D),
        lambda y: y[0].expand(4, D),
        lambda y: torch._neg_view(y),
        lambda y: nn.Parameter(y),
        lambda y: y.clone().requires_grad_(),
        lambda y: y.as_subclass(type("Marked", (torch.Tensor,), {})),
        lambda y: y * torch.ones((), requires_grad=True),
    ],
)
def test_other_states_are_told_apart(make, call, short):
    field, y = Field(), torch.randn(4, D)
    warm(call, field, y, short)
    other = make(y)
    if other.dtype == torch.float64:
        with pytest.raises(RuntimeError):
            call(field, other)
        return
    for _ in range(4):
        out = call(field, other)
        assert type(out) is type(odeint(lambda t, x: x, other, T, method="midpoint"))
        with fused("off"):
            torch.testing.assert_close(out, call(field, other))
        call(field, y)


def test_a_state_of_a_class_of_its_own_is_asked_for_nothing_more(call, short):
    class Watched(torch.Tensor):
        asked = []

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.asked.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    field, y = Field(), torch.randn(4, D)

    warm(call, field, y, short)
    call(field, y.as_subclass(Watched))
    assert Watched.asked and torch.Tensor.is_cpu.__get__ not in Watched.asked
    assert not short


def test_a_state_of_inference_mode_is_another(call, short):
    field, y = Field().requires_grad_(False), torch.randn(4, D)
    warm(call, field, y, short)
    with torch.inference_mode():
        inside = y.clone()
        for _ in range(4):
            assert call(field, y).is_inference()
            assert call(field, inside).is_inference()
    for _ in range(4):
        assert_right(call, field, inside)
        assert_right(call, field, y)


def test_grad_mode_is_part_of_the_kind(call, short):
    field, y = Field(), torch.randn(4, D)
    warm(call, field, y, short)
    with torch.no_grad():
        for _ in range(3):
            assert not call(field, y).requires_grad
    assert short == [True]
    assert call(field, y).requires_grad
    assert short == [True, True]


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
    field, y = Field(), torch.randn(4, D)
    warm(call, field, y, short)
    with SURROUNDINGS[around]():
        for _ in range(3):
            found = call(field, y)
            with fused("off"):
                torch.testing.assert_close(found, call(field, y), rtol=1e-4, atol=1e-5)
    assert not short


def test_the_environment_turns_it_off(call, short, monkeypatch):
    field, y = Field(), torch.randn(4, D)
    warm(call, field, y, short)
    monkeypatch.setenv("FMFT_FUSED", "0")
    call(field, y)
    assert not short


def test_the_default_dtype_is_part_of_it(call, short):
    field, y = Field(), torch.randn(4, D)
    warm(call, field, y, short)
    torch.set_default_dtype(torch.float64)
    try:
        call(field, y)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not short


def test_hooks_on_all_modules_are_seen(call, short):
    field, y = Field(), torch.randn(4, D)
    warm(call, field, y, short)
    calls = []
    handle = torch_module.register_module_forward_hook(lambda m, i, o: calls.append(m))
    try:
        call(field, y)
    finally:
        handle.remove()
    assert calls and not short


def lists_are_read_inside_grad() -> bool:
    times = torch.zeros(2)
    try:
        torch.func.grad(lambda y: y * len(times.tolist()))(torch.ones(()))
    except RuntimeError:
        return False
    return True


def test_transforms_are_seen(call, short):
    field, y = Field(), torch.randn(4, D)
    warm(call, field, y, short)
    batch = torch.randn(5, 4, D)
    found = torch.func.vmap(lambda y: call(field, y))(batch)
    torch.testing.assert_close(found[2], call(field, batch[2]))
    short.clear()
    if not lists_are_read_inside_grad():
        pytest.skip(f"torch {torch.__version__} reads no list of times inside torch.func.grad")
    got = torch.func.grad(lambda y: call(field, y).square().sum())(y)
    leaf = y.clone().requires_grad_()
    want = torch.autograd.grad(call(field, leaf).square().sum(), leaf)[0]
    torch.testing.assert_close(got, want)
    _, tangent = torch.func.jvp(lambda y: call(field, y), (y,), (torch.ones_like(y),))
    assert bool(tangent.isfinite().all())
    assert not short


def test_traces_see_the_operations(call, short):
    field, y = Field().requires_grad_(False), torch.randn(4, D)
    warm(call, field, y, short)
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda y: call(field, y))(y)
    assert sum("elu" in str(node.target) for node in graph.graph.nodes) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda y: call(field, y), y, check_trace=False)
    other = torch.randn(4, D)
    torch.testing.assert_close(traced(other), call(field, other))


def test_compile_sees_the_operations(short):
    field, y = Field(), torch.randn(4, D)
    warm(by_odeint, field, y, short)
    compiled = torch.compile(lambda y: by_odeint(field, y), backend="eager", fullgraph=True)
    with fused("off"):
        want = by_odeint(field, y)
    for _ in range(3):
        torch.testing.assert_close(compiled(y), want, rtol=1e-4, atol=1e-5)
    assert not short


def test_patched_torch_functions_are_seen(call, short, monkeypatch):
    field, y = Field(), torch.randn(4, D)
    warm(call, field, y, short)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.T)
    assert_right(call, field, y)
    assert not short
