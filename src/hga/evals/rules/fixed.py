"""Rules that choose without looking: sinks and window, and random groups. What any selection has to beat."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from hga.evals.rules.budget import BudgetedRule
from hga.evals.rules.tile import Attended, Tile
from hga.ops.routing import NEVER


@dataclass(frozen=True, kw_only=True)
class SinksAndWindow(BudgetedRule):
    """StreamingLLM (arXiv 2309.17453): the first tokens and as many recent ones as the budget holds.

    Positions stay those of the text; the paper counts them inside the cache.
    """

    def metadata_share(self, width: int, tokens: int) -> float:
        """Nothing is kept beside sink and window."""
        return 0.0

    def attend(self, tile: Tile) -> Attended:
        """Sink and window, the window taking the whole budget."""
        wide = dataclasses.replace(self, window_tokens=self.budget_tokens - self.sink_tokens)
        return tile.attend(wide.near(tile, 1).expand(tile.key.shape[0], 1, -1, -1))


@dataclass(frozen=True, kw_only=True)
class RandomGroups(BudgetedRule):
    """Groups of consecutive tokens drawn by a hash of query position, group and KV head."""

    group_size: int = 4

    def metadata_share(self, width: int, tokens: int) -> float:
        """Nothing is kept."""
        return 0.0

    def attend(self, tile: Tile) -> Attended:
        """Sink, window and random groups; all R heads agree."""
        allowed = self.allowed(tile, self.group_size)
        heads, groups = tile.key.shape[0], allowed.shape[1]
        group = torch.arange(groups, device=allowed.device, dtype=torch.float64)
        head = torch.arange(heads, device=allowed.device, dtype=torch.float64)
        seed = tile.positions[:, None] * 12.9898 + group * 78.233 + head[:, None, None] * 37.719
        drawn = ((seed.sin() * 43758.5453) % 1.0).float()[:, None]  # (H, 1, M, groups)
        scores = drawn.masked_fill(~allowed, NEVER)
        chosen = self.choose(scores, self.routed_tokens // self.group_size)
        return tile.attend(self.expand(tile, chosen, self.group_size) | self.near(tile, self.group_size))
