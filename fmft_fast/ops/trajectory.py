"""The contract of whole-trajectory kernels: a solve, and its exact gradient, in one call each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fmft_fast.ops.network import Inputs, Network, evaluate

Row = tuple[float, ...]
Keep = Literal["nothing", "inputs", "activations"]


@dataclass(frozen=True)
class Program:
    """The steps of a solve, apart from its tensors.

    Attributes:
        network: the field.
        a: [s] rows, row i with i entries, and b: [s] weights of an explicit Runge-Kutta method.
        times: [N, s] float64 on the host, the time of every stage.
        h: [N] float64 on the host, signed steps.
        outputs: [K] numbers of the states (0 is y0, N the final state) that are wanted, ascending.
        weights: None, or [K, s] float64 on the host, and then output k is
            y_n + h_n sum_i weights[k, i] k_i inside step n = outputs[k] (dense output).
    """

    network: Network
    a: tuple[Row, ...]
    b: Row
    times: Tensor
    h: Tensor
    outputs: tuple[int, ...]
    weights: Tensor | None = None

    @cached_property
    def steps(self) -> int:
        """Number of steps N."""
        return self.times.shape[0]

    @cached_property
    def last_step(self) -> float | None:
        """Size of the last step; None without steps."""
        return abs(self.h[-1].item()) if self.steps else None

    @cached_property
    def digest(self) -> bytes:
        """The same for programs of the same content, and only for those."""
        tensors = (self.times, self.h, *(() if self.weights is None else (self.weights,)))
        plain = (self.network, self.a, self.b, self.outputs, [list(x.shape) for x in tensors])
        found = hashlib.sha256(repr(plain).encode())
        for x in tensors:
            found.update(x.contiguous().numpy().tobytes())
        return found.digest()

    def flat_times(self, dtype: torch.dtype) -> Tensor:
        """The times of all stages [N s]: the same tensor whenever it is asked for.

        It lies on the host, unless `with_times_on` has made the program.
        """
        made = self.__dict__.setdefault("_flat_times", {})
        if dtype not in made:
            made[dtype] = self.times.reshape(-1).to(dtype)
        return made[dtype]

    def with_times_on(self, device: torch.device, dtype: torch.dtype) -> Program:
        """A copy whose flat times lie on a device: who records its solve need not bring them."""
        own = replace(self)
        own.__dict__["_flat_times"] = {dtype: self.flat_times(dtype).to(device)}
        return own

    @property
    def stages(self) -> int:
        """Number of stages s of a step."""
        return len(self.b)


@dataclass(frozen=True)
class Control:
    """Step control of an adaptive solve; the meaning and defaults are those of `odeint`.

    With `meet` a step ends at every time of the output; without it the output is interpolated.
    """

    rtol: float
    atol: float
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    min_step: float = 0.0
    max_step: float = float("inf")
    max_num_steps: int = 2**31 - 1
    first_step: float | None = None
    meet: bool = False


class TrajectoryKernels(Protocol):
    """Whole-trajectory kernels of one backend.

    They know nothing of autograd; the state and all tensors have one dtype and device.
    """

    name: str

    def refuses(self, network: Network, stages: int, batch: int, dtype: torch.dtype) -> str | None:
        """Why a solve cannot or should not run here, as the end of a sentence; None if it can."""
        ...

    def forward(self, program: Program, inputs: Inputs, keep: Keep) -> tuple[Tensor, Any]:
        """Outputs [K, batch, state] and what `backward` wants kept.

        keep: "nothing" without a backward pass; "inputs": of every stage the input only, so that
        memory is O(steps x state) and the backward pass computes the activations again;
        "activations": all of them, for a faster backward pass where they are not too many.
        """
        ...

    def backward(
        self, program: Program, inputs: Inputs, kept: Any, grad: Tensor, wanted: Inputs
    ) -> Inputs:
        """Gradients of the inputs from that of the outputs [K, batch, state].

        wanted: booleans in the place of tensors. A parameter's gradient has its full shape, with
        zeros in columns that the network does not read. The result is deterministic.
        """
        ...


class RecordableKernels(TrajectoryKernels, Protocol):
    """Kernels that are many launches each, whose sequence depends on nothing but the arguments.

    Whoever records them as CUDA graphs reads what `backward` wants kept as a tensor, None, or an
    object whose `tensors()` are all its tensors.
    """

    def working_bytes(self, program: Program, y0: Tensor, keep: Keep) -> int:
        """How many bytes a solve of y0 [batch, state] and its backward pass need, about.

        Besides the tensors that go in and the gradients that come out.
        """
        ...


class AdaptiveSolve(NamedTuple):
    """An adaptive solve.

    Attributes:
        outcome: "done", or why it ended early: "too many steps", "underflow", "not finite".
        out: [T, batch, state].
        program: the accepted steps, with the weights of the dense output at every time.
        kept: what `backward` wants; None if nothing is kept or the solve ended early.
        rejected: number of rejected steps.
        evaluations: number of evaluations of the field.
    """

    outcome: str
    out: Tensor
    program: Program
    kept: Any
    rejected: int
    evaluations: int


class PerSampleSolve(NamedTuple):
    """An adaptive solve in which every row of the batch has its own steps.

    Attributes:
        failed: the first row that did not reach the end, or None.
        y: [batch, state] final states; of a row that ended early, the last state.
        accepted: [batch] numbers of accepted steps.
        rejected: [batch] numbers of rejected steps.
        evaluations: [batch] numbers of evaluations of the field.
        kept: what the backward pass wants, and the steps.
    """

    failed: int | None
    y: Tensor
    accepted: Tensor
    rejected: Tensor
    evaluations: Tensor
    kept: Any


class AdaptiveKernels(TrajectoryKernels, Protocol):
    """Kernels that control the steps themselves."""

    def adaptive(
        self,
        network: Network,
        tableau: Any,
        control: Control,
        inputs: Inputs,
        t: list[float],
        keep: Keep,
    ) -> AdaptiveSolve:
        """Solve with the step control of `odeint`, which accepts the same steps up to rounding.

        Args:
            network: the field, without tables.
            tableau: a `fmft_fast.solvers.Tableau` whose last stage is the first of the next step.
            control: tolerances and bounds of the step control.
            inputs: the tensors.
            t: [T] two or more times, in one direction.
            keep: see `forward`.
        """
        ...


class Reference:
    """The contract in plain torch; what the kernels are tested against in float64."""

    name = "reference"

    def refuses(self, network: Network, stages: int, batch: int, dtype: torch.dtype) -> str | None:
        """See `TrajectoryKernels`."""
        return None

    def forward(self, program: Program, inputs: Inputs, keep: Keep) -> tuple[Tensor, Any]:
        """See `TrajectoryKernels`."""
        return run(program, inputs), None

    def backward(
        self, program: Program, inputs: Inputs, kept: Any, grad: Tensor, wanted: Inputs
    ) -> Inputs:
        """See `TrajectoryKernels`."""
        flat, wants = flatten(inputs), flatten(wanted)
        leaves = [x.detach().requires_grad_(w) for x, w in zip(flat, wants, strict=True)]
        with torch.enable_grad():
            out = run(program, rebuild(inputs, leaves))
        asked = [x for x in leaves if x.requires_grad]
        found = iter(torch.autograd.grad(out, asked, grad, allow_unused=True) if asked else ())
        grads = [
            None if not w else torch.zeros_like(x) if (g := next(found)) is None else g
            for x, w in zip(flat, wants, strict=True)
        ]
        return rebuild(inputs, grads)


def run(program: Program, inputs: Inputs) -> Tensor:
    """The outputs [K, batch, state] in plain torch, with a graph."""
    y: Any = inputs.y0
    times, steps = program.times.tolist(), program.h.tolist()
    found = {k: y for k, n in enumerate(program.outputs) if program.weights is None and n == 0}
    for n, h in enumerate(steps):
        k: list[Tensor] = []
        for i, row in enumerate(program.a):
            x = combine(y, k, h, row)
            k.append(evaluate(program.network, inputs, times[n][i], n * program.stages + i, x))
        if program.weights is not None:
            for j, (m, row) in enumerate(
                zip(program.outputs, program.weights.tolist(), strict=True)
            ):
                if m == n:
                    found[j] = combine(y, k, h, row)
        y = combine(y, k, h, program.b)
        if program.weights is None:
            found |= {j: y for j, m in enumerate(program.outputs) if m == n + 1}
    return torch.stack([found[j] for j in range(len(program.outputs))])


def combine(y: Any, k: list[Tensor], h: float | Tensor, weights: Sequence[float]) -> Any:
    """Add h sum_i weights[i] k[i] to y."""
    for w, slope in zip(weights, k, strict=True):
        if w:
            y = y + h * w * slope
    return y


def flatten(inputs: Inputs) -> list[Any]:
    """All tensors in one list: the state, parameters, tables, conditions."""
    return [inputs.y0, *inputs.parameters, *inputs.tables, *inputs.conds]


def rebuild(like: Inputs, flat: list[Any]) -> Inputs:
    """The opposite of `flatten`, with the counts of `like`."""
    p = 1 + len(like.parameters)
    q = p + len(like.tables)
    return Inputs(flat[0], list(flat[1:p]), list(flat[p:q]), list(flat[q:]))
