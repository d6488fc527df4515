"""What is timed is right: every adapter on tiny cases, and what happens to one that is wrong."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

from benchmarks import measure, run
from benchmarks.cases import CASES, OPERATIONS, Problem, tiny
from benchmarks.check import Errors, Reference
from benchmarks.peers import BASELINE, PEERS, NotApplicable, Peer, torch_operation

EAGER = [name for name, peer in PEERS.items() if peer.kind == "eager"]


def test_the_cases_cover_what_the_suite_promises():
    assert set(CASES) >= {"small", "narrow", "wide", "rk4", "policy", "gav", "unet", "dopri5"}
    assert all(case.name == name for name, case in CASES.items())
    assert len({case.title for case in CASES.values()}) == len(CASES)
    assert all(set(case.operations) <= set(OPERATIONS) for case in CASES.values())
    on_cpu = {case.name for case, _ in run.selection(None, None, "cpu")}
    assert on_cpu == set(CASES) - {"p1"}
    assert ("p1", "training") in {(c.name, o) for c, o in run.selection(["p1"], None, "cpu")}


@pytest.mark.parametrize("name", CASES)
def test_a_problem_is_the_same_on_every_call_and_has_useful_work(name):
    case = tiny(CASES[name])
    first, second = Problem(case), Problem(case)
    assert torch.equal(first.x0, second.x0)
    for one, other in zip(first.parameters, second.parameters, strict=True):
        assert torch.equal(one, other)
    assert first.velocity(first.times[0], first.x0).shape == first.x0.shape
    flops = [first.useful_flops(operation) for operation in OPERATIONS]
    assert 0 < 3 * flops[0] == flops[1] == flops[2]
    moved = [first.useful_bytes(operation) for operation in OPERATIONS]
    assert 0 < moved[0] < moved[1] < moved[2]


def test_useful_flops_of_a_chain_are_those_of_its_matrices():
    case = CASES["small"]
    per_sample = 2 * (3 * 64 + 64 * 64 + 64 * 64 + 64 * 2)
    assert Problem(case).useful_flops("forward") == 16 * 256 * per_sample
    # The condition's 66 columns are multiplied once, the other 33 in each of 4 steps.
    policy = 2 * 256 * (4 * (33 * 256 + 2 * 256**2 + 256 * 32) + 66 * 256)
    assert Problem(CASES["policy"]).useful_flops("forward") == policy


@pytest.mark.parametrize("name", ["small", "rk4", "policy", "gav", "residual", "unet", "dopri5"])
@pytest.mark.parametrize("peer", EAGER)
def test_an_adapter_is_right(name, peer):
    check_adapter(name, peer)


@pytest.mark.parametrize(
    ("name", "peer"),
    [(name, "jax") for name in ("rk4", "gav", "residual", "unet")] + [("policy", "diffrax")],
)
def test_a_jax_adapter_is_right(name, peer):
    if not all(importlib.util.find_spec(package) for package in ("jax", "diffrax")):
        pytest.skip("jax or diffrax is not installed")
    check_adapter(name, peer)


def check_adapter(name, peer):
    case = tiny(CASES[name])
    reference = Reference(case)
    call, found = run.prepare(case, "gradient", peer, reference, "cpu")
    if call is None:
        assert found["reason"].startswith(("not applicable", "not installed")), found["reason"]
        pytest.skip(found["reason"])
    assert found["gradient_error"] <= (0.5 if PEERS[peer].approximate else 2e-2)
    for operation in ("forward", "training"):
        if PEERS[peer].kind == "eager":
            call, found = run.prepare(case, operation, peer, reference, "cpu")
            assert call is not None, found["reason"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_wrong_peer_reports_no_time(monkeypatch, operation):
    def prepare(problem, operation):
        return torch_operation(problem, operation, lambda x0: -problem.field(problem.times[0], x0))

    monkeypatch.setitem(PEERS, "broken", Peer("broken", prepare))
    case = tiny(CASES["small"])
    rates = {"gemm": 1e9, "copy": 1e9}
    broken, good = run.time_peers(case, operation, ["broken", BASELINE], 0.01, rates)
    assert broken.ms is None and "wrong" in (broken.reason or "")
    assert good.ms is not None and good.reason is None


def test_peers_that_cannot_run_say_why(monkeypatch):
    def refuse(problem, operation):
        raise NotApplicable("for a reason")

    def fail(problem, operation):
        raise RuntimeError("it broke")

    def miss(problem, operation):
        return __import__("no_such_package")

    expected = {
        "refuses": (refuse, "not applicable: for a reason"),
        "fails": (fail, "failed: RuntimeError: it broke"),
        "is missing": (miss, "not installed: No module named 'no_such_package'"),
    }
    for name, (prepare, _) in expected.items():
        monkeypatch.setitem(PEERS, name, Peer(name, prepare))
    rows = run.time_peers(
        tiny(CASES["small"]), "forward", list(expected), 0.01, {"gemm": 1, "copy": 1}
    )
    assert [row.reason for row in rows] == [reason for _, reason in expected.values()]


def test_errors_out_of_bounds_are_named_but_not_those_of_an_adjoint_ode():
    exact, adjoint = PEERS[BASELINE], PEERS["torchdiffeq.odeint_adjoint"]
    case, adaptive = CASES["small"], CASES["dopri5"]
    assert Errors(value=1e-6, gradient=1e-5).fault(case, exact) is None
    assert "gradient error 1.0e-02" in (Errors(1e-6, 1e-2).fault(case, exact) or "")
    assert Errors(1e-6, 1e-2).fault(case, adjoint) is None
    assert "value" in (Errors(1e-2, 1e-2).fault(case, adjoint) or "")
    assert Errors(1e-5, 1e-3).fault(adaptive, exact) is None
    assert "nan" in (Errors(float("nan")).fault(case, exact) or "")


def test_evaluations_are_counted():
    case = tiny(CASES["rk4"])
    rows = run.time_peers(
        case,
        "gradient",
        [BASELINE, "torchdiffeq.odeint_adjoint"],
        0.01,
        {"gemm": 1.0, "copy": 1.0},
    )
    counted = [row.evaluations for row in rows]
    assert counted[0] == 8 and counted[1] is not None and counted[1] >= 16


def test_calls_take_turns():
    order = []
    times = measure.interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.02
    )
    turns = ["".join(group) for _, group in itertools.groupby(order)]
    assert 2 * measure.LEAST_ROUNDS <= len(turns) <= 2 * measure.ROUNDS
    assert [turn[0] for turn in turns] == ["a", "b"] * (len(turns) // 2)
    assert times["a"].ms_20 <= times["a"].ms <= times["a"].ms_80
    # The first of a turn is left out where it is not the only one.
    counted = sum(max(1, len(turn) - 1) for turn in turns)
    assert times["a"].runs + times["b"].runs == counted
