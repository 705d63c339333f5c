"""The other use of the same bytes: all K/V on the GPU, in 8, 4 or 2 bits (KIVI, arXiv 2402.02750)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hga.evals.rules.simulated import SimulatedRule
from hga.evals.rules.tile import Attended, Tile


@dataclass(frozen=True, kw_only=True)
class QuantisedRule(SimulatedRule):
    """Dense attention over quantised K/V: keys a channel, values a token, in groups with a scale and a zero each.

    bits: of a number. group_size: tokens that share a key channel's scale; as many numbers of a value row share
    another (at most the row). sink_tokens first and window_tokens recent tokens stay exact, as in the other rules.
    Scales and zeros are 16 bits each.
    """

    bits: int
    group_size: int = 64
    sink_tokens: int = 16
    window_tokens: int = 64
    budget_tokens: None = None

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ValueError(f"bits={self.bits} must be 2, 4 or 8")

    def metadata_share(self, width: int, tokens: int) -> float:
        """All K/V at so many bits, with scales and zeros."""
        return (self.bits + (32 / self.group_size + 32 / min(width, self.group_size)) / 2) / 16

    def attend(self, tile: Tile) -> Attended:
        """Every token, those behind the window as they come back from their bits."""
        size, sink = self.group_size, self.sink_tokens
        count = max(0, (tile.start - self.window_tokens - sink) // size)

        def part(x: Tensor, first: int, last: int) -> Tensor:
            return x[:, sink + first * size : sink + last * size].view(x.shape[0], last - first, size, x.shape[2])

        def keys(first: int, last: int) -> Tensor:
            return quantise(part(tile.key, first, last), self.bits, 2)

        def values(first: int, last: int) -> Tensor:
            rows = part(tile.value, first, last)
            piece = min(size, rows.shape[-1])
            pieces = rows.view(*rows.shape[:-1], rows.shape[-1] // piece, piece)
            return quantise(pieces, self.bits, -1).view(rows.shape)

        stop = sink + count * size
        made = (tile.once("keys", count, keys), tile.once("values", count, values))
        key, value = (
            torch.cat([x[:, :sink], done.flatten(1, 2), x[:, stop:]], 1)
            for x, done in zip((tile.key, tile.value), made, strict=True)
        )
        exact = tile.causal.expand(tile.key.shape[0], 1, -1, -1)
        return Tile(tile.query, key, value, tile.start).attend(exact)


def quantise(rows: Tensor, bits: int, dim: int) -> Tensor:
    """Rows as they come back from `bits` bits, evenly spaced between the least and the largest along `dim`."""
    least, largest = rows.amin(dim, keepdim=True), rows.amax(dim, keepdim=True)
    step = ((largest - least) / (2**bits - 1)).clamp(min=torch.finfo(rows.dtype).tiny)
    restored: Tensor = ((rows - least) / step).round() * step + least
    return restored
