"""What the sources of all kernels of a network have in common: its layers, tile by tile.

A value is a list of tiles, each of at most so many columns: Triton takes a whole operand of a dot
into registers.
"""

from __future__ import annotations

import linecache
import types
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import triton
import triton.language as tl
from fmft_fast.kernels import tiles

from fmft_fast.ops.network import Network, Term

Shapes = tuple[tuple[int, ...], ...]
NONZERO_AT_ZERO = ("sigmoid", "softplus")
NAMES = [name for name, value in vars(tiles).items() if hasattr(value, "arg_names")]


def padded(width: int) -> int:
    """The side of a tile that holds `width` numbers; `tl.dot` takes no side below 16."""
    return max(16, triton.next_power_of_2(width))


def pieces(width: int, tile: int) -> list[tuple[int, int, int]]:
    """The tiles of so many columns: first column, columns, and columns with padding."""
    return [
        (at, min(tile, width - at), padded(min(tile, width - at))) for at in range(0, width, tile)
    ]


def used(network: Network) -> tuple[list[int], list[int]]:
    """The numbers of the tables and of the conditions that the layers read."""
    tables = {x.table for x in network.layers if x.table is not None}
    conds = {x.cond for x in network.layers if x.cond is not None}
    return sorted(tables), sorted(conds)


def compile_kernel(source: str, **functions: Any) -> Any:
    """The kernel of a source that may call the functions of `tiles`, and those given."""
    # Triton reads the source of a function through `inspect`, which asks linecache.
    name = f"<trajectory {sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    module = types.ModuleType(__name__)
    vars(module).update({n: getattr(tiles, n) for n in NAMES}, triton=triton, tl=tl, **functions)
    exec(compile(source, name, "exec"), vars(module))
    return vars(module)["kernel"]


class Writer:
    """Lines of a kernel, and what all kernels write."""

    # The arguments that are numbers: kernels are not compiled anew for values of theirs.
    counts = ("batch", "steps", "keep")

    def __init__(self, network: Network, shapes: Shapes, stages: int, tile: int) -> None:
        self.network, self.shapes, self.stages, self.tile = network, shapes, stages, tile
        self.last = len(network.layers)
        self.lines: list[str] = []
        self.depth = 0

    def add(self, *lines: str) -> None:
        """Append lines at the depth of now."""
        self.lines += ["    " * self.depth + line for line in lines]

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """Write what follows inside a block."""
        self.add(head)
        self.depth += 1
        yield
        self.depth -= 1

    @contextmanager
    def kernel(self, arguments: list[str]) -> Iterator[None]:
        """Write the body of the kernel, which takes the tensors of the network as well."""
        tables, conds = used(self.network)
        arguments = [
            *arguments,
            *(f"p{i}" for i in range(len(self.shapes))),
            *(f"table{i}" for i in tables),
            *(f"cond{i}" for i in conds),
            "BLOCK: tl.constexpr",
            "PRECISION: tl.constexpr",
        ]
        self.add(f"@triton.jit(do_not_specialize={list(self.counts)})")
        with self.block(f"def kernel({', '.join(arguments)}):"):
            yield

    def pieces(self, value: int) -> list[tuple[int, int, int]]:
        """The tiles of a value."""
        return pieces(self.network.width(value), self.tile)

    def stride(self, parameter: int) -> int:
        """The distance of a parameter's rows."""
        shape = self.shapes[parameter]
        return shape[1] if len(shape) == 2 else 1

    def matrix(self, kind: str, term: Term, value: int, row: int, column: int) -> str:
        """A tile of the matrix of a term."""
        assert term.weight is not None
        (i, n, pn), (j, k, pk) = self.pieces(value)[row], self.pieces(term.source)[column]
        stride = self.stride(term.weight)
        at = i * stride + term.column + j
        return f"{kind}(p{term.weight} + {at}, {n}, {k}, {stride}, {pn}, {pk})"

    def rows(
        self, pointer: str, width: int, piece: tuple[int, int, int], where: str = "rows, batch"
    ) -> str:
        """A tile of the program's rows, or of others below a bound, of a matrix."""
        i, n, pn = piece
        return f"rows_of({pointer} + {i}, {where}, {width}, {n}, {pn})"

    def put_rows(self, pointer: str, name: str, width: int, where: str = "rows, batch") -> None:
        """Write a store of the program's rows, or of others below a bound, of a matrix."""
        for c, (i, n, pn) in enumerate(pieces(width, self.tile)):
            x = f"{name}_{c}"
            self.add(f"put_rows({pointer} + {i}, {where}, {x}, {width}, {n}, {pn})")

    def zeros(self, name: str, width: int) -> None:
        """Write zeros in the form of a value."""
        for c, (_, _, pn) in enumerate(pieces(width, self.tile)):
            self.add(f"{name}_{c} = tl.zeros((BLOCK, {pn}), tl.float32)")

    def weight(self, at: str) -> str:
        """A coefficient of the method times h."""
        return f"tl.load({at})"

    def time(self, at: str) -> None:
        """Write the time of a stage."""
        self.add(f"t = tl.load({at})")

    def times(self, vector: str) -> str:
        """The time times a vector, as it is added to a tile."""
        return f"(t * {vector})[None, :]"

    def combine(self, name: str, weights: str, base: str, terms: list[str]) -> None:
        """Write base plus the sum of terms times numbers on the device."""
        for j in range(len(terms)):
            self.add(f"w{j} = {self.weight(f'{weights} + {j}')}")
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
                self.add(f"{z} += {self.times(f'vector({at}, {n}, {stride}, {pn})')}")
            if layer.table is not None:
                at = f"table{layer.table} + q * {layer.width} + {i}"
                self.add(f"{z} += vector({at}, {n}, 1, {pn})[None, :]")
            if layer.cond is not None:
                self.add(f"{z} += {self.rows(f'cond{layer.cond}', layer.width, (i, n, pn))}")
            self.activation(value, c, n < pn, derivative)

    def activation(self, value: int, c: int, is_padded: bool, derivative: bool) -> None:
        """Write what follows the sums of a layer's tile."""
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
        """Write all layers."""
        for value in range(1, self.last + 1):
            self.layer(value, derivatives)
