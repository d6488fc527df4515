"""What evaluations say: means over starts with bootstrap intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmft_fast.errors import InputError

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Interval:
    """A mean over starts, an interval for it, and the number of starts."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """Give the text of a table's cell."""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def summarise(
    rows: Rows,
    by: Sequence[str] = ("steps",),
    measures: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[tuple[Any, ...], dict[str, Interval]]:
    """Give means with percentile bootstrap intervals for each combination of settings.

    Starts are drawn with replacement, each with all its rows (noise and training seeds) together:
    a start that is easy for one seed is easy for the next. So the interval says how far the mean
    would move with other starts, for these very policies. A measure that is the same at every
    start gets an interval of no width.

    Args:
        rows: as `evaluate_policy` gives them; you may add settings of your own.
        by: names of settings; rows that differ in others are pooled.
        measures: by default all whose values are floats.
        level: probability that an interval is made for, between 0 and 1.
        resamples: draws of as many starts as there are.
        seed: of the draws.

    Returns:
        {(value of each setting in `by`, ...): {measure: Interval}}, in the order of the rows.

    Raises:
        InputError: there are no rows, a row lacks a name, or the level lies outside (0, 1).

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.

    Example:
        >>> rows = [{"steps": 1, "start": i, "score": float(i % 2)} for i in range(50)]
        >>> print(summarise(rows)[1,]["score"])
        0.500 [0.360, 0.640]
    """
    measures = _measures(rows, measures)
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(_get(row, name) for name in by), []).append(row)
    options = {"level": level, "resamples": resamples, "seed": seed}
    return {
        key: _intervals(_per_start(group, measures), measures, **options)
        for key, group in groups.items()
    }


def paired_difference(
    rows: Rows,
    base: Rows,
    measures: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Give the mean of `rows` minus that of `base` on the same starts, with its interval.

    The differences of single starts are drawn with replacement, which is much sharper than
    comparing two intervals: what makes a start hard for both is no longer in the way.

    Args:
        rows: of one policy and setting, as `evaluate_policy` gives them, over any seeds.
        base: of what it is compared with, over the same starts.
        measures: by default all whose values are floats.
        level: probability that an interval is made for, between 0 and 1.
        resamples: draws of as many starts as there are.
        seed: of the draws.

    Raises:
        InputError: the starts are not the same, or see `summarise`.

    Example:
        >>> base = [{"start": i, "score": i / 50} for i in range(50)]
        >>> rows = [{"start": i, "score": i / 50 + 0.1} for i in range(50)]
        >>> print(paired_difference(rows, base)["score"])
        0.100 [0.100, 0.100]
    """
    measures = _measures(rows, measures)
    ours, theirs = _per_start(rows, measures), _per_start(base, measures)
    only = sorted(set(ours) ^ set(theirs))
    if only:
        raise InputError(
            f"expected the same starts on both sides, got {only[:5]} on one side only; evaluate "
            f"both on them"
        )
    # With one mean per start, a start with more seeds counts no more than another.
    differences = {
        start: np.append(
            ours[start][:-1] / ours[start][-1] - theirs[start][:-1] / theirs[start][-1], 1.0
        )
        for start in ours
    }
    return _intervals(differences, measures, level=level, resamples=resamples, seed=seed)


def _measures(rows: Rows, measures: Sequence[str] | None) -> list[str]:
    if not rows:
        raise InputError("expected at least one row, got none")
    if measures is not None:
        return list(measures)
    return [name for name, value in rows[0].items() if isinstance(value, float)]


def _get(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise InputError(f"expected {name!r} in every row, got one with {', '.join(row)}")
    return row[name]


def _per_start(rows: Rows, measures: Sequence[str]) -> dict[int, np.ndarray]:
    """Give, for each start, the sums of its measures and, last, how many rows they are of."""
    sums: dict[int, np.ndarray] = {}
    for row in rows:
        values = np.array([*(float(_get(row, name)) for name in measures), 1.0])
        start = _get(row, "start")
        sums[start] = sums[start] + values if start in sums else values
    return sums


def _intervals(
    sums: Mapping[int, np.ndarray],
    measures: Sequence[str],
    *,
    level: float,
    resamples: int,
    seed: int,
) -> dict[str, Interval]:
    if not 0 < level < 1 or resamples < 1:
        raise InputError(
            f"expected a level in (0, 1) and at least 1 resample, got {level} and {resamples}"
        )
    table, n = np.stack(list(sums.values())), len(sums)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    drawn = times @ table
    means = drawn[:, :-1] / drawn[:, -1:]
    tails = ((1 - level) / 2, (1 + level) / 2)
    low, high = np.quantile(means, tails, axis=0)
    total = table.sum(0)
    mean = total[:-1] / total[-1]
    return {
        name: Interval(float(mean[i]), float(low[i]), float(high[i]), n)
        for i, name in enumerate(measures)
    }
