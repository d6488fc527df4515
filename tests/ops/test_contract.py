"""The ops that solvers call: gradients, ways around a fused kernel, the choice of a backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_sets import instruction_set
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from fmft_fast.errors import InputError, MissingBackendError
from fmft_fast.ops import REFERENCE, backend_report, choose_kernels, contract

W, W_ERR = (0.3, 0.0, -0.5), (0.1, 0.2, 0.3)
P = ((1.0, 0.2, 0.3), (0.0, 0.1, -0.4), (0.3, 0.2, 0.1))


def inputs(dtype=torch.float64, shape=(3, 2), requires_grad=True):
    """Return y, h, theta and three stages."""
    real = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    y, *k = (torch.randn(shape, dtype=dtype) for _ in range(4))
    tensors = (y, torch.tensor(0.3, dtype=real), torch.rand(4, dtype=real), *k)
    return tuple(t.requires_grad_(requires_grad) for t in tensors)


def calls(kernels):
    """Each op as a function of tensors alone."""
    return {
        "rk_combine": lambda y, h, theta, *k: kernels.rk_combine(y, k, h, W),
        "rk_finish": lambda y, h, theta, *k: kernels.rk_finish(y, k, h, W, W_ERR, 1e-3, 1e-3)[0],
        "dense_eval": lambda y, h, theta, *k: kernels.dense_eval(y, k, h, P, theta),
    }


@pytest.fixture
def always_fused(monkeypatch):
    """The ops of the CPU module with the fused path for every size, counting its calls."""
    cpu = pytest.importorskip("fmft_fast.ops.cpu", exc_type=ImportError)
    monkeypatch.setattr(contract, "SMALL", 0)
    counts = dict.fromkeys(("rk_combine", "rk_finish", "dense_eval"), 0)

    def counted(name):
        def kernel(*args):
            counts[name] += 1
            return getattr(cpu.KERNELS, name)(*args)

        return kernel

    kernels = contract.fuse("counted", contract.StepKernels("counted", *map(counted, counts)))
    return kernels, counts


OPS = ["rk_combine", "rk_finish", "dense_eval"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(3, 2), ()], ids=str)
def test_gradients_of_the_reference(op, dtype, shape) -> None:
    call, tensors = calls(REFERENCE)[op], inputs(dtype, shape)
    assert gradcheck(call, tensors) and gradgradcheck(call, tensors)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_fused_kernels(op, always_fused) -> None:
    kernels, counts = always_fused
    call, tensors = calls(kernels)[op], inputs()
    assert gradcheck(call, tensors) and gradgradcheck(call, tensors)
    assert counts[op] > 0 or op == "dense_eval"


@pytest.mark.parametrize("op", ["rk_combine", "rk_finish"])
def test_every_subset_of_inputs_that_require_grad(op, always_fused) -> None:
    kernels, _ = always_fused
    for chosen in itertools.product([False, True], repeat=5):
        if chosen in ((False,) * 5, (False, False, False, True, False)):
            continue  # nothing, or only the stage of weight zero
        tensors = inputs(requires_grad=False)
        y, h, theta, *k = tensors
        for tensor, wanted in zip((y, h, *k), chosen, strict=True):
            tensor.requires_grad_(wanted)
        leaves = [t for t in (y, h, *k) if t.requires_grad]
        found, expected = (
            torch.autograd.grad(calls(ops)[op](*tensors).sum(), leaves, allow_unused=True)
            for ops in (kernels, REFERENCE)
        )
        for a, b in zip(found, expected, strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-13, atol=1e-13)


def test_low_precision_stages_get_gradients_of_their_own_dtype(always_fused) -> None:
    kernels, counts = always_fused
    y = torch.randn(5, requires_grad=True)
    k = [torch.randn(5).to(torch.bfloat16).requires_grad_() for _ in range(3)]
    found = kernels.rk_combine(y, k, 0.1, W)
    found.sum().backward()
    assert counts["rk_combine"] == 1
    assert found.dtype == torch.float32
    assert k[0].grad is not None and k[0].grad.dtype == torch.bfloat16


def test_the_error_ratio_is_detached(always_fused) -> None:
    y, h, _, *k = inputs()
    for kernels in (always_fused[0], REFERENCE):
        y1, ratio = kernels.rk_finish(y, k, h, W, W_ERR, 1e-3, 1e-3)
        assert y1.requires_grad and not ratio.requires_grad


@pytest.mark.parametrize("op", OPS)
def test_transforms_pass_by_the_kernels(op, always_fused) -> None:
    """vmap, forward-mode AD, fake tensors and tracing see torch ops only."""
    kernels, counts = always_fused
    call, tensors = calls(kernels)[op], inputs(requires_grad=False)
    batch = tuple(torch.stack([t, 2 * t]) for t in tensors)
    mapped = torch.vmap(call)(*batch)
    torch.testing.assert_close(mapped[1], call(*(2 * t for t in tensors)))
    counts[op] = 0
    tangents = tuple(torch.ones_like(t) for t in tensors)
    _, tangent = torch.func.jvp(call, tensors, tangents)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
        dual = forward_ad.unpack_dual(call(*duals)).tangent
    torch.testing.assert_close(dual, tangent)
    torch.func.grad(lambda *ts: call(*ts).sum())(*tensors)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(*(mode.from_tensor(t) for t in tensors))
    assert fake.shape == call(*tensors).shape
    counts[op] = 0
    torch.jit.trace(call, tensors, check_trace=False)
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), calls(REFERENCE)[op](*tensors))
    assert counts[op] == 0


def test_arguments_that_a_kernel_cannot_take_go_to_the_reference(always_fused) -> None:
    kernels, counts = always_fused
    y = torch.randn(4, 3)
    broadcast = kernels.rk_combine(y, [torch.randn(3), torch.randn(4, 1)], 0.1, (1.0, 1.0))
    assert broadcast.shape == (4, 3)
    mixed = kernels.rk_combine(y, [torch.randn(4, 3), torch.randn(4, 3).half()], 0.1, (1.0, 1.0))
    assert mixed.dtype == torch.float32
    empty = torch.randn(0, 3)
    y1, ratio = kernels.rk_finish(empty, [empty] * 3, 0.1, W, W_ERR, 1e-3, 1e-3)
    assert y1.shape == (0, 3) and ratio.item() == 0
    with pytest.raises(ValueError):
        kernels.rk_combine(y, [y, y], 0.1, (1.0,))
    with pytest.raises(RuntimeError):
        kernels.rk_combine(y, [torch.randn(4, 2)] * 2, 0.1, (1.0, 1.0))
    assert not any(counts.values())


def test_the_state_keeps_its_dtype_whatever_that_of_the_step(always_fused) -> None:
    h = torch.tensor(0.1, dtype=torch.float64)
    for kernels in (always_fused[0], REFERENCE):
        for y in (torch.randn(()), torch.randn(3), torch.randn(3, dtype=torch.complex64)):
            for step in (h, h.clone().requires_grad_()):
                assert kernels.rk_combine(y, [y, y], step, (1.0, 1.0)).dtype == y.dtype
                assert kernels.dense_eval(y, [y], step, [[1.0]], h[None]).dtype == y.dtype


def test_the_choice_of_a_backend() -> None:
    y = torch.randn(3)
    available = {status.name: status.available for status in backend_report()}
    assert choose_kernels(y).name == ("cpu" if available["cpu"] else "reference")
    assert choose_kernels(y, "reference") is REFERENCE
    for state in (y.to(torch.complex64), y.half(), y.to("meta"), torch.zeros(3, dtype=torch.int64)):
        assert choose_kernels(state) is REFERENCE
    assert torch.vmap(lambda x: (x, choose_kernels(x) is REFERENCE)[0])(y).shape == y.shape


def test_a_missing_backend_asked_for_by_name_says_why_and_the_cure() -> None:
    y = torch.randn(3)
    with pytest.raises(InputError, match="'auto', 'reference', 'cpu', 'cuda', 'triton'"):
        choose_kernels(y, "tpu")
    for status in backend_report():
        if status.available:
            continue
        assert status.reason and status.cure
        with pytest.raises(MissingBackendError) as raised:
            choose_kernels(y, status.name)
        assert status.reason in str(raised.value) and status.cure in str(raised.value)


def test_a_backend_that_cannot_take_the_state_says_so() -> None:
    with instruction_set("portable"), pytest.raises(MissingBackendError, match="complex64"):
        choose_kernels(torch.zeros(3, dtype=torch.complex64), "cpu")
    with pytest.raises(MissingBackendError, match="got meta"):
        choose_kernels(torch.zeros(3, device="meta"), "cpu")
