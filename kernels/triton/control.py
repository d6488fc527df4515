"""The step control of adaptive solves, on the device and in float64.

It is that of `fmft_fast.solvers.adaptive`; time runs as s = direction t, so that it always grows.
What it knows lies in memory of the device, of which the host only has to see the outcome:

- `state`: the numbers below;
- `given`: the settings below, the method (c, a, b, b_err, and the powers of the dense output), and
  the times of the output;
- `numbers`: of the coming attempt, in float32, the times of the stages, and a, b and b_err times h;
- `weights`: of the outputs inside the coming attempt, the stages' weights times h, in float32;
- `sums`: of every tile of the last attempt, the sums of the squares of the error ratios and of the
  state over the allowed error, and the number of entries that made the start not finite;
- `log`: where every accepted step ends, and its signed size.
"""

import triton
import triton.language as tl

# What the state holds: time, size of the attempt, and where it ends; accepted and rejected steps;
# attempts since the last output; the first output that is not reached, and the first one that is
# beyond the attempt; which of two places holds the state; the outcome; the phase; the first guess
# at a step, and the size of the first slope.
S = tl.constexpr(0)
SIZE = tl.constexpr(1)
END = tl.constexpr(2)
ACCEPTED = tl.constexpr(3)
REJECTED = tl.constexpr(4)
ATTEMPTS = tl.constexpr(5)
NEXT = tl.constexpr(6)
BEYOND = tl.constexpr(7)
PLACE = tl.constexpr(8)
OUTCOME = tl.constexpr(9)
PHASE = tl.constexpr(10)
GUESS = tl.constexpr(11)
SLOPE = tl.constexpr(12)

# Outcomes.
RUNNING = tl.constexpr(-1)
DONE = tl.constexpr(0)
TOO_MANY = tl.constexpr(1)
UNDERFLOW = tl.constexpr(2)
NOT_FINITE = tl.constexpr(3)

# Phases: the first slope, the slope after a first guess at a step, and attempts.
START = tl.constexpr(0)
PROBE = tl.constexpr(1)
STEP = tl.constexpr(2)

# What is given, before the method.
RTOL = tl.constexpr(0)
ATOL = tl.constexpr(1)
SAFETY = tl.constexpr(2)
IFACTOR = tl.constexpr(3)
DFACTOR = tl.constexpr(4)
MIN_STEP = tl.constexpr(5)
MAX_STEP = tl.constexpr(6)
MOST = tl.constexpr(7)
FIRST_STEP = tl.constexpr(8)
MEET = tl.constexpr(9)
DIRECTION = tl.constexpr(10)
ORDER = tl.constexpr(11)
ENTRIES = tl.constexpr(12)
METHOD = tl.constexpr(13)

# Tiles, and outputs inside an attempt, that are looked at together.
TILES = tl.constexpr(512)
OUTPUTS = tl.constexpr(16)


@triton.jit
def power(x, exponent):
    """The power of x > 0 in float64."""
    return tl.exp(tl.log(x) * exponent)


@triton.jit
def clamp(h, given):
    """The size h within its bounds."""
    smallest, largest = tl.load(given + MIN_STEP), tl.load(given + MAX_STEP)
    return tl.minimum(tl.maximum(h, smallest), largest)


@triton.jit
def next_size(h, ratio, given):
    """Size of the next step after one of size h with this error ratio."""
    dfactor, ifactor = tl.load(given + DFACTOR), tl.load(given + IFACTOR)
    is_plain = (ratio > 0.0) & (ratio < float("inf"))
    root = power(tl.where(is_plain, ratio, 1.0), 1.0 / tl.load(given + ORDER))
    factor = tl.maximum(tl.load(given + SAFETY) / root, tl.where(ratio < 1.0, 1.0, dfactor))
    factor = tl.where(is_plain, tl.minimum(factor, ifactor), dfactor)
    return clamp(h * tl.where(ratio == 0.0, ifactor, factor), given)


@triton.jit
def first_guess(d0, d1):
    """A first step from the sizes of the state and its slope."""
    is_small = (d0 < 1e-5) | (d1 < 1e-5)
    small = tl.full((), 1e-6, tl.float64)
    return tl.where(is_small, small, 0.01 * d0 / tl.where(is_small, 1.0, d1))


@triton.jit
def first_size(h, d1, d2, given):
    """The first step from a guess h, the size of the slope, and that of its change over h."""
    steepest = tl.maximum(d1, d2)
    is_flat = steepest <= 1e-15
    small = tl.maximum(h * 1e-3, tl.full((), 1e-6, tl.float64))
    root = power(0.01 / tl.where(is_flat, 1.0, steepest), 1.0 / tl.load(given + ORDER))
    size = tl.minimum(100.0 * h, tl.where(is_flat, small, root))
    return tl.where(d2 < float("inf"), size, h * 1e-3)


@triton.jit
def total(sums, tiles):
    """The sum over the tiles, in an order that does not depend on the device."""
    at = tl.arange(0, TILES)
    found = tl.zeros((TILES,), tl.float64)
    for first in range(0, tiles, TILES):
        found += tl.load(sums + first + at, mask=first + at < tiles, other=0.0)
    return tl.sum(found)


@triton.jit
def measures(y, end, error, slope, rows, batch, given, N: tl.constexpr, PN: tl.constexpr):
    """What every entry of a tile of N columns adds to the sums."""
    rtol, atol = tl.load(given + RTOL).to(tl.float32), tl.load(given + ATOL).to(tl.float32)
    inside = (rows[:, None] < batch) & (tl.arange(0, PN)[None, :] < N)
    # NaN in `end` makes the comparison false and so reaches the scale.
    scale = atol + rtol * tl.where(tl.abs(y) > tl.abs(end), tl.abs(y), tl.abs(end))
    ratio = tl.where(inside, error / scale, 0.0).to(tl.float64)
    size = tl.where(inside, y / scale, 0.0).to(tl.float64)
    is_finite = (tl.abs(y) < float("inf")) & (tl.abs(slope) < float("inf"))
    bad = tl.where(inside & ~is_finite, 1.0, 0.0).to(tl.float64)
    return ratio * ratio, size * size, bad


@triton.jit
def plan_probe(numbers, s, h, direction, STAGES: tl.constexpr, PLACES: tl.constexpr):
    """Write the numbers of the slope after a step h of the first slope, and of their difference."""
    at = tl.arange(0, PLACES)
    error = STAGES * (STAGES + 2)
    x = tl.where(at == 2 * STAGES, direction * h, 0.0)
    x = tl.where(at == 1, direction * (s + h), x)
    x = tl.where(at == error, -1.0, tl.where(at == error + 1, 1.0, x))
    tl.store(numbers + at, x.to(tl.float32), mask=at < STAGES * (STAGES + 3))


@triton.jit
def plan_step(numbers, given, s, h, end, direction, STAGES: tl.constexpr, PLACES: tl.constexpr):
    """Write the numbers of an attempt at a step h from s."""
    at = tl.arange(0, PLACES)
    inside = at < STAGES * (STAGES + 3)
    x = tl.load(given + METHOD + at, mask=inside, other=0.0)
    times = tl.where(x == 1.0, end, s + x * h)
    x = direction * tl.where(at < STAGES, times, x * h)
    tl.store(numbers + at, x.to(tl.float32), mask=inside)


@triton.jit
def plan_outputs(
    weights,
    given,
    s,
    h,
    end,
    direction,
    first,
    outputs,
    STAGES: tl.constexpr,
    STAGE_PLACES: tl.constexpr,
):
    """Write the weights of the outputs inside an attempt, and return the first one beyond it."""
    method = given + METHOD
    targets = method + STAGES * (STAGES + 7)
    j = tl.arange(0, STAGE_PLACES)
    known = j < STAGES
    b = tl.load(method + STAGES * (STAGES + 1) + j, mask=known, other=0.0)[None, :]
    more = first < outputs
    while more:
        o = first + tl.arange(0, OUTPUTS)
        target = tl.load(targets + o, mask=o < outputs, other=float("inf"))
        inside = (o < outputs) & (target <= end)
        theta = ((tl.where(inside, target, s) - s) / h)[:, None]
        w = tl.zeros((OUTPUTS, STAGE_PLACES), tl.float64)
        for p in tl.static_range(4):
            at = method + STAGES * (STAGES + 6 - p) + j
            w = (w + tl.load(at, mask=known, other=0.0)[None, :]) * theta
        w = direction * h * tl.where((target == end)[:, None], b, w)
        at = weights + o[:, None] * STAGES + j[None, :]
        tl.store(at, w.to(tl.float32), mask=inside[:, None] & known[None, :])
        found = tl.sum(inside.to(tl.int32))
        first += found
        more = found == OUTPUTS
    return first


@triton.jit
def control(
    state,
    given,
    numbers,
    weights,
    sums,
    log,
    tiles,
    outputs,
    STAGES: tl.constexpr,
    PLACES: tl.constexpr,
    STAGE_PLACES: tl.constexpr,
):
    """Accept or reject an attempt, and plan the next one."""
    phase, s = tl.load(state + PHASE), tl.load(state + S)
    h, end = tl.load(state + SIZE), tl.load(state + END)
    accepted, attempts = tl.load(state + ACCEPTED), tl.load(state + ATTEMPTS)
    before, beyond = tl.load(state + NEXT), tl.load(state + BEYOND)
    rejected, place = tl.load(state + REJECTED), tl.load(state + PLACE)
    guess, slope = tl.load(state + GUESS), tl.load(state + SLOPE)
    first_step, direction = tl.load(given + FIRST_STEP), tl.load(given + DIRECTION)
    min_step, entries = tl.load(given + MIN_STEP), tl.load(given + ENTRIES)
    ratio = tl.sqrt(total(sums, tiles) / entries)
    size = tl.sqrt(total(sums + tiles, tiles) / entries)
    bad = total(sums + 2 * tiles, tiles)
    tl.debug_barrier()  # all threads have read what one of them will overwrite

    starts, probes, steps = phase == START, phase == PROBE, phase == STEP
    guesses = starts & (first_step != first_step)
    fails = steps & ~(ratio < float("inf")) & ((bad > 0.0) | (h <= min_step))
    fails = fails | (guesses & ~(size + ratio < float("inf")))
    accepts = steps & ((ratio <= 1.0) | (h <= min_step)) & ~fails
    tl.store(log + 2 * accepted.to(tl.int64), direction * end, mask=accepts)
    tl.store(log + 2 * accepted.to(tl.int64) + 1, direction * h, mask=accepts)
    tl.store(state + ACCEPTED, accepted + accepts.to(tl.float64))
    tl.store(state + REJECTED, rejected + (steps & ~accepts & ~fails).to(tl.float64))
    tl.store(state + PLACE, tl.where(accepts | starts, 1.0 - place, place))
    after = tl.where(accepts, beyond, before)
    attempts = tl.where(after > before, 0.0, attempts + steps.to(tl.float64))
    s = tl.where(accepts, end, s)

    raw = tl.where(probes, first_size(guess, slope, ratio / guess, given), first_step)
    h = clamp(tl.where(steps, next_size(h, ratio, given), raw), given)
    end = s + h
    underflows = ~(end > s)
    target = tl.load(
        given + METHOD + STAGES * (STAGES + 7) + after.to(tl.int32), mask=after < outputs
    )
    meets = (tl.load(given + MEET) > 0.0) & (target < end)
    h = tl.where(meets, target - s, h)
    end = tl.where(meets, target, end)

    outcome = tl.where(guesses | ~underflows, RUNNING, UNDERFLOW)
    too_many = ~guesses & (attempts >= tl.load(given + MOST))
    outcome = tl.where(too_many, TOO_MANY, outcome)
    outcome = tl.where(after >= outputs, DONE, outcome)
    outcome = tl.where(fails, NOT_FINITE, outcome)
    beyond = after.to(tl.int32)
    if outcome == RUNNING:
        if guesses:
            guess = first_guess(size, ratio)
            plan_probe(numbers, s, guess, direction, STAGES, PLACES)
        else:
            plan_step(numbers, given, s, h, end, direction, STAGES, PLACES)
            beyond = plan_outputs(
                weights, given, s, h, end, direction, beyond, outputs, STAGES, STAGE_PLACES
            )
    tl.store(state + S, s)
    tl.store(state + SIZE, h)
    tl.store(state + END, end)
    tl.store(state + ATTEMPTS, attempts)
    tl.store(state + NEXT, after)
    tl.store(state + BEYOND, beyond.to(tl.float64))
    tl.store(state + OUTCOME, outcome.to(tl.float64))
    tl.store(state + PHASE, tl.where(guesses, PROBE, STEP).to(tl.float64))
    tl.store(state + GUESS, guess)
    tl.store(state + SLOPE, tl.where(starts, ratio, slope))


@triton.jit(do_not_specialize=["tiles", "outputs"])
def control_kernel(
    state,
    given,
    numbers,
    weights,
    sums,
    log,
    tiles,
    outputs,
    STAGES: tl.constexpr,
    PLACES: tl.constexpr,
    STAGE_PLACES: tl.constexpr,
):
    """The step control, unless the solve is over; one program."""
    if tl.load(state + OUTCOME) == RUNNING:
        control(
            state, given, numbers, weights, sums, log, tiles, outputs, STAGES, PLACES, STAGE_PLACES
        )


@triton.jit
def control_rows(
    given,
    phase,
    target,
    first_node,
    ratio,
    size,
    bad,
    s,
    h,
    end,
    accepted,
    rejected,
    attempts,
    outcome,
    guess,
    slope,
    last,
):
    """Accept or reject the attempt of every row, and plan the next one, with values in registers.

    The last step of a row ends at the target.
    """
    # The interpreter does not take a condition of one number and one of every row together.
    zeros = tl.zeros_like(s)
    first_step, min_step = tl.load(given + FIRST_STEP) + zeros, tl.load(given + MIN_STEP)
    runs, phase = outcome == RUNNING, phase + zeros
    starts, probes, steps = phase == START, phase == PROBE, phase == STEP
    guesses = starts & (first_step != first_step)
    fails = steps & ~(ratio < float("inf")) & ((bad > 0.0) | (h <= min_step))
    fails = fails | (guesses & ~(size + ratio < float("inf")))
    accepts = runs & steps & ((ratio <= 1.0) | (h <= min_step)) & ~fails
    accepted += accepts.to(tl.float64)
    rejected += (runs & steps & ~accepts & ~fails).to(tl.float64)
    attempts += (runs & steps).to(tl.float64)
    last = tl.where(runs & steps & ~fails, ratio, last)

    raw = tl.where(probes, first_size(guess, slope, ratio / guess, given), first_step)
    raw = clamp(tl.where(steps, next_size(h, ratio, given), raw), given)
    guess = tl.where(guesses, first_guess(size, ratio), guess)
    slope = tl.where(starts, ratio, slope)
    s = tl.where(accepts, end, s)
    end = s + raw
    ends = tl.where(end > s, RUNNING, UNDERFLOW)
    ends = tl.where(attempts >= tl.load(given + MOST), TOO_MANY, ends)
    ends = tl.where(s >= target, DONE, ends)
    ends = tl.where(guesses, RUNNING, ends)
    ends = tl.where(fails, NOT_FINITE, ends).to(tl.float64)
    outcome = tl.where(runs, ends, outcome)
    meets = target < end
    h = tl.where(meets, target - s, raw)
    end = tl.where(meets, target, end)
    # The slope after a guess is the second stage of a step whose second node lies there.
    h = tl.where(guesses, guess / first_node, h)
    end = tl.where(guesses, s + h, end)
    return s, h, end, accepted, rejected, attempts, outcome, guess, slope, last, accepts
