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


def check_records(layout: RecordLayout, records: Tensor, order: Tensor | None) -> None:
    """ValueError if records (N, Hkv, G, 2, g, D) and permutations (N, Hkv, C) are not of this layout."""
    if tuple(records.shape[1:]) != layout.shape or records.dtype != layout.dtype:
        raise ValueError(
            f"records of shape {tuple(records.shape[1:])} and {records.dtype} do not fit this store's "
            f"layout {layout.shape} and {layout.dtype}"
        )
    if (order is not None) != layout.ordered:
        raise ValueError(f"this store's layout has ordered={layout.ordered}; order was {order is not None}")
    expected = (len(records), layout.kv_heads, layout.tokens)
    if order is not None and tuple(order.shape) != expected:
        raise ValueError(f"order of shape {tuple(order.shape)} does not fit these records: expected {expected}")


class Store(Protocol):
    """The archive of one layer: immutable, reference-counted chunks, addressed by id.

    Rows (and beams) that hold the same chunk share it: each holder retains it once and releases it once.
    """

    layout: RecordLayout

    def append(self, records: Tensor, order: Tensor | None) -> list[int]:
        """Keep chunks (N, Hkv, G, 2, g, D) and their permutations (N, Hkv, C); returns N ids, each retained once.

        A copy from a GPU may still be under way on return; `read`, `fetch` and `addresses` wait for it. Either all
        chunks are kept or none: MemoryError when the host has no room for them, ValueError for another layout.
        """
        ...

    def read(self, ids: list[int], device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
        """Whole chunks (N, Hkv, G, 2, g, D) and permutations (N, Hkv, C), on `device`, else the tier's own.

        On a GPU they are ready for its current stream. KeyError for a chunk that is not held.
        """
        ...

    def stage(self, ids: list[int], out: Tensor) -> None:
        """Copy whole chunks to `out` (N, Hkv, G, 2, g, D), in order; on a GPU on its current stream."""
        ...

    def fetch(self, ids: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Groups of each KV head: chunk ids and group indices, both (Hkv, U) -> keys, values (Hkv, U, g, D).

        For each head the pairs (id, group) must ascend, so that a tier can read in its own order.
        """
        ...

    def collect(self, ids: Tensor, heads: Tensor, groups: Tensor, out: Tensor) -> None:
        """Copy groups of single heads, indices (n,) on the CPU in any order, to `out` (n, 2, g, D) in host memory.

        For kernels that cannot read every chunk by its address. All are one batch.
        """
        ...

    def addresses(self, ids: list[int]) -> Tensor:
        """Where each chunk's record [Hkv, G, 2, g, D] starts: int64 (N,) on the CPU, in bytes.

        For kernels that read records themselves: a GPU may do so where `gpu_readable`, once its stream has waited
        (this call does, and `wait`). An address holds until its chunk is released. KeyError for one not held.
        """
        ...

    def wait(self) -> None:
        """Order the GPU's current stream after all copies into the store that are under way."""
        ...

    @property
    def gpu_readable(self) -> bool:
        """Whether a GPU can read every chunk held now by its address: device memory, or page-locked host memory."""
        ...

    @property
    def waits(self) -> bool:
        """Whether `fetch` is worth a thread of its own: it waits for a device, and threads may share the store."""
        ...

    def retain(self, ids: list[int]) -> None:
        """Add one holder to each chunk."""
        ...

    def release(self, ids: list[int]) -> None:
        """Take one holder from each chunk; a chunk with none is forgotten and its place reused."""
        ...

    def abandon(self, ids: list[int]) -> None:
        """`release` for a finalizer, which may run in the middle of any call: it takes effect at a later one."""
        ...

    def held_bytes(self) -> dict[str, int]:
        """Bytes held now by tier ("device", "ram", "nvme"): each chunk once, permutations included."""
        ...

    def allocated_bytes(self) -> dict[str, int]:
        """Bytes taken by tier: what is held, and the room kept for the archive to grow."""
        ...
