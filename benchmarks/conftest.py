"""Options of `pytest benchmarks`."""

from __future__ import annotations

import pytest

from .run import use_threads


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the choice between the quick selection and everything."""
    parser.addoption(
        "--all-cases",
        action="store_true",
        help="benchmarks: every case, operation and peer, not the quick selection",
    )


def pytest_configure() -> None:
    """Use one thread, in JAX too."""
    use_threads(1)
