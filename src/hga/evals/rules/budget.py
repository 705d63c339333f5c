"""What all selection rules share: the same sink and window, the same budget, and how R heads agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hga.evals.rules.simulated import SimulatedRule
from hga.evals.rules.tile import Tile
from hga.ops.routing import NEVER, add_masses, mark_largest


@dataclass(frozen=True, kw_only=True)
class BudgetedRule(SimulatedRule):
    """A rule that attends to sink, window and chosen units, at most `budget_tokens` in all.

    All rules get the sink and the window of `HGAConfig`'s defaults, so that what differs is the selection.
    selection: "shared": the R query heads of a KV head add their softmax masses and make one choice: attended
    and fetched tokens are equal. "per_head": each makes its own within the budget (equal attended tokens; more
    are fetched). "in_turn": the heads name their next best in turn until the budget is full, and all attend to what
    any named: equal fetched tokens. ValueError for a budget that does not hold sink and window.
    """

    budget_tokens: int
    sink_tokens: int = 16
    window_tokens: int = 64
    selection: Literal["shared", "per_head", "in_turn"] = "shared"

    def __post_init__(self) -> None:
        if self.selection not in ("shared", "per_head", "in_turn"):
            raise ValueError(f"selection={self.selection!r} must be one of shared, per_head, in_turn")
        if self.budget_tokens < self.sink_tokens + self.window_tokens:
            raise ValueError(
                f"budget_tokens={self.budget_tokens} must be at least {self.sink_tokens + self.window_tokens} = sink "
                "and window are always attended; read more tokens or raise the share"
            )

    @property
    def routed_tokens(self) -> int:
        """What the budget leaves after sink and window."""
        return self.budget_tokens - self.sink_tokens - self.window_tokens

    def window_starts(self, tile: Tile, unit: int) -> Tensor:
        """First position of each query's window (M,), on the grid of units behind the sink."""
        behind = (tile.positions - self.window_tokens + 1 - self.sink_tokens).clamp(min=0)
        return self.sink_tokens + (behind + unit - 1) // unit * unit

    def near(self, tile: Tile, unit: int) -> Tensor:
        """bool (M, N): sink and window of each query."""
        token = torch.arange(tile.key.shape[1], device=tile.key.device)
        recent = token >= self.window_starts(tile, unit)[:, None]
        return ((token < self.sink_tokens) | recent) & tile.causal

    def units(self, tile: Tile, unit: int) -> int:
        """Whole units between the sink and the last query's window."""
        last = max(0, tile.key.shape[1] - self.window_tokens - self.sink_tokens)
        return -(-last // unit)

    def allowed(self, tile: Tile, unit: int) -> Tensor:
        """bool (M, units): the units that end before each query's window."""
        ends = self.sink_tokens + torch.arange(1, self.units(tile, unit) + 1, device=tile.key.device) * unit
        return ends <= self.window_starts(tile, unit)[:, None]

    def rows(self, x: Tensor, first: int, last: int, unit: int) -> Tensor:
        """Rows (H, N, D) of units first to last - 1: (H, last - first, unit, D)."""
        here = x[:, self.sink_tokens + first * unit : self.sink_tokens + last * unit]
        return here.view(here.shape[0], last - first, unit, here.shape[2])

    def choose(self, scores: Tensor, keep: int) -> Tensor:
        """Mark the best units of scores (H, R, M, K), -inf where barred: bool (H, R', M, K)."""
        if self.selection != "in_turn":
            return mark_largest(add_masses(scores, self.selection), keep)
        allowed, repeats = scores > NEVER, scores.shape[1]
        ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        head = torch.arange(repeats, device=ranks.device)[:, None, None]
        turns = (ranks * repeats + head).amin(1, keepdim=True)  # the turn in which a unit is first named
        return mark_largest(repeats * scores.shape[-1] - turns, keep) & allowed[:, :1]

    def expand(self, tile: Tile, chosen: Tensor, unit: int) -> Tensor:
        """Units (H, R', M, K) as tokens: bool (H, R', M, N)."""
        exact = torch.zeros(*chosen.shape[:3], tile.key.shape[1], dtype=torch.bool, device=chosen.device)
        tokens = chosen.repeat_interleave(unit, -1)
        exact[..., self.sink_tokens : self.sink_tokens + tokens.shape[-1]] = tokens
        return exact
