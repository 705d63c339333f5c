"""What stands for a group or a node: the mean of its keys and of its values."""

from __future__ import annotations

import torch
from torch import Tensor

SLOW_PHASE_RADIANS = 0.5
"""A RoPE pair that moves less than this over a unit is averaged before rotation (the paper's mixed summary)."""


def mean_rows(rows: Tensor, size: int) -> Tensor:
    """Plain means of each `size` consecutive rows: (..., T, D) -> (..., T // size, D)."""
    means: Tensor = rows.unflatten(-2, (-1, size)).mean(-2)
    return means


def mixed_rope_means(keys: Tensor, size: int, inverse_frequencies: Tensor) -> Tensor:
    """The paper's mixed-RoPE means of each `size` consecutive keys: (..., T, D) -> (..., T // size, D).

    A pair whose phase moves more than 0.5 rad over the unit, `(size - 1) * theta > 0.5`, is averaged as
    stored. A slower pair of each key is first rotated to the unit's middle position, which equals averaging
    before RoPE and rotating once. `inverse_frequencies`: (r,) for the first 2 r dimensions (half-split
    layout, dimension i pairs with i + r); the dimensions behind them carry no position.
    """
    pairs = inverse_frequencies.shape[0]
    theta = inverse_frequencies.to(keys.device, keys.dtype)
    to_middle = (size - 1) / 2 - torch.arange(size, device=keys.device, dtype=keys.dtype)  # (size,)
    slow = (size - 1) * theta <= SLOW_PHASE_RADIANS
    angle = to_middle[:, None] * torch.where(slow, theta, 0)  # (size, r)
    units = keys.unflatten(-2, (-1, size))  # (..., units, size, D)
    first, second, rest = units.split([pairs, pairs, units.shape[-1] - 2 * pairs], -1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
    return turned.mean(-2)


def summarise_keys(keys: Tensor, size: int, inverse_frequencies: Tensor | None) -> Tensor:
    """Key summaries of each `size` rows: plain means, or mixed-RoPE means where frequencies are given."""
    if inverse_frequencies is None:
        return mean_rows(keys, size)
    return mixed_rope_means(keys, size, inverse_frequencies)
