"""Fields that become networks: the same numbers and gradients, and nothing that anyone notices."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fmft_fast.fields import MLP
from fmft_fast.fusion import NotFusable, Plan, find_plan
from fmft_fast.ops.activations import clipped_cube
from fmft_fast.ops.network import ACTIVATIONS, evaluate

D = 3


class TorchCfm(nn.Module):
    """The MLP and the wrapper of torchcfm."""

    def __init__(self, dim=D, w=8):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim + 1, w), nn.SELU(), nn.Linear(w, w), nn.SELU(), nn.Linear(w, dim)
        )

    def forward(self, x):
        return self.net(x)


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, t, x, *args, **kwargs):
        return self.model(torch.cat([x, t.repeat(x.shape[0])[:, None]], 1))


class Residual(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form
        self.inside = nn.Linear(D, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.other = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.outside = nn.Linear(6, D)

    def forward(self, t, x):
        h = torch.tanh(self.inside(x))
        for a, b in zip(self.blocks, self.other):  # noqa: B905
            if self.form == "post":
                h = h + F.silu(a(h))
            elif self.form == "two":
                h = h + b(F.silu(a(h)))
            elif self.form == "inplace":
                z = a(h)
                z += b(h)
                h = F.gelu(z, approximate="tanh")
            else:
                h = F.elu(a(h) + h, 0.7)
        return self.outside(h) + 0.5 * x


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D + 1, 4), nn.Linear(D + 5, 4), nn.Linear(D + 9, D)])

    def forward(self, t, x):
        h = torch.cat([t.view(1, 1).expand(len(x), 1), x], -1)
        for i, layer in enumerate(self.layers):
            z = layer(h)
            if i == 2:
                return z
            h = torch.cat((h, torch.sigmoid(z)), dim=1)


class Embedded(nn.Module):
    """Sinusoidal features of time through their own layers, added or joined."""

    def __init__(self, form, cond=0):
        super().__init__()
        self.form = form
        self.register_buffer("freqs", torch.arange(1, 4) * math.pi)
        self.time_mlp = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 8))
        extra = 8 if form == "joined" else 0
        self.first = nn.Linear(D + extra, 8)
        self.per_layer = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.last = nn.Linear(8, D)
        if cond:
            self.cond = nn.Linear(cond, 8)

    def forward(self, t, x, cond=None):
        if t.dim() == 0:
            t = t.expand(x.shape[0])
        angles = t[:, None] * self.freqs.to(x.dtype)
        emb = self.time_mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))
        if self.form == "joined":
            h = F.silu(self.first(torch.cat([x, emb], dim=-1)))
        else:
            h = F.silu(self.first(x) + emb)
        h = self.second(h) + self.per_layer(F.silu(emb))
        if cond is not None:
            h = h + self.cond(cond)
        return self.last(F.leaky_relu(h, 0.2))


class Viscous(nn.Module):
    def __init__(self):
        super().__init__()
        self.R = nn.Parameter(torch.randn(D, D))
        self.K = nn.Parameter(torch.randn(D, D))
        self.Ds = nn.ParameterList([nn.Parameter(torch.randn(5, D)) for _ in range(2)])
        self.lam = nn.Parameter(torch.randn(2, 5))
        self.base = MLP(D, (7,))

    def forward(self, t, x):
        a0 = self.K - self.K.T - self.R @ self.R.T - 0.1 * torch.eye(D, dtype=x.dtype)
        out = self.base(t, x) + x @ a0.T
        for j, d in enumerate(self.Ds):
            a = -d.T * F.softplus(self.lam[j])
            out = out + torch.tanh(x @ d.T) @ a.T
        return out


class Second(nn.Module):
    """Position and velocity: split and join the state."""

    def __init__(self):
        super().__init__()
        self.force = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2, bias=False))

    def forward(self, t, z):
        q, v = z.chunk(2, dim=-1)
        return torch.cat([v, self.force(q) - 0.3 * z[..., 2:]], dim=-1)


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(D, 5))
        self.b1 = nn.Parameter(torch.randn(5))
        self.w2 = nn.Parameter(torch.randn(5, D))
        self.gain = nn.Parameter(torch.randn(D))

    def forward(self, t, x):
        h = torch.addmm(self.b1, x, self.w1)
        h = h * torch.sigmoid(h)
        return -(h.matmul(self.w2) * self.gain - t) / 2 + (1 - 2 * t)


def lambdas():
    net = nn.Sequential(
        nn.Linear(D + 1, 5), nn.Softplus(beta=2.0), nn.Dropout(0.0), nn.Linear(5, D)
    )
    scale = 0.7
    shift = nn.Parameter(torch.randn(D))

    def field(t, x):
        time = torch.ones_like(x[:, :1]) * t
        return scale * net(torch.cat([x, time], 1)) + shift

    field.parts = [net, shift]
    return field


ZOO = {
    "mlp": lambda: MLP(D, (8, 8), "silu"),
    "affine": lambda: MLP(D, ()),
    "torchcfm": lambda: Wrapper(TorchCfm()),
    "residual-post": lambda: Residual("post"),
    "residual-two": lambda: Residual("two"),
    "residual-inplace": lambda: Residual("inplace"),
    "residual-pre": lambda: Residual("pre"),
    "dense": Dense,
    "embedded-added": lambda: Embedded("added"),
    "embedded-joined": lambda: Embedded("joined"),
    "viscous": Viscous,
    "by-hand": ByHand,
    "closure": lambdas,
    "eval-dropout": lambda: nn_field(nn.Dropout(0.5)).eval(),
}


class Plain(nn.Module):
    def __init__(self, *middle):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 6), *middle, nn.Linear(6, D))

    def forward(self, t, x):
        return self.net(x)


def nn_field(*middle):
    return Plain(*middle)


def parameters(field):
    parts = getattr(field, "parts", [field] if isinstance(field, nn.Module) else [])
    return [p for m in parts for p in (m.parameters() if isinstance(m, nn.Module) else [m])]


def check(field, y, cond=None, tables=None):
    """Values at three times and all gradients are those of the field, in float64."""
    plan = find_plan(field, y, cond)
    assert isinstance(plan, Plan), str(plan)
    assert find_plan(field, y, cond) is plan
    times = torch.tensor([0.1, 0.55, 0.9], dtype=y.dtype)
    leaves = parameters(field) + ([cond] if cond is not None and cond.requires_grad else [])
    inputs = plan.bind(times, cond, y.shape[:-1])
    for q, t in enumerate(times):
        args = (t, y) if cond is None else (t, y, cond)
        want = field(*args)
        got = plan.restore(
            evaluate(plan.network, inputs, float(t), q, plan.flatten(y)), y.shape[:-1]
        )
        torch.testing.assert_close(got, want.expand_as(got), rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(got)
    if leaves:
        wanted = torch.autograd.grad((want * weight).sum(), leaves, allow_unused=True)
        found = torch.autograd.grad((got * weight).sum(), leaves, allow_unused=True)
        for p, q in zip(wanted, found, strict=True):
            if p is None or q is None:
                assert (p is None or not p.any()) and (q is None or not q.any())
            else:
                torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11)
    if tables is not None:
        assert plan.needs_tables == tables
    return plan


def double(field):
    for part in getattr(field, "parts", [field]):
        if isinstance(part, nn.Module):
            part.double()
        else:
            part.data = part.data.double()
    return field


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("batch", [1, 5])
def test_a_network_gives_the_numbers_and_gradients_of_its_field(name, batch):
    y = torch.randn(batch, D, dtype=torch.float64, requires_grad=True)
    check(double(ZOO[name]()), y, tables=name.startswith("embedded"))


def test_a_split_and_joined_state():
    check(Second().double(), torch.randn(5, 4, dtype=torch.float64))


@pytest.mark.parametrize("form", ["added", "joined"])
def test_time_and_condition_at_once(form):
    cond = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    check(Embedded(form, cond=4).double(), torch.randn(5, D, dtype=torch.float64), cond)


def test_a_condition_among_the_columns():
    cond = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    plan = check(MLP(D, (8,), cond_dim=2).double(), torch.randn(5, D, dtype=torch.float64), cond)
    assert not plan.needs_tables


def test_labels_as_a_condition():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.first = nn.Embedding(4, 6), nn.Linear(D, 6)
            self.last = nn.Linear(6, D)

        def forward(self, t, x, label):
            return self.last(F.gelu(self.first(x) + self.table(label)))

    check(
        Labelled().double(), torch.randn(5, D, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    )


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3)])
def test_states_of_other_dimensions_are_flattened(lead):
    class Any(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(D + 1, 6), nn.Linear(6, D)

        def forward(self, t, x):
            time = t.expand(*x.shape[:-1], 1)
            return self.b(torch.relu(self.a(torch.cat([x, time], dim=-1))))

    check(Any().double(), torch.randn(*lead, D, dtype=torch.float64))


class Calls(nn.Module):
    """A module of a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z):
        return self.function(z)


MODULES = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(inplace=True),
    "leaky_relu": nn.LeakyReLU(0.3),
    "elu": nn.ELU(0.8),
    "selu": nn.SELU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "softplus": nn.Softplus(1.5),
    "softsign": nn.Softsign(),
    "asinh": Calls(torch.asinh),
    "clipped_cube": Calls(clipped_cube),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_as_a_module(name):
    plan = check(nn_field(MODULES[name]).double(), torch.randn(4, D, dtype=torch.float64))
    assert plan.network.layers[0].activation == name


def test_the_plain_case_returns_the_parameters_themselves():
    field = MLP(D, (8, 8))
    plan = find_plan(field, torch.randn(4, D))
    assert isinstance(plan, Plan) and not plan.needs_tables
    found = plan.bind(None).parameters
    assert all(a is b for a, b in zip(found, field.parameters(), strict=True))
    assert [layer.time for layer in plan.network.layers] == [(0, D), None, None]


def test_a_skip_becomes_a_skip():
    plan = find_plan(Residual("post"), torch.randn(4, D))
    assert isinstance(plan, Plan)
    assert [layer.skips for layer in plan.network.layers] == [(), (1,), (2,), ()]


def test_a_field_may_ask_its_parameters_for_their_dtype():
    class Asks(Plain):
        def forward(self, t, x):
            assert torch.is_tensor(t)
            like = next(self.parameters())
            return self.net(x.to(like.dtype).to(like.device)) + t.to(like)

    check(Asks(nn.Tanh()).double(), torch.randn(4, D, dtype=torch.float64))


def test_time_written_into_a_column():
    net = nn.Sequential(nn.Linear(D + 1, 5), nn.Tanh(), nn.Linear(5, D))

    def field(t, x):
        return net(torch.cat([x, torch.full((x.shape[0], 1), t)], 1))

    plan = find_plan(field, torch.randn(4, D))
    assert isinstance(plan, Plan) and plan.network.layers[0].time == (0, D)


def test_a_negated_state():
    check(lambda t, x: -x, torch.randn(5, 2, dtype=torch.float64))


def test_the_words_of_a_plan():
    text = str(find_plan(MLP(2, (16,), "tanh"), torch.randn(3, 2)))
    assert "2 layers" in text and "tanh" in text and "column of a matrix" in text
    assert f"{2 * 16 * 2 + 2 * 16 * 2} FLOPs" in text
    assert not isinstance(text, NotFusable)


@pytest.mark.parametrize("seed", range(12))
def test_random_compositions(seed):
    g = torch.Generator().manual_seed(seed)

    def pick(n):
        return int(torch.randint(n, (1,), generator=g))

    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.kinds = [pick(5) for _ in range(4)]
            self.layers = nn.ModuleList()
            size = D
            for kind in self.kinds:
                out = size if kind in (1, 2) else 2 + pick(6)
                self.layers.append(nn.Linear(size + (kind == 3), out, bias=bool(pick(2))))
                size = out + D if kind == 4 else out
            self.last = nn.Linear(size, D)

        def forward(self, t, x):
            h = x
            for kind, layer in zip(self.kinds, self.layers):  # noqa: B905
                if kind == 0:
                    h = torch.tanh(layer(h))
                elif kind == 1:
                    h = h + F.silu(layer(h))
                elif kind == 2:
                    h = 2 * h - layer(h)
                elif kind == 3:
                    h = F.elu(layer(torch.cat([h, t.expand(len(h), 1)], 1)))
                else:
                    h = torch.cat([F.selu(layer(h)), x], 1)
            return self.last(h)

    check(Random().double(), torch.randn(4, D, dtype=torch.float64))
