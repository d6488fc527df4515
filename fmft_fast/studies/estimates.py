"""Medians over seeds with bootstrap intervals, and tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmft_fast.errors import InputError
from fmft_fast.report import markdown, number

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Estimate:
    """The median of some numbers and an interval for it."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        """Give the text of a table's cell; numbers that are all the same have no interval."""
        if self.low == self.high:
            return number(self.median)
        return f"{number(self.median)} [{number(self.low)}, {number(self.high)}]"


def estimate(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 4000, seed: int = 0
) -> Estimate:
    """Give the median with its percentile bootstrap interval.

    Of fewer than five numbers the interval at level .95 is their range, which holds the median of
    the law with probability 1 - 2^(1-n) only: .75 for three seeds, .94 for five.

    Args:
        values: at least one number.
        level: probability that the interval is made for, between 0 and 1.
        resamples: draws with replacement.
        seed: of the draws.

    Raises:
        InputError: there are no values, or the level lies outside (0, 1).

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.

    Example:
        >>> print(estimate([3.0, 1.0, 2.0]))
        2 [1, 3]
    """
    if not values or not 0 < level < 1:
        raise InputError(f"expected values and a level in (0, 1), got {len(values)} and {level}")
    numbers = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(numbers), size=(resamples, len(numbers)))
    medians = np.median(numbers[drawn], axis=1)
    tails = ((1 - level) / 2, (1 + level) / 2)
    low, high = np.quantile(medians, tails, method="nearest")
    return Estimate(statistics.median(values), float(low), float(high), len(values))


def estimates(rows: Rows, by: Sequence[str], measure: str) -> dict[tuple[Any, ...], Estimate]:
    """Estimate a measure for each combination of settings, over all other settings (the seeds).

    Rows in which it was not measured (None) are left out; a combination without any is absent.

    Args:
        rows: settings and measures of each cell.
        by: names of settings.
        measure: name of the measure.

    Example:
        >>> rows = [{"n": n, "seed": s, "error": n + s} for n in (1, 2) for s in (0, 1, 2)]
        >>> {key: found.median for key, found in estimates(rows, ["n"], "error").items()}
        {(1,): 2, (2,): 3}
    """
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row.get(measure) is not None:
            groups.setdefault(tuple(row[name] for name in by), []).append(row[measure])
    return {key: estimate(values) for key, values in groups.items()}


def table(rows: Rows, down: Mapping[str, str], across: Mapping[str, str]) -> str:
    """Lay out a Markdown table: a line for each combination of settings, a column per measure.

    Args:
        rows: settings and measures of each cell.
        down: {setting: heading}; lines come in the order in which combinations first appear.
        across: {measure: heading}.

    Example:
        >>> rows = [{"n": n, "seed": s, "error": n + s} for n in (1, 2) for s in (0, 1, 2)]
        >>> print(table(rows, {"n": "steps"}, {"error": "error"}))
        | steps | error    |
        |-------|----------|
        | 1     | 2 [1, 3] |
        | 2     | 3 [2, 4] |
    """
    found = {measure: estimates(rows, list(down), measure) for measure in across}
    keys = dict.fromkeys(tuple(row[name] for name in down) for row in rows)
    lines = [[*down.values(), *across.values()]]
    for key in keys:
        lines.append([*map(str, key), *(str(found[measure].get(key, "-")) for measure in across)])
    return markdown(lines)
