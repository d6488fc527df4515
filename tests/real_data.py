"""Where tests find real data: in $FMFT_DATA, else in shared/data beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


def data_folder(name: str) -> Path:
    """Give the folder of a data set, or skip the test with the reason."""
    folder = Path(os.environ.get("FMFT_DATA", BESIDE)) / name
    if not folder.is_dir():
        pytest.skip(f"needs the real data {name!r}: put them under $FMFT_DATA")
    return folder
