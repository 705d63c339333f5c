"""The oracle: the tokens with the largest attention weights. No rule that opens tokens only recalls more."""

from __future__ import annotations

from dataclasses import dataclass

from hga.evals.rules.budget import BudgetedRule
from hga.evals.rules.tile import Attended, Tile
from hga.ops.routing import NEVER


@dataclass(frozen=True, kw_only=True)
class OracleTokens(BudgetedRule):
    """Exact top tokens behind sink and window, found by scoring every key; unopened tokens are left out.

    "per_head" is the bound on recalled mass for any rule of the budget; "shared" the bound where R heads share.
    A far field can lose less than either.
    """

    def metadata_share(self, width: int, tokens: int) -> float:
        """All keys have to be at hand: half of the K/V."""
        return 0.5

    def attend(self, tile: Tile) -> Attended:
        """Sink, window and the best tokens."""
        near = self.near(tile, 1)
        chosen = self.choose(tile.logits.masked_fill(near, NEVER), self.routed_tokens)
        return tile.attend(chosen | near)
