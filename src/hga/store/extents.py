"""Which bytes of a file one read or write takes: runs of chunks, runs of pieces, and what else is read between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
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
    pieces: Any, buffers: list[memoryview], piece_bytes: int, unwanted: memoryview
) -> tuple[list[int], list[list[memoryview]]]:
    """Reads of ascending pieces (n,) into their buffers: offsets, and the buffers that each fills.

    Pieces with no more between them than `unwanted` holds come by one read, what lies between goes there: it costs
    less than another read.
    """
    if not len(pieces):
        return [], []
    gaps = np.diff(pieces) - 1
    longest = max(1, _LONGEST_BYTES // piece_bytes)
    cut = (gaps * piece_bytes > len(unwanted)) | (pieces[1:] // longest != pieces[:-1] // longest)
    edges = [0, *(np.flatnonzero(cut) + 1).tolist(), len(pieces)]
    between = (gaps * piece_bytes).tolist()
    targets = []
    for first, last in pairwise(edges):
        run = [buffers[first]]
        for index in range(first + 1, last):
            if between[index - 1]:
                run.append(unwanted[: between[index - 1]])
            run.append(buffers[index])
        targets.append(run)
    return (pieces[edges[:-1]] * piece_bytes).tolist(), targets
