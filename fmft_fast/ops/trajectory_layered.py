"""Whole trajectories by matrix products, layer by layer, on any device: for wide fields.

What a layer adds besides its products is laid out once per solve, one row per stage, so that the
product takes it along; the activation is one pass over the result. The backward pass leaves the
deltas of all stages side by side, so that each weight gets its gradient from one product over all
of them (in chunks of steps, should they not fit into `BUDGET` bytes).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmft_fast.ops.backend import choose_kernels
from fmft_fast.ops.capture import place
from fmft_fast.ops.contract import FUSED_DTYPES
from fmft_fast.ops.network import Inputs, Layer, Network, Term
from fmft_fast.ops.trajectory import Keep, Program, flatten, rebuild

# For the deltas, and where they are computed again the values, of the steps in a chunk.
BUDGET = 1 << 27

aten = torch.ops.aten
SELU = (1.6732632423543772, 1.0507009873554805, 1.0)
FORWARD = {
    "identity": lambda z, slope, out: out if out is z else out.copy_(z),
    "relu": lambda z, slope, out: aten.relu.out(z, out=out),
    "leaky_relu": lambda z, slope, out: aten.leaky_relu.out(z, slope, out=out),
    "elu": lambda z, slope, out: aten.elu.out(z, slope, 1, 1, out=out),
    "selu": lambda z, slope, out: aten.elu.out(z, *SELU, out=out),
    "silu": lambda z, slope, out: aten.silu.out(z, out=out),
    "gelu": lambda z, slope, out: aten.gelu.out(z, out=out),
    "gelu_tanh": lambda z, slope, out: aten.gelu.out(z, approximate="tanh", out=out),
    "tanh": lambda z, slope, out: aten.tanh.out(z, out=out),
    "sigmoid": lambda z, slope, out: aten.sigmoid.out(z, out=out),
    "softplus": lambda z, slope, out: aten.softplus.out(z, slope, 20, out=out),
    "softsign": lambda z, slope, out: torch.div(z, z.abs().add_(1), out=out),
    "asinh": lambda z, slope, out: aten.asinh.out(z, out=out),
    "clipped_cube": lambda z, slope, out: clipped_cube_into(z, out),
}
# Those whose derivative is computed from the argument.
ARGUMENT = {"silu", "gelu", "gelu_tanh", "softplus", "asinh", "clipped_cube"}
# From the gradient g and what was seen, x: the result, or the argument (`keeps_argument`).
BACKWARD = {
    "identity": lambda g, x, slope: g,
    "relu": lambda g, x, slope: aten.threshold_backward.grad_input(g, x, 0, grad_input=g),
    "leaky_relu": lambda g, x, slope: aten.leaky_relu_backward.grad_input(
        g, x, slope, slope >= 0, grad_input=g
    ),
    "elu": lambda g, x, slope: aten.elu_backward.grad_input(
        g, slope, 1, 1, slope >= 0, x, grad_input=g
    ),
    "selu": lambda g, x, slope: aten.elu_backward.grad_input(g, *SELU, True, x, grad_input=g),
    "silu": lambda g, x, slope: aten.silu_backward.grad_input(g, x, grad_input=g),
    "gelu": lambda g, x, slope: aten.gelu_backward.grad_input(g, x, grad_input=g),
    "gelu_tanh": lambda g, x, slope: aten.gelu_backward.grad_input(
        g, x, approximate="tanh", grad_input=g
    ),
    "tanh": lambda g, x, slope: aten.tanh_backward.grad_input(g, x, grad_input=g),
    "sigmoid": lambda g, x, slope: aten.sigmoid_backward.grad_input(g, x, grad_input=g),
    "softplus": lambda g, x, slope: aten.softplus_backward.grad_input(
        g, x, slope, 20, grad_input=g
    ),
    "softsign": lambda g, x, slope: g.mul_(x.abs().neg_().add_(1).square_()),
    "asinh": lambda g, x, slope: g.mul_(x.square().add_(1).rsqrt_()),
    "clipped_cube": lambda g, x, slope: g.mul_(x.clamp(-1, 1).square_().mul_(3)),
}


def clipped_cube_into(z: Tensor, out: Tensor) -> Tensor:
    """Write `clipped_cube` of z to another tensor."""
    torch.clamp(z, -1, 1, out=out)
    beyond = z - out
    return out.pow_(3).add_(beyond, alpha=3)


def keeps_argument(layer: Layer) -> bool:
    """Whether the derivative of a layer's activation needs its argument, not its result."""
    if layer.activation in ("leaky_relu", "elu"):
        return layer.slope < 0
    return layer.activation in ARGUMENT


class Tape:
    """The values of a network in so many stages.

    Attributes:
        values: [stages, batch, width] of every value; of the state what is given.
        seen: the same of every layer, what its derivative needs; often the value itself.
    """

    def __init__(self, network: Network, stages: int, state: Tensor):
        def empty(width: int) -> Tensor:
            return state.new_empty(stages, state.shape[-2], width)

        self.values = [state]
        self.seen = []
        for layer in network.layers:
            value = empty(layer.width)
            self.values.append(value)
            apart = layer.activation != "identity" and (layer.skips or keeps_argument(layer))
            self.seen.append(empty(layer.width) if apart else value)

    def tensors(self) -> list[Tensor]:
        """All of them, each once."""
        return list({id(x): x for x in (*self.values, *self.seen)}.values())

    def rows(self, first: int, count: int) -> tuple[list[Tensor], list[Tensor]]:
        """Values and what was seen of some stages, each [count * batch, width]."""
        return flat_rows(self.values, first, count), flat_rows(self.seen, first, count)


def flat_rows(tensors: list[Tensor], first: int, count: int) -> list[Tensor]:
    """[count * batch, width] of tensors [stages, batch, width]."""
    return [x[first : first + count].flatten(0, 1) for x in tensors]


class Field:
    """A network and its tensors, laid out for matrix products."""

    def __init__(self, program: Program, inputs: Inputs):
        self.network, self.conds = program.network, inputs.conds
        like = inputs.y0
        assert like is not None
        self.times = place(program.flat_times(like.dtype), like.device)
        self.matrices = {
            term: inputs.parameters[term.weight][:, self.columns(term)].contiguous()
            for layer in self.network.layers
            for term in layer.terms
            if term.weight is not None
        }
        self.shifts = [self.shift(layer, inputs) for layer in self.network.layers]
        self.live = live_layers(self.network)

    def columns(self, term: Term) -> slice:
        """The columns of its matrix that a term reads."""
        return slice(term.column, term.column + self.network.width(term.source))

    def shift(self, layer: Layer, inputs: Inputs) -> Tensor | None:
        """What a layer adds in every stage, whatever the sample: [stages of the solve, width]."""
        total: Any = None
        if layer.time is not None:
            weight, column = layer.time
            total = torch.outer(self.times, inputs.parameters[weight][:, column])
        if layer.table is not None:
            table = inputs.tables[layer.table]
            total = table if total is None else total + table
        if layer.bias is not None:
            bias = inputs.parameters[layer.bias]
            total = bias.expand(len(self.times), -1) if total is None else total + bias
        return total

    def run(self, values: list[Tensor], seen: list[Tensor], first: int, count: int) -> None:
        """Fill the values from values[0] on, for stages `first` and the following ones."""
        for number, layer in enumerate(self.network.layers):
            value, z = values[number + 1], seen[number]
            for term in self.start(number, z, values, first, count):
                if term.weight is None:
                    z.add_(values[term.source])
                else:
                    z.addmm_(values[term.source], self.matrices[term].T)
            out = value if keeps_argument(layer) else z
            result = FORWARD[layer.activation](z, layer.slope, out)
            for skip in layer.skips:
                result = torch.add(result, values[skip], out=value)

    def start(
        self, number: int, z: Tensor, values: list[Tensor], first: int, count: int
    ) -> tuple[Term, ...]:
        """Write what a layer adds, with the first product where one call does both.

        Returns:
            The terms that are left.
        """
        layer, shift = self.network.layers[number], self.shifts[number]
        terms = layer.terms
        stages = z.view(count, -1, layer.width)
        if layer.cond is not None:
            cond = self.conds[layer.cond]
            if shift is None:
                stages.copy_(cond)
            else:
                torch.add(shift[first : first + count, None], cond, out=stages)
        elif terms and terms[0].weight is not None and (shift is None or count == 1):
            x, matrix = values[terms[0].source], self.matrices[terms[0]]
            if shift is None:
                torch.mm(x, matrix.T, out=z)
            else:
                torch.addmm(shift[first], x, matrix.T, out=z)
            return terms[1:]
        elif shift is None:
            z.zero_()
        else:
            stages.copy_(shift[first : first + count, None])
        return terms

    def back(self, seen: list[Tensor], deltas: list[Tensor], y_bar: Tensor) -> None:
        """Fill y_bar and the deltas (dL/dz of every layer) of a stage; the last one is dL/dk."""
        targets = [y_bar, *deltas]
        touched = {len(deltas)}

        def give(value: int, delta: Tensor, matrix: Tensor | None) -> None:
            target, first = targets[value], value not in touched
            touched.add(value)
            if matrix is None:
                target.copy_(delta) if first else target.add_(delta)
            elif first:
                torch.mm(delta, matrix, out=target)
            else:
                target.addmm_(delta, matrix)

        for number in self.live:
            layer, delta = self.network.layers[number], deltas[number]
            for skip in layer.skips:
                give(skip, delta, None)
            BACKWARD[layer.activation](delta, seen[number], layer.slope)
            for term in layer.terms:
                give(term.source, delta, self.matrices.get(term))
        if 0 not in touched:
            y_bar.zero_()

    def collect(
        self, grads: Inputs, values: list[Tensor], deltas: list[Tensor], first: int, count: int
    ) -> None:
        """Add what the deltas of some stages give to the gradients that are not None."""
        for number in self.live:
            layer, delta = self.network.layers[number], deltas[number]
            stages = delta.view(count, -1, layer.width)
            bias = None if layer.bias is None else grads.parameters[layer.bias]
            time = None if layer.time is None else grads.parameters[layer.time[0]]
            table = None if layer.table is None else grads.tables[layer.table]
            if not bias is time is table is None:
                sums = stages.sum(1)
                if bias is not None:
                    bias += sums.sum(0)
                if time is not None and layer.time is not None:
                    time[:, layer.time[1]] += self.times[first : first + count] @ sums
                if table is not None:
                    table[first : first + count] += sums
            if layer.cond is not None and grads.conds[layer.cond] is not None:
                grads.conds[layer.cond] += stages.sum(0)
            for term in layer.terms:
                if term.weight is not None and grads.parameters[term.weight] is not None:
                    part = grads.parameters[term.weight][:, self.columns(term)]
                    part.addmm_(delta.T, values[term.source])


def live_layers(network: Network) -> list[int]:
    """The layers on which the velocity depends, the last one first."""
    wanted, live = {len(network.layers)}, []
    for number in range(len(network.layers) - 1, -1, -1):
        if number + 1 in wanted:
            layer = network.layers[number]
            live.append(number)
            wanted |= {*layer.skips, *(term.source for term in layer.terms)}
    return live


class Layered:
    """See the module and `TrajectoryKernels`."""

    name = "layered"

    def refuses(self, network: Network, stages: int, batch: int, dtype: torch.dtype) -> str | None:
        """See `TrajectoryKernels`."""
        if dtype not in FUSED_DTYPES:
            return f"the state must be float32 or float64, got {dtype}"
        return None

    def working_bytes(self, program: Program, y0: Tensor, keep: Keep) -> int:
        """See `RecordableKernels`."""
        whole, stages = keep == "activations", program.steps * program.stages
        width = sum(layer.width for layer in program.network.layers)
        stage = len(y0) * width * y0.element_size()
        # Of every layer the value and, at most, what its derivative needs apart from it.
        held = 2 * stage * (stages if whole else 1) + len(program.outputs) * y0.nbytes
        if keep == "nothing":
            return held
        chunk = min(program.steps, steps_per_chunk(program, y0, whole)) * program.stages
        return held + (stages + 1) * y0.nbytes + stage * chunk * (1 if whole else 3)

    @torch.no_grad()
    def forward(self, program: Program, inputs: Inputs, keep: Keep) -> tuple[Tensor, Any]:
        """See `TrajectoryKernels`."""
        field, y = Field(program, inputs), inputs.y0
        assert y is not None
        stages = program.steps * program.stages
        whole = keep == "activations"
        stays = whole or program.stages == 1  # a slope, until its step is done
        # The inputs of all stages, and the final state.
        starts = None if keep == "nothing" else y.new_empty(stages + 1, *y.shape)
        tape = Tape(program.network, stages if whole else 1, y[None] if starts is None else starts)
        out = y.new_empty(len(program.outputs), *y.shape)
        rows = None if program.weights is None else program.weights.tolist()
        if starts is not None:
            y = starts[0].copy_(y)
        for n, h in enumerate(program.h.tolist()):
            if rows is None:
                store(out, program.outputs, n, y)
            k: list[Tensor] = []
            for i, row in enumerate(program.a):
                q = n * program.stages + i
                x = combine(y, k, h, row, None if starts is None else starts[q]) if k else y
                (_, *values), seen = tape.rows(q if whole else 0, 1)
                field.run([x, *values], seen, q, 1)
                k.append(values[-1] if stays else values[-1].clone())
            for j, m in enumerate(program.outputs):
                if rows is not None and m == n:
                    combine(y, k, h, rows[j], out[j])
            after = None if starts is None else starts[(n + 1) * program.stages]
            y = combine(y, k, h, program.b, after)
        if rows is None:
            store(out, program.outputs, program.steps, y)
        return out, tape if whole else starts

    @torch.no_grad()
    def backward(
        self, program: Program, inputs: Inputs, kept: Any, grad: Tensor, wanted: Inputs
    ) -> Inputs:
        """See `TrajectoryKernels`."""
        pairs = zip(flatten(inputs), flatten(wanted), strict=True)
        grads = rebuild(inputs, [torch.zeros_like(x) if w else None for x, w in pairs])
        field, s, y0 = Field(program, inputs), program.stages, inputs.y0
        assert y0 is not None
        per_chunk = min(program.steps, steps_per_chunk(program, y0, isinstance(kept, Tape)))
        deltas = [y0.new_empty(per_chunk * s, len(y0), x.width) for x in program.network.layers]
        adjoint = Adjoint(program, grad)
        for end in range(program.steps, 0, -per_chunk):
            start = max(0, end - per_chunk)
            first, count = start * s, (end - start) * s
            if isinstance(kept, Tape):
                tape, base = kept, first
            else:
                tape, base = Tape(program.network, count, kept[first : first + count]), 0
                field.run(*tape.rows(0, count), first, count)
            for n in range(end - 1, start - 1, -1):
                adjoint.begin(n)
                for i in range(s - 1, -1, -1):
                    row, bar = (n - start) * s + i, torch.empty_like(y0)
                    _, seen = tape.rows(base + row, 1)
                    delta = flat_rows(deltas, row, 1)
                    adjoint.slope(i, delta[-1])
                    field.back(seen, delta, bar)
                    adjoint.bars.append(bar)
                adjoint.end()
            values, _ = tape.rows(base, count)
            field.collect(grads, values, flat_rows(deltas, 0, count), first, count)
        if wanted.y0:
            grads.y0 = adjoint.total()
        return grads


class Adjoint:
    """lambda = dL/dy from the last step to the first, with the stages of one step.

    With ybar_i = (df/dy)^T kbar_i:

        kbar_i = h (b_i lambda + sum_{j > i} a_ji ybar_j) + h sum_out w_i dL/dout
        lambda <- lambda + sum_i ybar_i + sum_out dL/dout
    """

    def __init__(self, program: Program, grad: Tensor):
        self.program, self.grad = program, grad
        self.h = program.h.tolist()
        self.lam = torch.zeros_like(grad[0]) if len(grad) else grad.new_zeros(grad.shape[1:])
        self.bars: list[Tensor] = []  # of the stages after i, the last stage first

    def begin(self, n: int) -> None:
        """Before the stages of step n."""
        self.n, self.bars = n, []
        if self.program.weights is None:
            self.lam = self.with_outputs(self.lam, n + 1)

    def with_outputs(self, total: Tensor, n: int, weights: list[float] | None = None) -> Tensor:
        """Add the gradients of the outputs numbered n, weighted."""
        for j, m in enumerate(self.program.outputs):
            if m == n:
                total = total + (self.grad[j] if weights is None else self.grad[j] * weights[j])
        return total

    def slope(self, i: int, out: Tensor) -> None:
        """Write kbar_i."""
        program, h = self.program, self.h[self.n]
        total = torch.mul(self.lam, h * program.b[i], out=out)
        if program.weights is not None:
            total = self.with_outputs(total, self.n, (h * program.weights[:, i]).tolist())
        if self.bars:
            later = range(program.stages - 1, i, -1)
            combine(total, self.bars, h, tuple(program.a[j][i] for j in later), out)
        elif total is not out:
            out.copy_(total)

    def end(self) -> None:
        """After the stages of a step."""
        self.lam = combine(self.lam, self.bars, 1.0, (1.0,) * len(self.bars))
        if self.program.weights is not None:
            self.lam = self.with_outputs(self.lam, self.n)

    def total(self) -> Tensor:
        """dL/dy0 after the first step."""
        return self.lam if self.program.weights is not None else self.with_outputs(self.lam, 0)


def combine(
    y: Tensor, k: list[Tensor], h: float, w: tuple[float, ...], out: Tensor | None = None
) -> Tensor:
    """Return y + h sum_i w[i] k[i], in `out` if it is given: with one stage in one pass."""
    if out is not None and len(k) == 1 and w[0] != 0:
        return torch.add(y, k[0], alpha=h * w[0], out=out)
    total = choose_kernels(y).rk_combine(y, k, h, w)
    return total if out is None else out.copy_(total)


def steps_per_chunk(program: Program, y0: Tensor, kept: bool) -> int:
    """How many steps' deltas, and values where they were not kept, fit into `BUDGET`."""
    width = sum(layer.width * (1 if kept else 3) for layer in program.network.layers)
    return max(1, BUDGET // max(1, program.stages * len(y0) * width * y0.element_size()))


def store(out: Tensor, outputs: tuple[int, ...], n: int, y: Tensor) -> None:
    """Write state n to the places where it is wanted."""
    for j, m in enumerate(outputs):
        if m == n:
            out[j].copy_(y)


KERNELS = Layered()
