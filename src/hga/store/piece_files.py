"""Where pieces that are not in RAM come from: a saved file, a scratch file, and what is on its way into that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hga.store.extents import plan_reads
from hga.store.host import allocate_host
from hga.store.reader import Batch, Reader, is_over
from hga.store.saved import SavedChunks
from hga.store.scratch import WriteBehind

_EXTENT_BYTES = 128 << 10  # read at once of whole chunks, so that even a few of them keep all threads busy
_GAP_BYTES = 16 << 10  # read between pieces: as long as another read takes


class PieceFiles:
    """Pieces of equal size, `per_chunk` of each chunk, by number. Chunks of a saved file come before all others.

    saved: what is read there, and checked each time; reader, writer: of the scratch file, None until there is one.
    """

    def __init__(
        self, piece_bytes: int, per_chunk: int, saved: SavedChunks | None = None, saved_reader: Reader | None = None
    ) -> None:
        self.reader: Reader | None = None
        self.writer: WriteBehind | None = None
        self.saved = saved
        self.first_own = 0 if saved is None else saved.chunks
        self._saved_reader = saved_reader
        self._piece_bytes, self._per_chunk = piece_bytes, per_chunk
        unwanted: Any = allocate_host(_GAP_BYTES).bytes.numpy()
        self._unwanted = memoryview(unwanted)

    def place(self, chunk: int) -> int:
        """Where a chunk begins in the scratch file, in bytes."""
        return (chunk - self.first_own) * self._per_chunk * self._piece_bytes

    def load(self, pieces: Any, memory: memoryview, rows: Any, ends: Any, arrived: Callable[[int], object]) -> None:
        """Fill rows of memory with pieces, neighbours in a file by one read, and tell of each part that has arrived.

        ends: of the parts, each of ascending pieces, in pieces. All are read at once, and arrive in order. Errors as
        `Reader.read`, and ValueError for a saved piece that is not what was saved; no read is under way behind them,
        unless `is_over` denies it.
        """
        size, own = self._piece_bytes, self.first_own * self._per_chunk
        is_saved = pieces < own
        saved, on_file = np.flatnonzero(is_saved), ~is_saved
        if self.writer is not None and self.writer.busy:
            on_file &= self._take_waiting(pieces, memory, rows)
        batches: list[Batch] = []

        def start(reader: Reader | None, index: Any, base: int) -> None:
            if len(index):
                assert reader is not None
                plan = plan_reads(pieces[index], memory, rows[index], size, self._unwanted, base)
                offsets, targets, first = plan
                batches.append(reader.start(offsets, targets, np.searchsorted(index[first], ends).tolist()))

        try:
            start(self._saved_reader, saved, 0 if self.saved is None else self.saved.start)
            start(self.reader, np.flatnonzero(on_file), -own * size)
            checked = 0
            for part, end in enumerate(np.searchsorted(saved, ends).tolist()):
                for batch in batches:
                    batch.wait(part)
                for index in saved[checked:end].tolist():
                    assert self.saved is not None
                    row = int(rows[index])
                    self.saved.check(int(pieces[index]), memory[row * size : (row + 1) * size])
                checked = end
                arrived(part)
            for batch in batches:
                batch.finish()
        except BaseException as error:
            for batch in batches:
                batch.stop()
            if is_over(error):
                for batch in batches:
                    batch.settle()
            raise

    def load_chunks(self, chunks: list[int], rows: list[Any]) -> None:
        """Fill rows of page-aligned memory with whole chunks."""
        own: tuple[list[int], list[list[memoryview]]] = ([], [])
        saved: tuple[list[int], list[list[memoryview]]] = ([], [])
        for chunk, row in zip(chunks, rows, strict=True):
            if (waiting := self._waiting(chunk)) is not None:
                row[:] = waiting
                continue
            start, (offsets, targets) = self.place(chunk), own
            if self.saved is not None and chunk < self.first_own:
                start, (offsets, targets) = self.saved.start + chunk * len(row), saved
            raw = memoryview(row)
            for begin in range(0, len(row), _EXTENT_BYTES):
                offsets.append(start + begin)
                targets.append([raw[begin : begin + _EXTENT_BYTES]])
        if self.saved is not None:
            _read(self._saved_reader, *saved)
            for chunk, row in zip(chunks, rows, strict=True):
                if chunk < self.first_own:
                    self.saved.check(chunk * self._per_chunk, memoryview(row))
        _read(self.reader, *own)

    def forget(self, chunk: int) -> None:
        """A chunk is not needed any more."""
        if self.writer is not None:
            self.writer.forget(chunk)

    def cancel(self) -> None:
        """Write nothing more."""
        if self.writer is not None:
            self.writer.cancel()

    def _waiting(self, chunk: int) -> Any:
        """The bytes of a chunk that is not in the scratch file yet; else None."""
        return None if self.writer is None else self.writer.find(chunk)

    def _take_waiting(self, pieces: Any, memory: memoryview, rows: Any) -> Any:
        """Fill rows of pieces that are still on their way to the file; returns which others there are."""
        size = self._piece_bytes
        chunks = pieces // self._per_chunk
        on_file = np.ones(len(pieces), bool)
        for chunk in np.unique(chunks).tolist():
            if (waiting := self._waiting(chunk)) is not None:
                raw = memoryview(waiting)
                for index in np.flatnonzero(chunks == chunk).tolist():
                    start, row = int(pieces[index]) % self._per_chunk * size, int(rows[index])
                    memory[row * size : (row + 1) * size] = raw[start : start + size]
                    on_file[index] = False
        return on_file


def _read(reader: Reader | None, offsets: list[int], targets: list[list[memoryview]]) -> None:
    if offsets:
        assert reader is not None
        reader.read(offsets, targets)
