"""InfLLM (arXiv 2402.04617): blocks of consecutive tokens, each scored by a few representative keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hga.evals.rules.budget import BudgetedRule
from hga.evals.rules.tile import Attended, Tile
from hga.ops.routing import NEVER, score, take_rows


@dataclass(frozen=True, kw_only=True)
class InfLLMRule(BudgetedRule):
    """A block's representatives are its keys with the highest mean score from the queries that follow them.

    The score of a block is the sum of its representatives' scores. Following queries: as many as lie before the
    block can leave the window. The paper has blocks of 128 with 4 representatives; a budget of 1/32 of a short
    context holds one or two of those, so blocks are smaller here, with twice the representatives a token. The paper
    also moves all far tokens to one position; here rotations stay, as in every other rule. ValueError if a block is
    longer than the window.
    """

    block_size: int = 32
    representatives: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size > self.window_tokens:
            raise ValueError(
                f"block_size={self.block_size} must be at most window_tokens={self.window_tokens}: representatives "
                "are chosen by the queries of the window behind a block"
            )

    def metadata_share(self, width: int, tokens: int) -> float:
        """Representative keys in 16 bits."""
        return self.representatives / self.block_size / 2

    def observe(self, tile: Tile) -> None:
        """Keep running sums of the queries, mean over the R heads: (H, N + 1, D)."""
        query = tile.query.mean(1)
        sums = tile.notes.get("query sums")
        if sums is None:
            sums = torch.zeros_like(query[:, :1], dtype=torch.float64)
        tile.notes["query sums"] = torch.cat([sums, sums[:, -1:] + query.double().cumsum(1)], 1)

    def attend(self, tile: Tile) -> Attended:
        """Sink, window and the blocks with the best representatives."""
        size = self.block_size
        count = self.units(tile, size)

        def representatives(first: int, last: int) -> Tensor:
            return self._representatives(tile, first, last)

        scores = score(tile.query, tile.once("representatives", count, representatives))
        scores = scores.masked_fill(~self.allowed(tile, size), NEVER)
        chosen = self.choose(scores, self.routed_tokens // size)
        return tile.attend(self.expand(tile, chosen, size) | self.near(tile, size))

    def _representatives(self, tile: Tile, first: int, last: int) -> Tensor:
        """Sum of the representative keys of blocks first to last - 1: (H, blocks, D); scores are linear in keys."""
        following = self.window_tokens - self.block_size + 1
        keys = self.rows(tile.key, first, last, self.block_size)  # (H, blocks, B, D)
        begin = self.sink_tokens + first * self.block_size
        token = torch.arange(begin, begin + keys.shape[1] * self.block_size, device=keys.device)
        sums = tile.notes["query sums"]
        asked = sums[:, token + 1 + following] - sums[:, token + 1]  # queries token + 1 to token + following
        asked = (asked / following).to(keys.dtype).unflatten(1, (-1, self.block_size))
        best = (keys * asked).sum(-1).topk(min(self.representatives, self.block_size), -1).indices  # (H, blocks, reps)
        return take_rows(keys.flatten(0, 1), best.flatten(0, 1)).sum(1).view(*keys.shape[:2], keys.shape[3])
