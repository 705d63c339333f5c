"""A tile: some queries of one layer and everything that came before them; attention over a part of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hga.config import TILE_TOKENS
from hga.ops.precision import compute_dtype
from hga.ops.routing import NEVER, score


class Attended(NamedTuple):
    """What a rule made of a tile.

    out (H, R, M, D); exact: bool (H, R', M, N), the tokens attended exactly, R' = 1 where the R heads agree;
    estimated: (H, R, M), summary rows that took part beside them.
    """

    out: Tensor
    exact: Tensor
    estimated: Tensor


@dataclass
class Tile:
    """Queries at positions start to start + M - 1, at most `TILE_TOKENS` of one place of the tile grid.

    query (H, R, M, D), scaled; key, value (H, N, D): all rows up to the last query, N = start + M.
    frequencies: inverse RoPE frequencies (r,), None without RoPE. notes: what a rule derived from earlier tiles
    of this layer (`once`).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    start: int
    frequencies: Tensor | None = None
    notes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> Tensor:
        """Positions of the queries (M,)."""
        return torch.arange(self.start, self.key.shape[1], device=self.key.device)

    @functools.cached_property
    def causal(self) -> Tensor:
        """bool (M, N): the tokens that a query may see."""
        return torch.arange(self.key.shape[1], device=self.key.device) <= self.positions[:, None]

    @functools.cached_property
    def logits(self) -> Tensor:
        """Exact logits (H, R, M, N), -inf behind the query."""
        return score(self.query, self.key).masked_fill(~self.causal, NEVER)

    def once(self, name: str, count: int, make: Callable[[int, int], Tensor]) -> Tensor:
        """The first `count` units of what `make(first, last)` derives from the past, along dimension 1.

        Each unit is derived once, when a tile first asks for it, and kept for the layer's later tiles.
        """
        made = self.notes.get(name)
        done = 0 if made is None else made.shape[1]
        if made is None or count > done:
            fresh = make(done, count)
            made = fresh if made is None else torch.cat([made, fresh], 1)
            self.notes[name] = made
        return made[:, :count]

    def attend(self, exact: Tensor, far_logits: Tensor | None = None, far_values: Tensor | None = None) -> Attended:
        """One softmax over the exact tokens (bool (H, R', M, N)) and estimated rows.

        far_logits (H, R, M, F), -inf where a row takes no part; far_values (H, F, D).
        """
        logits, values = self.logits.masked_fill(~exact, NEVER), self.value
        estimated = torch.zeros(self.query.shape[:3], device=self.key.device)
        if far_logits is not None and far_values is not None:
            estimated = (far_logits > NEVER).sum(-1).to(estimated.dtype)
            logits = torch.cat([logits, far_logits], -1)
            values = torch.cat([values, far_values], 1)
        heads, repeats, queries, _ = logits.shape
        weights = torch.softmax(logits, -1).view(heads, repeats * queries, -1)
        return Attended((weights @ values).view(heads, repeats, queries, -1), exact, estimated)


def cut_tiles(
    query: Tensor, key: Tensor, value: Tensor, scale: float, frequencies: Tensor | None, notes: dict[str, Tensor]
) -> Iterator[Tile]:
    """The tiles of a block of queries (Hq, T, D) behind which key and value (Hkv, N, D) end."""
    heads, length, width = key.shape
    work = compute_dtype(key.dtype)
    scaled = query.view(heads, -1, query.shape[1], width).to(work) * scale
    key, value = key.to(work), value.to(work)
    first = length - query.shape[1]
    start = first
    while start < length:
        stop = min(length, (start // TILE_TOKENS + 1) * TILE_TOKENS)
        here = scaled[:, :, start - first : stop - first]
        yield Tile(here, key[:, :stop], value[:, :stop], start, frequencies, notes)
        start = stop
