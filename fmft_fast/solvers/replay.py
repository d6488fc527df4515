"""A second evaluation of a field that equals the first, and gradients that are not lost.

The discrete adjoint evaluates the field again in the backward pass, out of order and outside of the
user's contexts. What an evaluation depends on besides its arguments has to be as it was, and a
graph has to end where the solver looks for gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GradientError
from ..ops.capture import is_capturing

_REMEDY = 'Use gradient="backprop", or put the field in eval() mode'


class Surroundings:
    """What an evaluation depends on besides its arguments: random numbers, buffers and autocast.

    Where the first evaluation drew random numbers (dropout) or changed buffers of its modules
    (batch or spectral norm), the generators or buffers are noted at every evaluation.

    Args:
        field: the user's callable; its buffers are known if it is an nn.Module.
        device: device of the state.
    """

    def __init__(self, field: Callable, device: torch.device):
        self.device = device
        self.autocast = torch.is_autocast_enabled(device.type)
        self.autocast_dtype = torch.get_autocast_dtype(device.type)
        modules = field.modules() if isinstance(field, nn.Module) else ()
        self.slots = [(m, name) for m in modules if m.training for name in m._buffers]
        self.notes: dict[tuple[int, int], tuple[list[Tensor], list[Tensor | None]]] = {}
        self.random = False
        self.first: Tensor | None = None
        self.last: Tensor | None = None

    def settled(self) -> None:
        """Called instead of the rest where an earlier solve has shown that nothing is to note."""
        self.slots = []

    def begin(self) -> None:
        """Called before the first evaluation of the forward pass."""
        self._before = self._generators()
        self._held = self._buffers()  # alive, or a new one could take the id of an old one
        self._values = [b if b is None else b.clone() for b in self._held]
        self._marks = self._versions()

    def compare(self, k: Tensor) -> None:
        """Called with the result of the first evaluation: find out what there is to note."""
        self.random = self._drew()
        pairs = zip(self.slots, self._versions(), self._marks, strict=True)
        # torch counts no version for running statistics, but for what lies next to them.
        modules = {module for (module, _), now, mark in pairs if now != mark}
        moved = [module in modules for module, _ in self.slots]
        self.slots = [slot for slot, m in zip(self.slots, moved, strict=True) if m]
        if self.noting:
            values = [value for value, m in zip(self._values, moved, strict=True) if m]
            self.notes[0, 0] = (self._before if self.random else [], values)
        del self._held, self._values
        self.first = self.last = self._reference(k)

    def _reference(self, k: Tensor) -> Tensor | None:
        """What a repeated evaluation is compared with; on a GPU that would sync."""
        return k.detach() if self.device.type == "cpu" else None

    @property
    def noting(self) -> bool:
        """Whether there is something to note."""
        return self.random or bool(self.slots)

    def note(self, n: int, i: int) -> None:
        """Called before evaluation (n, i) of the forward pass."""
        if self.noting:
            values = [b if b is None else b.clone() for b in self._buffers()]
            self.notes[n, i] = (self._generators() if self.random else [], values)

    def keep(self, k: Tensor) -> None:
        """Called with the result of every evaluation of the forward pass."""
        self.last = self._reference(k)

    def end(self) -> None:
        """Called after the forward pass: refuse what was not noted and is not compared later."""
        if not self.random and self.device.type != "cpu" and self._drew():
            raise GradientError(
                "random numbers were drawn during the solve, but not in its first evaluation of "
                f"the field, so they were not noted for the backward pass. {_REMEDY}"
            )

    def end_adaptive(self, slope: Tensor) -> None:
        """Called instead where step control has run before, with its first slope."""
        drew = self.random and self.device.type != "cpu"
        if drew or self.slots or _change(slope, self.first):
            raise GradientError(
                "the field draws random numbers or changes its buffers, so adaptive steps have no "
                "exact gradient: give steps=N, or put the field in eval() mode"
            )
        self.random = False  # what drew was another thread

    def restore(self, n: int, i: int) -> None:
        """Called before evaluation (n, i) is repeated."""
        if not self.noting:
            return
        generators, values = self.notes[n, i]
        if self.random:
            torch.set_rng_state(generators[0])
            for state in generators[1:]:
                torch.cuda.set_rng_state(state, self.device)
        for (module, name), value in zip(self.slots, values, strict=True):
            module._buffers[name] = value if value is None else value.clone()

    @staticmethod
    def check(k: Tensor, before: Tensor | None) -> None:
        """Called with the repeated result of the first and last evaluation: must be the same."""
        if change := _change(k, before):
            raise GradientError(
                "the field gave another result in the backward pass for the same input (relative "
                f"change {change:.1e}): it has a hidden state, such as a generator of its own or "
                "buffers of a module behind a lambda, or another thread drew random numbers "
                f"meanwhile. Pass the nn.Module itself as field. {_REMEDY}"
            )

    def autocasting(self) -> Any:
        """Autocast as in the forward pass."""
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Leave generators and buffers as they are after a replay."""
        devices = [self.device] if self.device.type == "cuda" else []
        buffers = self._buffers()
        try:
            with torch.random.fork_rng(devices=devices, enabled=self.random):
                yield
        finally:
            for (module, name), buffer in zip(self.slots, buffers, strict=True):
                module._buffers[name] = buffer

    def _generators(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        # A recording forbids to ask; what records has looked before.
        if self.device.type == "cuda" and not is_capturing():
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def _drew(self) -> bool:
        return not all(map(torch.equal, self._before, self._generators()))

    def _buffers(self) -> list[Tensor | None]:
        return [module._buffers[name] for module, name in self.slots]

    def _versions(self) -> list[tuple[int, int]]:
        return [
            (id(b), 0 if b is None or b.is_inference() else b._version) for b in self._buffers()
        ]


def _change(k: Tensor, before: Tensor | None) -> float:
    """Relative change beyond rounding, or 0; nothing to compare with is no change."""
    if before is None or not k.numel():
        return 0.0
    size, change = before.abs().max(), (k.detach() - before).abs().max()
    changed = change > torch.finfo(k.dtype).eps ** (2 / 3) * size
    return float(change / size) if changed else 0.0


class KnownTensors:
    """The tensors at which the solver picks up gradients; a field's graph must end there."""

    def __init__(self, tensors: Iterable[Tensor]):
        tensors = list(tensors)
        self.leaves = {id(t) for t in tensors if t.grad_fn is None}
        self.ends = {(t.grad_fn, t.output_nr): t for t in tensors if t.grad_fn is not None}

    def refuse_lost(self, k: Tensor, *own: Tensor) -> set:
        """Raise if k depends on a leaf that requires grad, is unknown and none of `own`.

        Returns:
            The ends that the walk met.
        """
        allowed = self.leaves | {id(t) for t in own}
        met: set = set()
        for _, leaf in _walk([(k.grad_fn, k.output_nr)], self.ends, met):
            if leaf is not None and id(leaf) not in allowed:
                raise GradientError(
                    f"the field depends on a tensor of shape {tuple(leaf.shape)} that requires "
                    "grad and is not known to the solver, so its gradient would be lost. Pass what "
                    "the field closes over as params=(...), or give it as cond=, or detach it"
                )
        return met

    def refuse_doubled(self, met: Iterable) -> None:
        """Raise if one of the ends was itself computed from known tensors."""
        for end in met:
            for edge, leaf in _walk(list(end[0].next_functions), (), set()):
                if edge in self.ends or (leaf is not None and id(leaf) in self.leaves):
                    raise GradientError(
                        f"a tensor of shape {tuple(self.ends[end].shape)} in params was computed "
                        "from another one there (or a parameter of the field), whose gradient "
                        "would count twice. Give it as cond=, compute it inside the field, or use "
                        'gradient="backprop"'
                    )


def _walk(edges: list[Any], ends: Any, met: set) -> Iterator[tuple[Any, Tensor | None]]:
    """Every (edge, leaf or None) of a graph, not beyond `ends`; those are added to `met`."""
    seen: set = set()
    while edges:
        edge = edges.pop()
        node = edge[0]
        if edge in ends:
            met.add(edge)
            continue
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        yield edge, leaf if isinstance(leaf, Tensor) else None
        edges.extend(node.next_functions)


def vjp(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], bars: Sequence[Tensor]
) -> list[Tensor | None]:
    """bars^T doutputs/dinputs; None where nothing depends on an input."""
    bars = [bar.to(out.dtype) for out, bar in zip(outputs, bars, strict=True)]
    try:
        return list(torch.autograd.grad(outputs, inputs, bars, allow_unused=True))
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise GradientError(
            "the field uses a tensor that was computed from its parameters before the solve "
            "(or is cached between evaluations). Give it as cond= or in params=, compute it "
            'inside the field, or use gradient="backprop"'
        ) from error


class GradientSums:
    """Gradients of some tensors, added up; those of half precision in float32."""

    def __init__(self, count: int):
        self.totals: list[Tensor | None] = [None] * count

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add one gradient to each sum; None is zero."""
        fresh, sums, terms = [], [], []
        for j, grad in enumerate(grads):
            if grad is None:
                continue
            total = self.totals[j]
            if total is None:
                fresh.append((j, grad))
            else:
                sums.append(total)
                terms.append(grad)
        if sums:
            torch._foreach_add_(sums, terms)  # pyright: ignore[reportPrivateImportUsage]
        for j, grad in fresh:
            half = grad.dtype in (torch.float16, torch.bfloat16)
            # A copy: autograd may hand out one tensor for several inputs.
            self.totals[j] = grad.float() if half else grad.clone()


@contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keep the gradient hooks of tensors from running: they are for the whole gradient.

    torch.autograd.grad runs the hooks of its inputs, and `retain_grad` adds to t.grad there.
    """
    hooks = [(t._backward_hooks, dict(t._backward_hooks)) for t in tensors if t._backward_hooks]
    retained = [(t, t.grad) for t in tensors if t.retains_grad]
    for active, _ in hooks:
        active.clear()
    try:
        yield
    finally:
        for active, kept in hooks:
            active.update(kept)
        for t, grad in retained:
            t.grad = grad
