"""A kept plan ends with the first change of anything that the field reads, and not before."""

from __future__ import annotations

import gc
import types
import weakref

import pytest
import torch
from torch import nn

from fmft_fast.fields import MLP
from fmft_fast.fusion import NotFusable, Plan, find_plan
from fmft_fast.fusion.find import _cache

D = 3
GAIN = 0.5
SETTINGS = types.SimpleNamespace(gain=0.5)


def twice(x):
    return 2 * x


class Scale:
    value = 0.5


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D + 1, 4), nn.ELU(), nn.Dropout(0.5), nn.Linear(4, D))
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(D, D))])
        self.register_buffer("shift", torch.randn(D))
        self.gains, self.options, self.skip, self.unread = [1.0, 2.0], {"a": 3.0}, True, object()
        self.eval()

    def forward(self, t, x, gain=0.5):
        out = self.net(torch.cat([x, t.expand(len(x), 1)], 1)) + x @ self.weights[0].T
        out = GAIN * SETTINGS.gain * Scale.value * gain * twice(out) + self.shift
        for g in self.gains:
            out = g * out
        return out + self.options["a"] * x if self.skip else out


def set_global(name, value):
    globals()[name] = value


CHANGES = {
    "train": lambda f: f.train(),
    "one flag": lambda f: f.net[2].train(),
    "slope": lambda f: setattr(f.net[1], "alpha", 0.3),
    "number": lambda f: setattr(f, "skip", False),
    "entry": lambda f: f.gains.__setitem__(1, 5.0),
    "longer": lambda f: f.gains.append(2.0),
    "option": lambda f: f.options.update(a=1.0),
    "parameter": lambda f: setattr(f.net[0], "weight", nn.Parameter(torch.randn(4, D + 1))),
    "one of a list": lambda f: f.weights.__setitem__(0, nn.Parameter(torch.randn(D, D))),
    "no bias": lambda f: setattr(f.net[0], "bias", None),
    "buffer": lambda f: setattr(f, "shift", torch.zeros(D)),
    "module": lambda f: f.net.__setitem__(1, nn.Tanh()),
    "hook": lambda f: f.net[0].register_forward_hook(lambda m, i, o: None),
    "own forward": lambda f: setattr(f.net[0], "forward", lambda x: x[:, :4]),
    "dtype": lambda f: f.double(),
    "data": lambda f: setattr(f.net[0].weight, "data", torch.randn(4, D + 1).double()),
    "global": lambda f: set_global("GAIN", 0.75),
    "settings": lambda f: setattr(SETTINGS, "gain", 0.75),
    "class attribute": lambda f: setattr(Scale, "value", 0.75),
    "function": lambda f: set_global("twice", lambda x: 3 * x),
    "code": lambda f: setattr(twice, "__code__", (lambda x: 3 * x).__code__),
    "default": lambda f: setattr(Field.forward, "__defaults__", (0.75,)),
    "method": lambda f: setattr(Field, "forward", lambda self, t, x: -x),
}


@pytest.fixture
def restored():
    held = (GAIN, SETTINGS.gain, Scale.value, twice, twice.__code__, Field.forward)
    yield
    set_global("GAIN", held[0])
    set_global("twice", held[3])
    SETTINGS.gain, Scale.value, Field.forward = held[1], held[2], held[5]
    held[3].__code__, Field.forward.__defaults__ = held[4], (0.5,)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_ends_a_plan(change, restored):
    field, y = Field(), torch.randn(4, D)
    plan = find_plan(field, y)
    assert isinstance(plan, Plan), plan
    assert find_plan(field, y) is plan
    CHANGES[change](field)
    assert find_plan(field, y) is not plan


@pytest.mark.parametrize("change", ["requires_grad", "values", "unread", "state_dict", "batch"])
def test_other_changes_keep_it(change):
    field, y = Field(), torch.randn(4, D)
    plan = find_plan(field, y)
    assert isinstance(plan, Plan)
    if change == "requires_grad":
        field.requires_grad_(False)
    elif change == "values":
        with torch.no_grad():
            field.net[0].weight.mul_(2)
    elif change == "unread":
        field.unread = object()
    elif change == "state_dict":
        field.load_state_dict(Field().state_dict())
    elif change == "batch":
        y = torch.randn(9, D)
    assert find_plan(field, y) is plan


def test_the_state_is_part_of_the_question():
    field, y = MLP(D, (4,)), torch.randn(4, D)
    plan = find_plan(field, y)
    assert isinstance(find_plan(field, y.double()), NotFusable)
    assert isinstance(find_plan(field, torch.randn(4, D + 1)), NotFusable)
    assert find_plan(field, y) is plan


def test_what_was_refused_is_looked_at_again_after_a_change():
    field, y = Field().train(), torch.randn(4, D)
    assert isinstance(find_plan(field, y), NotFusable)
    assert isinstance(find_plan(field.eval(), y), Plan)
    handle = field.net.register_forward_hook(lambda m, i, o: None)
    assert isinstance(find_plan(field, y), NotFusable)
    handle.remove()
    assert isinstance(find_plan(field, y), Plan)


def test_a_lambda_written_anew_is_found_again():
    net, y = nn.Linear(D, D), torch.randn(4, D)

    def make(net, scale):
        return lambda t, x: scale * net(x)

    plan = find_plan(make(net, 0.5), y)
    assert isinstance(plan, Plan)
    assert find_plan(make(net, 0.5), y) is plan
    assert find_plan(make(net, 0.25), y) is not plan
    assert find_plan(make(nn.Linear(D, D), 0.5), y) is not plan
    assert find_plan(make(net, 0.5), y) is plan
    net.bias = None
    assert find_plan(make(net, 0.5), y) is not plan


def test_the_contents_of_a_closure_may_change():
    scale, y = 0.5, torch.randn(4, D)

    def field(t, x):
        return scale * x

    plan = find_plan(field, y)
    assert isinstance(plan, Plan)
    scale = 0.25
    other = find_plan(field, y)
    assert other is not plan and isinstance(other, Plan)
    assert other.bind(None).parameters[0][0, 0] == 0.25


def test_bound_methods_and_callables():
    class Owner:
        def __init__(self):
            self.net = nn.Linear(D, D)

        def velocity(self, t, x):
            return self.net(x)

        def __call__(self, t, x):
            return -self.net(x)

    owner, y = Owner(), torch.randn(4, D)
    plan = find_plan(owner.velocity, y)
    assert isinstance(plan, Plan) and find_plan(owner.velocity, y) is plan
    whole = find_plan(owner, y)
    assert isinstance(whole, Plan) and find_plan(owner, y) is whole
    owner.net = nn.Linear(D, D)
    assert find_plan(owner.velocity, y) is not plan
    assert find_plan(owner, y) is not whole


def test_nothing_keeps_a_field_alive():
    y = torch.randn(4, D)
    net = MLP(D, (4,))
    field = lambda t, x: net(t, x)  # noqa: E731, F821
    assert isinstance(find_plan(net, y), Plan) and isinstance(find_plan(field, y), Plan)
    gone = weakref.ref(net)
    count = len(_cache)
    del net, field
    gc.collect()
    assert gone() is None
    assert len(_cache) <= count - 2


def test_a_field_that_looks_at_the_batch_is_refused_there():
    net = nn.Linear(D, D)

    def field(t, x):
        return net(x) if len(x) != 6 else -x

    assert isinstance(find_plan(field, torch.randn(4, D)), Plan)
    assert isinstance(find_plan(field, torch.randn(6, D)), NotFusable)
    assert isinstance(find_plan(field, torch.randn(6, D)), NotFusable)
    assert isinstance(find_plan(field, torch.randn(5, D)), Plan)


def test_a_field_that_is_another_one_every_time_is_not_traced_for_ever():
    y = torch.randn(4, D)

    def make(scale):
        return lambda t, x: scale * x

    results = [find_plan(make(float(i)), y) for i in range(40)]
    assert isinstance(results[0], Plan) and isinstance(results[-1], NotFusable)
    assert "another one at every call" in results[-1].reason


def test_a_layer_derived_from_one_of_torch_is_guarded_too():
    class Mine(nn.LeakyReLU):
        def forward(self, x):
            return super().forward(x)

    net, y = nn.Sequential(nn.Linear(D, D), Mine(0.1)), torch.randn(4, D)

    def field(t, x):
        return net(x)

    plan = find_plan(field, y)
    assert isinstance(plan, Plan) and plan.network.layers[0].slope == 0.1
    net[1].negative_slope = 0.3
    other = find_plan(field, y)
    assert isinstance(other, Plan) and other.network.layers[0].slope == 0.3
