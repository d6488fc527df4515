"""torch.ops.fmft_fast: schema, fake and gradient, and one node in a compiled graph."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fmft_fast.ops import REFERENCE, choose_kernels

OPS = torch.ops.fmft_fast
W, W_ERR = [0.3, 0.0, -0.5], [0.1, 0.2, 0.3]
P = [1.0, 0.2, 0.3, 0.0, 0.1, -0.4, 0.3, 0.2, 0.1]
ROWS = [P[0:3], P[3:6], P[6:9]]


def samples(dtype):
    """Arguments for every op."""
    real = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    y, *k = (torch.randn(3, 2, dtype=dtype, requires_grad=True) for _ in range(4))
    h = torch.tensor(0.3, dtype=real, requires_grad=True)
    theta = torch.rand(4, dtype=real, requires_grad=True)
    return {
        "rk_combine": (y, k, h, W),
        "rk_finish": (y, k, h, W, W_ERR, 1e-3, 1e-3),
        "dense_eval": (y, k, h, P, 3, theta),
    }


def as_functions():
    """Every op as a function of tensors alone."""
    return {
        "rk_combine": lambda y, h, theta, *k: OPS.rk_combine(y, k, h, W),
        "rk_finish": lambda y, h, theta, *k: OPS.rk_finish(y, k, h, W, W_ERR, 1e-3, 1e-3)[0],
        "dense_eval": lambda y, h, theta, *k: OPS.dense_eval(y, k, h, P, 3, theta),
    }


@pytest.mark.parametrize("op", ["rk_combine", "rk_finish", "dense_eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
def test_opcheck(op, dtype) -> None:
    torch.library.opcheck(getattr(OPS, op), samples(dtype)[op])


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["rk_combine", "rk_finish", "dense_eval"])
def test_opcheck_on_a_gpu(op) -> None:
    arguments = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.detach().cuda().requires_grad_(), samples(torch.float32)[op]
    )
    torch.library.opcheck(getattr(OPS, op), arguments)


@pytest.mark.parametrize("op", ["rk_combine", "rk_finish", "dense_eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_gradients(op, dtype) -> None:
    y, k, h, *_ = samples(dtype)["rk_combine"]
    theta = torch.rand(4, dtype=torch.float64, requires_grad=True)
    call = as_functions()[op]
    assert gradcheck(call, (y, h, theta, *k)) and gradgradcheck(call, (y, h, theta, *k))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_without_a_graph_break(backend) -> None:
    """The registered ops and those of choose_kernels compile as a whole, with their gradients."""

    def registered(y, k, h, theta):
        y = OPS.rk_combine(y, k, h, W)
        y, ratio = OPS.rk_finish(y, k, h, W, W_ERR, 1e-3, 1e-3)
        return OPS.dense_eval(y, k, h, P, 3, theta), ratio

    def chosen(y, k, h, theta):
        ops = choose_kernels(y)
        y = ops.rk_combine(y, k, h, W)
        y, ratio = ops.rk_finish(y, k, h, W, W_ERR, 1e-3, 1e-3)
        return ops.dense_eval(y, k, h, ROWS, theta), ratio

    y, k, h, _, _, theta = samples(torch.float64)["dense_eval"]
    leaves = [y, h, theta, *k]
    middle = REFERENCE.rk_combine(y, k, h, W)
    end, expected_ratio = REFERENCE.rk_finish(middle, k, h, W, W_ERR, 1e-3, 1e-3)
    expected = torch.autograd.grad(
        REFERENCE.dense_eval(end, k, h, ROWS, theta).square().sum(), leaves
    )
    for function in (registered, chosen):
        found, ratio = torch.compile(function, fullgraph=True, backend=backend)(y, k, h, theta)
        torch.testing.assert_close(ratio, expected_ratio)
        grads = torch.autograd.grad(found.square().sum(), leaves)
        torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-12)


def test_a_registered_op_is_one_node_of_the_graph() -> None:
    seen = []

    def keep(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    y, k, h, _ = samples(torch.float32)["rk_combine"]
    torch.compile(lambda: OPS.rk_combine(y, k, h, W), fullgraph=True, backend=keep)()
    assert OPS.rk_combine in seen or OPS.rk_combine.default in seen
    assert torch.ops.aten.add.Tensor not in seen
