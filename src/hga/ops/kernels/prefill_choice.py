"""Triton kernels that choose what each query of a block opens: the largest attention mass over summaries.

Log-sum-exps first, then masses, summed over heads, then what each query chooses of them (`prefill_marks`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga.ops.kernels.candidates import (
    Chosen,
    Means,
    Units,
    find_unit,
    has_bit,
    pending_logits,
    unit_arguments,
    unit_logits,
)
from hga.ops.kernels.prefill_marks import mark_largest
from hga.ops.kernels.selection import count_steps
from hga.ops.kernels.strips import CHANGING, Strips, count_closed, count_pending, load_query, place_rows
from hga.ops.prefill_routed import MASS_DTYPE

_BLOCKS_AT_ONCE = 16


def choose_units(
    strips: Strips,
    start: int,
    stop: int,
    units: Units,
    counts: Tensor,
    width: int,
    keep: int,
    scratch_bytes: int,
    means: Means | None = None,
    within: tuple[Chosen, int] | None = None,
) -> Chosen:
    """Choose the `keep` best candidates for each query of the strips [start, stop).

    counts int32 (S, H): archive columns of these strips; width: columns in all, a bound. means: None where no pending
    group takes part. within: the chosen nodes, and units a node, where a column is a unit of a chosen node.
    """
    heads, constants = strips.heads, strips.constants
    queries, device = constants["QUERIES"], strips.query.device
    rows = queries * constants["PADDED"]
    pending_width = constants["PENDING_WIDTH"] if means else 0
    shape = (stop - start, heads)
    chosen = Chosen(
        torch.empty((*shape, width), dtype=torch.int64, device=device),
        torch.empty((*shape, width), dtype=torch.int32, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
    )
    logsumexp = torch.empty((*shape, rows), dtype=torch.float32, device=device)
    unit = unit_arguments(units, means, strips.query)
    flags = {
        **constants,
        "PENDING_WIDTH": pending_width,
        "SCALED": units.scales is not None,
        "PAIRED": units.paired,
        "REST": means is not None and means.keys_rest is not None,
        "LISTED": within is not None,
        "PER_NODE": within[1] if within else 1,
        **strips.options,
    }

    def members(a: int, b: int) -> tuple[Any, ...]:
        if within is None:
            return chosen.words, chosen.listed, 0
        return within[0].words[a:b], within[0].listed[a:b], within[0].words.shape[-1]

    _logsumexp_kernel[shape](
        strips.query,
        *unit,
        *members(0, stop - start),
        counts,
        logsumexp,
        start,
        *strips.geometry,
        **flags,
    )
    strip_bytes = MASS_DTYPE.itemsize * heads * queries * width
    step = max(1, scratch_bytes // strip_bytes)
    mass = torch.empty((min(step, stop - start), heads, queries, width), dtype=MASS_DTYPE, device=device)
    for a in range(0, stop - start, step):
        b = min(stop - start, a + step)
        for pending, columns in ((True, pending_width), (False, width - pending_width)):
            if columns:
                _mass_kernel[(b - a, triton.cdiv(columns, _BLOCKS_AT_ONCE * constants["KEYS"]), heads)](
                    strips.query,
                    *unit,
                    *members(a, b),
                    counts[a:b],
                    logsumexp[a:b],
                    mass,
                    width,
                    start + a,
                    *strips.geometry,
                    PENDING=pending,
                    SPAN=_BLOCKS_AT_ONCE,
                    **flags,
                )
        mark_largest(mass[: b - a], counts[a:b], keep, pending_width, Chosen(*(x[a:b] for x in chosen)))
    return chosen


@triton.jit(do_not_specialize=CHANGING)
def _logsumexp_kernel(
    query,
    near_keys,
    near_rest,
    near_held,
    keys,
    scales,
    key_head_stride,
    key_stride,
    scale_head_stride,
    words,
    listed,
    words_width,
    counts,
    logsumexp,
    strip_first,
    closed_before,
    first,
    tokens,
    query_head_stride,
    query_repeat_stride,
    query_stride,
    scale,
    SINK: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    PENDING_WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    REPEATS: tl.constexpr,
    QUERIES: tl.constexpr,
    PADDED: tl.constexpr,
    SCALED: tl.constexpr,
    PAIRED: tl.constexpr,
    REST: tl.constexpr,
    LISTED: tl.constexpr,
    PER_NODE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Log-sum-exp, in powers of two, of each row's logits with its candidates."""
    strip = tl.program_id(0)
    head = tl.program_id(1)
    line = strip.to(tl.int64) * tl.num_programs(1) + head
    lane, position = place_rows(strip_first + strip, first, QUERIES, PADDED)
    tile_query, _, _ = load_query(
        query, head, position, first, tokens, query_head_stride, query_repeat_stride, query_stride,
        SPLIT, REPEATS, QUERIES, PADDED, WIDTH, BLOCK_WIDTH,
    )  # fmt: skip
    peak = tl.full([QUERIES * PADDED], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES * PADDED], tl.float32)
    kv_head = (head // SPLIT).to(tl.int64)
    if PENDING_WIDTH > 0:
        near_keys += kv_head * near_held * WIDTH
        near_rest += kv_head * near_held * WIDTH
        closed = count_closed(tl.min(position, 0), SINK, WINDOW, CHUNK, TILE)
        pending = count_pending(position, closed, SINK, WINDOW, CHUNK, GROUP)
        skipped = (closed - closed_before) * (CHUNK // GROUP)
        for start in range(0, tl.max(pending, 0), KEYS):
            group = start + tl.arange(0, KEYS)
            logits = pending_logits(
                tile_query, near_keys, near_rest, skipped + group, near_held, scale,
                REST, SOFTCAP, PRECISION, WIDTH, BLOCK_WIDTH,
            )  # fmt: skip
            logits = tl.where(group[None, :] < pending[:, None], logits, float("-inf"))
            peak, total = _add(logits, peak, total)
    count = tl.load(counts + line)
    keys += kv_head * key_head_stride
    scales += kv_head * scale_head_stride
    for start in range(0, count, KEYS):
        index = start + tl.arange(0, KEYS)
        unit, node = find_unit(index, count, listed + line * words_width, LISTED, PER_NODE)
        logits = unit_logits(
            tile_query, keys, scales, unit, key_stride, scale, SCALED, PAIRED, SOFTCAP, PRECISION, WIDTH, BLOCK_WIDTH
        )
        allowed = index[None, :] < count
        if LISTED:
            allowed = allowed & has_bit(tl.load(words + line * words_width + node), lane, QUERIES)
        peak, total = _add(tl.where(allowed, logits, float("-inf")), peak, total)
    some = total > 0
    result = tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(logsumexp + line * QUERIES * PADDED + tl.arange(0, QUERIES * PADDED), result)


@triton.jit
def _add(logits, peak, total):
    """One step of a running sum of exponentials; logits (M, N) in powers of two."""
    higher = tl.maximum(peak, tl.max(logits, 1))
    origin = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp2(peak - origin) + tl.sum(tl.exp2(logits - origin[:, None]), 1)


@triton.jit(do_not_specialize=CHANGING)
def _mass_kernel(
    query,
    near_keys,
    near_rest,
    near_held,
    keys,
    scales,
    key_head_stride,
    key_stride,
    scale_head_stride,
    words,
    listed,
    words_width,
    counts,
    logsumexp,
    mass,
    mass_width,
    strip_first,
    closed_before,
    first,
    tokens,
    query_head_stride,
    query_repeat_stride,
    query_stride,
    scale,
    PENDING: tl.constexpr,
    SPAN: tl.constexpr,
    SINK: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    PENDING_WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    REPEATS: tl.constexpr,
    QUERIES: tl.constexpr,
    PADDED: tl.constexpr,
    SCALED: tl.constexpr,
    PAIRED: tl.constexpr,
    REST: tl.constexpr,
    LISTED: tl.constexpr,
    PER_NODE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Masses of some blocks of candidates in steps, summed over a strip's heads; -1 where a query may not choose."""
    strip = tl.program_id(0)
    head = tl.program_id(2)
    line = strip.to(tl.int64) * tl.num_programs(2) + head
    _lane, position = place_rows(strip_first + strip, first, QUERIES, PADDED)
    tile_query, real, _ = load_query(
        query, head, position, first, tokens, query_head_stride, query_repeat_stride, query_stride,
        SPLIT, REPEATS, QUERIES, PADDED, WIDTH, BLOCK_WIDTH,
    )  # fmt: skip
    origin = tl.load(logsumexp + line * QUERIES * PADDED + tl.arange(0, QUERIES * PADDED))
    lane = tl.arange(0, QUERIES)
    query_position = (first // QUERIES + strip_first + strip) * QUERIES + lane
    queried = (query_position >= first) & (query_position < first + tokens)
    mass_rows = mass + (line * QUERIES + lane)[:, None] * mass_width
    kv_head = (head // SPLIT).to(tl.int64)
    count = tl.load(counts + line)
    if PENDING:
        count = PENDING_WIDTH
        closed = count_closed(tl.min(position, 0), SINK, WINDOW, CHUNK, TILE)
        pending = count_pending(query_position, closed, SINK, WINDOW, CHUNK, GROUP)
        skipped = (closed - closed_before) * (CHUNK // GROUP)
        near_keys += kv_head * near_held * WIDTH
        near_rest += kv_head * near_held * WIDTH
    else:
        mass_rows += PENDING_WIDTH
        keys += kv_head * key_head_stride
        scales += kv_head * scale_head_stride
        words += line * words_width
        listed += line * words_width
    begin = tl.program_id(1) * (SPAN * KEYS)
    for start in range(begin, tl.minimum(begin + SPAN * KEYS, count), KEYS):
        index = start + tl.arange(0, KEYS)
        if PENDING:
            logits = pending_logits(
                tile_query, near_keys, near_rest, skipped + index, near_held, scale,
                REST, SOFTCAP, PRECISION, WIDTH, BLOCK_WIDTH,
            )  # fmt: skip
            may = queried[:, None] & (index[None, :] < pending[:, None])
        else:
            unit, node = find_unit(index, count, listed, LISTED, PER_NODE)
            logits = unit_logits(
                tile_query,
                keys,
                scales,
                unit,
                key_stride,
                scale,
                SCALED,
                PAIRED,
                SOFTCAP,
                PRECISION,
                WIDTH,
                BLOCK_WIDTH,
            )
            may = queried[:, None] & (index[None, :] < count)
            if LISTED:
                may = may & has_bit(tl.load(words + node), lane, QUERIES)
        # A row without candidates has a log-sum-exp of -inf, and may choose nothing: what it yields is dropped.
        share = tl.exp2(logits - origin[:, None])
        if PADDED > REPEATS:
            share = tl.where(real[:, None], share, 0.0)
        if PADDED > 1:
            share = tl.sum(tl.reshape(share, (QUERIES, PADDED, KEYS)), 1)
        tl.store(mass_rows + index[None, :], tl.where(may, count_steps(share), -1).to(mass.dtype.element_ty))
