"""The source of the two kernels of a network: every layer written out, the steps in a loop.

A value is a list of tiles, each of at most so many columns: Triton takes a whole operand of a dot
into registers. Numbers of the solve (times, tableau times h, weights of outputs) are read from the
device, so that a kernel serves every method with as many stages, and every number of steps.
"""

from __future__ import annotations

import linecache
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

import triton
import triton.language as tl
from fmft_fast.kernels import tiles

from fmft_fast.ops.network import Layer, Network, Term

Shapes = tuple[tuple[int, ...], ...]
NONZERO_AT_ZERO = ("sigmoid", "softplus")
NAMES = [name for name, value in vars(tiles).items() if hasattr(value, "arg_names")]


@dataclass(frozen=True)
class Wanted:
    """Which gradients of parameters, tables and conditions a backward kernel computes."""

    parameters: tuple[bool, ...]
    tables: tuple[bool, ...]
    conds: tuple[bool, ...]


def padded(width: int) -> int:
    """The side of a tile that holds `width` numbers; `tl.dot` takes no side below 16."""
    return max(16, triton.next_power_of_2(width))


def pieces(width: int, tile: int) -> list[tuple[int, int, int]]:
    """The tiles of so many columns: first column, columns, and columns with padding."""
    return [
        (at, min(tile, width - at), padded(min(tile, width - at))) for at in range(0, width, tile)
    ]


@lru_cache(256)
def forward_kernel(network: Network, shapes: Shapes, stages: int, tile: int) -> Any:
    """The kernel of a whole solve."""
    return _compile(_Forward(network, shapes, stages, tile).source())


@lru_cache(256)
def backward_kernel(
    network: Network, shapes: Shapes, stages: int, tile: int, wanted: Wanted
) -> Any:
    """The kernel of the gradient of a whole solve."""
    return _compile(_Backward(network, shapes, stages, tile, wanted).source())


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


def used(network: Network) -> tuple[list[int], list[int]]:
    """The numbers of the tables and of the conditions that the layers read."""
    tables = {x.table for x in network.layers if x.table is not None}
    conds = {x.cond for x in network.layers if x.cond is not None}
    return sorted(tables), sorted(conds)


def _compile(source: str) -> Any:
    # Triton reads the source of a function through `inspect`, which asks linecache.
    name = f"<trajectory {sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    module = types.ModuleType(__name__)
    vars(module).update({n: getattr(tiles, n) for n in NAMES}, triton=triton, tl=tl)
    exec(compile(source, name, "exec"), vars(module))
    return vars(module)["kernel"]


class _Writer:
    """Lines of a kernel, and what both kernels write."""

    def __init__(self, network: Network, shapes: Shapes, stages: int, tile: int) -> None:
        self.network, self.shapes, self.stages, self.tile = network, shapes, stages, tile
        self.last = len(network.layers)
        self.lines: list[str] = []
        self.depth = 0

    def add(self, *lines: str) -> None:
        self.lines += ["    " * self.depth + line for line in lines]

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        self.add(head)
        self.depth += 1
        yield
        self.depth -= 1

    @contextmanager
    def kernel(self, arguments: list[str]) -> Iterator[None]:
        tables, conds = used(self.network)
        arguments = [
            *arguments,
            *(f"p{i}" for i in range(len(self.shapes))),
            *(f"table{i}" for i in tables),
            *(f"cond{i}" for i in conds),
            "BLOCK: tl.constexpr",
            "PRECISION: tl.constexpr",
        ]
        self.add('@triton.jit(do_not_specialize=["batch", "steps", "keep"])')
        with self.block(f"def kernel({', '.join(arguments)}):"):
            yield

    def pieces(self, value: int) -> list[tuple[int, int, int]]:
        return pieces(self.network.width(value), self.tile)

    def stride(self, parameter: int) -> int:
        shape = self.shapes[parameter]
        return shape[1] if len(shape) == 2 else 1

    def matrix(self, kind: str, term: Term, value: int, row: int, column: int) -> str:
        """A tile of the matrix of a term."""
        assert term.weight is not None
        (i, n, pn), (j, k, pk) = self.pieces(value)[row], self.pieces(term.source)[column]
        stride = self.stride(term.weight)
        at = i * stride + term.column + j
        return f"{kind}(p{term.weight} + {at}, {n}, {k}, {stride}, {pn}, {pk})"

    def rows(self, pointer: str, width: int, piece: tuple[int, int, int]) -> str:
        i, n, pn = piece
        return f"rows_of({pointer} + {i}, rows, batch, {width}, {n}, {pn})"

    def put_rows(self, pointer: str, name: str, width: int) -> None:
        for c, (i, n, pn) in enumerate(pieces(width, self.tile)):
            x = f"{name}_{c}"
            self.add(f"put_rows({pointer} + {i}, rows, batch, {x}, {width}, {n}, {pn})")

    def zeros(self, name: str, width: int) -> None:
        for c, (_, _, pn) in enumerate(pieces(width, self.tile)):
            self.add(f"{name}_{c} = tl.zeros((BLOCK, {pn}), tl.float32)")

    def combine(self, name: str, weights: str, base: str, terms: list[str]) -> None:
        """Write base plus the sum of terms times numbers on the device."""
        for j in range(len(terms)):
            self.add(f"w{j} = tl.load({weights} + {j})")
        for c in range(len(self.pieces(0))):
            sums = [f"w{j} * {term}_{c}" for j, term in enumerate(terms)]
            self.add(f"{name}_{c} = {' + '.join([f'{base}_{c}', *sums])}")

    def layer(self, value: int, derivative: bool) -> None:
        """Write the value v of a layer, and if wanted the derivative d of its activation."""
        layer = self.network.layers[value - 1]
        for c, (i, n, pn) in enumerate(self.pieces(value)):
            z, _v = f"z{value}_{c}", f"v{value}_{c}"
            started = False
            for term in layer.terms:
                if term.weight is None:
                    x = f"v{term.source}_{c}"
                    self.add(f"{z} = {z} + {x}" if started else f"{z} = {x}")
                    started = True
                    continue
                for k in range(len(self.pieces(term.source))):
                    acc = f"acc={z}, " if started else ""
                    w = self.matrix("transposed", term, value, c, k)
                    x = f"v{term.source}_{k}"
                    self.add(f"{z} = tl.dot({x}, {w}, {acc}input_precision=PRECISION)")
                    started = True
            if not started:
                self.add(f"{z} = tl.zeros((BLOCK, {pn}), tl.float32)")
            if layer.bias is not None:
                self.add(f"{z} += vector(p{layer.bias} + {i}, {n}, 1, {pn})[None, :]")
            if layer.time is not None:
                (p, column), stride = layer.time, self.stride(layer.time[0])
                at = f"p{p} + {i * stride + column}"
                self.add(f"{z} += (t * vector({at}, {n}, {stride}, {pn}))[None, :]")
            if layer.table is not None:
                at = f"table{layer.table} + q * {layer.width} + {i}"
                self.add(f"{z} += vector({at}, {n}, 1, {pn})[None, :]")
            if layer.cond is not None:
                self.add(f"{z} += {self.rows(f'cond{layer.cond}', layer.width, (i, n, pn))}")
            self.activation(value, c, n < pn, derivative)

    def activation(self, value: int, c: int, is_padded: bool, derivative: bool) -> None:
        layer, z, v = self.network.layers[value - 1], f"z{value}_{c}", f"v{value}_{c}"
        if layer.activation == "identity":
            self.add(f"{v} = {z}")
        else:
            how = f'"{layer.activation}", {float(layer.slope)!r}'
            self.add(f"{v} = activate({z}, {how})")
            if is_padded and layer.activation in NONZERO_AT_ZERO:
                _, n, pn = self.pieces(value)[c]
                self.add(f"{v} = tl.where((tl.arange(0, {pn}) < {n})[None, :], {v}, 0.0)")
            if derivative:
                self.add(f"d{value}_{c} = derivative({z}, {v}, {how})")
        for skip in layer.skips:
            self.add(f"{v} = {v} + v{skip}_{c}")

    def field(self, derivatives: bool) -> None:
        for value in range(1, self.last + 1):
            self.layer(value, derivatives)


class _Forward(_Writer):
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
        self.add(f"t = tl.load({time})")
        self.field(derivatives=False)


class _Backward(_Writer):
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
        state, s = self.network.state, self.stages
        ks = [f"k{j}" for j in range(s)]
        first = ["grad_y0", "partials", "grad", "kept", "numbers", "weights", "first"]
        grads = [f"grad_cond{i}" for i in self.conds]
        with self.kernel([*first, "batch", "steps", *grads]):
            self.add("program = tl.program_id(0).to(tl.int64)")
            self.add(f"size = batch.to(tl.int64) * {state}")
            tables = f"steps.to(tl.int64) * {s * sum(self.tables.values())}"
            self.add(f"mine = partials + program * ({self.ends[-1]} + {tables})")
            for name, size, _ in self.sums():
                self.add(f"{name} = tl.zeros(({size},), tl.float32)")
            loop = "range(tl.program_id(0), tl.cdiv(batch, BLOCK), tl.num_programs(0))"
            with self.block(f"for block in {loop}:"):
                self.add("rows = tl.arange(0, BLOCK).to(tl.int64) + block * BLOCK")
                self.zeros("gy", state)
                for i, width in self.conds.items():
                    self.zeros(f"sum_cond{i}", width)
                with self.block("for m in range(0, steps):"):
                    self.add("n = steps - 1 - m", f"at = numbers + n * {s * (s + 2)}")
                    self.step(ks)
                for i, width in self.conds.items():
                    self.put_rows(f"grad_cond{i}", f"sum_cond{i}", width)
            for _, _, put in self.sums():
                self.add(f"put_vector({put})")
        return "\n".join(self.lines) + "\n"

    def step(self, ks: list[str]) -> None:
        state, s = self.network.state, self.stages
        parts = range(len(self.pieces(0)))
        for c in parts:
            for j, k in enumerate(ks):
                self.add(f"{k}_{c} = tl.load(at + {s + s * s + j}) * gy_{c}")
        with self.block("for o in range(tl.load(first + n), tl.load(first + n + 1)):"):
            for c, piece in enumerate(self.pieces(0)):
                self.add(f"g_{c} = {self.rows('grad + o * size', state, piece)}")
                self.add(f"gy_{c} += g_{c}")
                for j, k in enumerate(ks):
                    self.add(f"{k}_{c} += tl.load(weights + o * {s} + {j}) * g_{c}")
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
                self.add(f"w{j} = tl.load(at + {s} + i * {s} + {j})")
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
        self.add(f"t = tl.load({time})")
        for c, piece in enumerate(self.pieces(0)):
            self.add(f"v0_{c} = {self.rows('kept + q * size', state, piece)}")
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
                self.add(f"sum{layer.time[0]}_{layer.time[1]}_{c} += t * {s}")
            if by_table:
                before = self.columns.get((layer.table, c))
                self.columns[layer.table, c] = f"{before} + {s}" if before else s
            if layer.cond is not None and wanted.conds[layer.cond]:
                self.add(f"sum_cond{layer.cond}_{c} += {b}")
