"""A kept plan ends with the first change of anything that the field reads, and not before."""

from __future__ import annotations

import functools
import gc
import types
import weakref

import pytest
import torch
from torch import nn

from fmft_fast.fields import MLP
from fmft_fast.fusion import NotFusable, Plan, find, find_plan, guards
from fmft_fast.fusion.find import _cache
from fmft_fast.fusion.unchanged import PlainUnchanged

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


@pytest.mark.parametrize("compare", [guards.Unchanged, PlainUnchanged])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_ends_a_plan(change, compare, restored, monkeypatch):
    monkeypatch.setattr(guards, "Unchanged", compare)
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

    results = [find_plan(make(float(i)), y) for i in range(80)]
    assert isinstance(results[0], Plan) and isinstance(results[-1], NotFusable)
    assert "another one at every call" in results[-1].reason


def test_fields_that_hold_themselves_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(find, "_FIELDS", 4)

    class OfItself(nn.Linear):
        def __init__(self):
            super().__init__(D, D)
            self.act = self.helper

        def helper(self, x):
            return torch.tanh(x)

        def forward(self, t, x):
            return self.act(super().forward(x))

    fields = []
    for _ in range(10):
        field = OfItself()
        assert isinstance(find_plan(field, torch.randn(4, D)), Plan)
        fields.append(weakref.ref(field))
    del field
    gc.collect()
    assert sum(field() is not None for field in fields) <= 4


def test_one_line_of_code_may_serve_any_number_of_networks():
    y = torch.randn(4, D)

    def field_of(net):
        return lambda t, x: net(x)

    for _ in range(100):  # one after the other
        net = nn.Linear(D, D)
        assert find_plan(field_of(net), y) is find_plan(field_of(net), y)
    nets = [nn.Linear(D, D) for _ in range(30)]  # in turn
    first = [find_plan(field_of(net), y) for net in nets]
    assert all(isinstance(plan, Plan) for plan in first)
    assert all(find_plan(field_of(net), y) is p for net, p in zip(nets, first, strict=True))


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


NET = nn.Linear(D, D)
CONFIG = types.ModuleType("config")


class Plain:
    gain = 1.0


class Base(nn.Module):
    gain1 = 1.0

    def __init__(self):
        super().__init__()
        self.named = nn.ModuleDict({"a": nn.Linear(D, D), "b": nn.Linear(D, D)})
        self.plain = {"a": self.named["a"], "b": self.named["b"]}
        self.n, self.settings, self.read = 1, Plain(), CONFIG

    def forward(self, t, x):
        for layer in (*self.named.values(), *self.plain.values()):
            x = torch.tanh(layer(x))
        return x


class Derived(Base):
    pass


class Other(Base):
    def forward(self, t, x):
        return -x


class Numbers(Base):
    def forward(self, t, x):
        return NET(x) * self.settings.gain * self.read.gain * getattr(self, f"gain{self.n}")


def by_a_local_name(t, x):
    config = CONFIG
    return NET(x) * config.gain


def by_a_computed_name(t, x):
    return NET(x) * getattr(CONFIG, "ga" + "in")


def by_its_own_attribute(t, x):
    return NET(x) * by_its_own_attribute.gain


def by_an_attribute_to_come(t, x):
    return NET(x) * getattr(by_an_attribute_to_come, "gain", 1.0)


def by_a_builtin(t, x):
    return NET(x) * max(0.5, 1.0)


def with_gain(t, x, gain=1.0):
    return NET(x) * gain


def reinsert(field):
    field.named["a"] = field.named.pop("a")


HIDDEN = {
    "an instance hides a class": (Numbers, lambda f: setattr(f.settings, "gain", 2.0)),
    "a computed class attribute": (Numbers, lambda f: setattr(Numbers, "gain1", 2.0)),
    "a file as an attribute": (Numbers, lambda f: setattr(CONFIG, "gain", 2.0)),
    "forward of a subclass": (Derived, lambda f: setattr(Derived, "forward", Other.forward)),
    "the class itself": (Base, lambda f: setattr(f, "__class__", Other)),
    "the order of modules": (Base, reinsert),
    "the order of a dictionary": (
        Base,
        lambda f: setattr(f, "plain", dict(reversed(f.plain.items()))),
    ),
    "a file by a local name": (lambda: by_a_local_name, lambda f: setattr(CONFIG, "gain", 2.0)),
    "a computed name": (lambda: by_a_computed_name, lambda f: setattr(CONFIG, "gain", 2.0)),
    "of a function": (lambda: by_its_own_attribute, lambda f: setattr(f, "gain", 2.0)),
    "to come": (lambda: by_an_attribute_to_come, lambda f: setattr(f, "gain", 2.0)),
    "a builtin": (lambda: by_a_builtin, lambda f: set_global("max", lambda a, b: 7.0)),
    "a partial": (
        lambda: functools.partial(with_gain, gain=1.0),
        lambda f: f.keywords.update(gain=2.0),
    ),
    "the default dtype": (Base, lambda f: torch.set_default_dtype(torch.float64)),
}


@pytest.fixture
def unhidden():
    CONFIG.gain = by_its_own_attribute.gain = 1.0
    yield
    Numbers.gain1, CONFIG.gain, by_its_own_attribute.gain = 1.0, 1.0, 1.0
    vars(by_an_attribute_to_come).pop("gain", None)
    globals().pop("max", None)
    if "forward" in vars(Derived):
        del Derived.forward
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", HIDDEN)
def test_a_change_from_the_side_is_noticed(case, unhidden):
    make, change = HIDDEN[case]
    field, y = make(), torch.randn(4, D)
    plan = find_plan(field, y)
    assert isinstance(plan, Plan), plan
    assert find_plan(field, y) is plan
    change(field)
    assert find_plan(field, y) is not plan


class Around(nn.Module):
    def __init__(self, net, gain):
        super().__init__()
        self.net, self.gain = net, gain

    def forward(self, t, x):
        return self.net(x) * self.gain


class Holder:
    def __init__(self, net, gain):
        self.net, self.gain = net, gain

    def __call__(self, t, x):
        return self.net(x) * self.gain


def around(net, gain):
    return functools.partial(with_net, net, gain=gain)


def with_net(net, t, x, gain):
    return net(x) * gain


def test_names_that_modules_use_mean_nothing_elsewhere():
    holder, y = Holder(NET, 1.0), torch.randn(4, D)
    holder._parameters, holder._modules = torch.ones(D), [1.0]
    settings = types.SimpleNamespace(_buffers=1.0)
    field = lambda t, x: holder(t, x) * settings._buffers  # noqa: E731
    assert isinstance(find_plan(holder, y), Plan)
    plan = find_plan(field, y)
    assert isinstance(plan, Plan)
    settings._buffers = 2.0
    assert find_plan(field, y) is not plan


@pytest.mark.parametrize("wrap", [Around, Holder, around])
def test_a_wrapper_made_anew_is_found_again(wrap):
    net, y = nn.Linear(D, D), torch.randn(4, D)
    plan = find_plan(wrap(net, 1.0), y)
    assert isinstance(plan, Plan)
    assert find_plan(wrap(net, 1.0), y) is plan
    other = find_plan(wrap(net, 2.0), y)
    assert isinstance(other, Plan) and other is not plan
    assert find_plan(wrap(nn.Linear(D, D), 1.0), y) is not plan
    assert find_plan(wrap(net, 1.0), y) is plan
    net.weight = nn.Parameter(torch.randn(D, D))
    assert find_plan(wrap(net, 1.0), y) is not plan
    gone = weakref.ref(net)
    del net, plan, other
    gc.collect()
    assert gone() is None


def test_a_dictionary_of_tensors_in_a_closure():
    params = {"w": torch.randn(D, D), "b": torch.randn(D)}
    y = torch.randn(4, D)
    field = lambda t, x: x @ params["w"] + params["b"]  # noqa: E731
    plan = find_plan(field, y)
    assert isinstance(plan, Plan) and find_plan(field, y) is plan
    params["w"] = params["w"].clone()
    assert find_plan(field, y) is not plan


def test_no_number_of_batches_makes_a_branch_on_their_size_believed():
    net = nn.Linear(D, D)
    field = lambda t, x: net(x) if len(x) < 300 else -x  # noqa: E731
    assert all(isinstance(find_plan(field, torch.randn(n, D)), Plan) for n in range(2, 20))
    assert isinstance(find_plan(field, torch.randn(500, D)), NotFusable)


def test_the_garbage_collector_is_no_call_of_the_field():
    seen = []
    call = lambda phase, info: seen.append(phase)  # noqa: E731
    threshold = gc.get_threshold()
    gc.callbacks.append(call)
    gc.set_threshold(1)
    try:
        assert isinstance(find_plan(MLP(D, (5,)), torch.randn(4, D)), Plan)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(call)
    assert gc.isenabled()
