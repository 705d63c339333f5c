"""One layer's row on random K/V: what the tests of the cache's core share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hga.cache.routed import Scoring
from hga.cache.row import Counters, Row
from hga.config import HGAConfig
from hga.store import MemoryStore, RecordLayout

SMALL = HGAConfig(
    chunk_size=32,
    group_size=4,
    node_size=4,
    overselection="all",
    coded=False,
    sink_tokens=4,
    window_tokens=12,
    budget_tokens=48,
    prefill="routed",
    summary_dtype="model",
)


@dataclass
class Sequence3:
    """query (H, R, T, D), key and value (H, T, D) of one sequence."""

    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def tokens(self) -> int:
        return self.key.shape[1]


def random_sequence(tokens: int, seed: int, dtype: torch.dtype = torch.float64) -> Sequence3:
    generator = torch.Generator().manual_seed(seed)
    heads, repeats, width = 2, 3, 16

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    # Queries of twice unit size make attention peaked enough for routing to matter.
    return Sequence3(2 * draw(heads, repeats, tokens, width), draw(heads, tokens, width), draw(heads, tokens, width))


def new_row(config: HGAConfig, frequencies: Tensor | None = None) -> tuple[Row, dict[str, MemoryStore]]:
    """A row, and the dict that will hold its store under "store" once a chunk has closed."""
    opened: dict[str, MemoryStore] = {}

    def open_store(layout: RecordLayout) -> MemoryStore:
        return opened.setdefault("store", MemoryStore(layout, torch.device("cpu"), config.store))

    return Row(config, open_store, Counters(), frequencies), opened


def feed(row: Row, sequence: Sequence3, first: int, last: int, blocks: Sequence[int] = ()) -> Tensor:
    """Feed positions [first, last) in blocks of the given sizes (repeated; one block if none): (H, R, T, D)."""
    outputs, start, index = [], first, 0
    while start < last:
        size = blocks[index % len(blocks)] if blocks else last - first
        stop = min(last, start + size)
        row.append(sequence.key[:, start:stop], sequence.value[:, start:stop])
        outputs.append(row.attend(sequence.query[:, :, start:stop], Scoring(sequence.key.shape[-1] ** -0.5)))
        start, index = stop, index + 1
    return torch.cat(outputs, 2)


def dense(sequence: Sequence3) -> Tensor:
    """Causal SDPA of the whole sequence (H, R, T, D)."""
    repeats = sequence.query.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        sequence.query,
        sequence.key[:, None].expand(-1, repeats, -1, -1),
        sequence.value[:, None].expand(-1, repeats, -1, -1),
        is_causal=True,
    )
