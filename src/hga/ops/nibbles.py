"""Mean values of nodes in four bits a number, with a step a row."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hga.ops.precision import SCALE_BYTES, Rows, decode_rows

TENTHS = range(5, 11)
"""Where the levels may end, in tenths of a row's largest number: what lies beyond is clipped, the rest gets finer."""
_TINY = torch.finfo(torch.bfloat16).tiny


class Nibbles(NamedTuple):
    """Rows of n means in four bits: each number is (code - 7.5) * the row's scale.

    data uint8 (..., n, D / 2): number d is in the low half of byte d, number d + D / 2 in its high half. scale bfloat16
    (..., n, 1).
    """

    data: Tensor
    scale: Tensor


def nibble_bytes(width: int) -> float:
    """Bytes of one row of `width` numbers, its scale included."""
    return width / 2 + SCALE_BYTES


def encode_nibbles(rows: Tensor) -> Nibbles:
    """Code rows (..., D), D even, each with the step that leaves the least squared error; the largest of equals."""
    peak = rows.abs().amax(-1, keepdim=True)
    best, least = torch.zeros_like(peak, dtype=torch.bfloat16), torch.full_like(peak, torch.inf)
    for tenths in TENTHS:
        scale = (peak * (tenths / 75)).clamp(min=_TINY).to(torch.bfloat16)  # 15 steps from one end to the other
        step = scale.to(rows.dtype)
        error = ((_levels(rows, step) + 0.5) * step - rows).square().sum(-1, keepdim=True)
        best, least = torch.where(error <= least, scale, best), torch.minimum(error, least)
    codes = (_levels(rows, best.to(rows.dtype)) + 8).to(torch.uint8)
    low, high = codes.chunk(2, -1)
    return Nibbles(low | high << 4, best)


def decode_nibbles(nibbles: Nibbles, dtype: torch.dtype) -> Tensor:
    """The rows (..., D) as `dtype`."""
    codes = torch.cat([nibbles.data & 15, nibbles.data >> 4], -1)
    return codes.to(dtype).sub_(7.5).mul_(nibbles.scale.to(dtype))


def decode_either(rows: Rows | Nibbles, dtype: torch.dtype, index: Any = ...) -> Tensor:
    """Rows (..., D) as `dtype`, in whichever way they are kept; index: which of them."""
    if isinstance(rows, Nibbles):
        return decode_nibbles(Nibbles(rows.data[index], rows.scale[index]), dtype)
    return decode_rows(Rows(rows.data[index], None if rows.scale is None else rows.scale[index]), dtype)


def _levels(rows: Tensor, step: Tensor) -> Tensor:
    return (rows / step).floor().clamp(-8, 7)
