"""What a config makes of a context: closed chunks, their records, and bytes. Shared by cache, plan and accounting."""

from __future__ import annotations

import torch

from hga.config import HGAConfig
from hga.ops.coding import code_bytes
from hga.ops.nibbles import nibble_bytes
from hga.ops.precision import resolve_summary_dtype, row_bytes
from hga.ops.tiles import closed_chunks
from hga.store import RecordLayout


def archived_chunks(config: HGAConfig, tokens: int) -> int:
    """Chunks that a row of `tokens` tokens holds in its archive."""
    return closed_chunks(config, tokens) if tokens >= config.dense_positions else 0


def record_layout(config: HGAConfig, kv_heads: int, head_dim: int, kv_dtype: torch.dtype) -> RecordLayout:
    """The records of one layer's chunks."""
    return RecordLayout(
        kv_heads=kv_heads,
        groups=config.chunk_size // config.group_size,
        group_size=config.group_size,
        head_dim=head_dim,
        dtype=kv_dtype,
        ordered=config.ordering == "content",
    )


def archive_bytes(config: HGAConfig, layout: RecordLayout, layers: int, tokens: int) -> int:
    """Bytes of the archive of one row of `tokens` tokens, in `layers` layers, permutations included."""
    return layers * archived_chunks(config, tokens) * (layout.chunk_bytes + layout.order_bytes)


def summary_bytes_per_token(config: HGAConfig, head_dim: int, kv_dtype: torch.dtype) -> float:
    """Bytes of summaries that one archived token of one KV head costs, scales included."""
    row = row_bytes(head_dim, resolve_summary_dtype(config.summary_dtype, kv_dtype))
    of_value = nibble_bytes(head_dim) if config.coded else row
    per_node = (row + (of_value if config.far_field else 0)) / config.node_size
    if config.coded:
        return per_node + code_bytes(head_dim, config.group_size, config.chunk_size)
    return per_node + (row / config.group_size if config.two_level else 0.0)
