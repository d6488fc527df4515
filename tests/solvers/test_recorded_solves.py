"""Recorded solves layer by layer: equal to usual ones to the bit, whatever happens in between."""

from __future__ import annotations

import threading

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
    state,
    total,
    usual,
)
from solvers.recording import double, operations  # noqa: F401

from fmft_fast import fused
from fmft_fast.fields import MLP
from fmft_fast.ops import trajectory_layered
from fmft_fast.ops.contract import REFERENCE
from fmft_fast.solvers import recorded_solve, whole_solve

pytestmark = pytest.mark.usefixtures("layered")


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


def test_a_parameter_that_moves_between_the_passes_is_read_where_it_was(double):  # noqa: F811
    field = make()
    for _ in range(2):
        run(field, state())

    def compute(factor):
        x = torch.ones(5, 3, dtype=torch.float64, requires_grad=True)
        y = call(field, x)
        kept = field.linears[1].weight.data
        field.linears[1].weight.data = kept * factor  # which torch does not see
        found = torch.autograd.grad(total(y), [x, *field.parameters()])
        field.linears[1].weight.data = kept
        return found

    before = double.replays
    assert equal(compute(2), usual(compute, 1)) and double.replays == before + 2


def test_saved_tensors_may_be_kept_elsewhere(double):  # noqa: F811
    field = make()
    for _ in range(4):
        x = state()
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
            found = run(field, x)
        assert equal(found, usual(run, field, x))
    assert double.records == 2


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


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("settings", CASES, ids=lambda s: s["method"])
def test_what_is_recorded_depends_on_nothing_that_python_does(
    operations,  # noqa: F811
    monkeypatch,
    settings,
    name,
):
    # While operations are watched, the plain ones stand in for the compiled ones.
    monkeypatch.setattr(trajectory_layered, "choose_kernels", lambda _: REFERENCE)
    field = make(name)
    for _ in range(4):
        x = state()
        assert equal(run(field, x, **settings), usual(run, field, x, **settings))
        move(field)
    assert operations.records == 2 and operations.replays == 6
