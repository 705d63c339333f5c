"""Attention of a decode step in parts, one launch for all of them, and their merge by log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from hga.ops.kernels.exact_parts import attend_cached, attend_near
from hga.ops.kernels.far_field import attend_far, attend_listed_far

_NEVER = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=["far_splits"])  # it grows with the context: one code for all
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
    far_splits,
    ROWS: tl.constexpr,
    SELECTORS: tl.constexpr,
    RB: tl.constexpr,
    DB: tl.constexpr,
    GROUP: tl.constexpr,
    FIRST: tl.constexpr,
    PER_NODE: tl.constexpr,
    PER_NODE_B: tl.constexpr,
    ALIGN: tl.constexpr,
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
):
    """All attention of a step, a part a program: near tokens, opened groups, the far field's units, and what was not
    opened of listed nodes (PER_NODE > 0).

    One launch, so that what is read from the GPU's own memory hides the wait for what comes over the bus; programs
    that wait come first. Launched side by side instead, the four cost a captured step more in gaps between kernels
    than they saved.
    """
    selector, part = tl.program_id(0), tl.program_id(1)
    if part < CACHED_SPLITS:
        attend_cached(
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
            DTYPE,
        )
    elif part < CACHED_SPLITS + NEAR_SPLITS:
        attend_near(
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
    elif part < CACHED_SPLITS + NEAR_SPLITS + far_splits:
        attend_far(
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
            far_splits,
            ROWS,
            SELECTORS,
            RB,
            DB,
            FAR_BLOCK,
            UNIT_PARTS_B,
            FIRST if PER_NODE == 0 else 0,
            WIDE,
            HALVED,
            FP8,
            BY_BITS,
            VALUE_DTYPE,
        )
    elif PER_NODE > 0:
        attend_listed_far(
            selector,
            part - CACHED_SPLITS - NEAR_SPLITS - far_splits,
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
    written = (p < used)[:, None] & (d < width)[None, :]
    part = tl.load(sums + (line * parts + p)[:, None] * DB + d[None, :], mask=written, other=0.0)
    value = tl.sum(part * weight[:, None], 0) / norm
    tl.store(out + line * width + d, value.to(out.dtype.element_ty), mask=d < width)
