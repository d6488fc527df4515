"""Solves layer by layer in CUDA graphs on a GPU: equal to usual ones, and really replayed."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from solvers.layered_solves import (
    CASES,
    CHANGES,
    FIELDS,
    call,
    equal,
    layered,  # noqa: F401
    make,
    move,
    run,
    total,
    train,
    usual,
)

from fmft_fast import cuda_graphs
from fmft_fast.errors import CaptureWarning
from fmft_fast.fields import MLP
from fmft_fast.solvers import recorder, whole_solve
from fmft_fast.solvers.recorded_solve import _cache

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("layered")]


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
        assert (x - y).norm() <= tolerance * (y.norm() + 1e-3)


def on_gpu(field, dtype=torch.float64):
    return field.to("cuda", dtype)


def gpu_state(rows=33, width=3, dtype=torch.float64):
    return torch.randn(rows, width, dtype=dtype, device="cuda")


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
