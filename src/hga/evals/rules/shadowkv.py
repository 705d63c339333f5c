"""ShadowKV (arXiv 2410.21465): landmarks, the mean keys of chunks of 8, and outlier chunks that are always open."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hga.evals.rules.budget import BudgetedRule
from hga.evals.rules.tile import Attended, Tile
from hga.ops.routing import NEVER, score


@dataclass(frozen=True, kw_only=True)
class ShadowKVRule(BudgetedRule):
    """Chunks whose keys are least like their landmark are outliers: their K/V stays on the GPU, always attended.

    outlier_share: outliers' part of the budget (the paper: 0.3% of the context beside 1.56% routed). Outliers count
    as attended and fetched. Keys are exact here; the paper rebuilds them from a low-rank form, whose bytes (rank over
    all KV heads' widths, of the keys) are not counted. What this simulation gives it, it gives for free.
    """

    chunk_size: int = 8
    outlier_share: float = 1 / 8

    @property
    def outliers(self) -> int:
        """Outlier chunks that are open."""
        return int(self.outlier_share * self.routed_tokens) // self.chunk_size

    def metadata_share(self, width: int, tokens: int) -> float:
        """Landmarks in 16 bits, and the outliers' K/V."""
        return 1 / (2 * self.chunk_size) + self.outliers * self.chunk_size / tokens

    def attend(self, tile: Tile) -> Attended:
        """Sink, window, outliers, and the chunks with the best landmarks."""
        size = self.chunk_size
        count = self.units(tile, size)

        def landmarks(first: int, last: int) -> Tensor:
            return self.rows(tile.key, first, last, size).mean(2)

        def likeness(first: int, last: int) -> Tensor:
            keys = self.rows(tile.key, first, last, size)
            return cosine_similarity(keys, keys.mean(2, keepdim=True), -1).amin(-1)

        allowed = self.allowed(tile, size)
        scores = score(tile.query, tile.once("landmarks", count, landmarks)).masked_fill(~allowed, NEVER)
        unlike = (-tile.once("likeness", count, likeness))[:, None, None].expand(-1, 1, allowed.shape[0], -1)
        unlike = unlike.masked_fill(~allowed, NEVER)
        outlying = torch.zeros_like(unlike, dtype=torch.bool)
        outlying.scatter_(-1, unlike.topk(min(self.outliers, count), -1).indices, True)
        outlying &= allowed
        chosen = self.choose(scores.masked_fill(outlying, NEVER), self.routed_tokens // size - self.outliers)
        return tile.attend(self.expand(tile, chosen | outlying, size) | self.near(tile, size))
