"""The units with the largest attention mass, chosen on the device: a histogram of float bits, then a radix search.

A selector is one choice: the R query heads of a KV head together ("shared"), or one query head ("per_head").
Non-negative floats order like their bits, so masses are compared as int32; -1 marks what may not be chosen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hga.ops import decode
from hga.ops.kernels.scores import COUNTS, count_pending, split_range

BINS = tl.constexpr(decode.BINS)
_LOWEST = tl.constexpr((127 - 27) << 4)  # bits >> 19 of 2 ** -27: sixteen bins an octave from there to 2 ** 5


@triton.jit
def find_bin(bits):
    """Histogram bin of masses given by their bits: sixteen an octave, everything up to 2 ** -27 in bin 0."""
    return tl.minimum(tl.maximum((bits >> 19) - _LOWEST, 0), BINS - 1)


@triton.jit
def count_columns(counts, row, listed_counts, selector, units_per_chunk, PER_NODE: tl.constexpr, FIRST: tl.constexpr):
    """Columns of a selector's scores that are in use: the archive's units begin at FIRST."""
    if PER_NODE == 0:
        return FIRST + tl.load(counts + row * COUNTS + 1) * units_per_chunk
    return FIRST + tl.load(listed_counts + selector) * PER_NODE


@triton.jit
def weigh_kernel(
    scores,
    scores_stride,
    peaks,
    totals,
    counts,
    listed_counts,
    mass,
    histogram,
    kv_heads,
    sink,
    window,
    units_per_chunk,
    ROWS: tl.constexpr,
    SELECTORS: tl.constexpr,
    RP: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_B: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PER_NODE: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Attention mass of each column, summed over the selector's heads, as bits, and a histogram a split."""
    selector, split = tl.program_id(0), tl.program_id(1)
    row = selector // SELECTORS // kv_heads
    pending = count_pending(tl.load(counts + row * COUNTS), sink, window, GROUP)
    columns = count_columns(counts, row, listed_counts, selector, units_per_chunk, PER_NODE, FIRST)
    start, stop = split_range(columns, split, SPLITS, BLOCK)
    seen = tl.zeros((BINS,), tl.int32)
    p, r = tl.arange(0, PARTS_B), tl.arange(0, RP)
    lines = selector.to(tl.int64) * ROWS + r
    column = start + tl.arange(0, BLOCK)
    allowed = ((column < pending) | (column >= FIRST)) & (column < stop)
    mask = (r < ROWS)[:, None] & allowed[None, :]
    at = scores + lines[:, None] * scores_stride
    s = tl.load(at + column[None, :], mask=mask, other=float("-inf"))  # asked for before log-sum-exps are waited for
    part_mask = (r < ROWS)[:, None] & (p < PARTS)[None, :]
    peak = tl.load(peaks + lines[:, None] * PARTS + p[None, :], mask=part_mask, other=float("-inf"))
    total = tl.load(totals + lines[:, None] * PARTS + p[None, :], mask=part_mask, other=0.0)
    top = tl.max(peak, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    norm = tl.sum(total * tl.exp(peak - top[:, None]), 1)
    logsumexp = top + tl.log(tl.where(norm > 0, norm, 1.0))  # (RP,)
    for _ in range(start, stop, BLOCK):
        shares = tl.sum(tl.where(mask, tl.exp(s - logsumexp[:, None]), 0.0), 0)
        # NaN, which a query with NaN gives, would order above everything and overrun what has room for `keep`.
        shares = tl.where(shares < 31.9, shares, 31.9)
        bits = tl.where(allowed, shares.to(tl.int32, bitcast=True), -1)
        tl.store(mass + selector.to(tl.int64) * scores_stride + column, bits, mask=column < stop)
        seen += tl.histogram(find_bin(bits), BINS, mask=column < stop)
        column += BLOCK
        allowed = ((column < pending) | (column >= FIRST)) & (column < stop)
        mask = (r < ROWS)[:, None] & allowed[None, :]
        s = tl.load(at + column[None, :], mask=mask, other=float("-inf"))
    here = (selector.to(tl.int64) * SPLITS + split) * BINS + tl.arange(0, BINS)
    tl.store(histogram + here, seen)


@triton.jit
def collect_kernel(
    mass,
    scores_stride,
    histogram,
    counts,
    listed_counts,
    keep,
    chosen,
    chosen_stride,
    tied,
    found,
    kv_heads,
    units_per_chunk,
    SELECTORS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_NODE: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Columns above the threshold's bin -> chosen; those in it -> tied, both in column order.

    found, int32 (selectors, 4): the bin, columns chosen, columns tied (-1 in place of what may not be chosen).
    """
    selector, split = tl.program_id(0), tl.program_id(1)
    row = selector // SELECTORS // kv_heads
    columns = count_columns(counts, row, listed_counts, selector, units_per_chunk, PER_NODE, FIRST)
    start, stop = split_range(columns, split, SPLITS, BLOCK)
    b, q = tl.arange(0, BINS), tl.arange(0, SPLITS)
    parts = tl.load(histogram + (selector.to(tl.int64) * SPLITS + q)[:, None] * BINS + b[None, :])  # (SPLITS, BINS)
    seen = tl.sum(parts, 0)
    before = tl.sum(tl.where((q < split)[:, None], parts, 0), 0)
    from_top = tl.cumsum(seen, 0, reverse=True)
    threshold = tl.max(tl.where(from_top >= keep, b, 0), 0)
    above = tl.sum(tl.where(b > threshold, seen, 0), 0)
    place = tl.sum(tl.where(b > threshold, before, 0), 0)
    tied_place = tl.sum(tl.where(b == threshold, before, 0), 0)
    if split == 0:
        tl.store(found + selector * 4, threshold)
        tl.store(found + selector * 4 + 1, above)
        tl.store(found + selector * 4 + 2, tl.sum(tl.where(b == threshold, seen, 0), 0))
    for first in range(start, stop, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < stop
        bits = tl.load(mass + selector.to(tl.int64) * scores_stride + column, mask=inside, other=-1)
        bin_ = find_bin(bits)
        is_above = inside & (bin_ > threshold)
        at = place + tl.cumsum(is_above.to(tl.int32), 0) - 1
        tl.store(chosen + selector.to(tl.int64) * chosen_stride + at, column, mask=is_above)
        is_tied = inside & (bin_ == threshold)
        at = tied_place + tl.cumsum(is_tied.to(tl.int32), 0) - 1
        tl.store(tied + selector.to(tl.int64) * scores_stride + at, tl.where(bits >= 0, column, -1), mask=is_tied)
        place += tl.sum(is_above.to(tl.int32), 0)
        tied_place += tl.sum(is_tied.to(tl.int32), 0)


@triton.jit
def resolve_kernel(
    mass, scores_stride, found, keep, chosen, chosen_stride, tied, limits, chosen_counts, BLOCK: tl.constexpr
):
    """Take the missing ones of the tied columns, exactly: a radix search for the smallest mass that is chosen.

    limits, int32 (selectors, 2): a column is chosen if its bits exceed the first number, or equal it and the column
    is at most the second. Ties go to lower columns.
    """
    selector = tl.program_id(0).to(tl.int64)
    threshold = tl.load(found + selector * 4)
    above = tl.load(found + selector * 4 + 1)
    count = tl.load(found + selector * 4 + 2)
    mass += selector * scores_stride
    tied += selector * scores_stride
    chosen += selector * chosen_stride
    digits = tl.arange(0, 32)
    missing = keep - above
    prefix = tl.where(threshold > 0, (threshold + _LOWEST) << 19, 0)
    rounds = tl.where(threshold > 0, 4, 6)  # bin 0 holds many octaves
    at = tl.arange(0, BLOCK)
    first_column = tl.load(tied + at, mask=at < count, other=-1)  # mostly there are no others
    first_bits = tl.load(mass + first_column, mask=first_column >= 0, other=-1)
    for step in range(rounds):
        shift = (rounds - 1 - step) * 5
        alike = (first_column >= 0) & ((first_bits >> (shift + 5)) == (prefix >> (shift + 5)))
        seen = tl.histogram((first_bits >> shift) & 31, 32, mask=alike)
        for first in range(BLOCK, count, BLOCK):
            column = tl.load(tied + first + at, mask=first + at < count, other=-1)
            bits = tl.load(mass + column, mask=column >= 0, other=-1)
            alike = (column >= 0) & ((bits >> (shift + 5)) == (prefix >> (shift + 5)))
            seen += tl.histogram((bits >> shift) & 31, 32, mask=alike)
        from_top = tl.cumsum(seen, 0, reverse=True)
        digit = tl.max(tl.where(from_top >= missing, digits, 0), 0)
        missing -= tl.sum(tl.where(digits > digit, seen, 0), 0)
        prefix = prefix | (digit << shift)
    prefix = tl.where(keep > 0, prefix, 0x7FFFFFFF)
    place = above
    equal_before = 0
    last = -1
    for first in range(0, count, BLOCK):
        column = tl.load(tied + first + at, mask=first + at < count, other=-1)
        bits = tl.load(mass + column, mask=column >= 0, other=-1)
        equal = (column >= 0) & (bits == prefix)
        rank = equal_before + tl.cumsum(equal.to(tl.int32), 0) - 1
        taken_equal = equal & (rank < missing)
        taken = taken_equal | ((column >= 0) & (bits > prefix))
        at_place = place + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(chosen + at_place, column, mask=taken & (at_place < keep))
        last = tl.maximum(last, tl.max(tl.where(taken_equal, column, -1), 0))
        equal_before += tl.sum(equal.to(tl.int32), 0)
        place += tl.sum(taken.to(tl.int32), 0)
    tl.store(limits + selector * 2, prefix)
    tl.store(limits + selector * 2 + 1, last)
    tl.store(chosen_counts + selector, tl.minimum(place, keep))


@triton.jit
def is_chosen(bits, column, limit, last):
    """Whether columns with these bits are chosen (see `resolve_kernel`)."""
    return (bits > limit) | ((bits == limit) & (column <= last))
