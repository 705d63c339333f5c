"""Triton kernels of routed prefill; `hga.ops.prefill_routed` is the reference and says what the function does.

A strip of queries (see `strips`) attends densely, with a mask, to the union of the groups that its queries
opened. Neighbouring queries open much the same groups, so the union is read a few times less often than each query's
own groups would be, and its products fill the matrix units, which the R heads of one query alone would not.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga.config import HGAConfig
from hga.ops.attention import Output
from hga.ops.coding import NUMBERS_PER_BYTE, Codes
from hga.ops.kernels.candidates import (
    Archived,
    Chosen,
    Means,
    count_unions,
    decode_summaries,
    find_unit,
    has_bit,
    mean_groups,
    pending_logits,
    unit_logits,
)
from hga.ops.kernels.flash import absorb, dot_logits, finish, load_rows
from hga.ops.kernels.prefill_choice import choose_units
from hga.ops.kernels.strips import CHANGING, Strips, count_closed, count_pending, cut_strips, load_query, place_rows
from hga.ops.nibbles import Nibbles
from hga.ops.prefill import nothing_attended
from hga.ops.prefill_routed import ClosedChunks, check_block
from hga.ops.tiles import closed_chunks

SCRATCH_BYTES = 256 << 20
"""Scratch of each kind held at once (decoded summaries; masses; choices): heads and strips go by in batches."""


def attend_prefill_routed(
    config: HGAConfig,
    query: Tensor,
    near_keys: Tensor,
    near_values: Tensor,
    closed: ClosedChunks | None,
    first: int,
    scale: float,
    softcap: float | None = None,
    inverse_frequencies: Tensor | None = None,
    opened: Tensor | None = None,
) -> Output:
    """See `hga.ops.prefill_routed.attend_prefill_routed`. float16, bfloat16 or float32; the output is float32.

    ValueError also for summaries of a type that the query's cannot hold: the PyTorch path serves those.
    """
    before = check_block(config, query, near_keys, closed, first)
    output = nothing_attended(query)
    heads = query.shape[0]
    step = heads if closed is None else max(1, SCRATCH_BYTES * heads // max(1, _decoded_bytes(closed, query.dtype)))
    for start in range(0, heads, step):
        here = slice(start, start + step)
        _attend_heads(
            config,
            query[here],
            near_keys[here],
            near_values[here],
            None if closed is None else _take_heads(closed, here),
            first,
            before,
            {"scale": scale, "SOFTCAP": softcap or 0.0},
            inverse_frequencies,
            Output(*(x[here] for x in output)),
            None if opened is None else opened[here],
        )
    return output


def _attend_heads(
    config: HGAConfig,
    query: Tensor,
    near_keys: Tensor,
    near_values: Tensor,
    closed: ClosedChunks | None,
    first: int,
    closed_before: int,
    scoring: dict[str, Any],
    inverse_frequencies: Tensor | None,
    output: Output,
    unions: Tensor | None,
) -> None:
    """Attend some KV heads' queries and write their output, and how many groups were opened, in place."""
    query, near_keys, near_values = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (query, near_keys, near_values)
    )
    strips = cut_strips(config, query, first, closed_before, scoring)
    means = mean_groups(config, near_keys, near_values, inverse_frequencies)
    chunks = closed_chunks(config, first + query.shape[2] - 1)
    archived = decode_summaries(config, closed, chunks, query)
    nodes, per_node = chunks * config.chunk_size // config.node_size, config.node_size // config.group_size
    groups = nodes * per_node
    if config.two_level:
        queries = strips.constants["QUERIES"] * strips.constants["REPEATS"]
        groups = min(groups, queries * config.candidate_nodes * per_node)
    keys = strips.constants["KEYS"]
    node_width = triton.cdiv(max(1, nodes), keys) * keys
    width = strips.constants["PENDING_WIDTH"] + triton.cdiv(groups, keys) * keys
    word_bytes = 12 * strips.heads * (width + node_width * config.two_level)
    step = max(1, SCRATCH_BYTES // word_bytes)
    for start in range(0, strips.count, step):
        stop = min(strips.count, start + step)
        node_counts = strips.closed[start:stop] * (config.chunk_size // config.node_size)
        counts, chosen_nodes, within = node_counts, None, None
        if config.two_level:
            chosen_nodes = choose_units(
                strips, start, stop, archived.nodes, node_counts, node_width, config.candidate_nodes, SCRATCH_BYTES
            )
            counts, within = chosen_nodes.counts * per_node, (chosen_nodes, per_node)
        opened = choose_units(
            strips, start, stop, archived.groups, counts, width, config.routed_groups, SCRATCH_BYTES, means, within
        )
        if unions is not None:
            count_unions(strips, start, opened, counts, within, unions)
        near = (near_keys, near_values)
        choices = (opened, chosen_nodes, counts, node_counts)
        _attend_strips(config, strips, start, stop, near, means, closed, archived, choices, output)


def _attend_strips(
    config: HGAConfig,
    strips: Strips,
    start: int,
    stop: int,
    near: tuple[Tensor, Tensor],
    means: Means,
    closed: ClosedChunks | None,
    archived: Archived,
    choices: tuple[Chosen, Chosen | None, Tensor, Tensor],
    output: Output,
) -> None:
    """Attend the strips [start, stop) to what they chose: groups, nodes, and how many columns there were of each."""
    near_keys, near_values = near
    nodes, groups, node_values = archived
    opened, chosen_nodes, counts, node_counts = choices
    records = near_keys[None, :, :1, None, None].expand(1, -1, 1, 2, 1, -1) if closed is None else closed.records
    record_keys, record_values = (x if x.stride(-1) == 1 else x.contiguous() for x in records.unbind(3))
    listed = chosen_nodes or opened
    _attend_kernel[(stop - start, strips.heads)](
        strips.query,
        near_keys,
        near_values,
        *near_keys.stride()[:2],
        *near_values.stride()[:2],
        near_keys.shape[1],
        means.keys,
        means.keys if means.keys_rest is None else means.keys_rest,
        means.values,
        means.keys.shape[1],
        record_keys,
        record_values,
        *record_keys.stride()[:4],
        groups.keys,
        strips.query if groups.scales is None else groups.scales,
        *groups.keys.stride()[:2],
        nodes.keys,
        strips.query if nodes.scales is None else nodes.scales,
        *nodes.keys.stride()[:2],
        node_values,
        *node_values.stride()[:2],
        0 if groups.scales is None else groups.scales.stride(0),
        0 if nodes.scales is None else nodes.scales.stride(0),
        opened.words,
        opened.listed,
        opened.counts,
        opened.words.shape[-1],
        listed.words,
        listed.listed,
        listed.words.shape[-1],
        counts,
        node_counts,
        output.value,
        output.logsumexp,
        start,
        *strips.geometry,
        **strips.constants,
        **strips.options,
        GROUP_LOG2=math.log2(config.group_size),
        NODE_LOG2=math.log2(config.node_size),
        PER_NODE=config.node_size // config.group_size if config.two_level else 1,
        FAR=config.far_field,
        LISTED=config.two_level,
        SCALED=groups.scales is not None,
        PAIRED=groups.paired,
        REST=means.keys_rest is not None,
    )


def _take_heads(closed: ClosedChunks, heads: slice) -> ClosedChunks:
    def take(rows: Any) -> Any:
        return rows if rows is None else type(rows)(*(None if part is None else part[heads] for part in rows))

    return ClosedChunks(closed.records[:, heads], *map(take, closed[1:]))


def _decoded_bytes(closed: ClosedChunks, dtype: torch.dtype) -> int:
    """Bytes of decoded copies of all summaries; 0 where they are in the query's type already."""
    numbers = 0
    for rows in closed[1:]:
        if rows is not None and rows.data.dtype != dtype:
            packed = {Codes: 2 * NUMBERS_PER_BYTE, Nibbles: 2}  # keys of groups come with what 16 bits round off
            numbers += rows.data.numel() * packed.get(type(rows), 1)
    return numbers * dtype.itemsize


@triton.jit(do_not_specialize=CHANGING)
def _attend_kernel(
    query,
    near_keys,
    near_values,
    near_key_head_stride,
    near_key_stride,
    near_value_head_stride,
    near_value_stride,
    near_tokens,
    mean_keys,
    mean_rest,
    mean_values,
    near_held,
    record_keys,
    record_values,
    chunk_stride,
    record_head_stride,
    record_group_stride,
    record_stride,
    group_keys,
    group_scales,
    group_head_stride,
    group_stride,
    node_keys,
    node_scales,
    node_head_stride,
    node_stride,
    node_values,
    node_value_head_stride,
    node_value_stride,
    group_scale_stride,
    node_scale_stride,
    opened_words,
    opened_listed,
    opened_counts,
    opened_width,
    node_words,
    node_listed,
    node_width,
    counts,
    node_counts,
    out_value,
    out_logsumexp,
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
    GROUP_LOG2: tl.constexpr,
    NODE_LOG2: tl.constexpr,
    PER_NODE: tl.constexpr,
    TILE: tl.constexpr,
    PENDING_WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    REPEATS: tl.constexpr,
    QUERIES: tl.constexpr,
    PADDED: tl.constexpr,
    FAR: tl.constexpr,
    SCALED: tl.constexpr,
    PAIRED: tl.constexpr,
    REST: tl.constexpr,
    LISTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One strip of one head: sink, near tokens, opened groups, far field, in one running softmax."""
    strip = tl.program_id(0)
    head = tl.program_id(1)
    line = strip.to(tl.int64) * tl.num_programs(1) + head
    lane, position = place_rows(strip_first + strip, first, QUERIES, PADDED)
    tile_query, real, out_row = load_query(
        query, head, position, first, tokens, query_head_stride, query_repeat_stride, query_stride,
        SPLIT, REPEATS, QUERIES, PADDED, WIDTH, BLOCK_WIDTH,
    )  # fmt: skip
    closed = count_closed(tl.min(position, 0), SINK, WINDOW, CHUNK, TILE)
    pending = count_pending(position, closed, SINK, WINDOW, CHUNK, GROUP)
    own = position - closed_before * CHUNK  # each query's place in `near`
    column = tl.arange(0, BLOCK_WIDTH)
    kv_head = (head // SPLIT).to(tl.int64)
    words = opened_words + line * opened_width
    peak = tl.full([QUERIES * PADDED], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES * PADDED], tl.float32)
    output = tl.zeros([QUERIES * PADDED, BLOCK_WIDTH], tl.float32)

    near_keys += kv_head * near_key_head_stride
    near_values += kv_head * near_value_head_stride
    for start in range(0, SINK, KEYS):
        place = start + tl.arange(0, KEYS)
        at = tl.minimum(place, near_tokens - 1).to(tl.int64)
        key = load_rows(near_keys, at * near_key_stride, column, WIDTH, BLOCK_WIDTH)
        value = load_rows(near_values, at * near_value_stride, column, WIDTH, BLOCK_WIDTH)
        logits = dot_logits(tile_query, key, scale, SOFTCAP, PRECISION)
        seen = (place[None, :] < SINK) & (place[None, :] <= own[:, None])
        peak, total, output = absorb(tl.where(seen, logits, float("-inf")), value, peak, total, output, PRECISION)
    # Behind the last closed chunk: the window, and of what is older the groups that a query opened.
    begin = SINK + (closed - closed_before) * CHUNK
    for start in range(begin, tl.minimum(tl.max(own, 0) + 1, near_tokens), KEYS):
        place = start + tl.arange(0, KEYS)
        at = tl.minimum(place, near_tokens - 1).to(tl.int64)
        key = load_rows(near_keys, at * near_key_stride, column, WIDTH, BLOCK_WIDTH)
        value = load_rows(near_values, at * near_value_stride, column, WIDTH, BLOCK_WIDTH)
        logits = dot_logits(tile_query, key, scale, SOFTCAP, PRECISION)
        group = (place - begin) // GROUP
        word = tl.load(words + group, mask=group < PENDING_WIDTH, other=0)
        seen = (group[None, :] >= pending[:, None]) | has_bit(word, lane, QUERIES)
        seen = seen & (place[None, :] <= own[:, None])
        peak, total, output = absorb(tl.where(seen, logits, float("-inf")), value, peak, total, output, PRECISION)
    if FAR:
        mean_keys += kv_head * near_held * WIDTH
        mean_rest += kv_head * near_held * WIDTH
        mean_values += kv_head * near_held * WIDTH
        skipped = (closed - closed_before) * (CHUNK // GROUP)
        for start in tl.range(0, tl.max(pending, 0), KEYS, num_stages=1):  # few, and three loads each
            group = start + tl.arange(0, KEYS)
            logits = pending_logits(
                tile_query, mean_keys, mean_rest, skipped + group, near_held, scale,
                REST, SOFTCAP, PRECISION, WIDTH, BLOCK_WIDTH,
            )  # fmt: skip
            at = tl.minimum(skipped + group, near_held - 1).to(tl.int64) * WIDTH
            value = load_rows(mean_values, at, column, WIDTH, BLOCK_WIDTH)
            counted = (group[None, :] < pending[:, None]) & ~has_bit(tl.load(words + group), lane, QUERIES)
            logits = tl.where(counted, logits + GROUP_LOG2, float("-inf"))
            peak, total, output = absorb(logits, value, peak, total, output, PRECISION)

    # The archive's opened groups, each by all queries of the strip that opened it.
    words += PENDING_WIDTH
    node_words += line * node_width
    node_listed += line * node_width
    record_keys += kv_head * record_head_stride
    record_values += kv_head * record_head_stride
    opened_listed += line * opened_width
    count = tl.load(opened_counts + line) * GROUP
    for start in range(0, count, KEYS):
        index = start + tl.arange(0, KEYS)
        choice = tl.load(opened_listed + tl.minimum(index, count - 1) // GROUP)
        group, _ = find_unit(choice, choice + 1, node_listed, LISTED, PER_NODE)
        at = (group // (CHUNK // GROUP)).to(tl.int64) * chunk_stride
        at += (group % (CHUNK // GROUP)) * record_group_stride + (index % GROUP) * record_stride
        key = load_rows(record_keys, at, column, WIDTH, BLOCK_WIDTH)
        value = load_rows(record_values, at, column, WIDTH, BLOCK_WIDTH)
        logits = dot_logits(tile_query, key, scale, SOFTCAP, PRECISION)
        seen = (index[None, :] < count) & has_bit(tl.load(words + choice), lane, QUERIES)
        peak, total, output = absorb(tl.where(seen, logits, float("-inf")), value, peak, total, output, PRECISION)
    if FAR:
        count = tl.load(counts + line)
        group_keys += kv_head * group_head_stride
        group_scales += kv_head * group_scale_stride
        node_values += kv_head * node_value_head_stride
        for start in range(0, count, KEYS):
            index = start + tl.arange(0, KEYS)
            unit, node = find_unit(index, count, node_listed, LISTED, PER_NODE)
            logits = unit_logits(
                tile_query, group_keys, group_scales, unit, group_stride, scale, SCALED, PAIRED, SOFTCAP, PRECISION,
                WIDTH, BLOCK_WIDTH,
            )  # fmt: skip
            value = load_rows(node_values, node.to(tl.int64) * node_value_stride, column, WIDTH, BLOCK_WIDTH)
            word = tl.load(words + tl.minimum(index, count - 1))
            counted = (index[None, :] < count) & ~has_bit(word, lane, QUERIES)
            if LISTED:
                counted = counted & has_bit(tl.load(node_words + node), lane, QUERIES)
            logits = tl.where(counted, logits + GROUP_LOG2, float("-inf"))
            peak, total, output = absorb(logits, value, peak, total, output, PRECISION)
        if LISTED:  # nodes whose groups were not scored count whole
            count = tl.load(node_counts + line)
            node_keys += kv_head * node_head_stride
            node_scales += kv_head * node_scale_stride
            for start in range(0, count, KEYS):
                index = start + tl.arange(0, KEYS)
                node = tl.minimum(index, count - 1)
                logits = unit_logits(
                    tile_query, node_keys, node_scales, node, node_stride, scale, SCALED, False, SOFTCAP, PRECISION,
                    WIDTH, BLOCK_WIDTH,
                )  # fmt: skip
                value = load_rows(node_values, node.to(tl.int64) * node_value_stride, column, WIDTH, BLOCK_WIDTH)
                counted = (index[None, :] < count) & ~has_bit(tl.load(node_words + node), lane, QUERIES)
                logits = tl.where(counted, logits + NODE_LOG2, float("-inf"))
                peak, total, output = absorb(logits, value, peak, total, output, PRECISION)

    value, logsumexp = finish(peak, total, output)
    mask = real[:, None] & (column < WIDTH)[None, :]
    tl.store(out_value + out_row[:, None] * WIDTH + column[None, :], value, mask=mask)
    tl.store(out_logsumexp + out_row, logsumexp, mask=real)
