"""The units with the largest attention mass, chosen on the device by a histogram of masses in whole steps.

A selector is one choice: the R query heads of a KV head together ("shared"), or one query head ("per_head").
-1 in place of a mass marks what may not be chosen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hga.ops import routing
from hga.ops.kernels.scores import COUNTS, count_pending, split_range

STEPS = tl.constexpr(routing.MASS_STEPS)
_SHIFT, _LOWEST = tl.constexpr(routing.STEP_SHIFT), tl.constexpr(routing.LOWEST_STEP)


@triton.jit
def count_steps(mass):
    """See `hga.ops.routing.count_steps`; int32, STEPS - 1 at most. A NaN may count as anything in that range."""
    bits = mass.to(tl.float32).to(tl.int32, bitcast=True) >> _SHIFT
    return tl.minimum(tl.maximum(bits - _LOWEST, 0), STEPS - 1)


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
    """Attention mass of each column, summed over the selector's heads, in steps, and a histogram a split."""
    selector, split = tl.program_id(0), tl.program_id(1)
    row = selector // SELECTORS // kv_heads
    pending = count_pending(tl.load(counts + row * COUNTS), sink, window, GROUP)
    columns = count_columns(counts, row, listed_counts, selector, units_per_chunk, PER_NODE, FIRST)
    start, stop = split_range(columns, split, SPLITS, BLOCK)
    seen = tl.zeros((STEPS,), tl.int32)
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
        steps = count_steps(shares)
        here = mass + selector.to(tl.int64) * scores_stride + column
        tl.store(here, tl.where(allowed, steps, -1), mask=column < stop)
        seen += tl.histogram(steps, STEPS, mask=allowed)
        column += BLOCK
        allowed = ((column < pending) | (column >= FIRST)) & (column < stop)
        mask = (r < ROWS)[:, None] & allowed[None, :]
        s = tl.load(at + column[None, :], mask=mask, other=float("-inf"))
    part = (selector.to(tl.int64) * SPLITS + split) * STEPS + tl.arange(0, STEPS)
    tl.store(histogram + part, seen)


@triton.jit
def collect_kernel(
    mass,
    mass_stride,
    histogram,
    counts,
    listed_counts,
    keep,
    chosen,
    chosen_stride,
    limits,
    chosen_counts,
    kv_heads,
    units_per_chunk,
    SELECTORS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_NODE: tl.constexpr,
    FIRST: tl.constexpr,
):
    """The `keep` columns with the largest masses -> chosen, ascending: of equal masses the lower columns.

    limits, int32 (selectors, 2): a column is chosen if its mass exceeds the first number, or equals it and the column
    is at most the second.
    """
    selector, split = tl.program_id(0), tl.program_id(1)
    row = selector // SELECTORS // kv_heads
    columns = count_columns(counts, row, listed_counts, selector, units_per_chunk, PER_NODE, FIRST)
    start, stop = split_range(columns, split, SPLITS, BLOCK)
    mass += selector.to(tl.int64) * mass_stride
    column = start + tl.arange(0, BLOCK)
    here = tl.load(mass + column, mask=column < stop, other=-1)  # asked for before histograms are waited for
    b, q = tl.arange(0, STEPS), tl.arange(0, SPLITS)
    parts = tl.load(histogram + (selector.to(tl.int64) * SPLITS + q)[:, None] * STEPS + b[None, :])  # (SPLITS, STEPS)
    seen = tl.sum(parts, 0)
    before = tl.sum(tl.where((q < split)[:, None], parts, 0), 0)
    from_top = tl.cumsum(seen, 0, reverse=True)
    limit = tl.max(tl.where(from_top >= keep, b, 0), 0)
    above = tl.sum(tl.where(b > limit, seen, 0), 0)
    wanted = tl.minimum(keep - above, tl.sum(tl.where(b == limit, seen, 0), 0))  # of those at the limit
    above_before = tl.sum(tl.where(b > limit, before, 0), 0)
    equal_before = tl.sum(tl.where(b == limit, before, 0), 0)
    if split == 0:
        tl.store(limits + selector * 2, limit)
        tl.store(chosen_counts + selector, above + wanted)
        tl.store(limits + selector * 2 + 1, -1, mask=wanted == 0)
    for _ in range(start, stop, BLOCK):
        is_equal = here == limit
        is_above = here > limit
        ranks = tl.cumsum(is_equal.to(tl.int32) + (is_above.to(tl.int32) << 16), 0)  # two sums at once
        equal = equal_before + (ranks & 0xFFFF)
        at = above_before + (ranks >> 16) + tl.minimum(equal, wanted) - 1
        taken = is_above | (is_equal & (equal <= wanted))
        tl.store(chosen + selector.to(tl.int64) * chosen_stride + at, column, mask=taken)
        tl.store(limits + selector * 2 + 1 + column * 0, column, mask=is_equal & (equal == wanted))  # one column's
        total = tl.max(ranks, 0)
        equal_before += total & 0xFFFF
        above_before += total >> 16
        column += BLOCK
        here = tl.load(mass + column, mask=column < stop, other=-1)


@triton.jit
def is_chosen(mass, column, limit, last):
    """Whether columns with these masses are chosen (see `collect_kernel`)."""
    return (mass > limit) | ((mass == limit) & (column <= last))
