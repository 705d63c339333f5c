"""Which type arithmetic runs in, and rows of summaries kept one width below it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_FP8_MAX = 448.0
_ONE_WIDTH_BELOW = {
    torch.float64: torch.float32,
    torch.float32: torch.bfloat16,
    torch.bfloat16: torch.float8_e4m3fn,
    torch.float16: torch.float8_e4m3fn,
}
_BY_NAME = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
SCALE_BYTES = 2


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulation type for inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def resolve_summary_dtype(name: str, kv_dtype: torch.dtype) -> torch.dtype:
    """The torch type that `HGAConfig.summary_dtype` stands for beside K/V of `kv_dtype`."""
    if name == "model":
        return kv_dtype
    return _ONE_WIDTH_BELOW[kv_dtype] if name == "auto" else _BY_NAME[name]


def row_bytes(width: int, dtype: torch.dtype) -> int:
    """Bytes of one encoded row of `width` numbers, its scale included."""
    return width * dtype.itemsize + (SCALE_BYTES if dtype == torch.float8_e4m3fn else 0)


class Rows(NamedTuple):
    """Encoded rows: data (..., D) and, for fp8, one bfloat16 scale a row (..., 1)."""

    data: Tensor
    scale: Tensor | None


def encode_rows(rows: Tensor, dtype: torch.dtype) -> Rows:
    """Encode float rows (..., D) as `dtype`; fp8 rows carry a scale of their own.

    fp8 with a scale a row costs nothing measurable in fidelity (design section 5). The scale is bfloat16 so
    that rows of any magnitude fit; rows are divided by the *rounded* scale, and clamped, since e4m3 has no Inf.
    """
    if dtype != torch.float8_e4m3fn:
        return Rows(rows.to(dtype), None)
    peak = rows.abs().amax(-1, keepdim=True)
    scale = (peak / _FP8_MAX).clamp(min=torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16)
    scaled = (rows / scale.to(rows.dtype)).clamp(-_FP8_MAX, _FP8_MAX)
    return Rows(scaled.to(dtype), scale)


def decode_rows(rows: Rows, dtype: torch.dtype) -> Tensor:
    """Decode rows back to `dtype` (..., D). Returns the data itself where nothing has to change."""
    decoded = rows.data.to(dtype)
    return decoded if rows.scale is None else decoded * rows.scale.to(dtype)
