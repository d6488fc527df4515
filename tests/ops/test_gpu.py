"""On a GPU: the kernels are chosen, only queue work, obey streams and graphs, and differentiate."""

from __future__ import annotations

import pytest
import torch

from fmft_fast.ops import REFERENCE, choose_kernels

pytestmark = pytest.mark.gpu
W, W_ERR = (0.3, 0.2, -0.5), (0.1, 0.2, 0.3)
P = [[1.0, 0.5]] * 3


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    return choose_kernels(torch.zeros(1, device="cuda"), request.param)


def samples(size: int = 1023):
    """Return y, the step on the device and three stages."""
    y, *k = torch.randn(4, size, device="cuda").unbind()
    return y, torch.tensor(0.3, device="cuda"), k


def run_all(kernels, y, h, k):
    """Return the results of all ops."""
    theta = torch.linspace(0, 1, 5, device=y.device)
    return (
        kernels.rk_combine(y, k, h, W),
        *kernels.rk_finish(y, k, h, W, W_ERR, 1e-3, 1e-3),
        kernels.dense_eval(y, k, h, P, theta),
    )


def test_auto_prefers_the_compiled_kernels() -> None:
    assert choose_kernels(torch.zeros(1, device="cuda")).name == "cuda"


def test_no_op_waits_for_the_device(kernels) -> None:
    y, h, k = samples()
    run_all(kernels, y, h, k)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_all(kernels, y, h, k)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ops_run_on_the_current_stream_and_in_a_graph(kernels) -> None:
    y, h, k = samples()
    run_all(kernels, y, h, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_all(kernels, y, h, k)
    for tensor in (y, *k):
        tensor.normal_()
    h.fill_(-0.7)
    graph.replay()
    for found, expected in zip(captured, run_all(REFERENCE, y, h, k), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_the_reference(kernels) -> None:
    y, h, k = samples(1 << 15)
    leaves = [y.requires_grad_(), h.requires_grad_(), *(ki.requires_grad_() for ki in k)]
    found, expected = (
        torch.autograd.grad(ops.rk_combine(y, k, h, W).square().sum(), leaves)
        for ops in (kernels, REFERENCE)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_state_of_more_than_2_to_31_numbers(kernels) -> None:
    """Offsets are 64 bits wide; the last number is the one that would be missed."""
    size = 2**31 + 3
    if torch.cuda.mem_get_info()[0] < 5 * 4 * size:
        pytest.skip("needs 43 GB of free device memory")
    y = torch.zeros(size, device="cuda")
    k = [torch.ones_like(y), torch.ones_like(y)]
    assert kernels.rk_combine(y, k, 1.0, (1.0, 2.0))[-3:].tolist() == [3.0] * 3
    y1, ratio = kernels.rk_finish(y, k, 1.0, (1.0, 2.0), (1.0, 1.0), 0.0, 1.0)
    assert y1[-3:].tolist() == [3.0] * 3
    assert ratio.item() == pytest.approx(2.0)
