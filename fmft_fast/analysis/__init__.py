"""Measures of samples (`metrics`) and figures (`plots`, which needs matplotlib)."""
