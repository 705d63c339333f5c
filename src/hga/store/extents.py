"""Which bytes of a file one read or write takes: runs of chunks, runs of pieces, and what else is read between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from hga.store.reader import PAGE_BYTES

PIECE_BYTES = 4096
"""Read and cached at once, at least: a page, the least that O_DIRECT reads. A routed group of 4 tokens is 2 KiB, one of
2 tokens 1 KiB; larger pieces hold siblings that are rarely wanted together (benchmarks/NOTES.md has the figures).
"""

_LONGEST_BYTES = 256 << 10  # of one read of pieces


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


def plan_reads(
    pieces: Any, memory: memoryview, rows: Any, piece_bytes: int, unwanted: memoryview
) -> tuple[list[int], list[list[memoryview]]]:
    """Reads of ascending pieces (n,) to rows (n,) of memory, a piece each: offsets, and the buffers that each fills.

    Pieces with no more between them than `unwanted` holds come by one read, what lies between goes there: it costs
    less than another read.
    """
    if not len(pieces):
        return [], []
    gaps = np.diff(pieces) - 1
    longest = max(1, _LONGEST_BYTES // piece_bytes)
    cut = (gaps * piece_bytes > len(unwanted)) | (pieces[1:] // longest != pieces[:-1] // longest)
    apart = cut | (gaps > 0) | (np.diff(rows) != 1)  # not one buffer
    starts = np.concatenate([[0], np.flatnonzero(apart) + 1])
    sizes = np.diff(np.append(starts, len(pieces))) * piece_bytes
    begins = np.concatenate([[True], cut])[starts]
    skipped = np.concatenate([[0], gaps * piece_bytes])[starts]
    targets: list[list[memoryview]] = []
    each = zip(begins.tolist(), skipped.tolist(), (rows[starts] * piece_bytes).tolist(), sizes.tolist(), strict=True)
    for begin, skip, at, size in each:
        if begin:
            targets.append([])
        elif skip:
            targets[-1].append(unwanted[:skip])
        targets[-1].append(memory[at : at + size])
    return (pieces[starts[begins]] * piece_bytes).tolist(), targets
