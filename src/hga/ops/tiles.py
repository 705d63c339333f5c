"""The tile grid in numbers: closed chunks, and the groups between archive and window that are routed by position."""

from __future__ import annotations

import torch
from torch import Tensor

from hga.config import TILE_TOKENS, HGAConfig


def closed_chunks(config: HGAConfig, position: int) -> int:
    """Chunks that count as closed for the tile of `position`: those that end before its window."""
    tile = position // TILE_TOKENS * TILE_TOKENS
    return max(0, (tile - config.window_tokens - config.sink_tokens) // config.chunk_size)


def pending_groups(config: HGAConfig, index: int) -> int:
    """Groups by position, behind the archive, that the query at a place of `near` may open.

    The window starts on a group boundary; what is older than it is routed.
    """
    older = max(0, index - config.window_tokens + 1 - config.sink_tokens)
    return -(-older // config.group_size)


def pending_capacity(config: HGAConfig, multiple: int) -> int:
    """Most pending groups of any query, rounded up to a multiple: chunks close at tile starts."""
    return -(-(config.chunk_size + TILE_TOKENS) // (config.group_size * multiple)) * multiple


def attended_tokens(config: HGAConfig, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Of each query at positions [first, last): tokens that it always attends, and those of groups that it opens.

    Both int64 (n,). Of a query head; what a KV head fetches is a union where its heads choose apart.
    """
    position = torch.arange(first, last)
    tile = position // TILE_TOKENS * TILE_TOKENS
    chunks = (tile - config.window_tokens - config.sink_tokens).clamp(min=0) // config.chunk_size
    index = position - chunks * config.chunk_size
    older = (index - config.window_tokens + 1 - config.sink_tokens).clamp(min=0)
    pending = (older + config.group_size - 1) // config.group_size
    groups = pending + chunks * (config.chunk_size // config.group_size)
    opened = groups.clamp(max=config.routed_groups) * config.group_size
    return index + 1 - pending * config.group_size, opened
