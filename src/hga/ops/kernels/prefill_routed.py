"""Triton kernels of routed prefill; `hga.ops.prefill_routed` is the reference and says what the function does.

A strip of queries (see `strips`) attends densely, with a mask, to the union of the groups that its queries
opened. Neighbouring queries open much the same groups, so the union is read a few times less often than each query's
own groups would be, and its products fill the matrix units, which the R heads of one query alone would not.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from hga.config import HGAConfig
from hga.ops.attention import Output
from hga.ops.coding import NUMBERS_PER_BYTE, Codes
from hga.ops.kernels.candidates import Archived, Chosen, Means, decode_summaries, mean_groups
from hga.ops.kernels.prefill_choice import choose_units
from hga.ops.kernels.prefill_marks import count_unions
from hga.ops.kernels.strip_attention import attend_strip_kernel
from hga.ops.kernels.strips import Strips, cut_strips, fit_strip
from hga.ops.nibbles import Nibbles
from hga.ops.prefill import nothing_attended
from hga.ops.prefill_routed import MASS_DTYPE, ClosedChunks, check_block
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
    scoring = {"scale": scale, "SOFTCAP": softcap or 0.0}
    heads = query.shape[0]
    step = heads
    if closed is not None:
        queries, _ = fit_strip(config, query)
        groups = closed.records.shape[0] * config.chunk_size // config.group_size
        masses = config.selectors(query.shape[1]) * queries * groups  # of one strip and KV head
        mass_bytes = MASS_DTYPE.itemsize * masses
        step = max(1, SCRATCH_BYTES // max(1, mass_bytes, _decoded_bytes(closed, query.dtype) // heads))
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
            scoring,
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
    groups = archived_groups = nodes * per_node
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
            count_unions(strips, start, opened, counts, within, archived_groups, unions)
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
    if closed is None:
        records = near_keys[None, :, :1, None, None].expand(1, -1, 1, 2, config.group_size, -1)
    else:
        records = closed.records
        closed.wait()
    record_keys, record_values = (x if x.stride(-1) == 1 else x.contiguous() for x in records.unbind(3))
    listed = chosen_nodes or opened
    attend_strip_kernel[(stop - start, strips.heads)](
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
        STORED_GROUP=records.shape[4],
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

    node_keys, node_values, group_keys = map(take, closed.summaries)
    return ClosedChunks(closed.records[:, heads], node_keys, node_values, group_keys, closed.wait)


def _decoded_bytes(closed: ClosedChunks, dtype: torch.dtype) -> int:
    """Bytes of decoded copies of all summaries; 0 where they are in the query's type already."""
    numbers = 0
    for rows in closed.summaries:
        if rows is not None and rows.data.dtype != dtype:
            packed = {Codes: 2 * NUMBERS_PER_BYTE, Nibbles: 2}  # keys of groups come with what 16 bits round off
            numbers += rows.data.numel() * packed.get(type(rows), 1)
    return numbers * dtype.itemsize
