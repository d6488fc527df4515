"""Which solves layer by layer are recorded, how many, and what they hold on to."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from solvers.layered_solves import (
    call,
    equal,
    layered,  # noqa: F401
    make,
    run,
    state,
    total,
    train,
    usual,
)
from solvers.recording import double  # noqa: F401

from fmft_fast import cuda_graphs, explain
from fmft_fast.errors import CaptureWarning
from fmft_fast.fields import MLP
from fmft_fast.ops.trajectory_layered import KERNELS
from fmft_fast.solvers import recorded_solve, recorder
from fmft_fast.solvers.recorded_solve import _cache
from fmft_fast.solvers.recordings import Recordings
from fmft_fast.train import step as step_module

pytestmark = pytest.mark.usefixtures("layered")


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
    # Of 4 stages the values, the arguments of SiLU and as many deltas, each state, the final one
    # as well, and the output.
    held = (4 * 5 * 3 * (8 + 7 + 3) + (5 + 1) * 5 * 3) * 8
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
