"""Candidates: what a query may open, its means and summaries, and the logits of a strip's queries with them.

Candidates are columns: first the pending groups, in PENDING_WIDTH columns, then the archive's units. A strip's choices
are words, one a candidate, with a bit for each query, and the list of the archive's columns that any query chose.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga.config import HGAConfig
from hga.ops.coding import Codes
from hga.ops.kernels.flash import LOG2_E, cap_logits, load_rows
from hga.ops.nibbles import decode_either
from hga.ops.precision import Rows
from hga.ops.prefill_routed import ClosedChunks
from hga.ops.summaries import mean_rows, summarise_keys


class Means(NamedTuple):
    """Means by position of all near groups (Hkv, m, D). Keys are `keys + keys_rest`: 16 bits alone would round them."""

    keys: Tensor
    keys_rest: Tensor | None
    values: Tensor


class Units(NamedTuple):
    """Key summaries (Hkv, n, D) in the query's type, and the float32 scale (Hkv, n) of each where they carry one.

    paired: what a 16-bit type rounded off a key follows it in memory, and counts.
    """

    keys: Tensor
    scales: Tensor | None
    paired: bool = False


class Chosen(NamedTuple):
    """Of strips (S) and heads (H): words int64 (S, H, W), listed archive columns int32 (S, H, W), how many (S, H)."""

    words: Tensor
    listed: Tensor
    counts: Tensor


class Archived(NamedTuple):
    """Summaries in the query's type: nodes, groups (the same with one level), and the nodes' values (Hkv, n, D)."""

    nodes: Units
    groups: Units
    node_values: Tensor


def mean_groups(config: HGAConfig, keys: Tensor, values: Tensor, inverse_frequencies: Tensor | None) -> Means:
    """Means of all whole groups behind the sink, by position; a 16-bit type holds a key mean as a sum of two."""
    size, sink = config.group_size, config.sink_tokens
    whole = max(0, keys.shape[1] - sink) // size * size
    if not whole:
        nothing = keys.new_zeros(keys.shape[0], 1, keys.shape[2])  # no query reaches a group yet
        return Means(nothing, None, nothing)
    exact = summarise_keys(keys[:, sink : sink + whole].float(), size, inverse_frequencies)
    rounded = exact.to(keys.dtype)
    rest = None if keys.dtype == torch.float32 else (exact - rounded.float()).to(keys.dtype)
    return Means(rounded, rest, mean_rows(values[:, sink : sink + whole].float(), size).to(keys.dtype))


def decode_summaries(config: HGAConfig, closed: ClosedChunks | None, chunks: int, query: Tensor) -> Archived:
    """The summaries of `chunks` chunks, decoded once for all strips. ValueError where one is missing or too wide."""
    if closed is None or not chunks:
        nothing = query.new_zeros(query.shape[0], 1, query.shape[3])
        return Archived(Units(nothing, None), Units(nothing, None), nothing)
    count = chunks * config.chunk_size // config.node_size
    nodes = _decode_keys(closed.node_keys, count, query.dtype)
    groups, values = nodes, nodes.keys
    if config.two_level:
        if closed.group_keys is None:
            raise ValueError("group_keys=None with two-level routing; pass the summaries of the groups too")
        if isinstance(closed.group_keys, Codes):
            exact = closed.group_key_rows(config, count, torch.float32)
            keys, paired = exact.to(query.dtype), query.dtype != torch.float32
            if paired:
                keys = torch.stack([keys, (exact - keys.float()).to(query.dtype)], 2)[:, :, 0]
            # Where nodes carry scales, a kernel that reads both expects them of groups too.
            groups = Units(keys, None if nodes.scales is None else torch.ones_like(exact[..., 0]), paired)
        else:
            groups = _decode_keys(closed.group_keys, count * config.node_size // config.group_size, query.dtype)
    if config.far_field:
        if closed.node_values is None:
            raise ValueError("node_values=None with far_field=True; pass the nodes' mean values too")
        values = decode_either(closed.node_values, query.dtype, (slice(None), slice(count)))
    return Archived(nodes, groups, values)


def _decode_keys(rows: Rows, count: int, dtype: torch.dtype) -> Units:
    """Key summaries in the query's type. fp8 numbers fit any type exactly; their scales stay apart, unrounded."""
    data, scale = rows.data[:, :count], None if rows.scale is None else rows.scale[:, :count]
    if data.dtype.itemsize > 1 and data.dtype != dtype != torch.float32:
        raise ValueError(f"summaries of {data.dtype} with queries of {dtype}: the PyTorch path serves them")
    return Units(data.to(dtype), None if scale is None else scale[..., 0].float().contiguous())


def unit_arguments(units: Units, means: Means | None, like: Tensor) -> tuple[Any, ...]:
    """Pointers and strides of the candidates' keys; `like` stands in for what is not there."""
    keys = like if means is None else means.keys
    rest = keys if means is None or means.keys_rest is None else means.keys_rest
    scales = like if units.scales is None else units.scales
    return (keys, rest, keys.shape[1], units.keys, scales, *units.keys.stride()[:2], scales.stride(0))


@triton.jit
def has_bit(words, lane, QUERIES: tl.constexpr):
    """Whether queries (M,) chose the candidates of words (N,): (M, N)."""
    if QUERIES <= 32:
        words = words.to(tl.int32)
    return ((words[None, :] >> lane[:, None].to(words.dtype)) & 1) != 0


@triton.jit
def pending_logits(
    query,
    keys,
    keys_rest,
    group,
    held,
    scale,
    REST: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Logits, in powers of two, of near groups (N,) counted as the means are; `held` means there are."""
    column = tl.arange(0, BLOCK_WIDTH)
    at = tl.minimum(group, held - 1).to(tl.int64) * WIDTH
    logits = tl.dot(query, tl.trans(load_rows(keys, at, column, WIDTH, BLOCK_WIDTH)), input_precision=PRECISION)
    if REST:
        rest = load_rows(keys_rest, at, column, WIDTH, BLOCK_WIDTH)
        logits = tl.dot(query, tl.trans(rest), logits, input_precision=PRECISION)
    logits = logits * scale
    if SOFTCAP > 0:
        logits = cap_logits(logits, SOFTCAP)
    return logits * LOG2_E


@triton.jit
def find_unit(index, count, listed, LISTED: tl.constexpr, PER_NODE: tl.constexpr):
    """The unit of each archive column, and the node that it is in. Columns behind the last stand for it."""
    index = tl.minimum(index, count - 1)
    if LISTED:
        node = tl.load(listed + index // PER_NODE)
        return node * PER_NODE + index % PER_NODE, node
    return index, index // PER_NODE


@triton.jit
def unit_logits(
    query,
    keys,
    scales,
    unit,
    stride,
    scale,
    SCALED: tl.constexpr,
    PAIRED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Logits, in powers of two, of archived units (N,)."""
    at, column = unit.to(tl.int64) * stride, tl.arange(0, BLOCK_WIDTH)
    logits = tl.dot(query, tl.trans(load_rows(keys, at, column, WIDTH, BLOCK_WIDTH)), input_precision=PRECISION)
    if PAIRED:
        rest = load_rows(keys + WIDTH, at, column, WIDTH, BLOCK_WIDTH)
        logits = tl.dot(query, tl.trans(rest), logits, input_precision=PRECISION)
    logits = logits * scale
    if SCALED:
        logits = logits * tl.load(scales + unit)[None, :]
    if SOFTCAP > 0:
        logits = cap_logits(logits, SOFTCAP)
    return logits * LOG2_E
