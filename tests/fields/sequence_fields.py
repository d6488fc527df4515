"""Checks that every field of sequences has to pass, at small sizes."""

from __future__ import annotations

import copy
import warnings

import torch
from torch.func import functional_call, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fmft_fast import cuda_graphs, solve
from fmft_fast.errors import CaptureWarning
from fmft_fast.flow import sample
from fmft_fast.train import FinetuneConfig, FlowMatchingTrainer, MLEFineTuner, PretrainConfig

READS_BACK = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "_assert_async"}


class NothingReadBack(TorchDispatchMode):
    """Refuses operations whose result the host has to wait for, and notes the others."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation unless it reads back."""
        name = func._schema.name.removeprefix("aten::")
        assert name not in READS_BACK, f"{name} makes the host wait for the device"
        self.seen.append(name)
        return func(*args, **(kwargs or {}))


def data(field, batch=4, dtype=torch.float64, seed=0):
    """A time, states and a condition (or None) for a field."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *field.state, generator=random, dtype=dtype)
    cond = torch.randn(batch, field.cond_dim, generator=random, dtype=dtype)
    return torch.tensor(0.3, dtype=dtype), x, cond if field.cond_dim else None


def gradients(field, x, cond, gradient, **settings):
    """The end of a solve and its gradients in state, condition and parameters."""
    leaves = [x.clone().requires_grad_(), *field.parameters()]
    if cond is not None:
        leaves.append(cond.clone().requires_grad_())
    y = solve(
        field,
        leaves[0],
        cond=None if cond is None else leaves[-1],
        gradient=gradient,
        **settings,
    ).y
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)]


def check_times(field):
    """One time for all is the same time for each, and the time matters; so does x's dtype."""
    field = field.double()
    _, x, cond = data(field)
    one = field(torch.tensor(0.3), x, cond)
    assert one.dtype == x.dtype and one.shape == x.shape
    # With a time for each row, products are summed in another order.
    torch.testing.assert_close(one, field(torch.full((len(x),), 0.3), x, cond))
    assert (one - field(torch.tensor(0.9), x, cond)).abs().max() > 1e-6
    each = field(torch.tensor([0.1, 0.3, 0.5, 0.9]).double(), x, cond)
    for row, t in enumerate((0.1, 0.3, 0.5, 0.9)):
        own = None if cond is None else cond[row : row + 1]
        alone = field(torch.tensor(t).double(), x[row : row + 1], own)
        torch.testing.assert_close(each[row : row + 1], alone)


def check_gradient(field, **settings):
    """The exact gradient of a solve is that of backpropagation; tells which are not zero."""
    field = field.double()
    _, x, cond = data(field)
    exact = gradients(field, x, cond, "discrete", **settings)
    usual = gradients(field, x, cond, "backprop", **settings)
    for a, b in zip(exact, usual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    return [bool(g.abs().max() > 0) for g in exact[1:]]


def check_replay(field, double):
    """A solve can be recorded, and what is replayed is the solve."""
    field = field.double()
    _, x, cond = data(field)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        for _ in range(3):
            got = gradients(field, x, cond, "discrete", steps=3)
    with cuda_graphs(False):
        usual = gradients(field, x, cond, "discrete", steps=3)
    for a, b in zip(got, usual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert double.records == 2 and double.replays > 0


def check_nothing_read_back(field):
    """A call has no branch on data and waits for nothing, so that CUDA graphs can hold it."""
    t, x, cond = data(field, dtype=torch.float32)
    with NothingReadBack() as mode:
        field(t, x, cond)
    assert len(mode.seen) > 10
    traced = make_fx(field)(t, x, cond)
    t, x, cond = data(field, dtype=torch.float32, seed=1)
    torch.testing.assert_close(traced(t * 2, x, cond), field(t * 2, x, cond))


def check_functional(field):
    """Jacobians by rows and by columns agree, and parameters can be given as a batch."""
    field = field.double().eval()
    t, x, cond = data(field, batch=2)

    def flat(z):
        return field(t, z.reshape(x.shape), cond).flatten()

    rows = jacrev(flat)(x.flatten())
    eye = torch.eye(x.numel(), dtype=x.dtype)
    columns = vmap(lambda v: jvp(flat, (x.flatten(),), (v,))[1])(eye).T
    torch.testing.assert_close(rows, columns)
    params = {name: p.detach() for name, p in field.named_parameters()}
    both = {name: torch.stack([p, 1.1 * p]) for name, p in params.items()}
    found = vmap(lambda p: functional_call(field, p, (t, x, cond)))(both)
    torch.testing.assert_close(found[0], field(t, x, cond))
    torch.testing.assert_close(
        found[1],
        functional_call(field, {name: 1.1 * p for name, p in params.items()}, (t, x, cond)),
    )


def check_copies(make):
    """A copy, and a new field with the weights of the old one, compute the same."""
    field, fresh = make(), make()
    t, x, cond = data(field, dtype=torch.float32)
    assert torch.equal(copy.deepcopy(field)(t, x, cond), field(t, x, cond))
    assert not torch.equal(fresh(t, x, cond), field(t, x, cond))
    fresh.load_state_dict(field.state_dict())
    assert torch.equal(fresh(t, x, cond), field(t, x, cond))


def check_training(field, dtype):
    """Both trainers take the field, with conditions, and lower its loss."""
    _, x1, cond = data(field, batch=64, dtype=torch.float32)
    x1 = 0.1 * x1 + 2
    given = x1 if cond is None else (x1, cond)
    settings = {"device": "cpu", "dtype": dtype, "batch_size": 16, "log_every": 1}
    settings |= {"lr": 3e-3, "eval_every": 30, "coupling": "ot-minibatch"}
    torch.manual_seed(0)
    config = PretrainConfig(steps=30, **settings)
    learned = FlowMatchingTrainer(field, given, config=config, progress=False).run().model
    assert {p.dtype for p in learned.parameters()} == {getattr(torch, dtype)}
    noise = torch.randn(64, *field.state, dtype=getattr(torch, dtype))
    told = None if cond is None else cond.to(noise)

    def error(model):
        return float((sample(model, noise, steps=2, cond=told) - x1).square().mean())

    before = error(learned)
    assert before < 2.5  # noise itself is about 5 away
    settings["coupling"] = "ot-fixed"
    config = FinetuneConfig(steps=20, solver_steps=(2,), select="last", **settings)
    tuned = MLEFineTuner(learned, given, config=config, progress=False).run().model
    assert error(tuned) < before
