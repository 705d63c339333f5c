"""Attention of a decode step in parts: near tokens, cached groups, far field; merged by log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from hga.ops.kernels.scores import COUNTS, cap_scores, count_pending, load_summaries, split_range
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
def _store_part(peak, total, sums, lines, part, parts, peaks, totals, out, r, d, ROWS, DB: tl.constexpr):
    at = lines * parts + part
    tl.store(peaks + at, peak, mask=r < ROWS)
    tl.store(totals + at, total, mask=r < ROWS)
    tl.store(out + at[:, None] * DB + d[None, :], sums, mask=(r < ROWS)[:, None])


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
def _attend_far(
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
    ROWS: tl.constexpr,
    SELECTORS: tl.constexpr,
    RB: tl.constexpr,
    DB: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
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
    start, stop = split_range(count, split, SPLITS, BLOCK)
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
        bits = tl.load(mass + selector.to(tl.int64) * scores_stride + FIRST + k, mask=inside, other=0)
        far = inside & (is_chosen(bits, FIRST + k, limit, last) == 0)
        s_mask = (r < ROWS)[:, None] & far[None, :]
        s = tl.load(scores + lines[:, None] * scores_stride + FIRST + k[None, :], mask=s_mask, other=_NEVER)
        rows = problem.to(tl.int64) * capacity + k
        weights = tl.exp(s + log_size - peak[:, None])
        total, low, high = _add_values(
            total, low, high, weights, values, value_scales, rows, inside, d, width, HALVED, FP8, BY_BITS, DTYPE
        )
    _store_far(peak, total, low, high, lines, part, parts, peaks, totals, out, r, d, width, ROWS, DB, HALVED)


@triton.jit
def _attend_listed_far(
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
        bits = tl.load(mass + selector.to(tl.int64) * scores_stride + column, mask=scored, other=0)
        far = scored & (is_chosen(bits, column, limit, last) == 0)
        s_mask = (r < ROWS)[:, None, None] & far[None, :, :]
        at = lines[:, None, None] * scores_stride + column[None, :, :]
        s = tl.load(scores + at, mask=s_mask, other=_NEVER)  # (RB, BLOCK, PER_NODE_B)
        weights = tl.sum(tl.exp(s + log_size - peak[:, None, None]), 2)
        total, low, high = _add_values(
            total, low, high, weights, values, value_scales, rows, inside, d, width, HALVED, FP8, BY_BITS, DTYPE
        )
    _store_far(peak, total, low, high, lines, part, parts, peaks, totals, out, r, d, width, ROWS, DB, HALVED)


@triton.jit
def _attend_near(
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
        bits = tl.load(mass + selector.to(tl.int64) * scores_stride + group, mask=is_pending, other=0)
        unopened = is_pending & (is_chosen(bits, group, limit, last) == 0)
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
def _attend_cached(
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
    DIRECT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Exact attention to the tokens of chosen archive groups, read from their slots [2, g, D]; BLOCK tokens at once.

    If DIRECT, what is missing is read from the store (`sources`, see `assign_kernel`), over the bus from host memory,
    and left in its slot. Groups are multiples of ALIGN bytes.
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
        held = home
        if DIRECT:
            source = tl.load(sources + chosen, mask=t < stop, other=0)
            held = tl.where(source == 0, home.to(tl.int64), source).to(cached.dtype)
            held = tl.multiple_of(held, ALIGN)
        at = ((t % GROUP) * width)[:, None] + d[None, :]
        key = tl.load(held[:, None] + at, mask=mask, other=0.0)
        value = tl.load(held[:, None] + GROUP * width + at, mask=mask, other=0.0)
        if DIRECT:
            # What is loaded for a product is laid out for it at once, and waited for. With these in between both are
            # asked for before that, so that the bus is waited for once.
            key, value = tl.where(mask, key, 0.0), tl.where(mask, value, 0.0)
            # No other program of this launch looks at these tokens' slots: a selector has its problem's slots to itself
            # and chooses a group once, and what it chose keeps its slot in this step. Later launches find them written.
            lacked = mask & (source != 0)[:, None]
            tl.store(home[:, None] + at, key, mask=lacked)
            tl.store(home[:, None] + GROUP * width + at, value, mask=lacked)
        s = cap_scores(tl.dot(q, tl.trans(key), input_precision="ieee") * scale, softcap)
        peak, total, sums = _fold(peak, total, sums, tl.where(inside[None, :], s, _NEVER), value, DTYPE)
    _store_part(peak, total, sums, lines, part, parts, peaks, totals, out, r, d, ROWS, DB)


@triton.jit
def attend_kernel(
    query,
    near_keys,
    near_values,
    near_capacity,
    counts,
    group_scores,
    group_mass,
    groups_stride,
    group_limits,
    group_peaks,
    group_parts,
    cached,
    slots,
    places,
    sources,
    chosen_stride,
    chosen_counts,
    values,
    value_scales,
    capacity,
    unit_scores,
    unit_mass,
    units_stride,
    unit_limits,
    unit_peaks,
    unit_parts,
    listed,
    listed_stride,
    listed_counts,
    peaks,
    totals,
    out,
    kv_heads,
    sink,
    window,
    scale,
    softcap,
    units_per_chunk,
    log_unit,
    log_group,
    width,
    value_width,
    parts,
    ROWS: tl.constexpr,
    SELECTORS: tl.constexpr,
    RB: tl.constexpr,
    DB: tl.constexpr,
    GROUP: tl.constexpr,
    FIRST: tl.constexpr,
    PER_NODE: tl.constexpr,
    PER_NODE_B: tl.constexpr,
    ALIGN: tl.constexpr,
    DIRECT: tl.constexpr,
    FAR: tl.constexpr,
    FAR_BLOCK: tl.constexpr,
    UNIT_PARTS_B: tl.constexpr,
    GROUP_PARTS_B: tl.constexpr,
    WIDE: tl.constexpr,
    HALVED: tl.constexpr,
    FP8: tl.constexpr,
    BY_BITS: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
    DTYPE: tl.constexpr,
    NEAR_SPLITS: tl.constexpr,
    CACHED_SPLITS: tl.constexpr,
    FAR_SPLITS: tl.constexpr,
):
    """All attention of a step, a part a program: near tokens, opened groups, the far field's units, and what was not
    opened of listed nodes (PER_NODE > 0).

    One launch, so that what is read from the GPU's own memory hides the wait for what comes over the bus; programs
    that wait come first. Launched side by side instead, the four cost a captured step more in gaps between kernels
    than they saved.
    """
    selector, part = tl.program_id(0), tl.program_id(1)
    if part < CACHED_SPLITS:
        _attend_cached(
            selector,
            part,
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
            ROWS,
            SELECTORS,
            RB,
            DB,
            64,
            CACHED_SPLITS,
            GROUP,
            ALIGN,
            DIRECT,
            DTYPE,
        )
    elif part < CACHED_SPLITS + NEAR_SPLITS:
        _attend_near(
            selector,
            part - CACHED_SPLITS,
            query,
            near_keys,
            near_values,
            near_capacity,
            counts,
            group_scores,
            group_mass,
            groups_stride,
            group_limits,
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
            ROWS,
            SELECTORS,
            RB,
            DB,
            32,
            NEAR_SPLITS,
            GROUP,
            FAR,
            DTYPE,
        )
    elif part < CACHED_SPLITS + NEAR_SPLITS + FAR_SPLITS:
        _attend_far(
            selector,
            part - CACHED_SPLITS - NEAR_SPLITS,
            values,
            value_scales,
            capacity,
            counts,
            unit_scores,
            unit_mass,
            units_stride,
            unit_limits,
            unit_peaks,
            unit_parts,
            peaks,
            totals,
            out,
            kv_heads,
            units_per_chunk,
            log_unit,
            value_width,
            parts,
            part,
            ROWS,
            SELECTORS,
            RB,
            DB,
            FAR_BLOCK,
            FAR_SPLITS,
            UNIT_PARTS_B,
            FIRST if PER_NODE == 0 else 0,
            WIDE,
            HALVED,
            FP8,
            BY_BITS,
            VALUE_DTYPE,
        )
    elif PER_NODE > 0:
        _attend_listed_far(
            selector,
            part - CACHED_SPLITS - NEAR_SPLITS - FAR_SPLITS,
            values,
            value_scales,
            capacity,
            listed,
            listed_stride,
            listed_counts,
            group_scores,
            group_mass,
            groups_stride,
            group_limits,
            group_peaks,
            group_parts,
            peaks,
            totals,
            out,
            log_group,
            value_width,
            parts,
            part,
            ROWS,
            SELECTORS,
            RB,
            DB,
            32,
            CACHED_SPLITS,
            GROUP_PARTS_B,
            FIRST,
            PER_NODE,
            PER_NODE_B,
            WIDE,
            HALVED,
            FP8,
            BY_BITS,
            VALUE_DTYPE,
        )


@triton.jit
def merge_kernel(
    peaks,
    totals,
    sums,
    sinks,
    out,
    parts,
    used,
    heads,
    width,
    PARTS_B: tl.constexpr,
    SHARE: tl.constexpr,
    DB: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Merge the first `used` parts of one query head; a learned sink logit enters the sum once."""
    line = tl.program_id(0).to(tl.int64)
    p, d = tl.arange(0, PARTS_B), tl.program_id(1) * SHARE + tl.arange(0, SHARE)
    peak = tl.load(peaks + line * parts + p, mask=p < used, other=_NEVER)
    total = tl.load(totals + line * parts + p, mask=p < used, other=0.0)
    top = tl.max(peak, 0)
    if SINKS:
        sink = tl.load(sinks + line % heads).to(tl.float32)
        top = tl.maximum(top, sink)
    weight = tl.exp(peak - top)
    norm = tl.sum(total * weight, 0)
    if SINKS:
        norm += tl.exp(sink - top)
    part = tl.load(sums + (line * parts + p)[:, None] * DB + d[None, :], mask=(p < used)[:, None], other=0.0)
    value = tl.sum(part * weight[:, None], 0) / norm
    tl.store(out + line * width + d, value.to(out.dtype.element_ty), mask=d < width)
