"""Triton kernels, one family per file; imported by `ramp_fast.ops` at the first use of each."""
