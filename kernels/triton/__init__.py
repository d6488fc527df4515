"""The Triton kernels, imported as `fmft_fast.kernels`."""
