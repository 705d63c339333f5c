"""Bounded memory: beside the model only the summaries grow with the context."""

import pytest
import torch
from rows import new_row

from hga.cache.layout import summary_bytes_per_token
from hga.cache.routed import Scoring
from hga.config import HGAConfig

KV_HEADS, REPEATS, HEAD_DIM = 4, 8, 128  # Qwen3-30B-A3B's layer


@pytest.mark.parametrize(("preset", "store"), [("balanced", "ram"), ("lean", "ram"), ("balanced", "device")])
@torch.no_grad()
def test_from_4k_to_64k_only_summaries_grow(preset, store):
    config = HGAConfig.preset(preset, prefill="routed", store=store)
    row, opened = new_row(config)
    generator = torch.Generator().manual_seed(0)
    summaries, windows, working, stored = {}, {}, {}, {}
    for end in range(1024, 65536 + 1, 1024):
        keys, values = (
            torch.randn(KV_HEADS, 1024, HEAD_DIM, generator=generator, dtype=torch.bfloat16) for _ in range(2)
        )
        row.append(keys, values)
        query = torch.randn(KV_HEADS, REPEATS, 1, HEAD_DIM, generator=generator, dtype=torch.bfloat16)
        row._counters.reset()
        row.attend(query, Scoring(HEAD_DIM**-0.5))
        summaries[end], windows[end] = row.summary_bytes(), row.window_bytes()
        working[end] = row._counters.working_bytes
        stored[end] = opened["store"].held_bytes()[store]
    per_token = KV_HEADS * summary_bytes_per_token(config, HEAD_DIM, torch.bfloat16)
    for end in (4096, 16384, 65536):
        archived = row_archive_tokens(config, end)
        assert per_token * archived <= summaries[end] <= 1.13 * per_token * archived
        token_bytes = KV_HEADS * 2 * HEAD_DIM * 2
        order_bytes = 2 * KV_HEADS if config.ordering == "content" else 0
        assert stored[end] == archived * (token_bytes + order_bytes)
    late = [end for end in windows if end >= 4096]
    assert max(windows[end] for end in late) == windows[4096]
    budget_bytes = KV_HEADS * config.budget_tokens * 2 * HEAD_DIM * 2
    assert max(working[end] for end in late) <= budget_bytes


def row_archive_tokens(config: HGAConfig, length: int) -> int:
    """Tokens in closed chunks after `length` tokens."""
    tile = length // 64 * 64
    return max(0, (tile - config.window_tokens - config.sink_tokens) // config.chunk_size) * config.chunk_size


def test_balanced_keeps_at_most_13_percent_in_every_type():
    config = HGAConfig.preset("balanced")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for head_dim in (64, 128, 256):
            share = summary_bytes_per_token(config, head_dim, dtype) / (2 * head_dim * dtype.itemsize)
            assert share <= 0.13
