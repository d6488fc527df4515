"""Every example in the documentation of `fmft_fast.train` and of the reports runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import fmft_fast.train

MODULES = ["fmft_fast.report"] + [
    f"fmft_fast.train.{module.name}" for module in pkgutil.iter_modules(fmft_fast.train.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0
