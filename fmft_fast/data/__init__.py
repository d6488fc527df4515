"""Demonstrations: one layout in memory, readers of the usual formats, windows, normalisers."""
