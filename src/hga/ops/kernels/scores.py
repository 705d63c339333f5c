"""Scores of a decode step's queries with summaries: all nodes, groups of listed nodes, pending groups."""

from __future__ import annotations

import triton
import triton.language as tl

from hga.ops import coding, decode

PENDING_BLOCK = tl.constexpr(decode.PENDING_BLOCK)
_PER_OCTAVE, _UNIT = tl.constexpr(coding.STEPS_PER_OCTAVE), tl.constexpr(coding.UNIT_STEP)
COUNTS = tl.constexpr(4)  # int32 a row: tokens in `near`, closed chunks, step, unused


@triton.jit
def widen_e4m3(code):
    """Float32 value of e4m3 bytes, by their bits: the same on every card and in the interpreter."""
    bits = ((code & 0x7F).to(tl.int32) << 4) | ((code & 0x80).to(tl.int32) << 8)
    return (bits << 16).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120


@triton.jit
def widen_step(code):
    """Float32 steps of coded keys from their bytes, as `hga.ops.coding.decode_steps`."""
    return tl.exp2((code.to(tl.float32) - _UNIT) / _PER_OCTAVE)


@triton.jit
def load_summaries(data, scales, rows, inside, d, width, FP8: tl.constexpr, BY_BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Summary rows (K, D) as DTYPE, with the scales (K,) that are left out of them."""
    at = rows[:, None] * width + d[None, :]
    mask = inside[:, None] & (d < width)[None, :]
    if FP8:
        codes = tl.load(data + at, mask=mask, other=0)
        if BY_BITS:
            values = widen_e4m3(codes).to(DTYPE)
        else:
            values = codes.to(tl.float8e4nv, bitcast=True).to(DTYPE)
        scale = tl.load(scales + rows, mask=inside, other=0.0).to(tl.float32)
    else:
        values = tl.load(data + at, mask=mask, other=0.0).to(DTYPE)
        scale = inside.to(tl.float32)
    return values, scale


@triton.jit
def find_power(peak):
    """The power of two that brings a positive number into [1, 2), and its inverse: exact factors for float16."""
    exponent = (tl.maximum(peak, 1e-30).to(tl.int32, bitcast=True) >> 23) & 0xFF
    factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return factor, (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def cap_scores(scores, softcap):
    """softcap * tanh(scores / softcap) where softcap > 0."""
    if softcap > 0:
        scores = softcap * (2 / (1 + tl.exp(-2 * scores / softcap)) - 1)
    return scores


@triton.jit
def fold_sum(peak, total, scores):
    """Online sum of exp(scores) (RB, K) along K: new peak and total (RB,); the peak is -inf while nothing was seen."""
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    total = total * tl.exp(peak - safe) + tl.sum(tl.exp(scores - safe[:, None]), 1)
    return new_peak, total


@triton.jit
def count_pending(near_length, sink, window, GROUP: tl.constexpr):
    """Groups by position between the archive and the window of the newest token."""
    return (tl.maximum(near_length - window - sink, 0) + GROUP - 1) // GROUP


@triton.jit
def split_range(count, split, splits, BLOCK: tl.constexpr):
    """The part [start, stop) of `count` units that a split takes, whole blocks each."""
    size = (count + splits * BLOCK - 1) // (splits * BLOCK) * BLOCK
    start = split * size
    return start, tl.minimum(start + size, count)


@triton.jit
def score_pending(
    query,
    near_keys,
    near_start,
    pending,
    scale,
    softcap,
    width,
    out,
    RB: tl.constexpr,
    ROWS: tl.constexpr,
    DB: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Score queries (ROWS, D) with the means of pending groups; near_start: the row of the first of them.

    The score with a mean is the mean of the tokens' scores, whose products are exact.
    """
    r, d = tl.arange(0, RB), tl.arange(0, DB)
    q_mask = (r < ROWS)[:, None] & (d < width)[None, :]
    q = tl.load(query + r[:, None] * width + d[None, :], mask=q_mask, other=0.0)
    peak = tl.full((RB,), float("-inf"), tl.float32)
    total = tl.zeros((RB,), tl.float32)
    for first in range(0, pending, BLOCK):
        k = first + tl.arange(0, BLOCK)
        inside = k < pending
        scores = tl.zeros((RB, BLOCK), tl.float32)
        for token in range(GROUP):
            rows = near_start + k * GROUP + token
            mask = inside[:, None] & (d < width)[None, :]
            key = tl.load(near_keys + rows[:, None] * width + d[None, :], mask=mask, other=0.0)
            scores += tl.dot(q, tl.trans(key), input_precision="ieee")
        scores *= scale / GROUP
        scores = tl.where(inside[None, :], cap_scores(scores, softcap), float("-inf"))
        tl.store(out + k[None, :], scores, mask=(r < ROWS)[:, None] & inside[None, :])
        peak, total = fold_sum(peak, total, scores)
    return peak, total


@triton.jit
def append_token(new_key, new_value, near_keys, near_values, row, faults, width, DB: tl.constexpr):
    """Write a token's K/V (D,) to a row of `near`, and 1 to `faults` if a number of them is not finite."""
    d = tl.arange(0, DB)
    key = tl.load(new_key + d, mask=d < width, other=0.0)
    value = tl.load(new_value + d, mask=d < width, other=0.0)
    tl.store(near_keys + row * width + d, key, mask=d < width)
    tl.store(near_values + row * width + d, value, mask=d < width)
    infinite = float("inf")
    finite = (tl.abs(key.to(tl.float32)) < infinite) & (tl.abs(value.to(tl.float32)) < infinite)
    tl.store(faults + d * 0, tl.zeros((DB,), tl.int32) + 1, mask=finite == 0)


@triton.jit
def score_kernel(
    query,
    new_keys,
    new_values,
    near_keys,
    near_values,
    near_capacity,
    faults,
    keys,
    key_scales,
    capacity,
    counts,
    listed,
    listed_counts,
    listed_stride,
    scores,
    scores_stride,
    peaks,
    totals,
    kv_heads,
    sink,
    window,
    units_per_chunk,
    scale,
    softcap,
    width,
    ROWS: tl.constexpr,
    SELECTORS: tl.constexpr,
    RB: tl.constexpr,
    DB: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    PER_NODE: tl.constexpr,
    PENDING: tl.constexpr,
    FIRST: tl.constexpr,
    FP8: tl.constexpr,
    BY_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Scores of ROWS query heads with summaries -> scores (rows, stride), and log-sum-exp parts a split.

    Grid (selectors, SPLITS + PENDING). PER_NODE = 0: every unit of the row's closed chunks. PER_NODE > 0: the
    PER_NODE groups of each listed node. Archive units start at column FIRST; the last split, with PENDING, writes
    the pending groups before it and appends the newest token's K/V to `near`. Without scale (FP8) e4m3 values are
    exact in DTYPE, and so is the query, brought near 1 by a power of two.
    """
    selector, split = tl.program_id(0), tl.program_id(1)
    problem = selector // SELECTORS
    row = problem // kv_heads
    near_length = tl.load(counts + row * COUNTS)
    r, d = tl.arange(0, RB), tl.arange(0, DB)
    heads = selector.to(tl.int64) * ROWS + r
    query += selector.to(tl.int64) * ROWS * width
    part = heads * (SPLITS + PENDING) + split
    out = scores + heads[:, None] * scores_stride
    if split < SPLITS:
        if PER_NODE == 0:
            count = tl.load(counts + row * COUNTS + 1) * units_per_chunk
        else:
            count = tl.load(listed_counts + selector) * PER_NODE
        start, stop = split_range(count, split, SPLITS, BLOCK)
        q_mask = (r < ROWS)[:, None] & (d < width)[None, :]
        q = tl.load(query + r[:, None] * width + d[None, :], mask=q_mask, other=0.0).to(tl.float32)
        factor, inverse = find_power(tl.max(tl.max(tl.abs(q), 1), 0))
        q = (q * factor).to(DTYPE)
        scale *= inverse
        peak = tl.full((RB,), float("-inf"), tl.float32)
        total = tl.zeros((RB,), tl.float32)
        for first in range(start, stop, BLOCK):
            k = first + tl.arange(0, BLOCK)
            inside = k < stop
            if PER_NODE == 0:
                unit = k
            else:
                node = tl.load(listed + selector.to(tl.int64) * listed_stride + k // PER_NODE, mask=inside, other=0)
                unit = node * PER_NODE + k % PER_NODE
            rows = problem.to(tl.int64) * capacity + unit
            data, key_scale = load_summaries(keys, key_scales, rows, inside, d, width, FP8, BY_BITS, DTYPE)
            s = tl.dot(q, tl.trans(data), input_precision="ieee") * (key_scale * scale)[None, :]
            s = tl.where(inside[None, :], cap_scores(s, softcap), float("-inf"))
            tl.store(out + FIRST + k[None, :], s, mask=(r < ROWS)[:, None] & inside[None, :])
            peak, total = fold_sum(peak, total, s)
        tl.store(peaks + part, peak, mask=r < ROWS)
        tl.store(totals + part, total, mask=r < ROWS)
    else:
        # The newest token is in the window: no program of this launch reads what is written here.
        at = problem.to(tl.int64) * near_capacity
        append_token(
            new_keys + problem * width, new_values + problem * width, near_keys, near_values, at + near_length - 1,
            faults, width, DB,
        )  # fmt: skip
        pending = count_pending(near_length, sink, window, GROUP)
        peak, total = score_pending(
            query, near_keys, at + sink, pending, scale, softcap, width, out, RB, ROWS, DB, GROUP, PENDING_BLOCK
        )
        tl.store(peaks + part, peak, mask=r < ROWS)
        tl.store(totals + part, total, mask=r < ROWS)
