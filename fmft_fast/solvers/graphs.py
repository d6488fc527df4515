"""Steps of a discrete solve, and their vector-Jacobian products, recorded once and replayed.

A field that no whole-trajectory kernel takes costs a host many launches per evaluation. The first
solve of a kind runs as usual and shows whether the field can be recorded at all: one that draws
random numbers, changes buffers or changes attributes of its modules cannot. From the second one on
a step is one launch. Of a kind are solves that share everything that a recorded step holds fixed:
field, shapes, dtypes, strides, memory of parameters and buffers, plain attributes of all modules,
autocast and precision settings, stream and thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..fusion import hooks_on_all_modules
from ..ops.contract import is_traced
from .recorder import CaptureError, Recorded, find_recorder
from .recordings import Recordings, autocast, layout, settings, version

if TYPE_CHECKING:
    from .discrete_adjoint import DiscretePlan

# Each recorded step owns the memory of one evaluation and its graph.
LIMIT = 8
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
OWN = {"_parameters", "_buffers", "_modules", "_compiled_call_impl"}
REFUSED = ("DataParallel", "DistributedDataParallel", "OptimizedModule")
HALF = (torch.float16, torch.bfloat16)


_cache = Recordings(LIMIT)


def clear() -> None:
    """Drop all recorded steps and their memory."""
    _cache.clear()


def describe(field: nn.Module) -> tuple | None:
    """All that a recorded evaluation of a field holds fixed; None if it must not be recorded."""
    if hooks_on_all_modules():
        return None
    marks: list[Any] = []
    for module in field.modules():
        if any(base.__name__ in REFUSED for base in type(module).__mro__):
            return None
        for name, value in vars(module).items():
            if "_hook" in name:
                if value and name.endswith("_hooks"):
                    return None
            elif name not in OWN:
                marks.append((name, _mark(value)))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                if tensor.layout != torch.strided or is_lazy(tensor):
                    return None
                marks.append((tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.requires_grad))
    return tuple(marks)


def _mark(value: Any, depth: int = 3) -> Any:
    """What tells that an attribute is as it was, as far as that shows from outside."""
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        return id(value), value.data_ptr(), version(value)
    if isinstance(value, (list, tuple, dict, set)):
        if not depth or len(value) > 64:
            return id(value), len(value)
        items = value.items() if isinstance(value, dict) else value
        return type(value), tuple(_mark(item, depth - 1) for item in items)
    return id(value)


def find_graphs(
    plan: DiscretePlan, x: Tensor, table: Tensor, cond: Tensor | None, params: Sequence[Tensor] = ()
) -> StepGraphs | None:
    """The recorded steps of a solve, also before they are recorded; None if they never are."""
    field = plan.field.base
    if plan.checkpoint_every or not isinstance(field, nn.Module) or not x.numel():
        return None
    recorder = find_recorder(x.device)
    if recorder is None or field in _cache.failed or is_traced():
        return None
    own = list(field.parameters())
    given = [t for t in (x, table, cond) if t is not None]
    if any(type(t) not in (Tensor, nn.Parameter) for t in (*given, *own)):
        return None
    if any(t.device != x.device for t in (*given, *own, *field.buffers())):
        return None
    mine = {id(p) for p in own}
    if any(id(p) not in mine for p in params):
        return None
    marks = describe(field)
    if marks is None:
        return None
    graphs = StepGraphs(plan, recorder, marks, x, table, cond)
    return None if graphs.verdict is False else graphs


class StepGraphs:
    """The recorded steps of one solve."""

    def __init__(
        self,
        plan: DiscretePlan,
        recorder: Any,
        marks: tuple,
        x: Tensor,
        table: Tensor,
        cond: Tensor | None,
    ):
        self.plan, self.recorder, self.marks = plan, recorder, marks
        self.device, self.cond = x.device, cond
        self.table = table.detach()
        self.autocast = autocast(x.device)
        field = plan.field.base
        assert isinstance(field, nn.Module)
        self.base = field
        row = (table.shape[1:], table.dtype)
        tableau = (plan.tableau.a, plan.tableau.b)
        layouts = (layout(x), row, layout(cond), plan.field.dtype)
        self.kind = (
            _cache.know(field),
            marks,
            layouts,
            tableau,
            plan.kernels.name,
            self.autocast,
        )
        self.verdict = _cache.seen.get(self.kind)
        self._before = self._state() if self.verdict is None else None

    def _state(self) -> tuple:
        """What an evaluation may change that a replay would not, or not in the same way."""
        random = [torch.get_rng_state()]
        if self.device.type == "cuda":
            random.append(torch.cuda.get_rng_state(self.device))
        versions = [version(b) for b in self.base.buffers()]
        return [bytes(r.numpy()) for r in random], versions, describe(self.base)

    def settle(self) -> None:
        """Called after steps that ran as usual: note whether they can be recorded next time."""
        if self._before is not None:
            _cache.note(self.kind, self._before == self._state())
            self._before = None

    def _recorded(self, part: Any, make: Callable[[], Any]) -> Any:
        """What is recorded of a part; None in its first solve and after a failure."""
        if not self.verdict or self.base in _cache.failed:
            return None
        key = (*self.kind, settings(self.device), part)
        try:
            return _cache.get(key, make)
        except CaptureError as error:
            advice = (
                "To make it faster, let it compute on the device only, without reading results "
                "back. "
            )
            _cache.give_up(self.base, type(self.base).__name__, error, advice)
            return None

    def forward(
        self, x0: Tensor, keep: bool = True
    ) -> tuple[list[Tensor], list[list[Tensor]]] | None:
        """States [N + 1] and stage inputs [N][s]; None where the steps run as usual.

        Without `keep` there is the final state only, and no stage input.
        """
        step = self._recorded("forward", lambda: _Forward(self, x0))
        if step is None:
            return None
        step.begin(x0, self.cond)
        states, inputs = [x0.detach()] if keep else [], []
        for n, h in enumerate(self.plan.h):
            step.feed(self.table[n], h)
            step.recorded.replay()
            if keep:
                inputs.append([states[-1], *(x.clone() for x in step.recorded.outputs)])
                states.append(step.y.clone())
        self.plan.field.evaluations += len(self.plan.h) * self.plan.tableau.stages
        return states or [step.y.clone()], inputs

    def backward(
        self,
        grad: Tensor,
        inputs: list[list[Tensor]],
        leaves: Sequence[Tensor],
        cond_grad: bool,
    ) -> tuple[Tensor, list[Tensor | None]] | None:
        """dL/dx0 and the gradients of the leaves; None where the steps run as usual.

        Args:
            grad: gradient of the result, of all states or the final one.
            inputs: stage inputs [N][s]; used up.
            leaves: parameters, and the condition at the end if `cond_grad`.
            cond_grad: whether the condition gets a gradient.
        """
        if describe(self.base) != self.marks:
            return None  # memory that a recorded step would read may be gone
        part = ("backward", tuple(map(id, leaves[: len(leaves) - cond_grad])), cond_grad)
        step = self._recorded(part, lambda: _Backward(self, inputs[0], leaves, cond_grad))
        if step is None:
            return None
        steps, every = len(self.plan.h), self.plan.save_all
        step.begin(grad[steps] if every else grad, self.cond)
        for n in range(steps - 1, -1, -1):
            step.run(inputs[n], self.table[n], self.plan.h[n], grad[n] if every else None)
            inputs[n] = []
        self.plan.field.evaluations += steps * self.plan.tableau.stages
        return step.lam.clone(), step.gradients()


class _Recording:
    """The memory that a recorded step reads, and how it is fed; it holds on to no field."""

    recorded: Recorded

    def __init__(self, solve: StepGraphs):
        self.row = solve.table[0].clone()
        self.h = torch.zeros((), dtype=torch.float64, device=solve.device)
        self.cond = None if solve.cond is None else solve.cond.detach().clone()

    def record(
        self, solve: StepGraphs, work: Callable[[DiscretePlan, Sequence[Tensor]], list[Tensor]]
    ) -> None:
        """Record what one step does, given a plan of this step alone and its times [s]."""
        field, (enabled, dtype) = solve.plan.field, solve.autocast
        # A field of its own: evaluations count where they are replayed.
        plan = replace(solve.plan, field=type(field)(field.base, field.dtype), h=[self.h])
        times, fed = self.row.unbind(), [self.row, *([] if self.cond is None else [self.cond])]
        versions = [version(x) for x in fed]

        def run() -> list[Tensor]:
            # What autocast caches was not computed in the recording.
            casts = torch.autocast(solve.device.type, dtype, enabled, cache_enabled=False)
            with torch.no_grad(), casts:
                return work(plan, times)

        self.recorded = solve.recorder.record(run)
        if versions != [version(x) for x in fed]:
            raise CaptureError("it changes t or its condition in place")

    def feed(self, row: Tensor, h: float | Tensor) -> None:
        """Set the times and the size of a step."""
        self.row.copy_(row)
        if isinstance(h, Tensor):
            self.h.copy_(h)
        else:
            self.h.fill_(h)

    def feed_cond(self, cond: Tensor | None) -> None:
        """Set the condition of a solve."""
        if self.cond is not None and cond is not None:
            self.cond.copy_(cond.detach())


class _Forward(_Recording):
    """One step; the state moves on in place, the outputs are the stage inputs after the first."""

    def __init__(self, solve: StepGraphs, x0: Tensor):
        super().__init__(solve)
        y, cond = x0.detach().clone(), self.cond

        def work(plan: DiscretePlan, times: Sequence[Tensor]) -> list[Tensor]:
            y1, inputs = plan.step(0, y, lambda n, i, x: plan.field(times[i], x, cond))
            y.copy_(y1)
            return inputs[1:]

        self.y = y
        self.record(solve, work)

    def begin(self, x0: Tensor, cond: Tensor | None) -> None:
        """Before the first step."""
        self.y.copy_(x0)
        self.feed_cond(cond)


class _Backward(_Recording):
    """One step back; lambda and the sums move on in place."""

    def __init__(
        self, solve: StepGraphs, inputs: Sequence[Tensor], leaves: Sequence[Tensor], cond_grad: bool
    ):
        super().__init__(solve)
        own = self.inputs = [x.detach().clone() for x in inputs]
        lam = self.lam = torch.zeros_like(own[0])
        sums = self.sums = [
            torch.zeros_like(p, dtype=torch.float32 if p.dtype in HALF else p.dtype) for p in leaves
        ]
        used = self.used = [False] * len(leaves)
        params, fixed = list(leaves[: len(leaves) - cond_grad]), self.cond
        h = self.h

        def work(plan: DiscretePlan, times: Sequence[Tensor]) -> list[Tensor]:
            def pull(i: int, k_bar: Tensor) -> Tensor:
                cond = None if fixed is None else fixed.detach().requires_grad_(cond_grad)
                with torch.enable_grad():
                    y = own[i].detach().requires_grad_()
                    k = plan.field(times[i], y, cond)
                if not k.requires_grad:
                    return torch.zeros_like(k_bar)
                asked = [*params, *([cond] if cond_grad and cond is not None else []), y]
                found = torch.autograd.grad(k, asked, k_bar.to(k.dtype), allow_unused=True)
                for j, grad in enumerate(found[:-1]):
                    if grad is not None:
                        used[j] = True
                        sums[j].add_(grad)
                return torch.zeros_like(k_bar) if found[-1] is None else found[-1]

            lam.copy_(plan.step_back(h, lam, pull))
            return []

        self.record(solve, work)

    def begin(self, lam: Tensor, cond: Tensor | None) -> None:
        """Before the last step."""
        self.lam.copy_(lam)
        for total in self.sums:
            total.zero_()
        self.feed_cond(cond)

    def run(
        self, inputs: Sequence[Tensor], row: Tensor, h: float | Tensor, grad: Tensor | None
    ) -> None:
        """Replay a step and add what its first state gets as an output."""
        for own, x in zip(self.inputs, inputs, strict=True):
            own.copy_(x)
        self.feed(row, h)
        self.recorded.replay()
        if grad is not None:
            self.lam.add_(grad)

    def gradients(self) -> list[Tensor | None]:
        """The gradients of the leaves, None where the field does not use one."""
        return [s.clone() if used else None for s, used in zip(self.sums, self.used, strict=True)]
