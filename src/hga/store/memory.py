"""Chunks in memory: on the model's device, or in host memory."""

from __future__ import annotations

from itertools import cycle, pairwise

import torch
from torch import Tensor

from hga.store.record import RecordLayout

_FIRST_SEGMENT_CHUNKS = 16
_LARGEST_SEGMENT_CHUNKS = 1024


class MemoryStore:
    """A `Store` in memory. Segments grow geometrically, so that nothing is copied when the archive grows.

    device: where the chunks live; `tier` is "ram" for host memory and "device" beside the model.
    """

    def __init__(self, layout: RecordLayout, device: torch.device, tier: str) -> None:
        self.layout = layout
        self.device = device
        self.tier = tier
        self._segments: list[Tensor] = []  # each (n, Hkv, G, 2, g, D)
        self._orders: list[Tensor] = []  # each (n, Hkv, C) int16
        self._first_id: list[int] = []
        self._holders: dict[int, int] = {}
        self._free: list[int] = []
        self._capacity = 0

    def append(self, records: Tensor, order: Tensor | None) -> list[int]:
        """See `Store.append`. ValueError if the records do not have this store's layout."""
        self._check(records, order)
        while len(self._free) < len(records):
            self._grow()
        ids = [self._free.pop() for _ in range(len(records))]
        for index, chunk in enumerate(ids):
            segment, slot = self._locate(chunk)
            self._segments[segment][slot].copy_(records[index])
            if order is not None:
                self._orders[segment][slot].copy_(order[index])
            self._holders[chunk] = 1
        return ids

    def read(self, ids: list[int]) -> tuple[Tensor, Tensor | None]:
        """See `Store.read`."""
        places = [self._locate(self._held(chunk)) for chunk in ids]
        records = torch.stack([self._segments[segment][slot] for segment, slot in places])
        if not self.layout.ordered:
            return records, None
        return records, torch.stack([self._orders[segment][slot] for segment, slot in places]).long()

    def fetch(self, ids: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """See `Store.fetch`. Keys and values go straight to their places: one copy, an index_select a segment."""
        layout = self.layout
        ids, groups = ids.to(self.device), groups.to(self.device)
        head = torch.arange(layout.kv_heads, device=self.device)[:, None]
        places = (ids * layout.kv_heads + head) * layout.groups + groups  # (Hkv, U), ascending
        shape = (*places.shape, layout.group_size, layout.head_dim)
        keys, values = (torch.empty(shape, dtype=layout.dtype, device=self.device) for _ in range(2))
        per_chunk = layout.kv_heads * layout.groups
        edges = torch.tensor([*self._first_id, self._capacity], device=self.device) * per_chunk
        cuts = torch.searchsorted(places, edges.expand(layout.kv_heads, -1).contiguous()).tolist()
        runs = [last - first for cut in cuts for first, last in pairwise(cut)]  # head by head, segment by segment
        # K and V of a group are neighbours: rows 2 n and 2 n + 1 of a segment.
        rows = [segment.view(-1, layout.group_size, layout.head_dim) for segment in self._segments]
        sources = [(x, x[1:], 2 * per_chunk * first) for x, first in zip(rows, self._first_id, strict=True)]
        parts = ((2 * places).flatten().split(runs), keys.flatten(0, 1).split(runs), values.flatten(0, 1).split(runs))
        for (of_keys, of_values, start), run, k, v in zip(cycle(sources), *parts, strict=False):
            if len(run):
                here = run - start
                torch.index_select(of_keys, 0, here, out=k)
                torch.index_select(of_values, 0, here, out=v)
        return keys, values

    def retain(self, ids: list[int]) -> None:
        """See `Store.retain`."""
        for chunk in ids:
            self._holders[self._held(chunk)] += 1

    def release(self, ids: list[int]) -> None:
        """See `Store.release`. Memory of released chunks is reused, and given back when none is held."""
        for chunk in ids:
            self._holders[self._held(chunk)] -= 1
            if not self._holders[chunk]:
                del self._holders[chunk]
                self._free.append(chunk)
        if not self._holders:
            self._segments, self._orders, self._first_id, self._free, self._capacity = [], [], [], [], 0

    def held_bytes(self) -> dict[str, int]:
        """See `Store.held_bytes`."""
        return {self.tier: len(self._holders) * (self.layout.chunk_bytes + self.layout.order_bytes)}

    def _grow(self) -> None:
        count = min(max(_FIRST_SEGMENT_CHUNKS, self._capacity), _LARGEST_SEGMENT_CHUNKS)
        self._segments.append(torch.empty((count, *self.layout.shape), dtype=self.layout.dtype, device=self.device))
        if self.layout.ordered:
            shape = (count, self.layout.kv_heads, self.layout.tokens)
            self._orders.append(torch.empty(shape, dtype=torch.int16, device=self.device))
        self._first_id.append(self._capacity)
        self._free.extend(range(self._capacity + count - 1, self._capacity - 1, -1))
        self._capacity += count

    def _locate(self, chunk: int) -> tuple[int, int]:
        segment = len(self._first_id) - 1
        while self._first_id[segment] > chunk:
            segment -= 1
        return segment, chunk - self._first_id[segment]

    def _held(self, chunk: int) -> int:
        if chunk not in self._holders:
            raise KeyError(f"chunk {chunk} is not held by this store; it was released or never appended")
        return chunk

    def _check(self, records: Tensor, order: Tensor | None) -> None:
        if tuple(records.shape[1:]) != self.layout.shape or records.dtype != self.layout.dtype:
            raise ValueError(
                f"records of shape {tuple(records.shape[1:])} and {records.dtype} do not fit this store's "
                f"layout {self.layout.shape} and {self.layout.dtype}"
            )
        if (order is not None) != self.layout.ordered:
            raise ValueError(f"this store's layout has ordered={self.layout.ordered}; order was {order is not None}")
