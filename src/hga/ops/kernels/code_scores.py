"""Scores of a decode step's queries with the coded groups of listed nodes, and with pending groups."""

from __future__ import annotations

import triton
import triton.language as tl

from hga.ops.coding import NUMBERS_PER_BYTE
from hga.ops.kernels.scores import (
    COUNTS,
    PENDING_BLOCK,
    append_token,
    cap_scores,
    count_pending,
    find_power,
    fold_sum,
    load_summaries,
    score_pending,
    split_range,
    widen_e4m3,
    widen_step,
)

_PACKED = tl.constexpr(NUMBERS_PER_BYTE)


@triton.jit
def _load_quarter(query, r, b, factor, width, quarter: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """Every fourth number of queries (RB, QB), as bytes hold those of codes, times a factor."""
    mask = (r < ROWS)[:, None] & (b < width // _PACKED)[None, :]
    part = tl.load(query + r[:, None] * width + b[None, :] * _PACKED + quarter, mask=mask, other=0.0)
    return (part.to(tl.float32) * factor).to(DTYPE)


@triton.jit
def _add_quarter(
    total,
    query,
    codes,
    channels,
    inside,
    quarter: tl.constexpr,
    UNITS: tl.constexpr,
    QB: tl.constexpr,
    BY_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Add a quarter of the products of queries (RB, QB) with levels times channels: total (RB, UNITS).

    codes (NODES, PER_NODE, QB): bytes; channels: pointers to each node's (NODES, QB). The products of levels and e4m3
    numbers are exact in DTYPE.
    """
    bits = tl.load(channels + quarter, mask=inside, other=0)
    if BY_BITS:
        channel = widen_e4m3(bits).to(DTYPE)
    else:
        channel = bits.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    levels = ((codes >> (2 * quarter)) & 3).to(DTYPE) - 1.5
    rows = tl.reshape((levels * channel[:, None, :]).to(DTYPE), [UNITS, QB])
    return tl.dot(query, tl.trans(rows), total, input_precision="ieee")


@triton.jit
def score_codes_kernel(
    query,
    new_keys,
    new_values,
    near_keys,
    near_values,
    near_capacity,
    faults,
    node_keys,
    node_key_scales,
    node_capacity,
    node_scores,
    node_scores_stride,
    codes,
    steps,
    capacity,
    channels,
    channel_capacity,
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
    scale,
    softcap,
    width,
    ROWS: tl.constexpr,
    SELECTORS: tl.constexpr,
    RB: tl.constexpr,
    DB: tl.constexpr,
    QB: tl.constexpr,
    NODES: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    PER_NODE: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    FIRST: tl.constexpr,
    CAPPED: tl.constexpr,
    FP8: tl.constexpr,
    BY_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Scores of ROWS query heads -> scores (rows, stride) from column FIRST on, and log-sum-exp parts a split.

    Grid (selectors, SPLITS + 1), NODES listed nodes of PER_NODE groups at a time, PER_CHUNK nodes a chunk. A group's
    score is its node's (`node_scores`, computed again where scores are capped) and what its code adds. The last split
    writes the pending groups before them and appends the newest token's K/V to `near`.
    """
    selector, split = tl.program_id(0), tl.program_id(1)
    problem = selector // SELECTORS
    row = problem // kv_heads
    near_length = tl.load(counts + row * COUNTS)
    r, d, b = tl.arange(0, RB), tl.arange(0, DB), tl.arange(0, QB)
    heads = selector.to(tl.int64) * ROWS + r
    query += selector.to(tl.int64) * ROWS * width
    part = heads * (SPLITS + 1) + split
    out = scores + heads[:, None] * scores_stride
    if split == SPLITS:
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
    else:
        start, stop = split_range(tl.load(listed_counts + selector), split, SPLITS, NODES)
        q_mask = (r < ROWS)[:, None] & (d < width)[None, :]
        q = tl.load(query + r[:, None] * width + d[None, :], mask=q_mask, other=0.0).to(tl.float32)
        factor, inverse = find_power(tl.max(tl.max(tl.abs(q), 1), 0))
        q0 = _load_quarter(query, r, b, factor, width, 0, ROWS, DTYPE)
        q1 = _load_quarter(query, r, b, factor, width, 1, ROWS, DTYPE)
        q2 = _load_quarter(query, r, b, factor, width, 2, ROWS, DTYPE)
        q3 = _load_quarter(query, r, b, factor, width, 3, ROWS, DTYPE)
        peak = tl.full((RB,), float("-inf"), tl.float32)
        total = tl.zeros((RB,), tl.float32)
        g, n = tl.arange(0, PER_NODE), tl.arange(0, NODES)
        for first in range(start, stop, NODES):
            listed_here = first + n < stop
            node = tl.load(listed + selector.to(tl.int64) * listed_stride + first + n, mask=listed_here, other=0)
            unit = problem.to(tl.int64) * capacity + node[:, None] * PER_NODE + g[None, :]
            inside = listed_here[:, None] & (b < width // _PACKED)[None, :]
            at = unit[:, :, None] * (width // _PACKED) + b[None, None, :]
            here = tl.load(codes + at, mask=inside[:, None, :], other=0)
            step = widen_step(tl.load(steps + unit, mask=listed_here[:, None], other=0))
            chunk = problem.to(tl.int64) * channel_capacity + node // PER_CHUNK
            channel = channels + chunk[:, None] * width + b[None, :] * _PACKED
            if CAPPED:
                rows = problem.to(tl.int64) * node_capacity + node
                keys, key_scale = load_summaries(
                    node_keys, node_key_scales, rows, listed_here, d, width, FP8, BY_BITS, tl.float32
                )
                of_node = tl.sum(q[:, None, :] * keys[None, :, :], 2) * (key_scale * scale)[None, :]
            else:
                n_mask = (r < ROWS)[:, None] & listed_here[None, :]
                of_node = tl.load(node_scores + heads[:, None] * node_scores_stride + node[None, :], mask=n_mask)
            s = tl.zeros((RB, NODES * PER_NODE), tl.float32)
            s = _add_quarter(s, q0, here, channel, inside, 0, NODES * PER_NODE, QB, BY_BITS, DTYPE)
            s = _add_quarter(s, q1, here, channel, inside, 1, NODES * PER_NODE, QB, BY_BITS, DTYPE)
            s = _add_quarter(s, q2, here, channel, inside, 2, NODES * PER_NODE, QB, BY_BITS, DTYPE)
            s = _add_quarter(s, q3, here, channel, inside, 3, NODES * PER_NODE, QB, BY_BITS, DTYPE)
            s *= tl.reshape(step * (scale * inverse), [NODES * PER_NODE])[None, :]
            s = tl.reshape(s, [RB, NODES, PER_NODE]) + of_node[:, :, None]
            s = tl.reshape(tl.where(listed_here[None, :, None], s, float("-inf")), [RB, NODES * PER_NODE])
            s = cap_scores(s, softcap)
            k = first * PER_NODE + tl.arange(0, NODES * PER_NODE)
            tl.store(out + FIRST + k[None, :], s, mask=(r < ROWS)[:, None] & (k < stop * PER_NODE)[None, :])
            peak, total = fold_sum(peak, total, tl.where((k < stop * PER_NODE)[None, :], s, float("-inf")))
    tl.store(peaks + part, peak, mask=r < ROWS)
    tl.store(totals + part, total, mask=r < ROWS)
