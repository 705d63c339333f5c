"""Bytes of summaries a token, from the config alone: what `hga plan` and the accounting share."""

from __future__ import annotations

import torch

from hga.config import HGAConfig
from hga.ops.precision import resolve_summary_dtype, row_bytes


def summary_bytes_per_token(config: HGAConfig, head_dim: int, kv_dtype: torch.dtype) -> float:
    """Bytes of summaries that one archived token of one KV head costs, scales included."""
    row = row_bytes(head_dim, resolve_summary_dtype(config.summary_dtype, kv_dtype))
    per_node = row * (2 if config.far_field else 1) / config.node_size
    return per_node + (row / config.group_size if config.two_level else 0.0)
