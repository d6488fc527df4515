"""The source of the kernels of solves in which every sample has steps of its own.

The method's coefficients [c, a, b, ...] and, per sample, the step are on the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fmft_fast.kernels import control
from fmft_fast.kernels.trajectory_source import Backward, Wanted
from fmft_fast.kernels.writer import Shapes, Writer, compile_kernel

from fmft_fast.ops.network import Network

# What is known of every sample; see `control`. The last one is the last error ratio.
ROW = ("s", "h", "end", "accepted", "rejected", "attempts", "outcome", "guess", "slope", "last")
# Beyond all rows: a sample that has no step there.
NOWHERE = 2**62


@lru_cache(256)
def rows_kernel(network: Network, shapes: Shapes, stages: int, tile: int) -> Any:
    """The kernel of a number of attempts of every sample, or until all have come to their end."""
    functions = {"control_rows": control.control_rows, "measures": control.measures}
    return compile_kernel(_Rows(network, shapes, stages, tile).source(), **functions)


@lru_cache(256)
def rows_backward_kernel(
    network: Network, shapes: Shapes, stages: int, tile: int, wanted: Wanted
) -> Any:
    """The kernel of the gradient, the steps being constant."""
    return compile_kernel(_RowsBackward(network, shapes, stages, tile, wanted).source())


class _ByRow(Writer):
    """Times and steps of every row in float64: t_start, t_end, dt; and in float32: h32."""

    def weight(self, at: str) -> str:
        return f"(tl.load({at}).to(tl.float32) * h32)"

    def time(self, at: str) -> None:
        self.add(f"node = tl.load({at})")
        self.add("t = tl.where(node == 1.0, t_end, t_start + node * dt).to(tl.float32)")

    def times(self, vector: str) -> str:
        return f"t[:, None] * {vector}[None, :]"


class _Rows(_ByRow):
    counts = ("batch", "rounds", "phase", "keep")

    def source(self) -> str:
        state = self.network.state
        tensors = ["y", "slopes", "kept", "log", "state", "given"]
        with self.kernel([*tensors, *self.counts]):
            self.add("rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)")
            self.add("live = rows < batch", f"direction = tl.load(given + {_at('DIRECTION')})")
            # The time of the end comes after the powers of the dense output and the first time.
            end = control.METHOD.value + self.stages * (self.stages + 7) + 1
            self.add(f"target = tl.load(given + {end})")
            for i, name in enumerate(ROW):
                at = f"state + {i} * batch.to(tl.int64) + rows"
                other = f"{control.DONE.value}.0" if name == "outcome" else "1.0"
                self.add(f"{name} = tl.load({at}, mask=live, other={other})")
            for c, piece in enumerate(self.pieces(0)):
                self.add(f"y_{c} = {self.rows('y', state, piece)}")
                self.add(f"k0_{c} = {self.rows('slopes', state, piece)}")
            more = f"more = tl.max((outcome == {control.RUNNING.value}).to(tl.int32), 0)"
            self.add(more)
            # A loop in a `while` breaks the compiler of Triton 3.2 and 3.3.
            with self.block("for round in range(0, rounds):"), self.block("if more > 0:"):
                self.attempt()
                self.control()
                self.add(more)
            self.put_rows("y", "y", state)
            self.put_rows("slopes", "k0", state)
            for i, name in enumerate(ROW):
                self.add(f"tl.store(state + {i} * batch.to(tl.int64) + rows, {name}, mask=live)")
        return "\n".join(self.lines) + "\n"

    def attempt(self) -> None:
        """Write the stages, and where the step ends."""
        state, s = self.network.state, self.stages
        ks = [f"k{j}" for j in range(s)]
        method = f"given + {control.METHOD.value}"
        self.add(f"runs = live & (outcome == {control.RUNNING.value})")
        self.add("t_start = direction * s", "t_end = direction * end", "dt = direction * h")
        self.add("h32 = dt.to(tl.float32)[:, None]")
        for k in ks[1:]:
            self.zeros(k, state)
        self.keep("0", "y")
        last = f"tl.where(phase == {control.STEP.value}, {s}, phase + 1)"
        with self.block(f"for i in range(tl.minimum(phase, 1), {last}):"):
            self.combine("v0", f"{method} + {s} + i * {s}", "y", ks[:-1])
            self.keep("i", "v0")
            self.time(f"{method} + i")
            self.field(derivatives=False)
            for c in range(len(self.pieces(0))):
                for j, k in enumerate(ks):
                    self.add(f"{k}_{c} = tl.where(i == {j}, v{self.last}_{c}, {k}_{c})")
        self.combine("next", f"{method} + {s + s * s}", "y", ks)
        self.add(*(f"w{j} = {self.weight(f'{method} + {2 * s + s * s + j}')}" for j in range(s)))

    def keep(self, stage: str, name: str) -> None:
        """Write a store of a stage's input; where nothing is kept, all go to the same place."""
        slot = f"accepted.to(tl.int64) * keep + {stage} * tl.minimum(keep, 1)"
        self.add(f"there = tl.where(runs, ({slot}) * batch + rows, {NOWHERE})")
        self.put_rows("kept", name, self.network.state, f"there, {NOWHERE}")

    def control(self) -> None:
        """Write the measures of the rows, and what follows from them."""
        ks = [f"k{j}" for j in range(self.stages)]
        parts = range(len(self.pieces(0)))
        is_step, is_start = (f"phase == {_at(name)}" for name in ("STEP", "START"))
        for c, (_, n, pn) in enumerate(self.pieces(0)):
            self.add(f"error = {' + '.join(f'w{j} * {k}_{c}' for j, k in enumerate(ks))}")
            self.add(f"error = tl.where({is_step}, error, k1_{c} - k0_{c})")
            self.add(f"error = tl.where({is_start}, k0_{c}, error)")
            self.add(f"next_{c} = tl.where({is_step}, next_{c}, y_{c})")
            tile = f"y_{c}, next_{c}, error, k0_{c}, rows, batch, given, {n}, {pn}"
            self.add(f"errors_{c}, sizes_{c}, bad_{c} = measures({tile})")
        for name in ("errors", "sizes", "bad"):
            self.add(f"{name} = {' + '.join(f'tl.sum({name}_{c}, 1)' for c in parts)}")
        for name, total in (("ratio", "errors"), ("size", "sizes")):
            self.add(f"{name} = tl.sqrt({total} / tl.load(given + {_at('ENTRIES')}))")
        self.add("where = log + 3 * accepted.to(tl.int64) * batch + rows")
        first = f"given, phase, target, tl.load(given + {control.METHOD.value + 1})"
        row = ", ".join(ROW)
        self.add(f"{row}, accepts = control_rows({first}, ratio, size, bad, {row})")
        for i, name in enumerate(("t_start", "t_end", "dt")):
            self.add(f"tl.store(where + {i} * batch, {name}, mask=accepts)")
        for c in parts:
            self.add(f"y_{c} = tl.where(accepts[:, None], next_{c}, y_{c})")
            self.add(f"k0_{c} = tl.where(accepts[:, None], {ks[-1]}_{c}, k0_{c})")
        first_step = f"tl.load(given + {_at('FIRST_STEP')})"
        probe, step = control.PROBE.value, control.STEP.value
        self.add(f"guesses = ({is_start}) & ({first_step} != {first_step})")
        self.add(f"phase = tl.where(guesses, {probe}, {step})")


class _RowsBackward(_ByRow, Backward):
    tensors = ("grad_y0", "partials", "grad", "kept", "method", "log", "counts")
    steps = "most"

    def begin(self) -> None:
        for c, piece in enumerate(self.pieces(0)):
            self.add(f"gy_{c} = {self.rows('grad', self.network.state, piece)}")
        self.add("count = tl.load(counts + rows, mask=rows < batch, other=0)")
        self.add("most = tl.max(count, 0)")

    def numbers(self) -> None:
        self.add("at = method", "runs = n < count")
        for i, name in enumerate(("t_start", "t_end", "dt")):
            at = f"log + (3 * n.to(tl.int64) + {i}) * batch + rows"
            self.add(f"{name} = tl.load({at}, mask=runs, other=0.0)")
        self.add("h32 = dt.to(tl.float32)[:, None]")

    def outputs(self, ks: list[str]) -> None:
        pass

    def inputs(self, piece: tuple[int, int, int]) -> str:
        there = f"tl.where(runs, q.to(tl.int64) * batch + rows, {NOWHERE})"
        return self.rows("kept", self.network.state, piece, f"{there}, {NOWHERE}")

    def times_sum(self, grad: str, total: str) -> str:
        return f"tl.sum(t[:, None] * {grad}, 0)"


def _at(name: str) -> int:
    return getattr(control, name).value
