"""Every set of fused kernels computes what the reference says, at its precision, on odd sizes."""

from __future__ import annotations

import pytest
import torch
from kernel_sets import (
    INTERPRETED,
    NAMES,
    WEIGHTS,
    KernelSet,
    assert_as_good_as_torch,
    exact,
    kernel_set,
    stages,
)

from fmft_fast.ops import REFERENCE

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(), (1,), (15,), (63, 1), (341, 3), (64, 33)]


@pytest.fixture(params=NAMES)
def kernels(request):
    with kernel_set(request.param) as found:
        if request.param == "triton-interpreter":
            _leave_out_bfloat16(request)
        yield found


def _leave_out_bfloat16(request) -> None:
    if request.node.callspec.params.get("dtype") == torch.bfloat16:
        pytest.skip("Triton's interpreter gets bfloat16 wrong")


def steps(device: str, dtype: torch.dtype) -> list[float | torch.Tensor]:
    """The step as a number, and on the device in both of its types."""
    return [-0.3, torch.tensor(-0.3, device=device), torch.tensor(-0.3, device=device).double()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rk_combine(kernels: KernelSet, shape, dtype) -> None:
    for count, w in WEIGHTS.items():
        y, k = stages(shape, count, dtype, kernels.device)
        for h in steps(kernels.device, y.dtype):
            found = kernels.kernels.rk_combine(y, k, h, w)
            reference = REFERENCE.rk_combine(y, k, h, w)
            assert found.dtype == y.dtype and found.shape == y.shape
            assert_as_good_as_torch(
                found, reference, REFERENCE.rk_combine(y.double(), exact(k), float(h), w)
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rk_finish(kernels: KernelSet, shape, dtype) -> None:
    for count, b in WEIGHTS.items():
        b_err = tuple(0.1 * w for w in reversed(b))
        y, k = stages(shape, count, dtype, kernels.device)
        for h in steps(kernels.device, y.dtype):
            y1, ratio = kernels.kernels.rk_finish(y, k, h, b, b_err, 1e-3, 1e-2)
            reference = REFERENCE.rk_finish(y, k, h, b, b_err, 1e-3, 1e-2)
            truth = REFERENCE.rk_finish(y.double(), exact(k), float(h), b, b_err, 1e-3, 1e-2)
            assert ratio.shape == () and ratio.dtype == y.dtype
            assert_as_good_as_torch(y1, reference[0], truth[0])
            assert_as_good_as_torch(ratio, reference[1], truth[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (63, 1), (64, 3)], ids=str)
@pytest.mark.parametrize("degree", [1, 4, 8])
def test_dense_eval(kernels: KernelSet, shape, dtype, degree) -> None:
    y, k = stages(shape, 7, dtype, kernels.device)
    p = torch.randn(7, degree, dtype=torch.float64).tolist()
    for thetas in (1, 9):
        theta = torch.rand(thetas, device=kernels.device, dtype=y.dtype)
        for h in steps(kernels.device, y.dtype):
            found = kernels.kernels.dense_eval(y, k, h, p, theta)
            reference = REFERENCE.dense_eval(y, k, h, p, theta)
            truth = REFERENCE.dense_eval(y.double(), exact(k), float(h), p, theta.double())
            assert found.shape == (thetas, *shape) and found.dtype == y.dtype
            assert_as_good_as_torch(found, reference, truth)


def test_misaligned_storage(kernels: KernelSet) -> None:
    """Tensors that begin between two vector loads, each at another place."""
    store = torch.randn(4, 1031, device=kernels.device)
    y, *k = (store[i, i + 1 : i + 1024] for i in range(4))
    w = (0.5, -0.25, 2.0)
    truth = REFERENCE.rk_combine(y.double(), exact(k), 0.1, w)
    found = kernels.kernels.rk_combine(y, k, 0.1, w)
    assert_as_good_as_torch(found, REFERENCE.rk_combine(y, k, 0.1, w), truth)
    y1, _ = kernels.kernels.rk_finish(y, k, 0.1, w, w, 1e-3, 1e-3)
    assert_as_good_as_torch(y1, REFERENCE.rk_combine(y, k, 0.1, w), truth)


def test_layouts_are_mixed_freely_and_that_of_y_is_kept(kernels: KernelSet) -> None:
    y = torch.randn(2, 3, 4, 5, device=kernels.device).to(memory_format=torch.channels_last)
    k = [
        torch.randn_like(y),
        torch.randn(5, 4, 3, 2, device=kernels.device).permute(3, 2, 1, 0),
        y[:1].expand_as(y),
    ]
    w = (0.5, -0.25, 2.0)
    found = kernels.kernels.rk_combine(y, k, 0.1, w)
    assert found.stride() == y.stride()
    torch.testing.assert_close(found, REFERENCE.rk_combine(y, k, 0.1, w))
    dense = kernels.kernels.dense_eval(y, k, 0.1, [[1.0]] * 3, torch.ones(1, device=y.device))
    torch.testing.assert_close(dense[0], REFERENCE.rk_combine(y, k, 0.1, (1.0,) * 3))


def test_nan_reaches_the_result_and_the_error_ratio(kernels: KernelSet) -> None:
    w, w_err = (0.5, 0.25), (0.1, -0.1)
    for poisoned in range(3):
        tensors = [torch.randn(777, device=kernels.device) for _ in range(3)]
        tensors[poisoned][776] = torch.nan
        y, *k = tensors
        y1, ratio = kernels.kernels.rk_finish(y, k, 0.1, w, w_err, 1e-3, 1e-3)
        assert y1.isnan().nonzero().tolist() == [[776]]
        assert ratio.isnan()
        assert kernels.kernels.rk_combine(y, k, 0.1, w).isnan().sum() == 1


def test_a_stage_of_weight_zero_is_not_read(kernels: KernelSet) -> None:
    y, k = stages((17,), 3, torch.float32, kernels.device)
    k[1].fill_(torch.nan)
    assert kernels.kernels.rk_combine(y, k, 0.1, (1.0, 0.0, 1.0)).isfinite().all()


def test_all_weights_zero_leave_the_state(kernels: KernelSet) -> None:
    y, k = stages((17,), 2, torch.float32, kernels.device)
    assert torch.equal(kernels.kernels.rk_combine(y, k, 0.1, (0.0, 0.0)), y)


def test_the_result_is_the_same_bits_in_every_run(kernels: KernelSet) -> None:
    y, k = stages((3001,), 7, torch.float32, kernels.device)
    w = WEIGHTS[7]
    first, ratio = kernels.kernels.rk_finish(y, k, 0.1, w, w, 1e-3, 1e-3)
    for _ in range(3):
        again, ratio_again = kernels.kernels.rk_finish(y, k, 0.1, w, w, 1e-3, 1e-3)
        assert torch.equal(first, again) and torch.equal(ratio, ratio_again)


@pytest.mark.skipif(INTERPRETED, reason="tests the CPU kernels")
def test_every_half_number_is_widened_exactly() -> None:
    """All 65,536 bit patterns of float16, subnormals and infinities included, as on the CPU."""
    with kernel_set("cpu-portable") as found:
        k = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
        zero = torch.zeros(k.shape)
        wide = found.kernels.rk_combine(zero, [k], 1.0, (1.0,))
        torch.testing.assert_close(wide, k.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(INTERPRETED, reason="tests the CPU kernels")
def test_threads_change_no_bit() -> None:
    """A state large enough to be split gives the same error ratio with one thread and with four."""
    y, k = stages((700_001,), 3, torch.float32)
    before = torch.get_num_threads()
    found = []
    with kernel_set("cpu-portable") as portable:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(
                (
                    *portable.kernels.rk_finish(y, k, 0.1, WEIGHTS[3], WEIGHTS[3], 1e-3, 1e-3),
                    portable.kernels.rk_combine(y, k, 0.1, WEIGHTS[3]),
                )
            )
    torch.set_num_threads(before)
    assert all(torch.equal(one, four) for one, four in zip(*found, strict=True))
    assert not found[0][0].isnan().any()
