"""A store's pieces: a bounded cache in host memory over the files that hold them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hga.store.extents import in_turn
from hga.store.piece_files import PieceFiles
from hga.store.pieces import PieceCache
from hga.store.reader import is_over
from hga.store.staging import STAGED_BYTES, borrow
from hga.store.traffic import Traffic

Deliver = Callable[[slice, Any, Any, Any], None]
"""Takes some of the rows asked for, which lie in pieces (n, bytes): which piece, and which row in it, each is."""
_HandOver = Callable[[int, Any, Any], None]
"""Delivers a part of a batch: its number, pieces (n, bytes), and where in them each distinct piece is."""


class CachedPieces:
    """Pieces of equal size by number, `per_chunk` of each chunk, from the cache or else from the files."""

    def __init__(self, files: PieceFiles, piece_bytes: int, per_chunk: int, slots: int, traffic: Traffic) -> None:
        """MemoryError if the system refuses the address space of `slots` pieces."""
        self.cache = PieceCache(slots, piece_bytes)
        self._files = files
        self._per_chunk = per_chunk
        self._traffic = traffic
        self._known = 0

    def grow(self, chunks: int) -> None:
        """Make the pieces of chunks below `chunks` known."""
        self._known = chunks * self._per_chunk
        self.cache.grow(self._known)

    def keep(self, ids: list[int], rows: Any) -> None:
        """Cache those of the chunks' bytes (n, stride) that there is room for."""
        pieces = self._numbers(ids).ravel()[: self.cache.free]
        slots = self.cache.take(len(pieces))
        self.cache.memory[slots] = rows.reshape(-1, self.cache.piece_bytes)[: len(pieces)]
        self.cache.put(pieces, slots)

    def drop(self, ids: list[int]) -> None:
        """Forget what RAM holds of chunks."""
        self.cache.forget(self._numbers(ids).ravel())
        for chunk in ids:
            self._files.forget(chunk)

    def gather(self, ids: list[int], rows: Any) -> None:
        """Copy whole chunks to rows (n, stride) of page-aligned memory: from the cache, the queue or a file."""
        slots = self.cache.find(self._numbers(ids))
        cached = (slots >= 0).all(1)
        for index in np.flatnonzero(cached).tolist():
            rows[index].reshape(self._per_chunk, -1)[:] = self.cache.memory[slots[index]]
        others = np.flatnonzero(~cached).tolist()
        self._files.load_chunks([ids[index] for index in others], [rows[index] for index in others])

    def bring(self, wanted: Any, rows: Any, deliver: Deliver) -> None:
        """Bring rows of the wanted pieces, and deliver them in parts: the first while others are read."""
        at_once = max(self.cache.slots, STAGED_BYTES // self.cache.piece_bytes)
        for start in range(0, len(wanted), at_once):
            batch = slice(start, min(start + at_once, len(wanted)))
            found = self.cache.find(wanted[batch])
            hit = found >= 0
            self.cache.begin(found[hit])
            hits = int(hit.sum())
            self._traffic.add_look_ups(hits, len(hit) - hits)
            if hits == len(hit):
                deliver(batch, self.cache.memory, found, rows[batch])
                continue
            pieces, place = self.cache.find_distinct(wanted[batch])
            slots = self.cache.find(pieces)
            missing, ends, cuts = in_turn(slots < 0, place, self.cache.piece_bytes)

            def hand_over(
                part: int, memory: Any, where: Any, place: Any = place, cuts: Any = cuts, start: int = start
            ) -> None:
                here = slice(cuts[part], cuts[part + 1])
                there = slice(start + here.start, start + here.stop)
                deliver(there, memory, where[place[here]], rows[there])

            if len(pieces) <= self.cache.slots:
                self._read_to_cache(pieces, slots, missing, ends, hand_over)
            else:
                self._read_past_cache(pieces, slots, missing, ends, hand_over)

    def _read_to_cache(self, pieces: Any, slots: Any, missing: Any, ends: Any, hand_over: _HandOver) -> None:
        """Read those of some pieces that have no slot, in parts, into slots, and note these."""
        taken = self.cache.take(len(missing))
        slots[missing] = taken
        memory = self.cache.memory
        try:
            self._files.load(pieces[missing], self.cache.raw, taken, ends, lambda part: hand_over(part, memory, slots))
        except BaseException as error:
            if is_over(error):
                self.cache.give_back(taken)
            else:  # late reads may still write into the old one
                self.cache = PieceCache(self.cache.slots, self.cache.piece_bytes)
                self.cache.grow(self._known)
            raise
        self.cache.put(pieces[missing], taken)

    def _read_past_cache(self, pieces: Any, slots: Any, missing: Any, ends: Any, hand_over: _HandOver) -> None:
        """The same for more pieces than the cache holds, into borrowed memory; some of those read stay in the cache.

        As many as have room beside what this batch found there, of all of it alike: a scan then leaves what is used
        again and again where it is.
        """
        size, hit = self.cache.piece_bytes, np.flatnonzero(slots >= 0)
        with borrow(len(pieces) * size) as block:
            staged: Any = block.bytes.numpy()[: len(pieces) * size].reshape(-1, size)

            def arrived(part: int) -> None:
                if not part:
                    staged[hit] = self.cache.memory[slots[hit]]
                hand_over(part, staged, np.arange(len(pieces)))

            self._files.load(pieces[missing], memoryview(staged).cast("B"), missing, ends, arrived)
            room = min(len(missing), self.cache.slots - len(hit))
            kept = missing[np.arange(room) * len(missing) // max(1, room)]
            taken = self.cache.take(room)
            self.cache.memory[taken] = staged[kept]
            self.cache.put(pieces[kept], taken)

    def _numbers(self, ids: list[int]) -> Any:
        """Numbers of the pieces of chunks, (n, per_chunk)."""
        return np.array(ids, np.int64)[:, None] * self._per_chunk + np.arange(self._per_chunk)
