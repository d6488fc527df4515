"""The one training loop: `fit` serves pre-training and fine-tuning alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fmft_fast.errors import CheckpointError, ConfigError, NonFiniteError
from fmft_fast.train.batches import BatchSource, stream_seed
from fmft_fast.train.checkpoint import (
    Checkpoint,
    CheckpointStore,
    check_field,
    describe_field,
    load_checkpoint,
)
from fmft_fast.train.config import FitConfig
from fmft_fast.train.interrupt import stop_requests
from fmft_fast.train.logging import RunLog
from fmft_fast.train.monitors import Monitor
from fmft_fast.train.optim import lr_factor, pick_device
from fmft_fast.train.progress import FitResult, Progress, load_random_state, random_state
from fmft_fast.train.step import Choose, Loss, TrainStep, own_stream

Evaluate = Callable[[nn.Module], Mapping[str, float]]

# Keys that a resumed run may change: they steer how long and how it reports, not what is learnt.
FREE_ON_RESUME = {
    "steps",
    "patience",
    "log_every",
    "checkpoint_every",
    "keep_last",
    "tensorboard",
    "cuda_graph",
}


def fit(
    model: nn.Module,
    batches: BatchSource,
    loss: Loss,
    *,
    config: FitConfig,
    evaluate: Evaluate | None = None,
    monitors: Sequence[Monitor] = (),
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    title: str = "train",
    choose: Choose | None = None,
) -> FitResult:
    """Train `model`, reproducibly and resumably.

    Ctrl-C or SIGTERM ends the step, saves a checkpoint, and raises KeyboardInterrupt. The
    global random state is left as it was; inside, it is seeded, too (for dropout).

    Args:
        model: trained in place.
        batches: source of batches, e.g. `PairBatches` or `LoaderBatches`.
        loss: `loss(model, batch, random)` gives a 0-d tensor; all its noise comes from `random`,
            a generator on the run's device.
        config: settings.
        evaluate: `evaluate(model)` gives named numbers, lower being better; called without
            gradients on the averaged weights (if averaging) before training, every
            `config.eval_every` steps and at the end.
        monitors: see `fmft_fast.train.monitors`; fed with every evaluation.
        out: the run's folder, for checkpoints and metrics.jsonl; None writes nothing.
        resume: continue from the folder's last checkpoint, if there is one.
        progress: show the bar and the table.
        title: what the bar is called.
        choose: gives what the host decides before each step, from few possibilities; the loss gets
            it as fourth argument. A CUDA graph cannot branch, so each has one of its own.

    Raises:
        NonFiniteError: loss, gradient or evaluation became NaN or infinite; names the step.
        CheckpointError: `resume` met a checkpoint of another model or configuration.
        KeyboardInterrupt: stopped on request; says how to resume.

    Example:
        >>> from fmft_fast.train import LoaderBatches
        >>> line = nn.Linear(1, 1)
        >>> x = torch.linspace(-1, 1, 64).unsqueeze(1)
        >>> def loss(model, batch, random):
        ...     return (model(batch[0]) - 2 * batch[0]).square().mean()
        >>> source = LoaderBatches(x.split(32), seed=0)
        >>> config = FitConfig(steps=300, lr=0.05)
        >>> result = fit(line, source, loss, config=config, progress=False)
        >>> round(line.weight.item(), 2)
        2.0
    """
    folder = Path(out) if out is not None else None
    device = pick_device(config.device)
    log = RunLog(
        folder, steps=config.steps, screen=progress, tensorboard=config.tensorboard, title=title
    )
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), stop_requests() as stop:
            with own_stream(device, config.cuda_graph is not False):
                run = _Run(
                    model, batches, loss, config, device, evaluate, monitors, folder, log, choose
                )
                run.start(resume)
                return run.train(stop)
    finally:
        log.close()


class _Run:
    """One run of `fit`: everything that changes while it trains, and how that is saved."""

    def __init__(
        self,
        model: nn.Module,
        batches: BatchSource,
        loss: Loss,
        config: FitConfig,
        device: torch.device,
        evaluate: Evaluate | None,
        monitors: Sequence[Monitor],
        folder: Path | None,
        log: RunLog,
        choose: Choose | None = None,
    ) -> None:
        self.model = model.to(device)
        self.batches, self.config, self.log = batches, config, log
        self.evaluate, self.monitors = evaluate, monitors
        self.device, self.folder = device, folder
        self.random = torch.Generator(device).manual_seed(stream_seed(config.seed, "noise"))
        self.step = TrainStep(self.model, batches, loss, config, device, self.random, choose)
        torch.manual_seed(stream_seed(config.seed, "global"))
        self.store = (
            CheckpointStore(folder / "checkpoints", keep_last=config.keep_last) if folder else None
        )
        self.done = Progress()
        self.saved_step = -1
        self.best_weights: dict[str, Tensor] | None = None
        self.pending: list[tuple[int, Tensor, Tensor]] = []

    @property
    def weights_to_use(self) -> nn.Module:
        return self.model if self.step.average is None else self.step.average.module

    def start(self, resume: bool) -> None:
        """Resume, or begin anew with an evaluation of the model as it came."""
        last = self.store.get("last") if self.store else None
        if resume and last is not None:
            self._load(last)
            return
        if last is not None:
            raise CheckpointError(
                f"{self.folder} already holds a run (step {load_checkpoint(last).step}); "
                f"resume it (resume=True or --resume), or choose another folder"
            )
        self.log.rewind(-1)
        self._evaluate()

    def train(self, stop: Callable[[], bool]) -> FitResult:
        """Step until the end, an early stop, or a request to stop."""
        config, reason = self.config, "finished"
        self.model.train()
        while self.done.step < config.steps:
            if self._patience_spent():
                reason = "early stop"
                break
            self._train_step()
            at_end = self.done.step == config.steps
            if self.device.type == "cpu" or at_end or self.done.step % config.log_every == 0:
                self._flush()
            if self.done.step % config.log_every == 0 or at_end:
                self.log.train(self.done.step, {"loss": _mean(self.done.window), "lr": self._lr()})
            self.log.advance(self.done.step)
            if self.done.step % config.eval_every == 0 or at_end:
                self._evaluate()
            if self.done.step % config.checkpoint_every == 0 and self.saved_step != self.done.step:
                self._save()
            if stop():
                self._stop()
        return self._finish(reason)

    def _lr(self) -> float:
        return self.config.lr * lr_factor(self.done.step, self.config)

    def _patience_spent(self) -> bool:
        return self.config.patience is not None and self.done.stale >= self.config.patience

    def _train_step(self) -> None:
        try:
            loss, norm = self.step(self.done.step)
        except NonFiniteError as error:
            self._refuse(self.done.step + 1, f"solve inside the loss ({error})")
        self.done.step += 1
        self.pending.append((self.done.step, loss, norm))

    def _flush(self) -> None:
        """Bring losses to the host and refuse the first that is not finite."""
        if not self.pending:
            return
        measured = [x for _, loss, norm in self.pending for x in (loss, norm)]
        # sync: the one place where the loop waits for the device, every log_every steps.
        values = (
            torch.stack(measured).tolist() if len(measured) > 2 else [float(x) for x in measured]
        )
        pairs = zip(values[::2], values[1::2], strict=True)
        for (step, *_), (loss, norm) in zip(self.pending, pairs, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._refuse(step, "loss" if not math.isfinite(loss) else "gradient norm")
            self.done.window.append(loss)
        self.pending.clear()
        del self.done.window[: -self.config.log_every]

    def _refuse(self, step: int, what: str) -> NoReturn:
        kept = f"{self.folder} (step {self.saved_step})" if self.saved_step >= 0 else "none"
        message = (
            f"the {what} became NaN or infinite at step {step}; last good checkpoint: {kept}; "
            f"lower lr (now {self.config.lr:g}), set grad_clip, lengthen warmup, or check the "
            f"data for NaN"
        )
        self.log.event(step, "non-finite", message)
        raise NonFiniteError(message)

    def _evaluate(self) -> None:
        """Measure the weights to use, keep them if they are the best, and ask the monitors."""
        if self.evaluate is None:
            return
        self._flush()
        model = self.weights_to_use
        model.eval()
        try:
            with torch.no_grad():
                measured = {name: float(value) for name, value in self.evaluate(model).items()}
        except NonFiniteError as error:
            self._refuse(self.done.step, f"solve inside the evaluation ({error})")
        self.model.train()
        self.step.check()
        for name, value in measured.items():
            if not math.isfinite(value):
                self._refuse(self.done.step, f"evaluated {name}")
        value = self._chosen(measured)
        self.done.metrics = (
            {"loss": _mean(self.done.window), **measured} if self.done.window else measured
        )
        self.done.history.append({"step": self.done.step, **self.done.metrics})
        better = value < self.done.best_value
        self.done.stale = 0 if better else self.done.stale + 1
        if better:
            self.done.best_step, self.done.best_value = self.done.step, value
        self.log.evaluation(self.done.step, self.done.metrics, best=better)
        self._ask_monitors()
        if better:
            self._keep_best()

    def _chosen(self, measured: Mapping[str, float]) -> float:
        """Give the number that picks the best model; none is needed if nothing is picked."""
        config = self.config
        needed = config.select == "best" or config.patience is not None
        if config.metric not in measured and needed:
            raise ConfigError(
                f"metric: expected one of {', '.join(measured) or 'none'}, got {config.metric!r}; "
                f"choose a number that is evaluated, or set select = last and no patience"
            )
        return measured.get(config.metric, math.inf)

    def _ask_monitors(self) -> None:
        for monitor in self.monitors:
            finding = monitor.update(self.done.step, self.done.metrics)
            if finding is not None:
                self.done.findings.append(finding)
                self.log.event(self.done.step, finding.name, str(finding))

    def _keep_best(self) -> None:
        if self.store is not None:
            self._save(best=True)
        elif self.config.select == "best":
            weights = self.weights_to_use.state_dict()
            self.best_weights = {k: v.detach().clone() for k, v in weights.items()}

    def _save(self, *, best: bool = False) -> None:
        if self.store is None:
            return
        self._flush()
        self.saved_step = self.done.step
        checkpoint = Checkpoint(
            step=self.done.step,
            model=self.weights_to_use.state_dict(),
            training=self._state(),
            config=self.config.to_dict(),
            metrics=self.done.metrics,
            architecture=describe_field(self.model),
        )
        self.store.save(checkpoint, best=best)

    def _state(self) -> dict[str, Any]:
        average = self.step.average
        return {
            # Without averaging the weights to use are the raw ones; they are not written twice.
            "raw": None if average is None else self.model.state_dict(),
            "averaged": None if average is None else average.count,
            "optimizer": self.step.optimizer.describe(self._lr()),
            "random": random_state(self.random),
            "batches": self.batches.state(),
            "monitors": {monitor.name: monitor.state() for monitor in self.monitors},
            "progress": self.done.state(),
        }

    def _load(self, path: Path) -> None:
        """Take over a checkpoint: afterwards the run is where the saved one was, bit for bit."""
        checkpoint = load_checkpoint(path)
        self._check_config(checkpoint.config, path)
        check_field(self.model, checkpoint, path)
        state = checkpoint.training
        self.model.load_state_dict(dict(state["raw"] or checkpoint.model))
        average = self.step.average
        if average is not None:
            average.module.load_state_dict(dict(checkpoint.model))
            average.count = state["averaged"]
        self.step.optimizer.restore(state["optimizer"])
        self.step.forget()
        self.batches.load_state(state["batches"])
        for monitor in self.monitors:
            monitor.load_state(state["monitors"].get(monitor.name, {}))
        self.done = Progress.from_state(state["progress"])
        self.saved_step = self.done.step
        self.log.rewind(self.done.step)
        # Last, since skipping used batches of a loader may draw from the global stream.
        load_random_state(self.random, state["random"])

    def _check_config(self, saved: Mapping[str, Any], path: Path) -> None:
        changed = self.config.changed_since(saved, free=FREE_ON_RESUME)
        if changed:
            raise CheckpointError(
                f"{path} was made with another configuration ({changed}); resume with "
                f"the same one, or begin a new run in another folder"
            )

    def _stop(self) -> None:
        """Save and leave, on request of the user."""
        self._flush()
        if self.store is None:
            raise KeyboardInterrupt(
                f"stopped at step {self.done.step}; nothing saved (no out folder)"
            )
        self._save()
        message = f"stopped at step {self.done.step}, saved in {self.folder}; resume with --resume"
        self.log.event(self.done.step, "interrupted", message)
        raise KeyboardInterrupt(message)

    def _finish(self, reason: str) -> FitResult:
        """Save the end, put the selected weights into the model, and sum up."""
        if self.saved_step != self.done.step:
            self._save()
        selected = self.done.step
        weights: Mapping[str, Tensor] = self.weights_to_use.state_dict()
        if self.config.select == "best" and self.done.best_step >= 0:
            selected = self.done.best_step
            weights = self._best()
        if self.store is not None:
            self.store.link("final", selected)
        if self.step.average is not None or selected != self.done.step:
            self.model.load_state_dict(dict(weights))
        self.model.eval()
        metrics = next((row for row in self.done.history if row["step"] == selected), {})
        return FitResult(
            model=self.model,
            step=self.done.step,
            reason=reason,
            selected_step=selected,
            metrics={name: value for name, value in metrics.items() if name != "step"},
            history=tuple(self.done.history),
            findings=tuple(self.done.findings),
        )

    def _best(self) -> Mapping[str, Tensor]:
        if self.store is None:
            assert self.best_weights is not None
            return self.best_weights
        path = self.store.get("best")
        if path is None:
            raise CheckpointError(f"{self.folder}/checkpoints/best is gone; run again")
        return load_checkpoint(path).model


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(1, len(values))
