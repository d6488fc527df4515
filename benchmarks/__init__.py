"""Benchmarks that anyone can run; see `python -m benchmarks.run --help`."""
