"""Triton kernels, each beside a PyTorch reference of the same name and signature in `hga.ops`."""
