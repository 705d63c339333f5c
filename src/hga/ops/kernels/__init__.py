"""Triton kernels. Each module has the name, and its functions the signatures, of a readable reference in `hga.ops`."""
