"""The source of the two kernels of a network: every layer written out, the steps in a loop.

Numbers of the solve (times, tableau times h, weights of outputs) are read from the device, so that
a kernel serves every method with the same number of stages, and every number of steps.
"""

from __future__ import annotations

import linecache
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@lru_cache(256)
def forward_kernel(network: Network, shapes: Shapes, stages: int, keep: bool) -> Any:
    """The kernel of a whole solve."""
    return _compile(_Forward(network, shapes, stages, keep=keep).source())


@lru_cache(256)
def backward_kernel(network: Network, shapes: Shapes, stages: int, wanted: Wanted) -> Any:
    """The kernel of the gradient of a whole solve."""
    return _compile(_Backward(network, shapes, stages, wanted=wanted).source())


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


@dataclass
class _Writer:
    network: Network
    shapes: Shapes
    stages: int
    lines: list[str] = field(default_factory=list)
    depth: int = 0

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
        arguments = [*arguments, "BLOCK: tl.constexpr", "PRECISION: tl.constexpr"]
        self.add('@triton.jit(do_not_specialize=["batch", "steps"])')
        with self.block(f"def kernel({', '.join(arguments)}):"):
            yield

    def tensors(self) -> list[str]:
        tables, conds = used(self.network)
        names = [f"p{i}" for i in range(len(self.shapes))]
        return names + [f"table{i}" for i in tables] + [f"cond{i}" for i in conds]

    def width(self, value: int) -> tuple[int, int]:
        width = self.network.width(value)
        return width, padded(width)

    def combined(self, weights: str, base: str, names: list[str]) -> str:
        """Base plus the sum of the named tiles times numbers on the device."""
        sums = [f"tl.load({weights} + {j}) * {name}" for j, name in enumerate(names)]
        return " + ".join([base, *sums])

    def matrix(self, kind: str, term: Term, value: int) -> str:
        assert term.weight is not None
        (n, pn), (k, pk) = self.width(value), self.width(term.source)
        sizes = f"{n}, {k}, {self.stride(term.weight)}, {pn}, {pk}"
        return f"{kind}(p{term.weight} + {term.column}, {sizes})"

    def stride(self, parameter: int) -> int:
        shape = self.shapes[parameter]
        return shape[1] if len(shape) == 2 else 1

    def layer(self, value: int, layer: Layer, derivative: bool) -> None:
        """Write z, the value v and if wanted the derivative d of a layer."""
        n, pn = self.width(value)
        z, v = f"z{value}", f"v{value}"
        started = False
        for term in layer.terms:
            x = f"v{term.source}"
            if term.weight is None:
                self.add(f"{z} = {z} + {x}" if started else f"{z} = {x}")
            else:
                acc = f"acc={z}, " if started else ""
                tile = self.matrix("transposed", term, value)
                self.add(f"{z} = tl.dot({x}, {tile}, {acc}input_precision=PRECISION)")
            started = True
        if not started:
            self.add(f"{z} = tl.zeros((BLOCK, {pn}), tl.float32)")
        if layer.bias is not None:
            self.add(f"{z} += vector(p{layer.bias}, {n}, 1, {pn})[None, :]")
        if layer.time is not None:
            p, column = layer.time
            self.add(f"{z} += (t * vector(p{p} + {column}, {n}, {self.stride(p)}, {pn}))[None, :]")
        if layer.table is not None:
            self.add(f"{z} += vector(table{layer.table} + q * {n}, {n}, 1, {pn})[None, :]")
        if layer.cond is not None:
            self.add(f"{z} += rows_of(cond{layer.cond}, rows, batch, {n}, {pn})")
        how = f'"{layer.activation}", {float(layer.slope)!r}'
        plain = layer.activation == "identity"
        self.add(f"{v} = {z}" if plain else f"{v} = activate({z}, {how})")
        if n < pn and layer.activation in NONZERO_AT_ZERO:
            self.add(f"{v} = tl.where((tl.arange(0, {pn}) < {n})[None, :], {v}, 0.0)")
        if derivative and not plain:
            self.add(f"d{value} = derivative({z}, {v}, {how})")
        for skip in layer.skips:
            self.add(f"{v} = {v} + v{skip}")

    def field(self, derivatives: bool) -> None:
        for i, layer in enumerate(self.network.layers):
            self.layer(i + 1, layer, derivatives)


@dataclass
class _Forward(_Writer):
    keep: bool = False

    def source(self) -> str:
        state, pad = self.width(0)
        s = self.stages
        ks = [f"k{j}" for j in range(s)]
        first = ["out", "kept", "y0", "numbers", "weights", "first", "batch", "steps"]
        with self.kernel([*first, *self.tensors()]):
            self.add("rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)")
            self.add(f"size = batch.to(tl.int64) * {state}")
            self.add(f"y = rows_of(y0, rows, batch, {state}, {pad})")
            with self.block("for n in range(0, steps):"):
                self.add(f"at = numbers + n * {s * (s + 2)}")
                if s == 1:
                    self.add("q = n")
                    self.stage("y", "at")
                    self.add(f"k0 = v{len(self.network.layers)}")
                else:
                    for k in ks:
                        self.add(f"{k} = tl.zeros((BLOCK, {pad}), tl.float32)")
                    with self.block(f"for i in range(0, {s}):"):
                        self.add(f"q = n * {s} + i")
                        self.stage(self.combined(f"at + {s} + i * {s}", "y", ks[:-1]), "at + i")
                        for j, k in enumerate(ks):
                            v = f"v{len(self.network.layers)}"
                            self.add(f"{k} = tl.where(i == {j}, {v}, {k})")
                with self.block("for o in range(tl.load(first + n), tl.load(first + n + 1)):"):
                    self.add(f"wanted = {self.combined(f'weights + o * {s}', 'y', ks)}")
                    self.add(f"put_rows(out + o * size, rows, batch, wanted, {state}, {pad})")
                self.add(f"y = {self.combined(f'at + {s + s * s}', 'y', ks)}")
        return "\n".join(self.lines) + "\n"

    def stage(self, x: str, time: str) -> None:
        state, pad = self.width(0)
        self.add(f"v0 = {x}", f"t = tl.load({time})")
        if self.keep:
            self.add(f"put_rows(kept + q * size, rows, batch, v0, {state}, {pad})")
        self.field(derivatives=False)


@dataclass
class _Backward(_Writer):
    wanted: Wanted = field(default_factory=lambda: Wanted((), (), ()))

    def source(self) -> str:
        state, pad = self.width(0)
        s, sums = self.stages, self.sums()
        self.ends = offsets(self.shapes, self.wanted)
        ks = [f"k{j}" for j in range(s)]
        conds = self.conds()
        first = ["grad_y0", "partials", "grad", "kept", "numbers", "weights", "first"]
        grads = [f"grad_cond{j}" for j in conds]
        with self.kernel([*first, "batch", "steps", *self.tensors(), *grads]):
            self.add("program = tl.program_id(0)")
            self.add(f"size = batch.to(tl.int64) * {state}")
            tables = s * sum(self.tables().values())
            self.add(
                f"mine = partials + program * ({self.ends[-1]} + steps.to(tl.int64) * {tables})"
            )
            for name, shape in sums.items():
                self.add(f"{name} = tl.zeros({shape}, tl.float32)")
            loop = "range(program, tl.cdiv(batch, BLOCK), tl.num_programs(0))"
            with self.block(f"for block in {loop}:"):
                self.add("rows = tl.arange(0, BLOCK).to(tl.int64) + block * BLOCK")
                self.add(f"gy = tl.zeros((BLOCK, {pad}), tl.float32)")
                for j, (_, pn) in conds.items():
                    self.add(f"sum_cond{j} = tl.zeros((BLOCK, {pn}), tl.float32)")
                with self.block("for m in range(0, steps):"):
                    self.add("n = steps - 1 - m", f"at = numbers + n * {s * (s + 2)}")
                    for j, k in enumerate(ks):
                        self.add(f"{k} = tl.load(at + {s + s * s + j}) * gy")
                    with self.block("for o in range(tl.load(first + n), tl.load(first + n + 1)):"):
                        self.add(f"g = rows_of(grad + o * size, rows, batch, {state}, {pad})")
                        self.add("gy += g")
                        for j, k in enumerate(ks):
                            self.add(f"{k} += tl.load(weights + o * {s} + {j}) * g")
                    if s == 1:
                        self.add("q = n")
                        self.stage("k0", "at")
                    else:
                        with self.block(f"for e in range(0, {s}):"):
                            self.add(f"i = {s - 1} - e", f"q = n * {s} + i")
                            self.add(f"g = {ks[-1]}")
                            for j, k in enumerate(ks[:-1]):
                                self.add(f"g = tl.where(i == {j}, {k}, g)")
                            self.stage("g", "at + i")
                            for j, k in enumerate(ks[:-1]):
                                self.add(f"{k} += tl.load(at + {s} + i * {s} + {j}) * g0")
                self.add(f"put_rows(grad_y0, rows, batch, gy, {state}, {pad})")
                for j, (n, pn) in conds.items():
                    self.add(f"put_rows(grad_cond{j}, rows, batch, sum_cond{j}, {n}, {pn})")
            self.store(self.ends)
        return "\n".join(self.lines) + "\n"

    def sums(self) -> dict[str, str]:
        """The tiles that add up the gradients of parameters, and their shapes."""
        found = {}
        for p, column, k, matrix in reads(self.network):
            if self.wanted.parameters[p]:
                n = padded(self.shapes[p][0])
                found[f"sum{p}_{column}"] = f"({n}, {padded(k)})" if matrix else f"({n},)"
        return found

    def store(self, ends: list[int]) -> None:
        """Write the partial sums of this program, laid out as the parameters are."""
        for p, column, k, matrix in reads(self.network):
            if self.wanted.parameters[p]:
                n, name, stride = self.shapes[p][0], f"sum{p}_{column}", self.stride(p)
                at = f"mine + {ends[p] + column}"
                if matrix:
                    sides = f"{n}, {k}, {stride}, {padded(n)}, {padded(k)}"
                    self.add(f"put_matrix({at}, {name}, {sides})")
                else:
                    self.add(f"put_vector({at}, {name}, {n}, {stride}, {padded(n)})")

    def tables(self) -> dict[int, int]:
        """The widths of the tables whose gradients are wanted."""
        widths = {x.table: x.width for x in self.network.layers}
        return {i: widths[i] for i in used(self.network)[0] if self.wanted.tables[i]}

    def conds(self) -> dict[int, tuple[int, int]]:
        """The widths of the conditions whose gradients are wanted, and padded."""
        widths = {x.cond: x.width for x in self.network.layers}
        numbers = [i for i in used(self.network)[1] if self.wanted.conds[i]]
        return {i: (widths[i], padded(widths[i])) for i in numbers}

    def stage(self, grad: str, time: str) -> None:
        """Write the field again at a stage's input, and g0, what comes back through it."""
        state, pad = self.width(0)
        last = len(self.network.layers)
        self.add(f"t = tl.load({time})")
        self.add(f"v0 = rows_of(kept + q * size, rows, batch, {state}, {pad})")
        self.field(derivatives=True)
        self.known = {last: grad}
        self.columns: dict[int, str] = {}
        for value in range(last, 0, -1):
            if value in self.known:
                self.back(value, self.network.layers[value - 1])
        if 0 not in self.known:
            self.add(f"g0 = tl.zeros((BLOCK, {pad}), tl.float32)")
        self.add("gy += g0")
        before = 0
        for j, width in self.tables().items():
            if j in self.columns:
                at = f"mine + {self.ends[-1]} + {before} * steps.to(tl.int64) + q * {width}"
                args = f"{self.columns[j]}, {width}, {padded(width)}"
                self.add(f"add_vector({at}, {args})")
            before += self.stages * width

    def give(self, value: int, grad: str) -> None:
        """Add to the gradient of a value."""
        if value in self.known:
            self.add(f"g{value} = {self.known[value]} + {grad}")
        elif grad != f"g{value}":
            self.add(f"g{value} = {grad}")
        self.known[value] = f"g{value}"

    def back(self, value: int, layer: Layer) -> None:
        """Write the backward pass of a layer."""
        plain = layer.activation == "identity"
        b = f"b{value}"
        self.add(f"{b} = {self.known[value]}" + ("" if plain else f" * d{value}"))
        for skip in layer.skips:
            self.give(skip, self.known[value])
        wanted = self.wanted
        by_bias = layer.bias is not None and wanted.parameters[layer.bias]
        by_time = layer.time is not None and wanted.parameters[layer.time[0]]
        by_table = layer.table is not None and wanted.tables[layer.table]
        if by_bias or by_time or by_table:
            self.add(f"s{value} = tl.sum({b}, 0)")
        if by_bias:
            self.add(f"sum{layer.bias}_0 += s{value}")
        if by_time:
            self.add(f"sum{layer.time[0]}_{layer.time[1]} += t * s{value}")
        if by_table:
            before = self.columns.get(layer.table)
            self.columns[layer.table] = f"{before} + s{value}" if before else f"s{value}"
        if layer.cond is not None and wanted.conds[layer.cond]:
            self.add(f"sum_cond{layer.cond} += {b}")
        for term in layer.terms:
            if term.weight is None:
                self.give(term.source, b)
                continue
            if wanted.parameters[term.weight]:
                name = f"sum{term.weight}_{term.column}"
                dot = (
                    f"tl.dot(tl.trans({b}), v{term.source}, acc={name}, input_precision=PRECISION)"
                )
                self.add(f"{name} = {dot}")
            tile = self.matrix("matrix", term, value)
            self.give(term.source, f"tl.dot({b}, {tile}, input_precision=PRECISION)")
