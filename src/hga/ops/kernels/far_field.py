"""Parts of a decode step's attention that stand for unopened tokens: a unit's score, and the mean of its values."""

from __future__ import annotations

import triton
import triton.language as tl

from hga.ops.kernels.scores import COUNTS, load_summaries, split_range
from hga.ops.kernels.selection import is_chosen

_NEVER = tl.constexpr(float("-inf"))


@triton.jit
def _load_peaks(score_peaks, lines, score_parts, r, ROWS, PARTS_B: tl.constexpr):
    """A peak for each row (RB,): its largest score, from the parts that scoring left, less the logarithm of 64.

    Weights of single units against it are at most 64, so that float16 holds ones a billion times smaller, and the sum
    of a node's groups does not overflow.
    """
    p = tl.arange(0, PARTS_B)
    mask = (r < ROWS)[:, None] & (p < score_parts)[None, :]
    tops = tl.max(tl.load(score_peaks + lines[:, None] * score_parts + p[None, :], mask=mask, other=_NEVER), 1)
    return tl.where(tops == _NEVER, 0.0, tops - 4.1588830833596715)


@triton.jit
def _add_values(
    total,
    low,
    high,
    weights,
    data,
    scales,
    rows,
    inside,
    d,
    width,
    HALVED: tl.constexpr,
    FP8: tl.constexpr,
    BY_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Add weights (RB, K) times mean values to low; where a byte holds two numbers, of its high half to high."""
    weighed = weights.to(DTYPE)
    if HALVED:
        mask = inside[:, None] & (d < width)[None, :]
        codes = tl.load(data + rows[:, None] * width + d[None, :], mask=mask, other=0)
        scale = tl.load(scales + rows, mask=inside, other=0.0).to(DTYPE)[:, None]
        low += tl.dot(weighed, (((codes & 15).to(DTYPE) - 7.5) * scale).to(DTYPE), input_precision="ieee")
        high += tl.dot(weighed, (((codes >> 4).to(DTYPE) - 7.5) * scale).to(DTYPE), input_precision="ieee")
    else:
        values, scale = load_summaries(data, scales, rows, inside, d, width, FP8, BY_BITS, DTYPE)
        if FP8:
            values = values * scale.to(DTYPE)[:, None]
        low += tl.dot(weighed, values, input_precision="ieee")
    return total + weights, low, high


@triton.jit
def _store_far(
    peak,
    total,
    low,
    high,
    lines,
    part,
    parts,
    peaks,
    totals,
    out,
    r,
    d,
    width,
    ROWS,
    DB: tl.constexpr,
    HALVED: tl.constexpr,
):
    at = lines * parts + part
    tl.store(peaks + at, peak, mask=r < ROWS)
    tl.store(totals + at, tl.sum(total, 1), mask=r < ROWS)
    mask = (r < ROWS)[:, None] & (d < width)[None, :]
    tl.store(out + at[:, None] * DB + d[None, :], low, mask=mask)
    if HALVED:
        tl.store(out + at[:, None] * DB + width + d[None, :], high, mask=mask)


@triton.jit
def attend_far(
    selector,
    split,
    values,
    value_scales,
    capacity,
    counts,
    scores,
    mass,
    scores_stride,
    limits,
    score_peaks,
    score_parts,
    peaks,
    totals,
    out,
    kv_heads,
    units_per_chunk,
    log_size,
    width,
    parts,
    part,
    splits,
    ROWS: tl.constexpr,
    SELECTORS: tl.constexpr,
    RB: tl.constexpr,
    DB: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS_B: tl.constexpr,
    FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    HALVED: tl.constexpr,
    FP8: tl.constexpr,
    BY_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Far field: every unit that was not chosen, log_size added to its score, with its mean value.

    width: bytes or numbers that a row of values has, WIDE them rounded up; HALVED: in four bits a number.
    """
    problem = selector // SELECTORS
    count = tl.load(counts + problem // kv_heads * COUNTS + 1) * units_per_chunk
    start, stop = split_range(count, split, splits, BLOCK)
    limit, last = tl.load(limits + selector * 2), tl.load(limits + selector * 2 + 1)
    r, d = tl.arange(0, RB), tl.arange(0, WIDE)
    lines = selector.to(tl.int64) * ROWS + r
    peak = _load_peaks(score_peaks, lines, score_parts, r, ROWS, PARTS_B) + log_size
    total = tl.zeros((RB, BLOCK), tl.float32)
    low = tl.zeros((RB, WIDE), tl.float32)
    high = tl.zeros((RB, WIDE), tl.float32)
    for first in tl.range(start, stop, BLOCK, num_stages=3):
        k = first + tl.arange(0, BLOCK)
        inside = k < stop
        steps = tl.load(mass + selector.to(tl.int64) * scores_stride + FIRST + k, mask=inside, other=0)
        far = inside & (is_chosen(steps, FIRST + k, limit, last) == 0)
        s_mask = (r < ROWS)[:, None] & far[None, :]
        s = tl.load(scores + lines[:, None] * scores_stride + FIRST + k[None, :], mask=s_mask, other=_NEVER)
        rows = problem.to(tl.int64) * capacity + k
        weights = tl.exp(s + log_size - peak[:, None])
        total, low, high = _add_values(
            total, low, high, weights, values, value_scales, rows, inside, d, width, HALVED, FP8, BY_BITS, DTYPE
        )
    _store_far(peak, total, low, high, lines, part, parts, peaks, totals, out, r, d, width, ROWS, DB, HALVED)


@triton.jit
def attend_listed_far(
    selector,
    split,
    values,
    value_scales,
    capacity,
    listed,
    listed_stride,
    listed_counts,
    scores,
    mass,
    scores_stride,
    limits,
    score_peaks,
    score_parts,
    peaks,
    totals,
    out,
    log_size,
    width,
    parts,
    part,
    ROWS: tl.constexpr,
    SELECTORS: tl.constexpr,
    RB: tl.constexpr,
    DB: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS_B: tl.constexpr,
    FIRST: tl.constexpr,
    PER_NODE: tl.constexpr,
    PER_NODE_B: tl.constexpr,
    WIDE: tl.constexpr,
    HALVED: tl.constexpr,
    FP8: tl.constexpr,
    BY_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Far field inside the listed nodes: groups that were not chosen, with the mean value of their node."""
    problem = selector // SELECTORS
    start, stop = split_range(tl.load(listed_counts + selector), split, SPLITS, BLOCK)
    limit, last = tl.load(limits + selector * 2), tl.load(limits + selector * 2 + 1)
    r, d = tl.arange(0, RB), tl.arange(0, WIDE)
    lines = selector.to(tl.int64) * ROWS + r
    g = tl.arange(0, PER_NODE_B)
    peak = _load_peaks(score_peaks, lines, score_parts, r, ROWS, PARTS_B) + log_size
    total = tl.zeros((RB, BLOCK), tl.float32)
    low = tl.zeros((RB, WIDE), tl.float32)
    high = tl.zeros((RB, WIDE), tl.float32)
    for first in range(start, stop, BLOCK):
        k = first + tl.arange(0, BLOCK)
        inside = k < stop
        node = tl.load(listed + selector.to(tl.int64) * listed_stride + k, mask=inside, other=0)
        rows = problem.to(tl.int64) * capacity + node
        column = FIRST + k[:, None] * PER_NODE + g[None, :]  # (BLOCK, PER_NODE_B)
        scored = inside[:, None] & (g < PER_NODE)[None, :]
        steps = tl.load(mass + selector.to(tl.int64) * scores_stride + column, mask=scored, other=0)
        far = scored & (is_chosen(steps, column, limit, last) == 0)
        s_mask = (r < ROWS)[:, None, None] & far[None, :, :]
        at = lines[:, None, None] * scores_stride + column[None, :, :]
        s = tl.load(scores + at, mask=s_mask, other=_NEVER)  # (RB, BLOCK, PER_NODE_B)
        weights = tl.sum(tl.exp(s + log_size - peak[:, None, None]), 2)
        total, low, high = _add_values(
            total, low, high, weights, values, value_scales, rows, inside, d, width, HALVED, FP8, BY_BITS, DTYPE
        )
    _store_far(peak, total, low, high, lines, part, parts, peaks, totals, out, r, d, width, ROWS, DB, HALVED)
