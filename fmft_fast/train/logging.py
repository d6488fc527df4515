"""What a run says: metrics and events as JSONL, a table and a bar on the screen, TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fmft_fast.errors import MissingDependencyError


class RunLog:
    """Writes each record once: to `metrics.jsonl`, to the screen, to TensorBoard if asked.

    A line of `metrics.jsonl` is `{"kind": "train" | "eval" | "event", "step": ..., ...}`; numbers
    that are not finite become null, durations are seconds.

    Args:
        folder: the run's folder, or None to write no file.
        steps: steps that the bar counts to.
        screen: show bar, table and events.
        tensorboard: write event files, too.
        title: what the bar is called.

    Raises:
        MissingDependencyError: TensorBoard was asked for and is not installed.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        steps: int,
        screen: bool = True,
        tensorboard: bool = False,
        title: str = "train",
    ) -> None:
        self.path = folder / "metrics.jsonl" if folder else None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        self.screen = screen
        self._start = time.perf_counter()
        self._columns: tuple[str, ...] = ()
        self._board = _open_board(folder) if tensorboard else None
        self._bar = progress_bar(steps, title, show=screen)

    def rewind(self, step: int) -> None:
        """Forget what was written after `step`: a resumed run writes it again."""
        if self.path and self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            draft = self.path.with_suffix(".draft")
            draft.write_text(text, encoding="utf-8")
            draft.replace(self.path)
        self._bar.n = max(0, step)
        self._bar.refresh()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(step - self._bar.n)

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record averages of the steps since the last such line."""
        self._write("train", step, metrics)
        self._bar.set_postfix({k: f"{v:.4g}" for k, v in metrics.items()}, refresh=False)

    def evaluation(self, step: int, metrics: Mapping[str, float], *, best: bool) -> None:
        """Record an evaluation, as a row of the table on the screen."""
        self._write("eval", step, {**metrics, "best": best})
        if not self.screen:
            return
        # Before the first step there is no loss; its column is there all the same.
        names = ("loss", *(name for name in metrics if name != "loss"))
        if names != self._columns:
            self._columns = names
            tqdm.write("".join(f"{name:>12}" for name in ("step", *names)), file=sys.stdout)
        cells = "".join(
            f"{metrics[name]:>12.5g}" if name in metrics else f"{'-':>12}" for name in names
        )
        tqdm.write(f"{step:>12d}{cells}{'  best' if best else ''}", file=sys.stdout)

    def event(self, step: int, name: str, message: str, **details: Any) -> None:
        """Record something that happened once, with its remedy; always shown on the screen."""
        self._write("event", step, {"event": name, "message": message, **details})
        if self.screen:
            tqdm.write(f"step {step}: {message}", file=sys.stderr)

    def close(self) -> None:
        """Finish bar and files."""
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self.path:
            record = {"kind": kind, "step": step, **{k: _finite(v) for k, v in values.items()}}
            record["time_s"] = round(time.perf_counter() - self._start, 3)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._board.add_scalar(f"{kind}/{name}", value, step)


def progress_bar(total: int, title: str, *, show: bool, unit: str = "it") -> tqdm:
    """Give a bar on stderr; where that is a file, each picture is a line: one in 30 s will do."""
    interval_s = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total,
        desc=title,
        disable=not show,
        file=sys.stderr,
        unit=unit,
        mininterval=interval_s,
        maxinterval=interval_s,
        miniters=0,
    )


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read a `metrics.jsonl`; a last line that a kill cut short is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_board(folder: Path | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError(
            "tensorboard = true needs the package tensorboard, which is not installed; "
            "pip install 'fmft-fast[tensorboard]', or set tensorboard = false"
        ) from error
    return SummaryWriter(str(folder / "tensorboard") if folder else None)
