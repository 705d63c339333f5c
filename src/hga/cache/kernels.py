"""Which of a cache's work Triton kernels do; PyTorch does the rest."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch

from hga.config import HGAConfig
from hga.ops import closing
from hga.ops.closing import Closed
from hga.ops.precision import resolve_summary_dtype

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_CHUNK = 512


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def kernels_serve(config: HGAConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels serve K/V of this type on this device: CUDA, 16 or 32 bits, plain mean summaries no wider."""
    if device.type != "cuda" or not _has_triton() or dtype not in _DTYPES or config.summary != "mean":
        return False
    summary_dtype = resolve_summary_dtype(config.summary_dtype, dtype)
    return dtype == torch.float32 or summary_dtype in (dtype, torch.float8_e4m3fn)


def find_closing(config: HGAConfig, dtype: torch.dtype, device: torch.device) -> Callable[..., Closed]:
    """The `close_chunks` for K/V of this type on this device."""
    if kernels_serve(config, dtype, device) and config.chunk_size <= _LARGEST_CHUNK:
        from hga.ops.kernels.closing import close_chunks

        return close_chunks
    return closing.close_chunks
