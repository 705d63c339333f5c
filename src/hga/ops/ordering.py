"""Content ordering: which tokens of a closing chunk form a group (design section 3)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hga.ops.precision import compute_dtype
from hga.ops.routing import take_rows

POWER_ITERATIONS = 4
VALUE_WEIGHT = 0.5
"""Weight of values beside keys; measured: helps a little, full weight hurts."""


@functools.lru_cache(maxsize=8)
def start_vector(features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The one start vector of every power iteration (features, 1), so that an order depends on its chunk alone."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(features, 1, generator=generator, dtype=torch.float32).to(device, dtype)


def content_order(keys: Tensor, values: Tensor, group_size: int) -> Tensor:
    """Permutation that puts tokens with similar rotated keys (and, at half weight, values) side by side.

    A balanced tree: split at the median of the leading principal direction, recursively, down to
    `group_size`. Every aligned run of `group_size * 2**i` tokens is then a node of the tree.

    keys, values: (..., C, D) post-RoPE rows of whole chunks; C / group_size is a power of two.
    Returns int64 (..., C): position inside the chunk of the token at each place.
    """
    *batch, chunk, _ = keys.shape
    work = compute_dtype(keys.dtype)
    features = torch.cat([_standardise(keys.to(work)), VALUE_WEIGHT * _standardise(values.to(work))], -1)
    width = features.shape[-1]
    features = features.reshape(-1, chunk, width)  # (X, C, F)
    count = features.shape[0]
    start = start_vector(width, work, features.device)
    order = torch.arange(chunk, device=features.device).expand(count, chunk)  # (X, C)
    size, rows = chunk, features
    while size > group_size:
        rows = rows.view(count, chunk // size, size, width)
        rows = rows - rows.mean(2, keepdim=True)
        axis = start.expand(count, chunk // size, width, 1)
        for _ in range(POWER_ITERATIONS):
            axis = rows.mT @ (rows @ axis)
            axis = axis / (axis.norm(dim=-2, keepdim=True) + 1e-9)
        split = (rows @ axis)[..., 0].argsort(dim=-1, stable=True)  # (X, nodes, size)
        order = order.reshape(count, -1, size).gather(2, split).view(count, chunk)
        size //= 2
        if size > group_size:
            rows = take_rows(features, order)
    return order.reshape(*batch, chunk)


def _standardise(rows: Tensor) -> Tensor:
    """Divide (..., C, D) by its standard deviation over each chunk and head; rows without any stay as they are."""
    spread = rows.std((-2, -1), keepdim=True, correction=0)
    return rows / spread.masked_fill(spread < torch.finfo(rows.dtype).tiny, 1)
