"""Quest (arXiv 2406.10774): pages of consecutive tokens, bounded by the least and largest key of each channel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hga.evals.rules.budget import BudgetedRule
from hga.evals.rules.tile import Attended, Tile
from hga.ops.routing import NEVER, score


@dataclass(frozen=True, kw_only=True)
class QuestRule(BudgetedRule):
    """A page's score is the largest that any key within its bounds could have with the query.

    The paper lets each query head choose (it has no grouped heads) and keeps the first two layers dense; here all
    layers follow the rule, as for the other systems.
    """

    page_size: int = 16

    def metadata_share(self, width: int, tokens: int) -> float:
        """Two rows a page in 16 bits."""
        return 1 / self.page_size

    def attend(self, tile: Tile) -> Attended:
        """Sink, window and the pages with the highest bounds."""
        size = self.page_size
        count = self.units(tile, size)

        def least(first: int, last: int) -> Tensor:
            return self.rows(tile.key, first, last, size).amin(2)

        def largest(first: int, last: int) -> Tensor:
            return self.rows(tile.key, first, last, size).amax(2)

        bounds = score(tile.query.clamp(min=0), tile.once("largest", count, largest))
        bounds = bounds + score(tile.query.clamp(max=0), tile.once("least", count, least))
        scores = bounds.masked_fill(~self.allowed(tile, size), NEVER)
        chosen = self.choose(scores, self.routed_tokens // size)
        return tile.attend(self.expand(tile, chosen, size) | self.near(tile, size))
