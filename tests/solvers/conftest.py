"""Fixtures of the tests of repeated solves."""

from __future__ import annotations

import pytest
from solvers.repeating import CALLS

from fmft_fast.solvers.repeated import Repeat


@pytest.fixture
def short(monkeypatch):
    """Counts the solves that took the short way."""
    taken = []
    whole = Repeat.solve

    def solve(self, field, given):
        found = whole(self, field, given)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(Repeat, "solve", solve)
    return taken


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]
