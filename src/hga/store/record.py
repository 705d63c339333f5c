"""The record, and the protocol that every tier implements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_SCALE_BYTES = 2


@dataclass(frozen=True)
class RecordLayout:
    """One record per (layer, row, chunk, KV head): `[G, 2, g, D]`, the K and V of each group side by side.

    A routed group is one contiguous run and a chunk one read. `dtype` is the type of the stored K/V; one-byte
    types carry a 2-byte scale for each of the 2 g rows of a group, which `group_bytes` counts.
    """

    kv_heads: int
    groups: int
    group_size: int
    head_dim: int
    dtype: torch.dtype
    ordered: bool
    """Whether a record keeps the permutation of its tokens (content ordering)."""

    @property
    def tokens(self) -> int:
        """Tokens of one record."""
        return self.groups * self.group_size

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Shape of one chunk's records of all KV heads: (Hkv, G, 2, g, D)."""
        return (self.kv_heads, self.groups, 2, self.group_size, self.head_dim)

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of one KV head, scales included."""
        scale = _SCALE_BYTES if self.dtype.itemsize == 1 else 0
        return 2 * self.group_size * (self.head_dim * self.dtype.itemsize + scale)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk's K/V over all KV heads."""
        return self.kv_heads * self.groups * self.group_bytes

    @property
    def order_bytes(self) -> int:
        """Bytes of one chunk's permutations (int16 a token and KV head), 0 without content ordering."""
        return 2 * self.kv_heads * self.tokens if self.ordered else 0

    def unpack(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """Records (N, Hkv, G, 2, g, D) -> keys, values (N, Hkv, C, D) in group order."""
        keys, values = records.unbind(3)
        return keys.flatten(2, 3), values.flatten(2, 3)


class Store(Protocol):
    """The archive of one layer: immutable, reference-counted chunks, addressed by id.

    Rows (and beams) that hold the same chunk share it: each holder retains it once and releases it once.
    """

    layout: RecordLayout

    def append(self, records: Tensor, order: Tensor | None) -> list[int]:
        """Keep chunks (N, Hkv, G, 2, g, D) and their permutations (N, Hkv, C); returns N ids, each retained once."""
        ...

    def read(self, ids: list[int]) -> tuple[Tensor, Tensor | None]:
        """Whole chunks (N, Hkv, G, 2, g, D) and permutations (N, Hkv, C), on the tier's own device."""
        ...

    def fetch(self, ids: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Groups of each KV head: chunk ids and group indices, both (Hkv, U) -> keys, values (Hkv, U, g, D).

        For each head the pairs (id, group) must ascend, so that a tier can read in its own order.
        """
        ...

    def retain(self, ids: list[int]) -> None:
        """Add one holder to each chunk."""
        ...

    def release(self, ids: list[int]) -> None:
        """Take one holder from each chunk; a chunk with none is forgotten and its place reused."""
        ...

    def held_bytes(self) -> dict[str, int]:
        """Bytes held now by tier ("device", "ram", "nvme"): each chunk once, permutations included."""
        ...
