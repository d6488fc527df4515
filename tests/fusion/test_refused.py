"""Fields that are not networks: why, at which line, and what would help."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from fmft_fast.fields import MLP
from fmft_fast.fusion import NotFusable, find_plan

D = 3
W = nn.Parameter(torch.randn(D, D))


def lin(*extra):
    return nn.Sequential(nn.Linear(D, 4), *extra, nn.Linear(4, D))


class Field(nn.Module):
    """A forward function around two layers."""

    def __init__(self, forward, *middle):
        super().__init__()
        self.net = lin(*middle)
        self.run = forward

    def forward(self, t, x):
        return self.run(self, t, x)


def by_value(self, t, x):
    if t > 0.5:
        return self.net(x)
    return x


def by_float(self, t, x):
    return self.net(x) * float(t)


def time_times_state(self, t, x):
    return t * self.net(x)


def state_squared(self, t, x):
    return self.net(x) * x


def normed(self, t, x):
    return F.layer_norm(self.net(x), (D,))


def over_batch(self, t, x):
    return self.net(x) - x.mean(0)


def batch_size(self, t, x):
    return self.net(x) / x.shape[0]


def batch_branch(self, t, x):
    return self.net(x) if len(x) > 50 else x


def random_numbers(self, t, x):
    return self.net(x) + torch.randn(D)


def detached(self, t, x):
    return self.net(x.detach())


def no_grad(self, t, x):
    with torch.no_grad():
        return self.net(x)


def transposed(self, t, x):
    return (W @ x.T).T


def hypernet(self, t, x):
    return x @ (t * W)


def in_place_state(self, t, x):
    x += 1
    return self.net(x)


def in_place_alias(self, t, x):
    h = F.dropout(x, 0.5, training=False)
    h += 1
    return self.net(h) + x


def other_dtype(self, t, x):
    return self.net(x).double()


def compare(self, t, x):
    return torch.where(x > 0, self.net(x), x)


def own_gradient(self, t, x):
    x.requires_grad_(True)
    return torch.autograd.grad(self.net(x).sum(), x)[0]


def layout(self, t, x):
    return self.net(x) if x.is_contiguous() else x


def tuple_result(self, t, x):
    return (self.net(x),)


LINES = {
    by_value: ("reads the value", "if t > 0.5"),
    by_float: ("reads the value", "float(t)"),
    time_times_state: ("multiplied by a value that depends on the time", "t * self.net(x)"),
    state_squared: ("multiplied by a value that depends on the state", "self.net(x) * x"),
    normed: ("layer_norm", "F.layer_norm"),
    over_batch: ("mixes samples", "x.mean(0)"),
    batch_size: ("depends on the batch|multiplied", "x.shape[0]"),
    batch_branch: ("depends on the batch size", None),
    random_numbers: ("random numbers", "torch.randn(D)"),
    detached: ("detach", "x.detach()"),
    no_grad: ("with statement", "with torch.no_grad()"),
    transposed: ("shape|mixes|product", "W @ x.T"),
    hypernet: ("matrix depends", "x @ (t * W)"),
    in_place_state: ("in place", "x += 1"),
    in_place_alias: ("in place", "h += 1"),
    other_dtype: ("dtype", ".double()"),
    compare: ("gt|where", "torch.where"),
    own_gradient: ("gradients itself", "x.requires_grad_(True)"),
    layout: ("lies in memory", "x.is_contiguous()"),
    tuple_result: ("returns a tuple", None),
}


@pytest.mark.parametrize("forward", LINES, ids=lambda f: f.__name__)
def test_the_reason_and_the_line(forward):
    import re

    got = find_plan(Field(forward), torch.randn(4, D))
    reason, line = LINES[forward]
    assert isinstance(got, NotFusable)
    assert re.search(reason, got.reason), got
    if line is not None:
        assert got.where is not None and line in got.where and "test_refused.py:" in got.where, got
    assert "not fused" in str(got)


def hooked():
    net = MLP(D, (4,))
    net.linears[0].register_forward_hook(lambda m, i, o: None)
    return net


def pre_hooked():
    net = MLP(D, (4,))
    net.register_forward_pre_hook(lambda m, i: None)
    return net


def grad_hooked():
    net = MLP(D, (4,))
    net.act.register_full_backward_hook(lambda m, i, o: None)
    return net


def old_weight_norm():
    net = MLP(D, (4,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net.linears[0])
    return net


def spectral_norm():
    net = MLP(D, (4,))
    parametrizations.spectral_norm(net.linears[0])
    return net


def scripted():
    net = lin(nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (
            torch.jit.trace(
                Field(lambda self, t, x: self.net(x)), (torch.tensor(0.0), torch.ones(1, D))
            )
            or net
        )


class Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = lin()

    @torch.no_grad()
    def forward(self, t, x):
        return self.net(x)


def decorated():
    return Decorated()


def half_precision_weights():
    return MLP(D, (4,)).double()


def plain(self, t, x):
    return self.net(x)


OTHERS = {
    hooked: "hooks",
    pre_hooked: "hooks",
    grad_hooked: "hooks",
    old_weight_norm: "hooks",
    spectral_norm: "forward of torch.nn.utils.parametrizations",
    scripted: "compiled|plain module",
    decorated: "_contextlib",
    half_precision_weights: "dtype",
    lambda: Field(plain, nn.Dropout(0.3)): "dropout|random",
    lambda: Field(plain, nn.BatchNorm1d(4)): "in place|batch_norm",
    lambda: Field(plain, nn.BatchNorm1d(4)).eval(): "batch_norm",
    lambda: Field(plain, nn.RReLU()): "random|rrelu",
    lambda: Field(plain, nn.Mish()): "mish is no layer",
    lambda: nn.DataParallel(MLP(D, (4,))): "plain module",
    lambda: torch.compile(MLP(D, (4,))): "compiled",
    lambda: torch.compile(lambda t, x: -x): "made by torch",
    lambda: lambda t, x: -x + random.random(): "random",
    lambda: lambda t, x: torch.ones(D): "does not depend on the state",
    lambda: lambda t, x: torch.cat([x, t.expand(len(x), 1)], 1): "returns the shape",
    lambda: lambda t, x: undefined_name: "NameError",  # noqa: F821
}


@pytest.mark.parametrize("make", OTHERS, ids=lambda f: OTHERS[f] + "-" + f.__name__)
def test_what_is_no_plain_field(make):
    import re

    got = find_plan(make(), torch.randn(4, D))
    assert isinstance(got, NotFusable) and re.search(OTHERS[make], got.reason), got


def test_states_and_surroundings():
    field, y = MLP(D, (4,)), torch.randn(4, D)
    assert not isinstance(find_plan(field, y), NotFusable)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in str(find_plan(field, y))
    for other in (y.half(), y.to(torch.complex64), y[:0], y.to("meta"), y.to_sparse()):
        assert isinstance(find_plan(field, other), NotFusable)
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: None)
    try:
        assert "hooks" in str(find_plan(field, y))
    finally:
        handle.remove()
    found = []
    torch.vmap(lambda x: found.append(find_plan(field, x)) or x)(y[None])
    assert isinstance(found[0], NotFusable)
    assert not isinstance(find_plan(field, y), NotFusable)


def test_a_subclass_of_tensor_is_refused():
    class Mine(torch.Tensor):
        pass

    assert isinstance(find_plan(MLP(D, (4,)), torch.randn(4, D).as_subclass(Mine)), NotFusable)
    field = MLP(D, (4,))
    field.linears[0].bias = nn.Parameter(torch.zeros(4).as_subclass(Mine))
    assert isinstance(find_plan(field, torch.randn(4, D)), NotFusable)


def test_a_subclass_of_a_layer_runs_as_it_is_written():
    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) ** 3

    y = torch.randn(4, D)
    field = Field(plain)
    field.net[0] = Shifted(D, 4)
    assert not isinstance(find_plan(field, y), NotFusable)
    field.net[0] = Odd(D, 4)
    got = find_plan(field, y)
    assert isinstance(got, NotFusable) and "** 3" in (got.where or "")
