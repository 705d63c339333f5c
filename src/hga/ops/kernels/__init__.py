"""Triton kernels: each beside a reference of the same name and signature in `hga.ops`."""
