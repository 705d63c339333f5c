"""Chunks in host memory that come from elsewhere, record by record, when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hga.store.memory import MemoryStore
from hga.store.record import RecordLayout

ReadRecords = Callable[[int, memoryview], None]
"""Fills a buffer with consecutive records, from a number on that counts chunk by chunk and head by head, and checks
them.
"""

_FILLED_BYTES = 16 << 20


class LazyStore(MemoryStore):
    """A `MemoryStore` in host memory whose first chunks, ids 0 to n - 1, are a saved archive, each retained once.

    Memory for all of them is taken at once, and filled as queries ask. An error of `read` leaves the record missing:
    whoever asks for it again gets the error again.
    """

    def __init__(self, layout: RecordLayout, chunks: int, order: Tensor | None, read: ReadRecords, gpu: torch.device):
        """order (n, Hkv, C) int16, None without content ordering; gpu: the model's device, page-locked for if CUDA."""
        super().__init__(layout, torch.device("cpu"), "ram")
        self._read = read
        self._add_segment(chunks, gpu)
        if order is not None:
            self._orders[0].copy_(order)
        self._missing = torch.ones(chunks, layout.kv_heads, dtype=torch.bool)
        self._missing_count = self._missing.numel()
        self._free, self._holders = [], dict.fromkeys(range(chunks), 1)

    def read(self, ids: list[int], device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Store.read`."""
        self.fill(ids)
        return super().read(ids, device)

    def stage(self, ids: list[int], out: Tensor) -> None:
        """See `Store.stage`."""
        self.fill(ids)
        super().stage(ids, out)

    def fetch(self, ids: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """See `Store.fetch`."""
        if self._missing_count:
            ids = ids.cpu()
            head = torch.arange(self.layout.kv_heads)[:, None].expand_as(ids)
            saved = ids < len(self._missing)
            asked = torch.zeros_like(self._missing)
            asked[ids[saved], head[saved]] = True
            self._fill(asked & self._missing)
        return super().fetch(ids, groups)

    def addresses(self, ids: list[int]) -> Tensor:
        """See `Store.addresses`."""
        self.fill(ids)
        return super().addresses(ids)

    @property
    def gpu_readable(self) -> bool:
        """See `Store.gpu_readable`."""
        return not self._missing_count and super().gpu_readable

    def release(self, ids: list[int]) -> None:
        """See `Store.release`."""
        super().release(ids)
        if self._missing_count:
            held = torch.tensor([chunk in self._holders for chunk in range(len(self._missing))])
            self._note(self._missing & ~held[:, None])  # their places may be taken by others

    def fill(self, ids: list[int]) -> None:
        """Read what is missing of chunks."""
        if self._missing_count:
            asked = torch.zeros_like(self._missing)
            asked[[chunk for chunk in ids if chunk < len(asked)]] = True
            self._fill(asked & self._missing)

    def _fill(self, wanted: Tensor) -> None:
        """Read records (n, Hkv), neighbours in one piece."""
        record_bytes = self.layout.chunk_bytes // self.layout.kv_heads
        at_once = max(1, _FILLED_BYTES // record_bytes)
        places: list[int] = wanted.view(-1).nonzero().flatten().tolist()
        numbers: Any = self._segments[0].view(-1).view(torch.uint8).numpy() if places else b""
        raw = memoryview(numbers)
        start = 0
        while start < len(places):
            count = 1
            while count < at_once and places[start + count : start + count + 1] == [places[start] + count]:
                count += 1
            first = places[start]
            self._read(first, raw[first * record_bytes : (first + count) * record_bytes])
            here = torch.zeros_like(self._missing)
            here.view(-1)[first : first + count] = True
            self._note(here)
            start += count

    def _note(self, arrived: Tensor) -> None:
        """Records (n, Hkv) are not missing any more; with the last one, their source is let go."""
        self._missing &= ~arrived
        self._missing_count = int(self._missing.sum())
        if not self._missing_count:
            self._read = _read_nothing


def _read_nothing(first: int, target: memoryview) -> None:
    raise RuntimeError(f"record {first} was read already")
