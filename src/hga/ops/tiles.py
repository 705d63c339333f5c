"""The tile grid in numbers: closed chunks, and the groups between archive and window that are routed by position."""

from __future__ import annotations

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
