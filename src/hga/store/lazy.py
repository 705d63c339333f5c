"""Chunks in host memory that come from elsewhere, piece by piece, when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hga.store.memory import MemoryStore
from hga.store.record import RecordLayout

ReadPieces = Callable[[Sequence[int], Sequence[memoryview]], None]
"""Fills each buffer with consecutive pieces from its number on, which counts chunk by chunk, head by head and piece by
piece of a record, and checks them. After an error the buffers are not used again: late reads may write to them.
"""

_FILLED_BYTES = 16 << 20
_RUN_BYTES = 1 << 20


class LazyStore(MemoryStore):
    """A `MemoryStore` in host memory whose first chunks, ids 0 to n - 1, are a saved archive, each retained once.

    Memory for all of them is taken at once, and filled as queries ask, `piece_groups` groups of a record together. An
    error of `read` leaves its pieces missing: whoever asks for them again gets the error again.
    """

    def __init__(
        self,
        layout: RecordLayout,
        chunks: int,
        order: Tensor | None,
        piece_groups: int,
        read: ReadPieces,
        gpu: torch.device,
    ) -> None:
        """order (n, Hkv, C) int16, None without content ordering; gpu: the model's device, page-locked for if CUDA."""
        super().__init__(layout, torch.device("cpu"), "ram")
        self._read = read
        self._add_segment(chunks, gpu)
        if order is not None:
            self._orders[0].copy_(order)
        self._piece_groups = piece_groups
        self._missing = torch.ones(chunks, layout.kv_heads, layout.groups // piece_groups, dtype=torch.bool)
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
            ids, pieces = ids.cpu(), groups.cpu() // self._piece_groups
            self._fill_pieces(ids, torch.arange(self.layout.kv_heads)[:, None].expand_as(ids), pieces)
        return super().fetch(ids, groups)

    def collect(self, ids: Tensor, heads: Tensor, groups: Tensor, out: Tensor) -> None:
        """See `Store.collect`."""
        if self._missing_count:
            self._fill_pieces(ids, heads, groups // self._piece_groups)
        super().collect(ids, heads, groups, out)

    def addresses(self, ids: list[int]) -> Tensor:
        """See `Store.addresses`."""
        self.fill(ids)
        return super().addresses(ids)

    @property
    def missing_bytes(self) -> int:
        """Bytes of the saved archive that nobody has asked for yet."""
        return self._missing_count * self._piece_groups * self.layout.group_bytes

    @property
    def gpu_readable(self) -> bool:
        """See `Store.gpu_readable`."""
        return not self._missing_count and super().gpu_readable

    def release(self, ids: list[int]) -> None:
        """See `Store.release`."""
        super().release(ids)
        if self._missing_count:
            held = torch.tensor([chunk in self._holders for chunk in range(len(self._missing))])
            self._missing &= held[:, None, None]  # their places may be taken by others
            self._count()

    def fill(self, ids: list[int]) -> None:
        """Read what is missing of chunks."""
        if self._missing_count:
            asked = torch.zeros_like(self._missing)
            asked[[chunk for chunk in ids if chunk < len(asked)]] = True
            self._fill(asked & self._missing)

    def _fill_pieces(self, ids: Tensor, heads: Tensor, pieces: Tensor) -> None:
        """Read what is missing of single heads' pieces, all of one shape on the CPU."""
        saved = ids < len(self._missing)
        asked = torch.zeros_like(self._missing)
        asked[ids[saved], heads[saved], pieces[saved]] = True
        self._fill(asked & self._missing)

    def _fill(self, wanted: Tensor) -> None:
        """Read pieces (n, Hkv, pieces of a record), neighbours as one run, many runs at once.

        By way of other memory: what is in place was checked, and nothing writes to it late.
        """
        size = self._piece_groups * self.layout.group_bytes
        places = wanted.view(-1).nonzero().flatten()
        at_once, longest = max(1, _FILLED_BYTES // size), max(1, _RUN_BYTES // size)
        try:
            for part in places.split(at_once) if len(places) else ():
                read = torch.empty(len(part), size, dtype=torch.uint8)
                rows: Any = read.numpy()
                starts = _starts(part.tolist(), longest)
                ends = [*starts[1:], len(part)]
                targets = [memoryview(rows[a:b]).cast("B") for a, b in zip(starts, ends, strict=True)]
                self._read(part[starts].tolist(), targets)
                self._segments[0].view(-1).view(torch.uint8).view(-1, size)[part] = read
                self._missing.view(-1)[part] = False
        finally:
            self._count()

    def _count(self) -> None:
        """Count what is missing; with the last piece its source is let go."""
        self._missing_count = int(self._missing.sum())
        if not self._missing_count:
            self._read = _read_nothing


def _starts(places: list[int], longest: int) -> list[int]:
    """Where runs of neighbours begin in ascending places."""
    starts: list[int] = []
    for index, place in enumerate(places):
        if not index or place != places[index - 1] + 1 or index - starts[-1] == longest:
            starts.append(index)
    return starts


def _read_nothing(firsts: Sequence[int], targets: Sequence[memoryview]) -> None:
    raise RuntimeError(f"pieces {list(firsts)[:4]} were read already")
