"""The kernel that attends a strip of queries to what they chose; `prefill_routed` launches it."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from hga.ops.kernels.candidates import find_unit, has_bit, pending_logits, unit_logits
from hga.ops.kernels.flash import absorb, dot_logits, finish, load_rows
from hga.ops.kernels.strips import CHANGING, count_closed, count_pending, load_query, place_rows


@triton.jit(do_not_specialize=CHANGING)
def attend_strip_kernel(
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
    STORED_GROUP: tl.constexpr,
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
        # Where whole nodes are opened, a group here is several of those in which records are stored.
        token = (group % (CHUNK // GROUP)) * GROUP + index % GROUP
        at = (group // (CHUNK // GROUP)).to(tl.int64) * chunk_stride
        at += (token // STORED_GROUP) * record_group_stride + (token % STORED_GROUP) * record_stride
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
