"""Strips: at most 64 consecutive positions of one tile, whose heads fill the rows of a matrix product.

With "shared" the R heads of a KV head choose together and share a strip; with "per_head" each query head has strips of
its own.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga.config import TILE_TOKENS, HGAConfig
from hga.ops.kernels.flash import choose_launch, load_rows, padded_width
from hga.ops.tiles import pending_capacity

CHANGING = ("strip_first", "closed_before", "first", "tokens", "near_held", "near_tokens")
"""Arguments that differ from block to block: a kernel specialised on them would be compiled again and again."""


@dataclass(frozen=True)
class Strips:
    """The strips of a block, and what every kernel is told of it."""

    query: Tensor
    """(Hkv, R, T, D)"""
    heads: int
    """Heads that choose: Hkv, or Hkv R with "per_head"."""
    count: int
    first: int
    """The block's first position."""
    closed_before: int
    """Chunks that were closed when the block began."""
    closed: Tensor
    """Chunks closed for each strip and head, int32 (S, H)."""
    constants: dict[str, Any]
    options: dict[str, Any]
    """Warps and stages of the kernels with matrix products."""

    @property
    def geometry(self) -> tuple[int, ...]:
        """What a kernel is told of the block: closed chunks, first position, tokens, and the query's strides."""
        return (self.closed_before, self.first, self.query.shape[2], *self.query.stride()[:3])


def fit_strip(config: HGAConfig, query: Tensor) -> tuple[int, int]:
    """Positions of a strip and rows of each, for queries (Hkv, R, T, D). ValueError for more heads than fit a tile."""
    repeats, width = query.shape[1], query.shape[3]
    rows = choose_launch(width, query.dtype, query.device).rows
    padded = 1 << (repeats - 1).bit_length() if config.selectors(repeats) == 1 else 1
    queries = min(TILE_TOKENS, rows // padded)
    if not queries:
        raise ValueError(f"{repeats} query heads per KV head; the kernels serve at most {rows}: use PyTorch")
    return queries, padded


def cut_strips(config: HGAConfig, query: Tensor, first: int, closed_before: int, scoring: dict[str, Any]) -> Strips:
    """Strips of as many positions as fill a tile's rows with their heads. scoring: `scale` and SOFTCAP."""
    kv_heads, repeats, tokens, width = query.shape
    launch = choose_launch(width, query.dtype, query.device)
    shared = config.selectors(repeats) == 1
    queries, padded = fit_strip(config, query)
    constants = {
        **scoring,
        "SINK": config.sink_tokens,
        "WINDOW": config.window_tokens,
        "CHUNK": config.chunk_size,
        "GROUP": config.group_size,
        "TILE": TILE_TOKENS,
        "PENDING_WIDTH": pending_capacity(config, launch.keys),
        "SPLIT": 1 if shared else repeats,
        "REPEATS": repeats if shared else 1,
        "QUERIES": queries,
        "PADDED": padded,
        "PRECISION": "ieee",
        "WIDTH": width,
        "BLOCK_WIDTH": padded_width(width),
        "KEYS": launch.keys,
    }
    heads = kv_heads if shared else kv_heads * repeats
    options = {"num_warps": launch.warps if queries * padded == launch.rows else 4, "num_stages": launch.stages}
    strips = torch.arange(first // queries, (first + tokens - 1) // queries + 1, device=query.device)
    tile = strips * queries // TILE_TOKENS * TILE_TOKENS
    closed = (tile - config.window_tokens - config.sink_tokens).clamp(min=0) // config.chunk_size
    closed = closed.to(torch.int32)[:, None].repeat(1, heads)
    return Strips(query, heads, len(strips), first, closed_before, closed, constants, options)


@triton.jit
def place_rows(strip, first, QUERIES: tl.constexpr, PADDED: tl.constexpr):
    """Of each row of a strip: which of its queries, and at which position."""
    lane = tl.arange(0, QUERIES * PADDED) // PADDED
    return lane, (first // QUERIES + strip) * QUERIES + lane


@triton.jit
def count_closed(position, SINK: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Chunks that count as closed for the tile of a position."""
    return tl.maximum(position // TILE * TILE - WINDOW - SINK, 0) // CHUNK


@triton.jit
def count_pending(position, closed, SINK: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr):
    """Groups by position, behind the archive, that the query at a position may open."""
    return (tl.maximum(position - closed * CHUNK - WINDOW + 1 - SINK, 0) + GROUP - 1) // GROUP


@triton.jit
def load_query(
    query,
    head,
    position,
    first,
    tokens,
    head_stride,
    repeat_stride,
    stride,
    SPLIT: tl.constexpr,
    REPEATS: tl.constexpr,
    QUERIES: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The queries (rows, D) of a strip, whether each row is a query of the block, and its place in an output."""
    repeat = head % SPLIT + tl.arange(0, QUERIES * PADDED) % PADDED
    real = (position >= first) & (position < first + tokens)
    if PADDED > REPEATS:
        real = real & (repeat < REPEATS)
    place = tl.minimum(tl.maximum(position - first, 0), tokens - 1)
    repeat = tl.minimum(repeat, SPLIT * REPEATS - 1)
    kv_head = (head // SPLIT).to(tl.int64)
    at = kv_head * head_stride + repeat.to(tl.int64) * repeat_stride + place.to(tl.int64) * stride
    rows = load_rows(query, at, tl.arange(0, BLOCK_WIDTH), WIDTH, BLOCK_WIDTH)
    return rows, real, (kv_head * SPLIT * REPEATS + repeat) * tokens + place
