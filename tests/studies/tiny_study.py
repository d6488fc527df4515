"""A study of a few sums; run as a script, it is `fmft` with that study."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from fmft_fast import cli
from fmft_fast.studies import Study, register
from fmft_fast.studies.estimates import table


def cells(seeds, *, quick):
    """Give two sizes for each seed, or one."""
    return [{"size": size, "seed": seed} for size in ((1,) if quick else (1, 2)) for seed in seeds]


def measure(settings, models):
    """Give a number; what the environment says goes wrong."""
    time.sleep(float(os.environ.get("TINY_SECONDS", "0")))
    (models.folder.parent / "calls").mkdir(exist_ok=True)
    (models.folder.parent / "calls" / f"{time.time_ns()}").touch()
    name = f"{settings['size']}-{settings['seed']}"
    trouble = os.environ.get(f"TINY_{name}")
    if trouble == "raise":
        return {"value": 1 / 0}
    if trouble == "exit":
        os._exit(7)
    if trouble == "nan":
        return {"value": float("nan")}
    if trouble == "clash":
        return {"size": 1}
    return {"value": None if trouble == "none" else settings["size"] * 10 + settings["seed"]}


def show(rows):
    """Give the table."""
    return table(rows, {"size": "size"}, {"value": "value"})


def draw(rows, folder):
    """Write a text instead of a picture."""
    (Path(folder) / "drawn.txt").write_text(str(len(rows)))
    return [Path(folder) / "drawn.txt"]


TINY = Study("tiny", "How much is a sum?", cells, measure, show, draw)

if __name__ == "__main__":
    register(TINY)
    sys.exit(cli.main())
