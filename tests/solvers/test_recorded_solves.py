"""Recorded solves layer by layer: equal to usual ones to the bit, whatever happens in between."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from solvers.recording import double  # noqa: F401
from torch import nn

from fmft_fast import cuda_graphs, explain, fused, odeint, solve
from fmft_fast.errors import CaptureWarning
from fmft_fast.fields import GAV, MLP
from fmft_fast.ops.trajectory_layered import KERNELS
from fmft_fast.solvers import recorded_solve, recorder, whole_solve
from fmft_fast.solvers.recorded_solve import _cache
from fmft_fast.solvers.recordings import Recordings
from fmft_fast.train import FinetuneConfig, MLEFineTuner
from fmft_fast.train import step as step_module


@pytest.fixture(autouse=True)
def layered(monkeypatch):
    """Every solve goes layer by layer."""
    recorded_solve.clear()
    monkeypatch.setattr(whole_solve, "choose_trajectory", lambda *_: KERNELS)
    with fused("require"):
        yield
    recorded_solve.clear()


class Embedded(nn.Module):
    """A field that sees its time by an embedding, so that kernels are given tables."""

    def __init__(self):
        super().__init__()
        self.first, self.time, self.last = nn.Linear(3, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("rates", torch.arange(1.0, 5.0))

    def forward(self, t, x):
        return self.last(torch.tanh(self.first(x) + self.time(torch.sin(t * self.rates))))


FIELDS = {
    "mlp": lambda: MLP(3, (8, 7), "silu"),
    "tables": Embedded,
    "derived weights": lambda: GAV(3, width=8),
    "lambda": lambda: nn.Sequential(nn.Linear(3, 6), nn.Softplus(), nn.Linear(6, 3)),
}


def make(name="mlp"):
    return FIELDS[name]().double()


def state(rows=5):
    return torch.randn(rows, 3, dtype=torch.float64)


def call(field, x, cond=None, **settings):
    """The states of a solve."""
    if isinstance(field, nn.Sequential):
        inner = field
        field = lambda t, x: inner(x) - x  # noqa: E731
    if "t" in settings:
        return odeint(field, x, **settings)
    return solve(field, x, cond=cond, **{"steps": 4, **settings}).y


def run(field, x, cond=None, **settings):
    """The states of a solve and all gradients of a sum of them."""
    x = x.detach().clone().requires_grad_()
    leaves = [x, *(p for p in field.parameters() if p.requires_grad)]
    if cond is not None:
        cond = cond.clone().requires_grad_()
        leaves.append(cond)
    y = call(field, x, cond, **settings)
    return [y, *torch.autograd.grad(total(y), leaves)]


def total(y):
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device)
    return (y * weights.reshape(y.shape)).sum()


def usual(compute, *args, **settings):
    """The same without recordings."""
    with cuda_graphs(False):
        return compute(*args, **settings)


def equal(a, b):
    return all(map(torch.equal, a, b)) and len(a) == len(b)


@torch.no_grad()
def move(field):
    """As an optimiser does."""
    for p in field.parameters():
        p.add_(0.1 * torch.randn_like(p))


CASES = [
    {"method": "euler"},
    {"method": "rk4", "save": "all"},
    {"method": "midpoint", "gradient": "backprop", "t0": 1.0, "t1": -0.5},
    {"method": "dopri5", "steps": torch.tensor([0.0, 0.1, 0.5, 2.0], dtype=torch.float64)},
    {"method": "heun2", "t": torch.linspace(0, 1, 4)},
]


@pytest.mark.parametrize("keep", ["inputs", "activations"])
@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("settings", CASES, ids=lambda s: s["method"])
def test_replayed_solves_equal_usual_ones(double, monkeypatch, settings, name, keep):  # noqa: F811
    if keep == "inputs":
        monkeypatch.setattr(whole_solve, "SMALL_KEEP", 0)
    field = make(name)
    for number in range(4):
        x = state()
        assert equal(run(field, x, **settings), usual(run, field, x, **settings))
        move(field)
        assert double.records == (2 if number else 0) and double.replays == 2 * number


def test_conditions_are_copied(double):  # noqa: F811
    field = MLP(3, (8, 7), cond_dim=2).double()
    for number in range(4):
        x, cond = state(), torch.randn(5, 2, dtype=torch.float64)
        assert equal(run(field, x, cond), usual(run, field, x, cond))
        assert double.replays == 2 * number
    assert double.records == 2


def test_solves_without_gradients_and_with_take_turns(double):  # noqa: F811
    field = make()
    for number in range(4):
        x = state()
        want = usual(run, field, x)
        with torch.no_grad():
            first = call(field, x)
        assert equal(run(field, x), want) and torch.equal(first, want[0])
        with torch.inference_mode():
            assert torch.equal(call(field, x), want[0])
        assert torch.equal(call(field, x, gradient="none"), want[0])
        move(field)
        # Forward without gradients, the same in inference mode, with gradients, and backward.
        assert double.records == (4 if number else 2)
    assert double.replays == 2 + 3 * 5


def test_kinds_are_told_apart(double):  # noqa: F811
    field = make()
    kinds = [
        {},
        {"x": state(6)},
        {"x": torch.randn(3, 5, dtype=torch.float64).T},
        {"method": "heun2"},
        {"steps": 3},
        {"t1": 0.5},
        {"save": "all"},
    ]
    for turn in range(3):
        for number, kind in enumerate(kinds):
            kind = {"x": state(), **kind}
            assert equal(run(field, **kind), usual(run, field, **kind))
            assert double.records == (0, 2 * (number + 1), 2 * len(kinds))[turn]
    field.linears[0].bias.requires_grad_(False)
    for _ in range(3):
        x = state()
        assert equal(run(field, x), usual(run, field, x))
    assert double.records == 2 * len(kinds) + 2


def test_results_are_not_overwritten_by_later_replays(double):  # noqa: F811
    field = make()
    found = [run(field, state(), save="all") for _ in range(4)]
    copies = [[x.clone() for x in each] for each in found]
    run(field, state(), save="all")
    assert all(map(equal, found, copies)) and double.replays == 8


def test_gradients_are_added_up_by_torch_as_ever(double):  # noqa: F811
    field, x = make(), state()
    for _ in range(2):
        run(field, x)
    grads = run(field, x)[1:]
    field.zero_grad()
    for _ in range(3):
        total(call(field, x.requires_grad_())).backward()
    for p, g in zip([x, *field.parameters()], grads, strict=True):
        torch.testing.assert_close(p.grad, 3 * g, rtol=1e-14, atol=1e-14)


def test_several_solves_may_wait_for_their_backward_passes(double):  # noqa: F811
    field, xs = make(), [state() for _ in range(3)]

    def gradients(order):
        leaves = [x.clone().requires_grad_() for x in xs]
        ends = [call(field, x) for x in leaves]
        inputs = [*leaves, *field.parameters()]
        return [
            g
            for i in order
            for g in torch.autograd.grad(total(ends[i]), inputs, allow_unused=True)
            if g is not None
        ]

    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        before = double.replays
        for _ in range(2):
            assert equal(gradients(order), usual(gradients, order))
        assert double.replays > before
    assert double.records == 2

    def chained():
        """A solve from where one of the same kind ended."""
        x = xs[0].clone().requires_grad_()
        end = call(field, call(field, x))
        return torch.autograd.grad(total(end), [x, *field.parameters()])

    assert equal(chained(), usual(chained))


def test_a_backward_pass_may_be_repeated_and_come_late(double):  # noqa: F811
    field, other = make(), make("tables")
    for _ in range(2):
        run(field, state())
    x = state().requires_grad_()
    leaves = [x, *field.parameters()]
    want = usual(run, field, x)[1:]
    loss = total(call(field, x))
    for _ in range(2):
        before = double.replays
        assert equal(torch.autograd.grad(loss, leaves, retain_graph=True), want)
        assert double.replays == before + 1
    run(other, state())
    run(field, state())  # takes the memory over
    before = double.replays
    for _ in range(2):
        assert equal(torch.autograd.grad(loss, leaves, retain_graph=True), want)
    assert double.replays == before and double.records == 2
    run(field, state())
    assert double.replays == before + 2


def test_solves_run_as_usual_while_one_waits_and_no_longer(double):  # noqa: F811
    field = make()
    for _ in range(2):
        run(field, state())
    waiting = call(field, state().requires_grad_())
    before = double.replays
    for _ in range(3):
        x = state()
        assert equal(run(field, x), usual(run, field, x))
    assert double.replays == before
    del waiting
    run(field, state())
    assert double.replays == before + 2


def test_a_backward_pass_that_fails_elsewhere_leaves_all_in_order(double):  # noqa: F811
    field = make()
    for _ in range(2):
        run(field, state())
    x = state().requires_grad_()
    leaves = [x, *field.parameters()]
    want = usual(run, field, x)[1:]
    y = call(field, x)
    shown = y * 1

    def refuse(grad):
        raise RuntimeError("no")

    handle = shown.register_hook(refuse)
    with pytest.raises(RuntimeError, match="no"):
        torch.autograd.grad(total(shown), leaves, retain_graph=True)
    handle.remove()
    assert equal(torch.autograd.grad(total(shown), leaves), want)


def test_a_parameter_that_changes_before_the_backward_pass_is_told_as_ever(double):  # noqa: F811
    field = make()
    for recorded in (False, True, True):
        loss = total(call(field, state().requires_grad_()))
        move(field)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        assert (double.replays > 0) == recorded
    x = state()
    del loss
    assert equal(run(field, x), usual(run, field, x))


CHANGES = {
    "data": lambda field: setattr(field.linears[0].weight, "data", torch.randn(8, 4).double()),
    "assign": lambda field: field.load_state_dict(make().state_dict(), assign=True),
    "copy": lambda field: field.load_state_dict(make().state_dict()),
    "parameter": lambda field: setattr(
        field.linears[1], "bias", nn.Parameter(torch.ones(7, dtype=torch.float64))
    ),
    "frozen": lambda field: field.linears[1].weight.requires_grad_(False),
    "module": lambda field: field.linears.__setitem__(2, nn.Linear(7, 3).double()),
    "there and back": lambda field: field.float().double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_may_be_replaced(double, change):  # noqa: F811
    field = make()
    for _ in range(3):
        run(field, state())
    CHANGES[change](field)
    for _ in range(3):
        x = state()
        assert equal(run(field, x), usual(run, field, x))
    assert double.records == (2 if change == "copy" else 4)


def test_a_parameter_that_moves_between_the_passes_is_read_where_it_is(double):  # noqa: F811
    field = make()
    for _ in range(2):
        run(field, state())

    def compute():
        x = torch.ones(5, 3, dtype=torch.float64, requires_grad=True)
        y = call(field, x)
        kept = field.linears[1].weight.data
        field.linears[1].weight.data = kept * 2  # which torch does not see
        found = torch.autograd.grad(total(y), [x, *field.parameters()])
        field.linears[1].weight.data = kept
        return found

    before = double.replays
    assert equal(compute(), usual(compute)) and double.replays == before + 1


def test_saved_tensors_may_be_kept_elsewhere(double):  # noqa: F811
    field = make()
    for _ in range(4):
        x = state()
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
            found = run(field, x)
        assert equal(found, usual(run, field, x))
    assert double.records == 1  # of the forward pass


def test_checkpointed_solves(double):  # noqa: F811
    field = make()

    def compute(reentrant):
        x = torch.ones(5, 3, dtype=torch.float64, requires_grad=True)
        again = torch.utils.checkpoint.checkpoint
        y = again(lambda x: call(field, x) ** 2, x, use_reentrant=reentrant)
        return [y, *torch.autograd.grad(total(y), [x, *field.parameters()])]

    def compute_leaves():
        field.zero_grad()
        x = torch.ones(5, 3, dtype=torch.float64, requires_grad=True)
        y = torch.utils.checkpoint.checkpoint(lambda x: call(field, x) ** 2, x, use_reentrant=True)
        total(y).backward()
        return [y, x.grad, *(p.grad.clone() for p in field.parameters())]

    for _ in range(4):
        assert equal(compute(False), usual(compute, False))
        assert equal(compute_leaves(), usual(compute_leaves))
    assert double.replays > 0


def test_second_derivatives(double):  # noqa: F811
    field = make()

    def compute():
        x = torch.ones(5, 3, dtype=torch.float64, requires_grad=True)
        slope = torch.autograd.grad(total(call(field, x)), x, create_graph=True)[0]
        return torch.autograd.grad(slope.square().sum(), list(field.parameters()))

    for _ in range(4):
        x = state()
        for a, b in zip(compute(), usual(compute), strict=True):
            assert torch.equal(a, b) and a.any()
        assert equal(run(field, x), usual(run, field, x))
    assert double.replays > 0


def test_many_gradients_at_once(double):  # noqa: F811
    field = make()

    def compute():
        x = torch.ones(5, 3, dtype=torch.float64, requires_grad=True)
        y = call(field, x)
        directions = torch.eye(15, dtype=torch.float64).reshape(15, 5, 3)
        return torch.autograd.grad(y, x, directions, is_grads_batched=True)

    for _ in range(3):
        assert equal(compute(), usual(compute))


def test_a_backward_pass_under_autocast(double):  # noqa: F811
    field = make().float()

    def compute(autocast):
        x = torch.ones(5, 3, requires_grad=True)
        y = call(field, x)
        with torch.autocast("cpu", enabled=autocast):
            return torch.autograd.grad(total(y), [x, *field.parameters()])

    for autocast in (False, True, True, False, True):
        assert equal(compute(autocast), usual(compute, autocast))
    assert double.records == 3


def test_settings_of_precision_are_of_the_kind(double):  # noqa: F811
    field, x = make(), state()
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            for _ in range(2):
                run(field, x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert double.records == 4


def test_a_backward_pass_on_another_stream_solves_again(double, monkeypatch):  # noqa: F811
    field = make()
    for _ in range(2):
        run(field, state())
    x = state().requires_grad_()
    want = usual(run, field, x)[1:]
    loss = total(call(field, x))
    monkeypatch.setattr(recorded_solve, "stream_of", lambda _: 7)
    before = double.replays
    assert equal(torch.autograd.grad(loss, [x, *field.parameters()]), want)
    assert double.replays == before


def test_threads_have_recordings_of_their_own(double):  # noqa: F811
    field, found = make(), {}
    xs = [state() for _ in range(4)]
    wants = [usual(run, field, x) for x in xs]

    def work(number):
        with fused("require"):
            found[number] = all(equal(run(field, xs[number]), wants[number]) for _ in range(6))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True) and double.replays > 0


def test_the_backward_pass_of_another_thread(double):  # noqa: F811
    field, found = make(), []
    for _ in range(2):
        run(field, state())
    for _ in range(3):
        x = state().requires_grad_()
        leaves = [x, *field.parameters()]
        loss = total(call(field, x))
        work = lambda: found.append(torch.autograd.grad(loss, leaves))  # noqa: B023, E731
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert equal(found[-1], usual(run, field, x)[1:])


def test_how_many_recordings_there_may_be(double, monkeypatch):  # noqa: F811
    monkeypatch.setattr(_cache, "limit", 2)
    monkeypatch.setattr(_cache, "patience", 6)
    field = make()
    for _ in range(3):  # three kinds take turns: there is room for two
        for rows in (3, 4, 5):
            x = state(rows)
            assert equal(run(field, x), usual(run, field, x))
    assert double.records == 4 and len(_cache.recorded) == 2
    for _ in range(6):  # the others are not used any more
        run(field, state(5))
    assert double.records == 6 and len(_cache.recorded) == 2


def test_how_much_recordings_may_hold(double, monkeypatch):  # noqa: F811
    field = make()
    held = (4 * 5 * (3 + 8 + 7 + 3 + 8 + 7) + 5 * 3) * 8  # values, arguments of SiLU, the output
    for budget, records in ((held - 1, 0), (held, 2)):
        recorded_solve.clear()
        monkeypatch.setattr(_cache, "budget", budget)
        for _ in range(3):
            x = state()
            assert equal(run(field, x), usual(run, field, x))
        assert double.records == records
    assert list(_cache.sizes.values()) == [held]
    monkeypatch.setattr(_cache, "patience", 0)
    for _ in range(3):
        run(field, state(), save="all", t1=0.5, steps=3)
    assert double.records == 4 and len(_cache.recorded) == len(_cache.sizes) == 1


def test_room_is_made_by_what_was_not_used_for_longest():
    class Owner:
        pass

    owner, cache = Owner(), Recordings(limit=9, budget=10, patience=3)
    number = cache.know(owner)
    assert cache.get((number, "large"), object, 11) is None
    a, b = cache.get((number, "a"), object, 4), cache.get((number, "b"), object, 6)
    assert cache.get((number, "c"), object, 6) is None
    assert cache.get((number, "b"), object, 6) is b and cache.get((number, "a"), object, 4) is a
    assert cache.get((number, "c"), object, 6) is None  # b was used two calls ago
    assert cache.get((number, "c"), object, 6) is not None  # in place of b
    assert set(cache.recorded) == {(number, "a"), (number, "c")}
    del owner
    assert not cache.recorded and not cache.sizes and not cache.used


def test_a_failure_is_told_once_and_nothing_is_lost(double):  # noqa: F811
    field, x = make(), state()
    want = usual(run, field, x)
    run(field, x)
    double.reason = "it waits for the device"
    with pytest.warns(CaptureWarning, match=r"without CUDA graphs.*waits for the device.*cuda_gr"):
        assert equal(run(field, x), want)
    double.reason = None
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        for _ in range(2):
            assert equal(run(field, x), want)
    assert double.records == 0
    other = make()
    for _ in range(2):
        run(other, x)
    assert double.records == 2


def test_a_backward_pass_that_cannot_be_recorded(double):  # noqa: F811
    field, x = make(), state().requires_grad_()
    leaves = [x, *field.parameters()]
    want = usual(run, field, x)[1:]
    run(field, x)
    loss = total(call(field, x))
    assert double.records == 1
    double.reason = "memory is short"
    with pytest.warns(CaptureWarning, match="memory is short"):
        assert equal(torch.autograd.grad(loss, leaves), want)
    double.reason = None
    for _ in range(2):
        assert equal(run(field, x)[1:], want)
    assert double.records == 1


def test_what_is_recorded_goes_with_its_field(double, monkeypatch):  # noqa: F811
    def record(work, generators=(), *, rehearse=True):
        double.records += 1
        outputs = work()
        return type("Recorded", (), {"outputs": outputs, "replay": lambda self: None})()

    monkeypatch.setattr(double, "record", record)
    for name in ("mlp", "derived weights"):
        field = make(name)
        for _ in range(3):
            run(field, state())
        assert len(_cache.recorded) == 1
        solved = next(iter(_cache.recorded.values()))
        gone = [weakref.ref(x) for x in (field, *field.parameters(), solved)]
        memory = {p.data_ptr() for p in field.parameters()}
        held = [x for x in (*solved.own, *solved.recorded.outputs) if x is not None]
        held += [x for part in solved.backwards.values() for x in part.recorded.outputs]
        assert not memory & {x.data_ptr() for x in held}
        del field, solved, held
        gc.collect()
        assert not any(ref() is not None for ref in gone)
        assert not _cache.recorded and not _cache.seen and not _cache.owners
    assert double.records == 4


def test_where_nothing_is_recorded(double, monkeypatch):  # noqa: F811
    field = make()
    with cuda_graphs(False):
        for _ in range(3):
            run(field, state())
    assert double.records == 0 and not _cache.seen
    monkeypatch.setattr(recorded_solve, "find_recorder", recorder.find_recorder)
    plan = explain(field, state()).plan
    assert recorded_solve.with_recordings(KERNELS, plan, torch.device("cpu")) is KERNELS
    gpu = torch.device("cuda")
    assert recorded_solve.with_recordings(KERNELS, plan, gpu).name == "layered"
    other = type("Kernels", (), {"name": "cpu"})()
    assert recorded_solve.with_recordings(other, plan, gpu) is other
    monkeypatch.setattr(recorder, "is_capturing", lambda: True)
    assert recorded_solve.with_recordings(KERNELS, plan, gpu) is KERNELS


def test_forbidden_before_the_backward_pass(double, monkeypatch):  # noqa: F811
    field = make()
    for _ in range(2):
        run(field, state())
    x = state().requires_grad_()
    want = usual(run, field, x)[1:]
    loss = total(call(field, x))
    before = double.replays
    assert equal(usual(torch.autograd.grad, loss, [x, *field.parameters()]), want)
    assert double.replays == before


def train(field, device="cpu", **settings):
    """The weights after fine-tuning."""
    torch.manual_seed(0)
    config = FinetuneConfig(
        **{"steps": 12, "solver_steps": (2, 3), "method": "midpoint", "batch_size": 16},
        **{"coupling": "ot-fixed", "warmup": 3, "lr": 1e-2, "device": device, **settings},
    )
    tuner = MLEFineTuner(field, torch.randn(64, 3), config=config, progress=False)
    return list(tuner.run().model.state_dict().values())


def test_a_recorded_training_step_records_its_solves_within(double, monkeypatch):  # noqa: F811
    """Nothing is recorded inside of another recording, and all else is as without."""
    inside = []
    record = double.record

    def outer(work, generators=(), *, rehearse=True):
        def watched():
            inside.append(1)
            try:
                return work()
            finally:
                inside.pop()

        return record(watched, generators, rehearse=rehearse)

    steps = type("Steps", (), {"record": staticmethod(outer)})()
    monkeypatch.setattr(
        recorded_solve,
        "find_recorder",
        lambda _: double if recorder.graphs_allowed() and not inside else None,
    )
    field = MLP(3, (8, 7))
    monkeypatch.setattr(
        step_module, "find_recorder", lambda _: steps if recorder.graphs_allowed() else None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        found = train(copy.deepcopy(field))
    assert double.replays > 0
    with cuda_graphs(False):
        want = train(copy.deepcopy(field))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_training_with_recorded_solves(double):  # noqa: F811
    field = MLP(3, (8, 7))
    found = train(copy.deepcopy(field))
    assert double.replays > 8
    with cuda_graphs(False):
        want = train(copy.deepcopy(field))
    assert equal(found, want)


def test_explain_tells_which_way_a_solve_takes(double):  # noqa: F811
    text = str(explain(make(), state()))
    assert text.startswith(
        "fused: layer by layer by torch's matrix products each way, from the second one on as one "
        "CUDA graph; state of width 3, 3 layers\n"
    )
    with cuda_graphs(False):
        found = explain(make(), state())
    assert found.backend == "layered" and found.fused and not found.recorded
    assert "CUDA graph" not in str(found)


@pytest.fixture
def replayed(monkeypatch):
    """The recordings that CUDA has replayed; a failure to record is an error."""
    replays = []
    replay = recorder._CudaGraph.replay

    def counted(graph):
        replays.append(graph)
        replay(graph)

    monkeypatch.setattr(recorder._CudaGraph, "replay", counted)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        yield replays


def close(a, b, tolerance=1e-11):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and x.isfinite().all()
        assert (x - y).norm() <= tolerance * y.norm()


def on_gpu(field, dtype=torch.float64):
    return field.to("cuda", dtype)


def gpu_state(rows=33, width=3, dtype=torch.float64):
    return torch.randn(rows, width, dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["inputs", "activations"])
@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("settings", CASES, ids=lambda s: s["method"])
def test_on_a_gpu_replays_equal_usual_solves(replayed, monkeypatch, settings, name, keep):
    if keep == "inputs":
        monkeypatch.setattr(whole_solve, "SMALL_KEEP", 0)
    if "t" in settings:
        settings = {**settings, "t": settings["t"].cuda()}
    field = on_gpu(FIELDS[name]())
    for number in range(4):
        x = gpu_state()
        close(run(field, x, **settings), usual(run, field, x, **settings))
        move(field)
        assert len(replayed) == 2 * number
    assert len(set(map(id, replayed))) == 2 and len(_cache.recorded) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 1e-5), ("high", 5e-3)])
def test_on_a_gpu_wide_fields(replayed, precision, tolerance):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        field = on_gpu(MLP(32, (512, 512, 512), "silu", cond_dim=4), torch.float32)
        for number in range(4):
            x = gpu_state(256, 32, torch.float32)
            cond = gpu_state(256, 4, torch.float32)
            with torch.no_grad():
                end = call(field, x, cond, steps=16)
            found = run(field, x, cond, steps=16)
            want = usual(run, field, x, cond, steps=16)
            close([end, *found], [want[0], *want], tolerance)
            assert len(replayed) == 3 * number
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [False, True])
def test_on_a_gpu_an_optimiser_is_followed(replayed, own_stream):
    def train(recorded):
        torch.manual_seed(0)
        field = on_gpu(MLP(3, (40, 40)))
        optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)
        losses = []
        for rows in (33, 33, 20, 33, 20, 33, 20, 33):
            x = gpu_state(rows)
            with cuda_graphs(recorded):
                loss = call(field, x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [torch.stack(losses), *(p.detach() for p in field.parameters())]

    with torch.cuda.stream(torch.cuda.Stream() if own_stream else torch.cuda.current_stream()):
        found = train(True)
        assert len(replayed) == 2 * (4 + 2)
        want = train(False)
        torch.cuda.synchronize()
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
def test_on_a_gpu_solves_that_overlap_and_late_backward_passes(replayed):
    field = on_gpu(make())
    for _ in range(2):
        run(field, gpu_state())
    xs = [gpu_state().requires_grad_() for _ in range(3)]
    wants = [usual(run, field, x)[1:] for x in xs]
    losses = [total(call(field, x)) for x in xs]
    assert len(replayed) == 3
    leaves = list(field.parameters())
    for i in (1, 0, 2):
        close(torch.autograd.grad(losses[i], [xs[i], *leaves], retain_graph=True), wants[i])
    assert len(replayed) == 4
    run(field, gpu_state())
    close(torch.autograd.grad(losses[0], [xs[0], *leaves]), wants[0])
    assert len(replayed) == 6
    kept = [run(field, gpu_state()) for _ in range(2)]
    copies = [[x.clone() for x in each] for each in kept]
    run(field, gpu_state())
    assert all(map(equal, kept, copies))


@pytest.mark.gpu
def test_on_a_gpu_parameters_may_move_and_change(replayed):
    field = on_gpu(make())
    for change in (None, *CHANGES):
        if change in ("copy", "frozen", "there and back"):
            CHANGES[change](field)
        elif change is not None:
            CHANGES[change](field)
            on_gpu(field)
        for _ in range(3):
            x = gpu_state()
            close(run(field, x), usual(run, field, x))
    loss = total(call(field, gpu_state().requires_grad_()))
    move(field)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert len(replayed) >= 2 * 2 * (len(CHANGES) + 1)


@pytest.mark.gpu
def test_on_a_gpu_replays_wait_for_nothing(replayed):
    field, x = on_gpu(make()), gpu_state().requires_grad_()
    leaves, weights = [x, *field.parameters()], torch.randn_like(gpu_state())
    compute = lambda: torch.autograd.grad((call(field, x) * weights).sum(), leaves)  # noqa: E731
    want = usual(compute)
    for _ in range(2):
        compute()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = compute()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    close(found, want)
    assert len(replayed) == 4


@pytest.mark.gpu
def test_on_a_gpu_somebody_elses_graph_takes_the_layers_in(replayed):
    field, x = on_gpu(make()), gpu_state()
    for _ in range(3):
        with torch.no_grad():
            call(field, x)
    before = len(replayed)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = call(field, x)
    x.copy_(gpu_state())
    graph.replay()
    with torch.no_grad():
        close([y], [usual(call, field, x)])
    assert len(replayed) == before == 2


@pytest.mark.gpu
def test_on_a_gpu_a_training_step_is_recorded_with_its_layers(replayed):
    field = MLP(3, (160, 160))
    found = train(copy.deepcopy(field), "cuda", steps=30, cuda_graph=True)
    assert replayed
    want = train(copy.deepcopy(field), "cuda", steps=30, cuda_graph=False)
    with cuda_graphs(False):
        plain = train(copy.deepcopy(field), "cuda", steps=30, cuda_graph=False)
    # Adam makes much of the rounding of gradients that are nearly zero.
    close(found, plain, 1e-2)
    close(want, plain, 1e-2)
