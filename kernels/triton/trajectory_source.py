"""The source of the two kernels of a network: every layer written out, the steps in a loop.

Numbers of the solve (times, tableau times h, weights of outputs) are read from the device, so that
a kernel serves every method with as many stages, and every number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fmft_fast.kernels.writer import Shapes, Writer, compile_kernel, pieces, used

from fmft_fast.ops.network import Layer, Network


@dataclass(frozen=True)
class Wanted:
    """Which gradients of parameters, tables and conditions a backward kernel computes."""

    parameters: tuple[bool, ...]
    tables: tuple[bool, ...]
    conds: tuple[bool, ...]


@lru_cache(256)
def forward_kernel(network: Network, shapes: Shapes, stages: int, tile: int) -> Any:
    """The kernel of a whole solve."""
    return compile_kernel(_Forward(network, shapes, stages, tile).source())


@lru_cache(256)
def backward_kernel(
    network: Network, shapes: Shapes, stages: int, tile: int, wanted: Wanted
) -> Any:
    """The kernel of the gradient of a whole solve."""
    return compile_kernel(Backward(network, shapes, stages, tile, wanted).source())


def offsets(shapes: Shapes, wanted: Wanted) -> list[int]:
    """Where each parameter's gradient begins in the partial sums of a program, and their end."""
    found = [0]
    for shape, want in zip(shapes, wanted.parameters, strict=True):
        size = shape[0] * (shape[1] if len(shape) == 2 else 1)
        found.append(found[-1] + size * want)
    return found


def reads(network: Network) -> list[tuple[int, int, int, bool]]:
    """The distinct blocks (parameter, first column, columns, whether a matrix) that are read."""
    found = {}
    for layer in network.layers:
        for term in layer.terms:
            if term.weight is not None:
                found[term.weight, term.column, network.width(term.source), True] = None
        if layer.time is not None:
            found[(*layer.time, 1, False)] = None
        if layer.bias is not None:
            found[layer.bias, 0, 1, False] = None
    return list(found)


class _Forward(Writer):
    def source(self) -> str:
        state, s = self.network.state, self.stages
        ks = [f"k{j}" for j in range(s)]
        first = [
            "out",
            "kept",
            "y0",
            "numbers",
            "weights",
            "first",
            "batch",
            "steps",
            "keep",
        ]
        with self.kernel(first):
            self.add("rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)")
            self.add(f"size = batch.to(tl.int64) * {state}")
            for c, piece in enumerate(self.pieces(0)):
                self.add(f"y_{c} = {self.rows('y0', state, piece)}")
            with self.block("for n in range(0, steps):"):
                self.add(f"at = numbers + n * {s * (s + 2)}")
                if s == 1:
                    self.add("q = n")
                    self.combine("v0", "at", "y", [])
                    self.stage("at")
                    self.combine("k0", "at", f"v{self.last}", [])
                else:
                    for k in ks:
                        self.zeros(k, state)
                    with self.block(f"for i in range(0, {s}):"):
                        self.add(f"q = n * {s} + i")
                        self.combine("v0", f"at + {s} + i * {s}", "y", ks[:-1])
                        self.stage("at + i")
                        for c in range(len(self.pieces(0))):
                            for j, k in enumerate(ks):
                                new = f"v{self.last}_{c}"
                                self.add(f"{k}_{c} = tl.where(i == {j}, {new}, {k}_{c})")
                with self.block("for o in range(tl.load(first + n), tl.load(first + n + 1)):"):
                    self.combine("x", f"weights + o * {s}", "y", ks)
                    self.put_rows("out + o * size", "x", state)
                self.combine("y", f"at + {s + s * s}", "y", ks)
        return "\n".join(self.lines) + "\n"

    def stage(self, time: str) -> None:
        # A store in the loop also keeps Triton from loading all weights before the loop, for which
        # there are not enough registers; where nothing is kept it goes to the same place again.
        self.put_rows("kept + q * (size * keep)", "v0", self.network.state)
        self.time(time)
        self.field(derivatives=False)


class Backward(Writer):
    """The kernel of the gradient of a whole solve."""

    tensors = ("grad_y0", "partials", "grad", "kept", "numbers", "weights", "first")
    steps = "steps"

    def __init__(
        self, network: Network, shapes: Shapes, stages: int, tile: int, wanted: Wanted
    ) -> None:
        super().__init__(network, shapes, stages, tile)
        self.wanted, self.ends = wanted, offsets(shapes, wanted)
        tables, conds = used(network)
        widths = {x.table: x.width for x in network.layers}
        self.tables = {i: widths[i] for i in tables if wanted.tables[i]}
        widths = {x.cond: x.width for x in network.layers}
        self.conds = {i: widths[i] for i in conds if wanted.conds[i]}

    def source(self) -> str:
        """The kernel."""
        state, s = self.network.state, self.stages
        grads = [f"grad_cond{i}" for i in self.conds]
        with self.kernel([*self.tensors, "batch", "steps", *grads]):
            self.add("program = tl.program_id(0).to(tl.int64)")
            self.add(f"size = batch.to(tl.int64) * {state}")
            tables = f"steps.to(tl.int64) * {s * sum(self.tables.values())}"
            self.add(f"mine = partials + program * ({self.ends[-1]} + {tables})")
            for name, size, _ in self.sums():
                self.add(f"{name} = tl.zeros(({size},), tl.float32)")
            loop = "range(tl.program_id(0), tl.cdiv(batch, BLOCK), tl.num_programs(0))"
            with self.block(f"for block in {loop}:"):
                self.add("rows = tl.arange(0, BLOCK).to(tl.int64) + block * BLOCK")
                for i, width in self.conds.items():
                    self.zeros(f"sum_cond{i}", width)
                self.begin()
                with self.block(f"for m in range(0, {self.steps}):"):
                    self.add(f"n = {self.steps} - 1 - m")
                    self.step()
                for i, width in self.conds.items():
                    self.put_rows(f"grad_cond{i}", f"sum_cond{i}", width)
            for _, _, put in self.sums():
                self.add(f"put_vector({put})")
        return "\n".join(self.lines) + "\n"

    def begin(self) -> None:
        """Write the gradient of the state after the last step."""
        self.zeros("gy", self.network.state)

    def numbers(self) -> None:
        """Write where the numbers of a step lie."""
        self.add(f"at = numbers + n * {self.stages * (self.stages + 2)}")

    def outputs(self, ks: list[str]) -> None:
        """Write what comes from the outputs inside a step."""
        with self.block("for o in range(tl.load(first + n), tl.load(first + n + 1)):"):
            for c, piece in enumerate(self.pieces(0)):
                self.add(f"g_{c} = {self.rows('grad + o * size', self.network.state, piece)}")
                self.add(f"gy_{c} += g_{c}")
                for j, k in enumerate(ks):
                    self.add(f"{k}_{c} += tl.load(weights + o * {self.stages} + {j}) * g_{c}")

    def inputs(self, piece: tuple[int, int, int]) -> str:
        """A tile of a stage's inputs."""
        return self.rows("kept + q * size", self.network.state, piece)

    def step(self) -> None:
        """Write the backward pass of a step."""
        s, parts = self.stages, range(len(self.pieces(0)))
        ks = [f"k{j}" for j in range(s)]
        self.numbers()
        for c in parts:
            for j, k in enumerate(ks):
                self.add(f"{k}_{c} = {self.weight(f'at + {s + s * s + j}')} * gy_{c}")
        self.outputs(ks)
        if s == 1:
            self.add("q = n")
            self.stage("k0", "at")
            return
        with self.block(f"for e in range(0, {s}):"):
            self.add(f"i = {s - 1} - e", f"q = n * {s} + i")
            for c in parts:
                self.add(f"g_{c} = {ks[-1]}_{c}")
                for j, k in enumerate(ks[:-1]):
                    self.add(f"g_{c} = tl.where(i == {j}, {k}_{c}, g_{c})")
            self.stage("g", "at + i")
            for j, k in enumerate(ks[:-1]):
                self.add(f"w{j} = {self.weight(f'at + {s} + i * {s} + {j}')}")
                self.add(*(f"{k}_{c} += w{j} * g0_{c}" for c in parts))

    def sums(self) -> Iterator[tuple[str, int, str]]:
        """The sums of vectors' gradients: their names, sizes, and what `put_vector` takes."""
        for p, column, _, matrix in reads(self.network):
            if matrix or not self.wanted.parameters[p]:
                continue
            stride = self.stride(p)
            for c, (i, n, pn) in enumerate(pieces(self.shapes[p][0], self.tile)):
                name = f"sum{p}_{column}_{c}"
                at = f"mine + {self.ends[p] + i * stride + column}"
                yield name, pn, f"{at}, {name}, {n}, {stride}, {pn}"

    def stage(self, grad: str, time: str) -> None:
        """Write the field again at a stage's input, and g0, what comes back through it."""
        state = self.network.state
        self.time(time)
        for c, piece in enumerate(self.pieces(0)):
            self.add(f"v0_{c} = {self.inputs(piece)}")
        self.field(derivatives=True)
        self.known = {self.last: grad}
        self.columns: dict[tuple[int, int], str] = {}
        for value in range(self.last, 0, -1):
            if value in self.known:
                self.back(value, self.network.layers[value - 1])
        if 0 not in self.known:
            self.zeros("g0", state)
        self.add(*(f"gy_{c} += g0_{c}" for c in range(len(self.pieces(0)))))
        # The last store counts; as in the forward kernel, a store keeps weights out of registers.
        self.put_rows("grad_y0", "gy", state)
        before = 0
        for table, width in self.tables.items():
            at = f"mine + {self.ends[-1]} + {before} * steps.to(tl.int64) + q * {width}"
            for c, (i, n, pn) in enumerate(pieces(width, self.tile)):
                if (table, c) in self.columns:
                    self.add(f"add_vector({at} + {i}, {self.columns[table, c]}, {n}, {pn})")
            before += self.stages * width

    def give(self, value: int, grads: list[str]) -> None:
        """Add to the gradient of a value, tile by tile."""
        before = self.known.get(value)
        for c, grad in enumerate(grads):
            self.add(f"g{value}_{c} = {f'{before}_{c} + ' if before else ''}{grad}")
        self.known[value] = f"g{value}"

    def back(self, value: int, layer: Layer) -> None:
        """Write the backward pass of a layer."""
        parts = range(len(self.pieces(value)))
        grad, b = self.known[value], [f"b{value}_{c}" for c in parts]
        factor = "" if layer.activation == "identity" else f" * d{value}_{{}}"
        self.add(*(f"{b[c]} = {grad}_{c}{factor.format(c)}" for c in parts))
        for skip in layer.skips:
            self.give(skip, [f"{grad}_{c}" for c in parts])
        self.vectors(value, layer)
        for term in layer.terms:
            if term.weight is None:
                self.give(term.source, b)
                continue
            columns = range(len(self.pieces(term.source)))
            if self.wanted.parameters[term.weight]:
                for c, (i, n, pn) in enumerate(self.pieces(value)):
                    for d, (j, k, pk) in enumerate(self.pieces(term.source)):
                        stride = self.stride(term.weight)
                        at = self.ends[term.weight] + i * stride + term.column + j
                        tiles = f"mine + {at}, {b[c]}, v{term.source}_{d}"
                        sizes = f"{n}, {k}, {stride}, {pn}, {pk}"
                        self.add(f"add_product({tiles}, {sizes}, PRECISION)")
            before = self.known.get(term.source)
            for d in columns:
                name = f"g{term.source}_{d}"
                acc = f"acc={before}_{d}, " if before else ""
                for c in parts:
                    w = self.matrix("matrix", term, value, c, d)
                    self.add(f"{name} = tl.dot({b[c]}, {w}, {acc}input_precision=PRECISION)")
                    acc = f"acc={name}, "
            self.known[term.source] = f"g{term.source}"

    def vectors(self, value: int, layer: Layer) -> None:
        """Write the gradients of what is added to a layer."""
        wanted = self.wanted
        by_bias = layer.bias is not None and wanted.parameters[layer.bias]
        by_time = layer.time is not None and wanted.parameters[layer.time[0]]
        by_table = layer.table is not None and wanted.tables[layer.table]
        for c in range(len(self.pieces(value))):
            s, b = f"s{value}_{c}", f"b{value}_{c}"
            if by_bias or by_time or by_table:
                self.add(f"{s} = tl.sum({b}, 0)")
            if by_bias:
                self.add(f"sum{layer.bias}_0_{c} += {s}")
            if by_time:
                self.add(f"sum{layer.time[0]}_{layer.time[1]}_{c} += {self.times_sum(b, s)}")
            if by_table:
                before = self.columns.get((layer.table, c))
                self.columns[layer.table, c] = f"{before} + {s}" if before else s
            if layer.cond is not None and wanted.conds[layer.cond]:
                self.add(f"sum_cond{layer.cond}_{c} += {b}")

    def times_sum(self, grad: str, total: str) -> str:
        """The sum over the rows of the time times a gradient."""
        return f"t * {total}"
