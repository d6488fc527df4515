"""One training step: pairs, loss, gradients, update and average; on a GPU as one CUDA graph.

A recorded step reads fixed memory only. The learning rate and the decay of the average lie on the
device and are set before; random numbers come from generators that advance with every replay; what
the host decides (a number of solver steps) has a recording of its own each. The first steps run as
usual and show whether the step can be recorded; then a replay is compared with a usual step once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fmft_fast.errors import CaptureWarning, ConfigError
from fmft_fast.solvers.graphs import describe
from fmft_fast.solvers.recorder import (
    CaptureError,
    Recorded,
    cuda_graphs,
    find_recorder,
    watch_waits,
)
from fmft_fast.train.batches import Batch, BatchSource
from fmft_fast.train.config import FitConfig
from fmft_fast.train.optim import Average, gradient_norm, lr_factor, make_optimizer

Loss = Callable[..., Tensor]
Choose = Callable[[], Hashable]
USUAL_STEPS = 3


class TrainStep:
    """The changing part of a run's step, and how it is done.

    Args:
        model: trained in place.
        batches: source of batches.
        loss: `loss(model, batch, random)`, with `choose` also `loss(..., choice)`.
        config: settings.
        device: of the model.
        random: source of the loss's random numbers, on the device.
        choose: what the host decides before a step.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: BatchSource,
        loss: Loss,
        config: FitConfig,
        device: torch.device,
        random: torch.Generator,
        choose: Choose | None = None,
    ) -> None:
        self.model, self.batches, self.loss, self.config = model, batches, loss, config
        self.device, self.random, self.choose = device, random, choose
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if config.cuda_graph is True and device.type != "cuda":
            raise ConfigError(
                f"cuda_graph: expected auto or false on {device.type}, got true, which needs a GPU"
            )
        self.recorder = find_recorder(device) if config.cuda_graph is not False else None
        on_device = self.recorder is not None
        self.optimizer = make_optimizer(self.parameters, config, rate_on_device=on_device)
        self.average = (
            Average(model, config.ema_decay, rate_on_device=on_device)
            if config.ema_decay is not None
            else None
        )
        own = getattr(batches, "generators", None)
        self.draws_inside = on_device and own is not None
        self.generators = [random, *(own if own is not None and self.draws_inside else ())]
        self.recordings: dict[Any, tuple[Recorded, Batch | None]] = {}
        self.usual_steps: dict[Any, int] = {}
        self.marks = describe(model) if on_device else None

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Do step number `step`, from 0: its loss and the norm of its gradients."""
        batch = None if self.draws_inside else self.next_batch()
        choice = None if self.choose is None else self.choose()
        self.optimizer.set_rate(self.config.lr * lr_factor(step, self.config))
        if self.average is not None:
            self.average.set_rate(step)
        loss, norm = (
            self._usual(batch, choice) if self.recorder is None else self._do(batch, choice)
        )
        if self.average is not None:
            self.average.count += 1
        return loss, norm

    def next_batch(self) -> Batch:
        """The next batch, on the device."""
        return tuple(x.to(self.device, non_blocking=True) for x in self.batches.next())

    def _usual(self, batch: Batch | None, choice: Hashable) -> tuple[Tensor, Tensor]:
        """A step, operation by operation."""
        for p in self.parameters:
            p.grad = None
        loss = self.gradients(self.next_batch() if batch is None else batch, choice)
        norm = gradient_norm(
            [p.grad for p in self.parameters if p.grad is not None], self.config.grad_clip
        )
        self.optimizer.advance()
        if self.average is not None:
            self.average.update()
        return loss, norm

    def gradients(self, batch: Batch, choice: Hashable) -> Tensor:
        """The loss of a batch; its gradients are left at the parameters."""
        extra = () if self.choose is None else (choice,)
        loss = self.loss(self.model, batch, self.random, *extra)
        loss.backward()
        return loss.detach()

    def _do(self, batch: Batch | None, choice: Hashable) -> tuple[Tensor, Tensor]:
        """A step, from its recording if there is one by now."""
        shapes = None if batch is None else tuple((x.shape, x.dtype) for x in batch)
        key = choice, shapes
        if key in self.recordings:
            recorded, fixed = self.recordings[key]
            for own, x in zip(fixed or (), batch or (), strict=True):
                own.copy_(x)
            recorded.replay()
            loss, norm = recorded.outputs
            return loss.clone(), norm.clone()  # the next replay writes there again
        try:
            done = self.usual_steps.get(key, 0)
            self.usual_steps[key] = done + 1
            if done < USUAL_STEPS:
                return self._watched(batch, choice, may_wait=done == 0)
            return self._record(key, batch, choice)
        except CaptureError as error:
            reason, *done = error.args
            self.give_up(reason)
            return done[0] if done else self._usual(batch, choice)

    def _watched(
        self, batch: Batch | None, choice: Hashable, may_wait: bool
    ) -> tuple[Tensor, Tensor]:
        """A usual step, with an eye on what a replay would not do.

        The first one of a kind may wait: a field is looked into, numbers are brought to the device.
        """
        before = self._outside()
        with watch_waits(self.device) as waits, cuda_graphs(False):
            done = self._usual(batch, choice)
        if before[0] is None:
            raise CaptureError("a module of the model has hooks, or is parallel or compiled", done)
        if waits and not may_wait:
            raise CaptureError(f"it waits for the device ({waits[0]})", done)
        if before != self._outside():
            raise CaptureError(
                "it changes buffers or attributes of the model, or draws random numbers other than "
                "from the generator that it is given (dropout does)",
                done,
            )
        return done

    def _outside(self) -> tuple[Any, ...]:
        """What a replay leaves as it is."""
        random = [torch.get_rng_state()]
        if self.device.type == "cuda":
            random.append(torch.cuda.get_rng_state(self.device))
        versions = [b._version for b in self.model.buffers()]
        return describe(self.model), versions, [bytes(r.numpy()) for r in random]

    def _record(self, key: Any, batch: Batch | None, choice: Hashable) -> tuple[Tensor, Tensor]:
        """Record a step, and do it once as usual and once by replay: both must agree."""
        assert self.recorder is not None
        start = self._snapshot()
        fixed = None if batch is None else tuple(x.clone() for x in batch)
        generators = [g for g in self.generators if g.device.type == self.device.type]
        recorded = self.recorder.record(
            lambda: self._usual(fixed, choice), generators, rehearse=False
        )
        self._return_to(start)
        recorded.replay()
        outputs = [x.clone() for x in recorded.outputs]
        replayed, _ = self._snapshot()
        self._return_to(start)
        with cuda_graphs(False):
            done = self._usual(batch, choice)
        alike = [
            torch.allclose(x, y, 1e-3, equal_nan=True) for x, y in zip(outputs, done, strict=True)
        ]
        # sync: once per recording.
        if not all(alike) or not all(map(_moved_alike, start[0], replayed, self._tensors())):
            raise CaptureError("a replayed step differs from a usual one", done)
        self.recordings[key] = recorded, fixed
        return done

    def _tensors(self) -> list[Tensor]:
        """All that a step changes."""
        states = (x for state in self.optimizer.state.values() for x in state.values())
        averaged = [] if self.average is None else list(self.average.module.parameters())
        return [*self.parameters, *averaged, *(x for x in states if isinstance(x, Tensor))]

    def _snapshot(self) -> tuple[list[Tensor], list[Tensor]]:
        return [x.detach().clone() for x in self._tensors()], [
            g.get_state() for g in self.generators
        ]

    @torch.no_grad()
    def _return_to(self, snapshot: tuple[list[Tensor], list[Tensor]]) -> None:
        values, states = snapshot
        for x, value in zip(self._tensors(), values, strict=True):
            x.copy_(value)
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)

    def check(self) -> None:
        """Called when other code has had the model: what is recorded must still be the model."""
        if self.recorder is not None and describe(self.model) != self.marks:
            self.forget()

    def forget(self) -> None:
        """Drop what is recorded and start over."""
        self.recordings.clear()
        self.usual_steps.clear()
        self.marks = describe(self.model) if self.recorder is not None else None

    def give_up(self, reason: str) -> None:
        """Do all further steps as usual, and say why."""
        self.recorder = None
        self.recordings.clear()
        warnings.warn(
            f"the training step runs without a CUDA graph: {reason}. To silence this, set "
            "cuda_graph = false",
            CaptureWarning,
            stacklevel=2,
        )


def _moved_alike(start: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether two ways from `start` differ by little of their length; NaN is for others to find."""
    length, noise = (b - start).norm(), torch.finfo(b.dtype).eps * b.norm()
    return not bool((a - b).norm() > 0.05 * length + 16 * noise)


@contextmanager
def own_stream(device: torch.device, wanted: bool) -> Iterator[None]:
    """Run on a stream of one's own: the default stream of a GPU cannot be recorded."""
    if not wanted or device.type != "cuda":
        yield
        return
    outer = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)
