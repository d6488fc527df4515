"""A field with effects is left alone: it is not run, not even once, to find that out."""

from __future__ import annotations

import functools
import itertools
import logging
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fmft_fast.fusion import NotFusable, Plan, find_plan

D = 2
TOTAL = 0
LOG: list = []
TABLE: dict = {}


def total(t, x):
    global TOTAL
    TOTAL += 1
    return -x


def appended(t, x):
    LOG.append(1)
    return -x


def appended_alias(t, x):
    log = LOG
    log += [1]
    return -x


def stored(t, x):
    TABLE[len(TABLE)] = 1
    return -x


def updated(t, x):
    TABLE.update({len(TABLE): 1})
    return -x


def by_default(t, x, log=[]):  # noqa: B006
    log.append(1)
    LOG.append(1)
    return -x


def printed(t, x):
    print("called")
    LOG.append(1)
    return -x


def written(t, x):
    sys.stdout.write("called")
    return -x


def logged(t, x):
    logging.getLogger("fusion").warning("called")
    return -x


def seeded(t, x):
    torch.manual_seed(LOG.append(1) or 0)
    return -x


def numpy_random(t, x):
    return -x + np.random.rand()


def exception(t, x):
    try:
        LOG.append(1)
    except BaseException:
        pass
    return -x


def helper(log):
    return log.append(1)


def through_helper(t, x):
    helper(LOG)
    return -x


def through_map(t, x):
    list(map(LOG.append, [1]))
    return -x


def set_attribute(t, x):
    appended_alias.calls = 1
    return -x


def set_by_name(t, x):
    setattr(appended_alias, "calls", 1)  # noqa: B010
    return -x


def walrus(t, x):
    return -x if not [LOG.append(v) for v in range(2)] else x


COUNTER, QUEUE = itertools.count(), iter([1.0, 2.0, 3.0])
push, later = LOG.append, functools.partial(LOG.append, 1)


def iterated(t, x):
    LOG.append(next(COUNTER))
    return -x


def consumed(t, x):
    for value in QUEUE:
        x = x * value
    return x


def bound_before(t, x):
    list(map(push, [1]))
    return -x


def partial(t, x):
    later()
    return -x


@functools.lru_cache
def remembered(n):
    return torch.ones(n)


def cached(t, x):
    return -x + remembered(D)


CASES = [
    iterated, consumed, bound_before, partial, cached,
    total, appended, appended_alias, stored, updated, by_default, printed, written, logged, seeded,
    numpy_random, exception, through_helper, through_map, set_attribute, set_by_name, walrus,
]  # fmt: skip


@pytest.mark.parametrize("field", CASES, ids=lambda f: f.__name__)
def test_no_effect_takes_place(field, capsys, caplog):
    before = (TOTAL, len(LOG), len(TABLE), hasattr(appended_alias, "calls"))
    state, np_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for _ in range(3):
        got = find_plan(field, torch.randn(4, D, generator=torch.Generator().manual_seed(0)))
        assert isinstance(got, NotFusable) and got.where and "test_effects.py:" in got.where, got
    assert next(COUNTER) == 0 and remembered.cache_info().currsize == 0
    globals()["COUNTER"] = itertools.count()
    assert before == (TOTAL, len(LOG), len(TABLE), hasattr(appended_alias, "calls"))
    assert torch.equal(state, torch.get_rng_state())
    assert (np_state == np.random.get_state()[1]).all()
    assert capsys.readouterr().out == "" and not caplog.records


class Counting(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.nfe, self.log = how, 0, []
        self.net = nn.Linear(D, D)
        self.register_buffer("calls", torch.zeros(()))

    def count(self):
        self.nfe += 1

    @property
    def noisy(self):
        self.log.append(1)
        return 1.0

    def forward(self, t, x):
        if self.how == "attribute":
            self.nfe += 1
        elif self.how == "method":
            self.count()
        elif self.how == "log":
            self.log.append(t)
        elif self.how == "buffer":
            self.calls.add_(1)
        elif self.how == "buffer by operator":
            calls = self.calls
            calls += 1
        elif self.how == "property":
            return self.net(x) * self.noisy
        elif self.how == "setattr":
            setattr(self, "nfe", self.nfe + 1)  # noqa: B010
        elif self.how == "dict":
            self.__dict__["nfe"] += 1
        elif self.how == "register":
            self.register_buffer("more", torch.zeros(1))
        return self.net(x)


HOW = ["attribute", "method", "log", "buffer", "buffer by operator", "property", "setattr", "dict"]


@pytest.mark.parametrize("how", [*HOW, "register"])
def test_a_module_that_counts_its_calls(how):
    field = Counting(how)
    keys = list(field.state_dict())
    got = find_plan(field, torch.randn(4, D))
    assert isinstance(got, NotFusable) and got.where and "test_effects.py:" in got.where
    assert field.nfe == 0 and field.log == [] and field.calls == 0
    assert list(field.state_dict()) == keys


def test_a_nonlocal_counter_and_one_in_a_closure():
    count, log = 0, []

    def by_nonlocal(t, x):
        nonlocal count
        count += 1
        return -x

    y = torch.randn(4, D)
    for field in (by_nonlocal, lambda t, x: -x if log.append(1) else x):
        assert isinstance(find_plan(field, y), NotFusable)
    assert count == 0 and log == []


def test_a_list_of_its_own_is_no_effect():
    net = nn.ModuleList([nn.Linear(D, D) for _ in range(3)])

    def field(t, x):
        values = [x]
        for layer in net:
            values.append(torch.tanh(layer(values[-1])))
        return sum(values)

    y = torch.randn(4, D)
    plan = find_plan(field, y)
    assert isinstance(plan, Plan), plan
    assert len(plan.network.layers) in (3, 4)


def test_a_plan_draws_no_random_numbers_and_calls_nothing_twice():
    calls = []

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, D))

        def forward(self, t, x):
            return self.net(x)

    field, y = Seen(), torch.randn(4, D)
    state = torch.get_rng_state()
    attributes = dict(field.__dict__)
    assert isinstance(find_plan(field, y), Plan)
    assert torch.equal(state, torch.get_rng_state())
    assert field.__dict__ == attributes and calls == []
    assert all(p.grad is None for p in field.parameters())
    assert sys.getprofile() is None
