"""Recorded steps: buffers, keys, limits, fallbacks and gradients, by a recorder without a GPU."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from solvers.recording import double  # noqa: F401
from torch import nn

import fmft_fast
from fmft_fast import cuda_graphs, solve
from fmft_fast.errors import CaptureWarning, GradientError, InputError
from fmft_fast.solvers import graphs, recorder


class Field(nn.Module):
    """An MLP of (t, x[, cond]) that torch evaluates operation by operation."""

    def __init__(self, state=3, cond=0):
        super().__init__()
        self.first = nn.Linear(state + cond, 8)
        self.last = nn.Linear(8, state)
        self.unused = nn.Linear(2, 2)
        self.scale = 1.0

    def forward(self, t, x, cond=None):
        x = x if cond is None else torch.cat((x, cond), -1)
        return self.scale * self.last(torch.sin(self.first(x) + t)) * x[..., :1].cos()


def run(field, x, cond=None, save="final", **settings):
    """The result and all gradients of one solve."""
    x = x.clone().requires_grad_()
    cond = None if cond is None else cond.clone().requires_grad_()
    field.zero_grad()
    solution = solve(field, x, save=save, cond=cond, **settings)
    weights = torch.linspace(-1, 1, solution.y.numel(), dtype=solution.y.dtype)
    (solution.y * weights.reshape(solution.y.shape)).sum().backward()
    found = [x.grad, *(p.grad for p in field.parameters()), *([] if cond is None else [cond.grad])]
    return solution, [None if g is None else g.clone() for g in found]


def compare(a, b):
    assert torch.equal(a[0].y, b[0].y)
    assert a[0].stats.evaluations == b[0].stats.evaluations
    for x, y in zip(a[1], b[1], strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


CASES = [
    {"method": "euler", "steps": 5},
    {"method": "rk4", "steps": 3, "save": "all"},
    {"method": "dopri5", "steps": torch.tensor([0.0, 0.1, 0.5, 2.0], dtype=torch.float64)},
    {"method": "midpoint", "steps": 4, "t0": 1.0, "t1": -0.5, "save": "all"},
    {"method": "bosh3", "rtol": 1e-4, "atol": 1e-4},
]


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("with_cond", [False, True])
def test_replayed_solves_equal_the_usual_ones(double, settings, with_cond):  # noqa: F811
    field = Field(cond=2 if with_cond else 0).double()
    for number in range(4):
        x = torch.randn(6, 3, dtype=torch.float64)
        cond = torch.randn(6, 2, dtype=torch.float64) if with_cond else None
        got = run(field, x, cond, **settings)
        with cuda_graphs(False):
            compare(got, run(field, x, cond, **settings))
        with torch.no_grad():  # parameters move in place, as an optimiser moves them
            for p in field.parameters():
                p.add_(0.1 * torch.randn_like(p))
        # Adaptive steps go forward under their step control; the backward pass is replayed.
        assert double.records == (0 if number == 0 else 1 if "rtol" in settings else 2)
    assert double.replays > 0


def test_a_solve_without_gradients_is_replayed_too(double):  # noqa: F811
    field, x = Field(), torch.randn(5, 3)
    first = solve(field, x, steps=4, method="heun2", gradient="none")
    for save in ("final", "all"):
        again = solve(field, x, steps=4, method="heun2", gradient="none", save=save)
        assert torch.equal(again.y if save == "final" else again.y[-1], first.y)
        assert again.stats.evaluations == first.stats.evaluations
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(solve(field, x, steps=4, method="heun2", gradient="none").y, first.y)
    assert double.records == 2 and double.replays == 16


def test_results_are_not_overwritten_by_later_replays(double):  # noqa: F811
    field, xs = Field(), [torch.randn(4, 3) for _ in range(4)]
    kept = [run(field, x, steps=3, save="all") for x in xs]
    copies = [(s.y.clone(), [None if g is None else g.clone() for g in grads]) for s, grads in kept]
    run(field, torch.randn(4, 3), steps=3, save="all")
    for (solution, grads), (y, copy) in zip(kept, copies, strict=True):
        assert torch.equal(solution.y, y)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(grads, copy, strict=True))


def test_two_solves_may_wait_for_their_backward_passes(double):  # noqa: F811
    field = Field().double()
    xs = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def gradients():
        total = sum(solve(field, x, steps=3, method="rk4").y.square().sum() for x in xs)
        return torch.autograd.grad(total, [*xs, *list(field.parameters())[:4]])

    with cuda_graphs(False):
        expected = gradients()
    for _ in range(3):
        torch.testing.assert_close(gradients(), expected, rtol=1e-12, atol=1e-12)
    assert double.replays > 0


def test_the_backward_pass_may_be_repeated(double):  # noqa: F811
    field, x = Field().double(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        loss = solve(field, x, steps=3).y.square().sum()
        first = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(first[0], torch.autograd.grad(loss, x)[0])


def test_half_precision_and_autocast(double):  # noqa: F811
    field = Field()
    for dtype in (torch.float32, torch.bfloat16):
        field.to(dtype)
        x = torch.randn(4, 3).to(dtype)
        for autocast in (False, True):
            with torch.autocast("cpu", enabled=autocast):
                got = [run(field, x, steps=3)[1] for _ in range(3)]
                with cuda_graphs(False):
                    want = run(field, x, steps=3)[1]
            for a, b in zip(got[-1], want, strict=True):
                assert (a is None) == (b is None)
                assert a is None or (a.dtype == dtype and torch.equal(a, b))
    assert double.records == 8


def test_a_time_table_and_frozen_parameters(double):  # noqa: F811
    field = Field().double()
    field.first.weight.requires_grad_(False)
    x = torch.randn(4, 3, dtype=torch.float64)
    table = fmft_fast.stage_time_table("rk4", 3)[..., None] * torch.ones(8, dtype=torch.float64)
    for _ in range(3):
        got = run(field, x, steps=3, method="rk4", time_table=table)
    with cuda_graphs(False):
        compare(got, run(field, x, steps=3, method="rk4", time_table=table))
    assert double.records == 2 and got[1][1] is None


def test_gradients_of_times_take_the_usual_way(double):  # noqa: F811
    field = Field().double()
    x = torch.randn(4, 3, dtype=torch.float64)

    def gradient():
        t1 = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(solve(field, x, 0.0, t1, steps=3).y.sum(), t1)[0]

    values = [gradient() for _ in range(3)]
    assert values[0] == values[1] == values[2] != 0 and double.records == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda field: setattr(field, "scale", 2.0),
        lambda field: field.eval(),
        lambda field: setattr(field.first, "weight", nn.Parameter(torch.ones(8, 3))),
        lambda field: field.last.weight.requires_grad_(False),
        lambda field: setattr(field.first.weight, "data", torch.ones(8, 3)),
        lambda field: setattr(field, "last", nn.Linear(8, 3)),
    ],
)
def test_what_is_recorded_belongs_to_one_state_of_the_field(double, change):  # noqa: F811
    field, x = Field(), torch.randn(4, 3)
    for _ in range(3):
        run(field, x, steps=2)
    assert double.records == 2
    change(field)
    for _ in range(3):
        got = run(field, x, steps=2)
        with cuda_graphs(False):
            compare(got, run(field, x, steps=2))
    assert double.records == 4


def test_a_field_that_changes_before_the_backward_pass_is_asked_again(double):  # noqa: F811
    field, x = Field(), torch.randn(4, 3, requires_grad=True)
    for _ in range(2):
        solve(field, x, steps=2).y.sum().backward()
    replays = double.replays
    loss = solve(field, x, steps=2).y.sum()
    field.extra = torch.ones(2)
    loss.backward()
    assert double.replays == replays + 2


def test_shapes_and_settings_are_told_apart(double):  # noqa: F811
    field = Field()
    for batch in (4, 5):
        for method in ("euler", "rk4"):
            for _ in range(2):
                run(field, torch.randn(batch, 3), steps=2, method=method)
    assert double.records == 8
    run(field, torch.randn(3, 4).T, steps=2)  # other strides
    assert double.records == 8
    run(field, torch.randn(4, 3), steps=9)  # any number of steps
    assert double.records == 8


def test_the_cache_is_bounded_and_lets_go(double):  # noqa: F811
    field = Field()
    for batch in range(1, 8):
        for _ in range(2):
            run(field, torch.randn(batch, 3), steps=2)
    assert double.records == 14 and len(graphs._cache.recorded) == graphs.LIMIT
    held = [weakref.ref(step.row) for step in graphs._cache.recorded.values()]
    for batch in range(20, 24):
        for _ in range(2):
            run(field, torch.randn(batch, 3), steps=2)
    gc.collect()
    assert not any(ref() is not None for ref in held)
    run(field, torch.randn(7, 3), steps=2)  # recorded again without a first solve
    assert double.records == 24


def test_nothing_recorded_keeps_a_field_alive(double, monkeypatch):  # noqa: F811
    def record(work, generators=(), *, rehearse=True):
        outputs = work()
        return type("Recorded", (), {"outputs": outputs, "replay": lambda self: None})()

    monkeypatch.setattr(double, "record", record)
    field = Field()
    for _ in range(3):
        run(field, torch.randn(2, 3), steps=2)
    assert len(graphs._cache.recorded) == 2
    gone = weakref.ref(field)
    del field
    gc.collect()
    assert gone() is None
    assert not graphs._cache.recorded and not graphs._cache.seen and not graphs._cache.owners


class Dropping(Field):
    def forward(self, t, x, cond=None):
        return nn.functional.dropout(super().forward(t, x), 0.5, self.training)


class Counting(Field):
    def forward(self, t, x, cond=None):
        self.scale += 0.0
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(t, x)


class Logging(Field):
    def __init__(self):
        super().__init__()
        self.log = []

    def forward(self, t, x, cond=None):
        self.log.append(1)
        return super().forward(t, x)


class Buffered(Field):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, t, x, cond=None):
        self.seen += 1
        return super().forward(t, x)


@pytest.mark.parametrize("kind", [Dropping, Counting, Logging, Buffered])
@pytest.mark.parametrize("gradient", ["discrete", "none"])
def test_fields_with_effects_are_not_recorded(double, kind, gradient):  # noqa: F811
    field = kind()
    for _ in range(4):
        solve(field, torch.randn(4, 3), steps=2, gradient=gradient)
    assert double.records == 0
    if kind is Dropping:
        field.eval()
        for _ in range(2):
            solve(field, torch.randn(4, 3), steps=2, gradient=gradient)
        assert double.records == 1


def test_fields_with_hooks_and_functions_are_not_recorded(double):  # noqa: F811
    field = Field()
    handle = field.last.register_forward_hook(lambda *_: None)
    for _ in range(3):
        run(field, torch.randn(4, 3), steps=2)
        solve(lambda t, x: -x, torch.randn(4, 3), steps=2)
        solve(nn.DataParallel(Field()), torch.randn(4, 3), steps=2, gradient="none", save="all")
    assert double.records == 0
    handle.remove()
    for _ in range(2):
        run(field, torch.randn(4, 3), steps=2)
    assert double.records == 2


def test_tensors_from_outside_of_the_module_are_not_recorded(double):  # noqa: F811
    class Outer(nn.Module):
        def forward(self, t, x):
            return x * outer

    outer, field = torch.ones(3, requires_grad=True), Outer()
    for _ in range(3):
        solve(field, torch.randn(4, 3), steps=2, params=[outer]).y.sum().backward()
    assert double.records == 0 and outer.grad is not None


def test_a_field_that_changes_its_arguments_is_refused_as_ever(double):  # noqa: F811
    class Rude(nn.Module):
        def forward(self, t, x):
            x *= 2
            return x

    with pytest.raises(InputError, match="in place"):
        solve(Rude(), torch.randn(4, 3), steps=2, gradient="none")


def test_second_derivatives_are_refused_as_ever(double):  # noqa: F811
    field, x = Field(), torch.randn(4, 3, requires_grad=True)
    for _ in range(2):
        y = solve(field, x, steps=2).y.sum()
        with pytest.raises(GradientError, match="backprop"):
            torch.autograd.grad(y, x, create_graph=True)


def test_a_failure_is_told_once_and_the_field_goes_on(double):  # noqa: F811
    field, x = Field(), torch.randn(4, 3)
    with cuda_graphs(False):
        want = run(field, x, steps=2)
    run(field, x, steps=2)
    double.reason = "it waits for the device"
    with pytest.warns(CaptureWarning, match="Field runs without CUDA graphs.*waits for the device"):
        compare(run(field, x, steps=2), want)
    double.reason = None
    compare(run(field, x, steps=2), want)
    assert double.records == 0
    for _ in range(2):
        run(Field(), x, steps=2)


def test_switches(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert recorder.find_recorder(cpu) is None
    assert isinstance(recorder.find_recorder(gpu), recorder.CudaRecorder)
    with cuda_graphs(False):
        assert recorder.find_recorder(gpu) is None
        with cuda_graphs(True):
            assert recorder.find_recorder(gpu) is not None
    monkeypatch.setenv("FMFT_CUDA_GRAPHS", "0")
    assert recorder.find_recorder(gpu) is None
    with cuda_graphs(True):
        assert recorder.find_recorder(gpu) is not None


def test_a_wait_is_told_from_other_warnings(monkeypatch):
    modes = []

    def set_mode(mode):
        modes.append(mode)
        warnings.warn(
            "a prototype, which does not detect all synchronizing operations", stacklevel=2
        )

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with recorder.watch_waits(torch.device("cuda")) as waits:
            warnings.warn("called a synchronizing CUDA operation (in copy)", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
    assert waits == ["called a synchronizing CUDA operation (in copy)"]
    assert [str(w.message) for w in caught] == ["something else"] and modes == ["warn", 0]


def test_the_reason_is_what_went_wrong_first():
    try:
        try:
            raise ValueError("the cause\nmore")
        finally:
            raise RuntimeError("capture failed")
    except RuntimeError as error:
        assert recorder._reason(error) == "ValueError: the cause"


@pytest.mark.gpu
@pytest.mark.parametrize("settings", CASES)
def test_on_a_gpu(settings):
    graphs.clear()
    field = Field(cond=2).double().cuda()
    settings = {**settings}
    for _ in range(3):
        x = torch.randn(6, 3, dtype=torch.float64)
        cond = torch.randn(6, 2, dtype=torch.float64)
        got = run_on_gpu(field, x, cond, settings)
        with cuda_graphs(False):
            for a, b in zip(got, run_on_gpu(field, x, cond, settings), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert graphs._cache.recorded


def run_on_gpu(field, x, cond, settings):
    x, cond = x.cuda().requires_grad_(), cond.cuda().requires_grad_()
    y = solve(field, x, cond=cond, **settings).y
    leaves = [x, cond, *field.first.parameters(), *field.last.parameters()]
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.gpu
def test_a_field_that_waits_for_the_device_goes_on_without_graphs():
    class Waiting(Field):
        def forward(self, t, x, cond=None):
            return super().forward(t, x) * float(x.sum().isfinite())

    graphs.clear()
    field, x = Waiting().cuda(), torch.randn(4, 3, device="cuda")
    first = solve(field, x, steps=2).y
    with pytest.warns(CaptureWarning, match="Waiting"):
        second = solve(field, x, steps=2).y
    assert torch.equal(first, second) and torch.equal(first, solve(field, x, steps=2).y)
    other = Field().cuda()
    ends = [solve(other, x, steps=2).y for _ in range(3)]
    torch.testing.assert_close(ends[0], ends[2])
