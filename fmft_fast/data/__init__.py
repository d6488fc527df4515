"""Demonstrations: one layout in memory, readers of the usual formats, windows, normalisers."""

from fmft_fast.data.episodes import Episodes
from fmft_fast.data.normalise import Normalizer
from fmft_fast.data.read import FORMATS, read_episodes
from fmft_fast.data.windows import Windows, make_windows

__all__ = ["FORMATS", "Episodes", "Normalizer", "Windows", "make_windows", "read_episodes"]
