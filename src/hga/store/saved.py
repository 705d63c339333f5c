"""Chunks of a saved file, read where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hga.store.reader import OpenFile


@dataclass(frozen=True)
class SavedChunks:
    """Chunks 0 to `chunks` - 1 that lie one behind another in a file that nobody writes to, from `start` on, a page's.

    piece_bytes: what `check(piece, raw)` checks together: whole pages and whole groups, that divide a chunk. It gets
    whole pieces from a number on, and raises ValueError if they are not what was saved.
    """

    file: OpenFile
    start: int
    chunks: int
    piece_bytes: int
    check: Callable[[int, memoryview], None]
