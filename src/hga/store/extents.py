"""Which bytes of a file one read or write takes: runs of chunks, runs of pieces, and what else is read between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hga.store.reader import PAGE_BYTES

PIECE_BYTES = 4096
"""Read and cached at once, at least: a page, the least that O_DIRECT reads. A routed group of 4 tokens is 2 KiB, one of
2 tokens 1 KiB; larger pieces hold siblings that are rarely wanted together (benchmarks/NOTES.md has the figures).
"""

_LONGEST_BYTES = 256 << 10  # of one read of pieces
_PARTS = 8  # that a batch is delivered in, at most
_PART_BYTES = 1 << 20  # of pieces, at least: delivering less costs more than it hides


def fit_piece(group_bytes: int, chunk_bytes: int) -> int:
    """Bytes of a piece: whole groups and whole pages, near PIECE_BYTES, at most a chunk."""
    least = math.lcm(group_bytes, PAGE_BYTES)
    whole = -(-chunk_bytes // PAGE_BYTES) * PAGE_BYTES
    return min(max(1, PIECE_BYTES // least) * least, whole)


def runs(ids: list[int], longest: int) -> Iterator[tuple[int, list[int]]]:
    """Cut a list of chunks into runs of neighbours, each with the index of its first."""
    start = 0
    for index in range(1, len(ids) + 1):
        if index == len(ids) or ids[index] != ids[index - 1] + 1 or index - start == longest:
            yield start, ids[start:index]
            start = index


@dataclass(frozen=True, slots=True)
class Targets(Sequence[list[memoryview]]):
    """The buffers that each read fills, made when a thread asks for them, so beside what others read.

    Read i has buffers first[i] to first[i + 1]. A buffer goes from begins to ends in `memory`, or, where it begins
    below 0, is so many bytes of `unwanted`.
    """

    memory: memoryview
    unwanted: memoryview
    first: list[int]
    begins: list[int]
    ends: list[int]

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, index: Any) -> Any:
        at, stop = self.first[index], self.first[index + 1]
        if stop - at == 1:  # as most are, and what is done here delays other threads
            return [self.memory[self.begins[at] : self.ends[at]]]
        return [
            self.memory[begin:end] if begin >= 0 else self.unwanted[:end]
            for begin, end in zip(self.begins[at:stop], self.ends[at:stop], strict=True)
        ]


def plan_reads(
    pieces: Any, memory: memoryview, rows: Any, piece_bytes: int, unwanted: memoryview, base: int = 0
) -> tuple[list[int], Targets, Any]:
    """Reads of pieces (n,) of a file, of which number 0 is at `base`, to rows (n,) of memory, a piece each.

    Pieces ascend, or are a few such runs. Those with no more between them than `unwanted` holds come by one read, what
    lies between goes there: it costs less than another read. Returns offsets, the buffers that each read fills, and
    which of the pieces is the first of each.
    """
    gaps = np.diff(pieces) - 1
    longest = max(1, _LONGEST_BYTES // piece_bytes)
    cut = (gaps < 0) | (gaps * piece_bytes > len(unwanted)) | (pieces[1:] // longest != pieces[:-1] // longest)
    apart = cut | (gaps > 0) | (np.diff(rows) != 1)  # not one buffer
    edge = np.ones(min(1, len(pieces)), bool)
    starts = np.flatnonzero(np.concatenate([edge, apart]))  # of buffers that are wanted
    sizes = np.diff(np.append(starts, len(pieces)))
    begins = np.concatenate([edge, cut])[starts]  # a read
    skipped = np.where(begins, 0, np.concatenate([edge * 0, gaps])[starts])  # in front of each, to unwanted memory
    bridge = skipped > 0
    place = np.arange(len(starts)) + np.cumsum(bridge)  # among all buffers
    buffers = np.full((2, len(starts) + int(bridge.sum())), -1)
    buffers[0, place], buffers[1, place] = rows[starts], rows[starts] + sizes
    buffers[1, place[bridge] - 1] = skipped[bridge]
    first = np.append(place[begins], buffers.shape[1])  # a read never begins with a bridge
    offsets = pieces[starts[begins]] * piece_bytes + base
    targets = Targets(memory, unwanted, first.tolist(), *(buffers * piece_bytes).tolist())
    return offsets.tolist(), targets, starts[begins]


def in_turn(missing: Any, place: Any, piece_bytes: int) -> tuple[Any, Any, Any]:
    """The order in which pieces are read, so that what is asked for first can be delivered while others are read.

    missing: bool (n,), which of ascending pieces; place (m,): which of them each group that is asked for lies in.
    Groups are delivered in parts, the first behind `cuts[0]`. Returns missing pieces in the parts' order, ascending in
    each, where each part ends among them, and cuts, one more than parts.
    """
    parts = max(1, min(_PARTS, int(missing.sum()) * piece_bytes // _PART_BYTES))
    cuts = np.arange(parts + 1) * len(place) // parts
    turn = np.empty(len(missing), np.int64)
    for part in reversed(range(parts)):  # a piece comes with the first part that wants it
        turn[place[cuts[part] : cuts[part + 1]]] = part
    order = np.flatnonzero(missing)
    order = order[np.argsort(turn[order], kind="stable")]
    return order, np.searchsorted(turn[order], np.arange(parts), "right"), cuts
