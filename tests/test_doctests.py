"""The examples in the docstrings of all modules run and say the truth."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import fmft_fast

COMPILED = ("_cpu", "_cuda")
MODULES = [
    module.name
    for module in pkgutil.walk_packages(fmft_fast.__path__, "fmft_fast.")
    if not module.name.endswith((*COMPILED, "__main__")) and ".kernels" not in module.name
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} does not import here: {error}")
    assert doctest.testmod(module).failed == 0


def test_the_public_interface_has_examples():
    finder = doctest.DocTestFinder()
    for function in (fmft_fast.solve, fmft_fast.odeint, fmft_fast.patch_torchdiffeq):
        assert any(test.examples for test in finder.find(function))
