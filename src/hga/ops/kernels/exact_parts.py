"""Parts of a decode step's attention that are exact: tokens beside the archive, and opened groups in their slots."""

from __future__ import annotations

import triton
import triton.language as tl

from hga.ops.kernels.scores import COUNTS, cap_scores, count_pending, split_range
from hga.ops.kernels.selection import is_chosen

_NEVER = tl.constexpr(float("-inf"))


@triton.jit
def _fold(peak, total, sums, logits, values, DTYPE: tl.constexpr):
    """Online softmax: take logits (RB, K) with values (K, D) of DTYPE into peak, total (RB,) and sums (RB, D)."""
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    safe = tl.where(new_peak == _NEVER, 0.0, new_peak)
    shrink = tl.exp(peak - safe)
    weights = tl.exp(logits - safe[:, None])
    total = total * shrink + tl.sum(weights, 1)
    sums = sums * shrink[:, None] + tl.dot(weights.to(DTYPE), values, input_precision="ieee")
    return new_peak, total, sums


@triton.jit
def _store_part(peak, total, sums, lines, part, parts, peaks, totals, out, r, d, ROWS, DB: tl.constexpr):
    at = lines * parts + part
    tl.store(peaks + at, peak, mask=r < ROWS)
    tl.store(totals + at, total, mask=r < ROWS)
    tl.store(out + at[:, None] * DB + d[None, :], sums, mask=(r < ROWS)[:, None])


@triton.jit
def attend_near(
    selector,
    split,
    query,
    keys,
    values,
    near_capacity,
    counts,
    scores,
    mass,
    scores_stride,
    limits,
    peaks,
    totals,
    out,
    kv_heads,
    sink,
    window,
    scale,
    softcap,
    width,
    parts,
    part,
    ROWS: tl.constexpr,
    SELECTORS: tl.constexpr,
    RB: tl.constexpr,
    DB: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    FAR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Sink, window and chosen pending groups exactly; a token of another pending group weighs as its group's mean."""
    problem = selector // SELECTORS
    count = tl.load(counts + problem // kv_heads * COUNTS)
    pending = count_pending(count, sink, window, GROUP)
    start, stop = split_range(count, split, SPLITS, BLOCK)
    limit, last = tl.load(limits + selector * 2), tl.load(limits + selector * 2 + 1)
    r, d = tl.arange(0, RB), tl.arange(0, DB)
    lines = selector.to(tl.int64) * ROWS + r
    q_mask = (r < ROWS)[:, None] & (d < width)[None, :]
    q = tl.load(query + lines[:, None] * width + d[None, :], mask=q_mask, other=0.0)
    peak = tl.full((RB,), _NEVER, tl.float32)
    total = tl.zeros((RB,), tl.float32)
    sums = tl.zeros((RB, DB), tl.float32)
    for first in range(start, stop, BLOCK):
        k = first + tl.arange(0, BLOCK)
        inside = k < stop
        at = (problem.to(tl.int64) * near_capacity + k)[:, None] * width + d[None, :]
        mask = inside[:, None] & (d < width)[None, :]
        key = tl.load(keys + at, mask=mask, other=0.0)
        s = cap_scores(tl.dot(q, tl.trans(key), input_precision="ieee") * scale, softcap)
        group = (k - sink) // GROUP
        is_pending = inside & (k >= sink) & (group < pending)
        steps = tl.load(mass + selector.to(tl.int64) * scores_stride + group, mask=is_pending, other=0)
        unopened = is_pending & (is_chosen(steps, group, limit, last) == 0)
        if FAR:
            s_mask = (r < ROWS)[:, None] & unopened[None, :]
            of_group = tl.load(scores + lines[:, None] * scores_stride + group[None, :], mask=s_mask, other=_NEVER)
            s = tl.where(unopened[None, :], of_group, s)
        else:
            s = tl.where(unopened[None, :], _NEVER, s)
        s = tl.where(inside[None, :], s, _NEVER)
        value = tl.load(values + at, mask=mask, other=0.0)
        peak, total, sums = _fold(peak, total, sums, s, value, DTYPE)
    _store_part(peak, total, sums, lines, part, parts, peaks, totals, out, r, d, ROWS, DB)


@triton.jit
def attend_cached(
    selector,
    split,
    query,
    cached,
    slots,
    places,
    sources,
    chosen_stride,
    chosen_counts,
    peaks,
    totals,
    out,
    scale,
    softcap,
    width,
    parts,
    part,
    ROWS: tl.constexpr,
    SELECTORS: tl.constexpr,
    RB: tl.constexpr,
    DB: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Exact attention to the tokens of chosen archive groups, read from their slots [2, g, D]; BLOCK tokens at once.

    What has a source (see `assign_kernel`) is read from there, over the bus from host memory, and left in its slot. One
    code for all stores: compiled otherwise, sums would round otherwise, and stores would not agree bit for bit. Groups
    are multiples of ALIGN bytes.
    """
    problem = selector // SELECTORS
    start, stop = split_range(tl.load(chosen_counts + selector) * GROUP, split, SPLITS, BLOCK)
    r, d = tl.arange(0, RB), tl.arange(0, DB)
    lines = selector.to(tl.int64) * ROWS + r
    q_mask = (r < ROWS)[:, None] & (d < width)[None, :]
    q = tl.load(query + lines[:, None] * width + d[None, :], mask=q_mask, other=0.0)
    peak = tl.full((RB,), _NEVER, tl.float32)
    total = tl.zeros((RB,), tl.float32)
    sums = tl.zeros((RB, DB), tl.float32)
    for first in range(start, stop, BLOCK):
        t = first + tl.arange(0, BLOCK)
        chosen = selector.to(tl.int64) * chosen_stride + t // GROUP
        slot = tl.load(places + chosen, mask=t < stop, other=-1)
        inside = slot >= 0
        mask = inside[:, None] & (d < width)[None, :]
        home = cached + (problem.to(tl.int64) * slots + slot) * (2 * GROUP * width)
        source = tl.load(sources + chosen, mask=t < stop, other=0)
        held = tl.multiple_of(tl.where(source == 0, home.to(tl.int64), source).to(cached.dtype), ALIGN)
        at = ((t % GROUP) * width)[:, None] + d[None, :]
        key = tl.load(held[:, None] + at, mask=mask, other=0.0)
        value = tl.load(held[:, None] + GROUP * width + at, mask=mask, other=0.0)
        # What is loaded for a product is laid out for it at once, and waited for. With these in between both are
        # asked for before that, so that the bus is waited for once.
        key, value = tl.where(mask, key, 0.0), tl.where(mask, value, 0.0)
        # No other program of this launch looks at these tokens' slots: where sources are given, a selector has its
        # problem's slots to itself and chooses a group once, and what it chose keeps its slot in this step. Later
        # launches find them written.
        lacked = mask & (source != 0)[:, None]
        tl.store(home[:, None] + at, key, mask=lacked)
        tl.store(home[:, None] + GROUP * width + at, value, mask=lacked)
        s = cap_scores(tl.dot(q, tl.trans(key), input_precision="ieee") * scale, softcap)
        peak, total, sums = _fold(peak, total, sums, tl.where(inside[None, :], s, _NEVER), value, DTYPE)
    _store_part(peak, total, sums, lines, part, parts, peaks, totals, out, r, d, ROWS, DB)
