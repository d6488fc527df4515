"""The source of the CUDA trajectory kernels on the host: numbers, gradients, plans, registers."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_sets import ROOT, with_binding
from networks import RESIDUALS, chain, make_inputs, make_program, residual, viscosity

from fmft_fast.errors import InputError
from fmft_fast.ops.cuda_plan import _place
from fmft_fast.ops.network import ACTIVATIONS, Inputs, Layer, Network, Term
from fmft_fast.ops.trajectory import Program, Reference, flatten, rebuild

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
REFERENCE = Reference()
# Relative error that products of so many bf16 terms may have, over a few steps of small fields.
ALLOWED = {"highest": 1e-6, "high": 1e-4, "medium": 2e-2}


@functools.cache
def on_host():
    return with_binding("trajectory_cuda")


@pytest.fixture
def kernels():
    return on_host().KERNELS


@pytest.fixture(params=ALLOWED)
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return rebuild(inputs, [x.to(dtype) for x in flatten(inputs)])


def all_of(inputs: Inputs) -> Inputs:
    return rebuild(inputs, [True] * len(flatten(inputs)))


def solve(kernels, program: Program, inputs: Inputs, wanted: Inputs | None = None):
    """Return the outputs and the gradients of a fixed random sum of them, in one list."""
    out, kept = kernels.forward(program, inputs, "inputs")
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = wanted or all_of(inputs)
    grads = kernels.backward(program, inputs, kept, grad.to(out.dtype), wanted)
    return [out, *flatten(grads)]


def relative(found, truth) -> float:
    return ((found.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def check(kernels, program: Program, inputs: Inputs, precision: str, found=None) -> None:
    """Assert errors against float64 that the precision allows: for "highest" those of float32."""
    inputs = cast(inputs, torch.float32)
    truth = solve(REFERENCE, program, cast(inputs, torch.float64))
    single = solve(REFERENCE, program, inputs)
    found = found or solve(kernels, program, inputs)
    for i, (mine, torchs, exact) in enumerate(zip(found, single, truth, strict=True)):
        assert mine.shape == exact.shape
        allowed = 2 * relative(torchs, exact) + ALLOWED[precision]
        assert relative(mine, exact) <= allowed, f"tensor {i}: {relative(mine, exact):.2e}"


def make(network, shapes, method="euler", batch=15, steps=2, outputs=None):
    program = make_program(network, method, steps, outputs, uneven=True)
    return program, make_inputs(network, shapes, batch, program.times.numel())


FIELDS = {
    "one row, state 1, five layers": lambda: make(*chain(1, (33,) * 5, "tanh"), batch=1),
    "state 2": lambda: make(*chain(2, (32, 32)), batch=17),
    "state 3, four stages": lambda: make(*chain(3, (16,), "silu"), "rk4", batch=15),
    "state 7, tables, cond": lambda: make(
        *chain(7, (20, 40, 33), "gelu", time="tables", cond=True), "midpoint", 33, outputs=(0, 1, 2)
    ),
    "more rows than blocks hold": lambda: make(
        *chain(2, (16,), "silu", time="tables", cond=True), batch=75, steps=3, outputs=(0, 2)
    ),
    "no time, two tiles of rows": lambda: make(*chain(5, (16, 18), time=None), "heun2", 63),
    "skips": lambda: make(*chain(16, (16, 16, 16), "tanh", skips=True), batch=33),
    "linear": lambda: make(*chain(2, ()), batch=3),
    "seven stages": lambda: make(*chain(3, (16,), "silu"), "dopri5", 3, steps=1),
    "hidden 64": lambda: make(*chain(2, (64, 50)), batch=17, steps=1),
    "hidden 64, tables, cond, skips": lambda: make(
        *chain(3, (64, 64, 64), "silu", time="tables", cond=True, skips=True), batch=33, steps=1
    ),
    "viscosity, state 32": lambda: make(*viscosity(32, 18), "midpoint", 1),
    "viscosity on an MLP": lambda: make(*viscosity(2, 18, 3, base=True), batch=63, steps=1),
}


@pytest.mark.parametrize("name", FIELDS)
def test_values_and_gradients(kernels, precision, name) -> None:
    program, inputs = FIELDS[name]()
    assert kernels.refuses(program.network, program.stages, 15, torch.float32) is None
    check(kernels, program, inputs, precision)


@pytest.mark.parametrize("precision", ["highest", "high"], indirect=True)
@pytest.mark.parametrize("name", RESIDUALS)
def test_v_and_gav_as_one_field(kernels, precision, name) -> None:
    program, inputs = residual(name, 17)
    assert kernels.refuses(program.network, program.stages, 17, torch.float32) is None
    check(kernels, program, inputs, precision)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(kernels, precision, activation) -> None:
    slope = {"leaky_relu": 0.2, "elu": 0.7, "softplus": 8.0}.get(activation, 1.0)
    program, inputs = make(*chain(2, (16,), activation, slope), batch=16, steps=1)
    assert inputs.y0 is not None
    inputs.y0 *= 2
    check(kernels, program, inputs, precision)


@pytest.mark.parametrize("activation", ["softsign", "asinh", "clipped_cube"])
def test_activations_of_large_numbers(kernels, activation) -> None:
    program, inputs = make(*chain(2, (16,), activation), batch=16, steps=1)
    assert inputs.y0 is not None
    inputs.y0 *= torch.logspace(-4, 9, 16, dtype=torch.float64)[:, None]
    check(kernels, program, inputs, "highest")


def test_dense_output(kernels) -> None:
    program, inputs = make(*chain(2, (16,)), "rk4", 5)
    weights = torch.randn(3, 4, dtype=torch.float64)
    program = replace(program, outputs=(0, 1, 1), weights=weights)
    check(kernels, program, inputs, "highest")


def test_a_last_layer_that_adds_a_value(kernels) -> None:
    network, shapes = chain(16, (16,))
    first, last = network.layers
    network = replace(network, layers=(first, replace(last, skips=(0, 1))))
    check(kernels, *make(network, shapes), "highest")


def test_a_last_layer_with_a_condition_and_an_activation(kernels, precision) -> None:
    network, shapes = chain(5, (18,), "silu", cond=True)
    first, last = network.layers
    last = replace(last, cond=1, activation="tanh", skips=(0,))
    network = replace(network, layers=(first, last))
    check(kernels, *make(network, shapes, "midpoint", 33, outputs=(0, 2)), precision)


def test_columns_that_no_layer_reads_and_gradients_that_nobody_wants(kernels) -> None:
    program, inputs = make(*chain(3, (20,), cond=True), "midpoint")
    inputs = cast(inputs, torch.float32)
    wide = [torch.cat([x, x], 1) if x.dim() == 2 else x for x in inputs.parameters]
    inputs = replace(inputs, parameters=wide)
    everything = solve(kernels, program, inputs)
    check(kernels, program, inputs, "highest", everything)
    wanted = Inputs(False, [i == 2 for i in range(4)], [], [False])
    some = solve(kernels, program, inputs, wanted)
    assert [x is not None for x in some[1:]] == [bool(x) for x in flatten(wanted)]
    torch.testing.assert_close(some[4], everything[4], rtol=0, atol=0)
    only_state = solve(kernels, program, inputs, Inputs(True, [False] * 4, [], [False]))
    torch.testing.assert_close(only_state[1], everything[1], rtol=0, atol=0)


def test_runs_are_equal_to_the_bit_in_any_order_of_the_threads(kernels, monkeypatch) -> None:
    for name in ("more rows than blocks hold", "skips", "viscosity on an MLP"):
        program, inputs = FIELDS[name]()
        inputs = cast(inputs, torch.float32)
        forwards = solve(kernels, program, inputs)
        monkeypatch.setenv("FMFT_HOST_ORDER", "reverse")
        backwards = solve(kernels, program, inputs)
        monkeypatch.delenv("FMFT_HOST_ORDER")
        torch.testing.assert_close(backwards, forwards, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["state 7, tables, cond", "viscosity on an MLP", "linear"])
def test_gradients_of_weights_after_the_kernel(kernels, name, monkeypatch) -> None:
    program, inputs = FIELDS[name]()
    module = on_host()
    args = (program.network, 3, 1, program.stages, True)
    bytes_whole, bytes_deferred = (module.plan(*args, deferred).bytes for deferred in (False, True))
    assert bytes_deferred < bytes_whole
    monkeypatch.setattr(module, "_limits", lambda device: (bytes_whole - 1, 2))
    chosen = module._chosen(program.network, program.stages, inputs.y0.float(), 3, "backward", 0)
    assert chosen[0].deferred
    check(kernels, program, inputs, "highest")


def test_gradients_of_weights_by_parts_of_the_batch(kernels, monkeypatch) -> None:
    program, inputs = FIELDS["state 7, tables, cond"]()
    module = on_host()
    whole = module.plan(program.network, 3, 1, program.stages, True, False).bytes
    monkeypatch.setattr(module, "_limits", lambda device: (whole - 1, 2))
    monkeypatch.setattr(module, "ROOM", 0)
    monkeypatch.setattr(module, "MIN_ROWS", 16)
    assert module._rows_at_once(program) < len(inputs.y0)
    check(kernels, program, inputs, "highest")
    single = cast(inputs, torch.float32)
    some = solve(
        kernels, program, single, rebuild(single, [i == 1 for i in range(len(flatten(single)))])
    )
    assert [x is not None for x in some[1:]].count(True) == 1


def test_the_precision_is_found_however_it_was_chosen(kernels) -> None:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip(f"torch {torch.__version__} has no fp32_precision")
    network, _ = chain(2, (16,))
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert on_host()._split() == 2
        assert kernels.refuses(network, 1, 5, torch.float32) is None
    finally:
        matmul.fp32_precision = before


def test_a_plan_never_lays_two_values_that_are_in_use_over_each_other() -> None:
    lives = {0: (48, 0, 2), 1: (16, 3, 4), 2: (32, 1, 3), 3: (16, 4, 4), 4: (64, 3, 3)}
    places, total = _place(lives, 16)
    for i, (size, first, end) in lives.items():
        assert 16 <= places[i] <= total - size
        for j, (other, begin, stop) in lives.items():
            together = i != j and first <= stop and begin <= end
            assert not together or places[i] >= places[j] + other or places[j] >= places[i] + size
    assert total <= 16 + 48 + 64 + 32


@pytest.mark.parametrize(
    ("width", "hidden", "split", "limit", "row_tiles", "deferred"),
    [
        (64, 3, 3, 227, 2, False),  # an H200
        (64, 3, 3, 163, 1, False),  # an A100
        (64, 3, 1, 99, 1, False),  # an RTX 4090
        (128, 2, 3, 227, 1, True),
        (128, 3, 1, 227, 2, True),
        (128, 3, 3, 227, None, None),
    ],
)
def test_which_plan_fits_which_device(width, hidden, split, limit, row_tiles, deferred) -> None:
    module, (network, _) = on_host(), chain(2, (width,) * hidden)
    plans = [module.plan(network, split, r, 1, True, d) for d in (False, True) for r in (2, 1)]
    fitting = [plan for plan in plans if plan.bytes <= 1024 * limit]
    if row_tiles is None:
        assert not fitting
    else:
        assert (fitting[0].rows, fitting[0].deferred) == (16 * row_tiles, deferred)


def test_refusals_say_what_is_not_supported(kernels) -> None:
    network, shapes = chain(2, (16,))
    first, last = network.layers

    def refusal(*layers, stages=1, batch=5, dtype=torch.float32):
        return kernels.refuses(Network(2, layers), stages, batch, dtype)

    assert refusal(first, last) is None
    assert refusal(first, last, dtype=torch.float64) == (
        "the kernels take float32, got torch.float64"
    )
    assert refusal(first, last, batch=0) == "the batch is empty"
    assert refusal(first, last, stages=8) == "the kernels take at most 7 stages, got 8"
    assert refusal(first, replace(last, bias=1)) == "two layers share a parameter"
    assert "share a table" in refusal(replace(first, table=0), replace(last, table=0))
    many = [Layer(2, (Term(i, i),)) for i in range(13)]
    assert refusal(*many) == "the kernels take at most 12 layers, got 13"
    wide, _ = chain(2, (512, 512))
    assert "bytes of shared memory" in kernels.refuses(wide, 1, 5, torch.float32)
    program, inputs = make(network, shapes)
    with pytest.raises(InputError, match="refuse"):
        kernels.forward(program, inputs, "nothing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_failure_is_clear() -> None:
    module = pytest.importorskip("fmft_fast._cuda", exc_type=ImportError)
    with pytest.raises(RuntimeError, match="CUDA device's limits failed"):
        module.trajectory_shared_memory(0)
    with pytest.raises(ValueError, match="expected a plan of"):
        module.Field([1, 2], [], [], [], [], [])


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc of the CUDA toolkit")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_do_not_spill(capability, tmp_path: Path) -> None:
    """At 168 registers three blocks of 128 threads, or one of 256, share a multiprocessor.

    Steps with control have float64 to keep as well, and need one block.
    """

    def report(name: str) -> str:
        file = ROOT / f"csrc/cuda/{name}.cu"
        command = [str(NVCC), "-std=c++20", "-O3", f"-arch=sm_{capability}", "-Xptxas", "-v"]
        command += ["-cubin", str(file), "-o", str(tmp_path / f"{name}.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    for kind, kernels, most in (("trajectory", 27, 168), ("adaptive", 9, 200)):
        with ThreadPoolExecutor(3) as pool:
            text = "".join(pool.map(report, [f"{kind}_terms{terms}" for terms in (1, 2, 3)]))
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", text)
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
        assert len(frames) >= len(registers) == kernels, text[-2000:]
        assert set(frames) == {("0", "0", "0")}
        assert max(registers) <= most
