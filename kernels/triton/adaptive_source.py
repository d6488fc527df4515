"""The source of the kernel that attempts a step of a network, see `control`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import triton
from fmft_fast.kernels import control
from fmft_fast.kernels.writer import Shapes, Writer, compile_kernel

from fmft_fast.ops.network import Network


@lru_cache(256)
def attempt_kernel(network: Network, shapes: Shapes, stages: int, tile: int) -> Any:
    """The kernel of an attempted step, of every tile of the batch in a program of its own.

    The first slope, and the slope after a first guess at a step, are attempts with other numbers.
    A program that is alone controls the steps as well, and makes many attempts.
    """
    source = _Attempt(network, shapes, stages, tile).source()
    functions = {"control": control.control, "measures": control.measures}
    return compile_kernel(source, **functions)


def places(stages: int) -> dict[str, int]:
    """The sizes that the step control is compiled for."""
    return {
        "STAGES": stages,
        "PLACES": triton.next_power_of_2(stages * (stages + 3)),
        "STAGE_PLACES": triton.next_power_of_2(stages),
    }


class _Attempt(Writer):
    counts = ("batch", "attempts", "keep", "outputs")

    def source(self) -> str:
        tensors = ["out", "kept", "carried", "log", "sums", "state", "given", "numbers", "weights"]
        with self.kernel([*tensors, *self.counts, "ALONE: tl.constexpr"]):
            self.add("program = tl.program_id(0).to(tl.int64)")
            self.add("rows = program * BLOCK + tl.arange(0, BLOCK)")
            self.add(f"size = batch.to(tl.int64) * {self.network.state}")
            with (
                self.block("for attempt in range(0, attempts):"),
                self.block(f"if tl.load(state + {_at('OUTCOME')}) == {control.RUNNING.value}:"),
            ):
                self.attempt()
                self.outputs()
                with self.block("if ALONE:"):
                    # What the threads have written is seen by all of them.
                    self.add("tl.debug_barrier()", self.control(), "tl.debug_barrier()")
        return "\n".join(self.lines) + "\n"

    def attempt(self) -> None:
        """Write the stages, where the step ends, and the tile's sums."""
        state, s = self.network.state, self.stages
        ks = self.slopes()
        parts = range(len(self.pieces(0)))
        self.add(f"place = tl.load(state + {_at('PLACE')}).to(tl.int64)")
        self.add("start = carried + place * 2 * size")
        self.add("target = carried + (1 - place) * 2 * size")
        # Where nothing is kept, all stages go to the same place; see `Forward.stage`.
        self.add(f"step = kept + tl.load(state + {_at('ACCEPTED')}).to(tl.int64) * keep * size")
        self.add("later = tl.minimum(keep, 1) * size")
        self.add(f"phase = tl.load(state + {_at('PHASE')}).to(tl.int32)")
        for c, piece in enumerate(self.pieces(0)):
            self.add(f"y_{c} = {self.rows('start', state, piece)}")
            self.add(f"k0_{c} = {self.rows('start + size', state, piece)}")
        for k in ks[1:]:
            self.zeros(k, state)
        self.put_rows("step", "y", state)
        last = f"tl.where(phase == {control.STEP.value}, {s}, phase + 1)"
        with self.block(f"for i in range(tl.minimum(phase, 1), {last}):"):
            self.combine("v0", f"numbers + {s} + i * {s}", "y", ks[:-1])
            self.put_rows("step + i * later", "v0", state)
            self.add("t = tl.load(numbers + i)")
            self.field(derivatives=False)
            for c in parts:
                new = f"v{self.last}_{c}"
                self.add(
                    *(f"{k}_{c} = tl.where(i == {j}, {new}, {k}_{c})" for j, k in enumerate(ks))
                )
        self.combine("end", f"numbers + {s + s * s}", "y", ks)
        self.add(*(f"w{j} = tl.load(numbers + {2 * s + s * s + j})" for j in range(s)))
        for c, (_, n, pn) in enumerate(self.pieces(0)):
            self.add(f"error = {' + '.join(f'w{j} * {k}_{c}' for j, k in enumerate(ks))}")
            tile = f"y_{c}, end_{c}, error, k0_{c}, rows, batch, given, {n}, {pn}"
            names = ", ".join(f"{name}_{c}" for name in ("errors", "sizes", "bad"))
            self.add(f"{names} = measures({tile})")
            self.add(f"last_{c} = tl.where(phase == {control.START.value}, k0_{c}, {ks[-1]}_{c})")
        for i, name in enumerate(("errors", "sizes", "bad")):
            total = " + ".join(f"tl.sum({name}_{c})" for c in parts)
            self.add(f"tl.store(sums + {i} * tl.num_programs(0) + program, {total})")
        self.put_rows("target", "end", state)
        self.put_rows("target + size", "last", state)

    def outputs(self) -> None:
        """Write the outputs inside the step."""
        loop = [f"tl.load(state + {_at(name)}).to(tl.int32)" for name in ("NEXT", "BEYOND")]
        with self.block(f"for o in range({', '.join(loop)}):"):
            self.combine("x", f"weights + o * {self.stages}", "y", self.slopes())
            self.put_rows("out + o * size", "x", self.network.state)

    def control(self) -> str:
        sizes = ", ".join(str(x) for x in places(self.stages).values())
        return f"control(state, given, numbers, weights, sums, log, 1, outputs, {sizes})"

    def slopes(self) -> list[str]:
        return [f"k{j}" for j in range(self.stages)]


def _at(name: str) -> int:
    return getattr(control, name).value
