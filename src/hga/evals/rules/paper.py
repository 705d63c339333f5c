"""The rule of Hierarchical Global Attention (arXiv 2606.30709), in the strict form and with its block's leak."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hga.evals.rules.budget import BudgetedRule
from hga.evals.rules.tile import Attended, Tile
from hga.ops.routing import NEVER, score
from hga.ops.summaries import summarise_keys


@dataclass(frozen=True, kw_only=True)
class PaperRule(BudgetedRule):
    """Mixed-RoPE means of chunks of 64, then of groups of 16 inside the best chunks; no far field.

    leaking: the queries of a tile of 64 add their scores and share one choice, later queries included, as the
    authors' code does: a query then sees what later tokens ask for. For comparison only, and meant for blocks of
    whole tiles. Otherwise each query chooses by itself. overselection: tokens in the chunks whose groups are scored,
    over routed tokens. Sink and window are ours, so that the budget can be small; the paper's take 640 tokens.
    """

    leaking: bool = False
    chunk_size: int = 64
    group_size: int = 16
    overselection: int = 2

    def metadata_share(self, width: int, tokens: int) -> float:
        """Mean keys of chunks and groups in 16 bits."""
        return (1 / self.chunk_size + 1 / self.group_size) / 2

    def attend(self, tile: Tile) -> Attended:
        """Route over chunks, then over the groups of the best; groups of an unfinished chunk are always candidates."""
        size, per_chunk = self.group_size, self.chunk_size // self.group_size
        groups = self._scores(tile, size)
        chunks = self._scores(tile, self.chunk_size)[..., : groups.shape[-1] // per_chunk]
        routed = self.routed_tokens // size
        if self.leaking:
            groups, chunks = _pooled(groups), _pooled(chunks)
        best = self.choose(chunks, -(-self.overselection * routed * size // self.chunk_size))
        inside = best.repeat_interleave(per_chunk, -1)
        unfinished = torch.ones_like(groups[:, : inside.shape[1], :, inside.shape[-1] :], dtype=torch.bool)
        # A chunk that reaches into a query's window cannot be chosen, but its earlier groups may be.
        blocked = (chunks == NEVER)[:, : inside.shape[1]].repeat_interleave(per_chunk, -1)
        candidates = torch.cat([inside | blocked, unfinished], -1)
        chosen = self.choose(groups.masked_fill(~candidates, NEVER), routed)
        chosen = chosen & self.allowed(tile, size)
        return tile.attend(self.expand(tile, chosen, size) | self.near(tile, size))

    def _scores(self, tile: Tile, size: int) -> Tensor:
        """Scores of all whole units before the window (H, R, M, units), -inf where a query may not choose."""
        starts = self.window_starts(tile, self.group_size)
        count = self.units(tile, self.group_size) * self.group_size // size
        ends = self.sink_tokens + torch.arange(1, count + 1, device=starts.device) * size

        def means(first: int, last: int) -> Tensor:
            return summarise_keys(self.rows(tile.key, first, last, size), size, tile.frequencies).squeeze(2)

        scores = score(tile.query, tile.once(f"mean of {size}", count, means))
        return scores.masked_fill(ends > starts[:, None], NEVER)


def _pooled(scores: Tensor) -> Tensor:
    """Log of the masses that a tile's queries give together, for each of them: (H, R, M, K)."""
    mass = torch.softmax(scores, -1).nan_to_num(0.0).sum(2, keepdim=True)
    return mass.log().expand_as(scores)
