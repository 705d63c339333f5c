"""Launches of a decode step that choose: scores of summaries, columns with the largest mass, slots, missing groups."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga.ops.coding import NUMBERS_PER_BYTE, Codes
from hga.ops.decode import CODED_BLOCK, SELECTION_BLOCK, Bring, Choice
from hga.ops.kernels.code_scores import score_codes_kernel
from hga.ops.kernels.decode_step import TYPES, Step, lacks_fp8, widened
from hga.ops.kernels.scores import score_kernel
from hga.ops.kernels.selection import collect_kernel, weigh_kernel
from hga.ops.kernels.slots import assign_kernel, fetch_kernel
from hga.ops.precision import Rows

_FETCH_PROGRAMS = 32


def score_summaries(
    step: Step,
    query: Tensor,
    new: tuple[Tensor, Tensor],
    keys: Rows,
    into: Choice,
    scale: float,
    softcap: float,
    units: int = 0,
    pending: bool = True,
    listed: Choice | None = None,
) -> None:
    """Scores with all `units` a chunk, or with the groups of listed nodes; pending groups before them."""
    config, layer, splits = step.config, step.layer, into.parts - pending
    fp8 = keys.scale is not None
    exact = keys.data.dtype == query.dtype
    nodes = into if listed is None else listed
    score_kernel[(step.selectors, splits + pending)](
        query,
        *new,
        layer.near_keys,
        layer.near_values,
        layer.near_keys.shape[2],
        layer.faults,
        keys.data.view(torch.uint8) if fp8 else keys.data,
        keys.scale if fp8 else keys.data,
        keys.data.shape[2],
        step.counts,
        nodes.chosen,
        nodes.counts,
        nodes.chosen.shape[1],
        into.scores,
        into.scores.shape[1],
        into.peaks,
        into.totals,
        step.kv_heads,
        config.sink_tokens,
        config.window_tokens,
        units,
        scale,
        softcap,
        step.width,
        **step.tile,
        BLOCK=128 if fp8 else 64,
        SPLITS=splits,
        GROUP=config.group_size,
        PER_NODE=0 if listed is None else step.per_node,
        PENDING=int(pending),
        FIRST=step.first if pending else 0,
        FP8=fp8,
        BY_BITS=lacks_fp8(query.device),
        DTYPE=widened(query.dtype) if fp8 else (TYPES[query.dtype] if exact else tl.float32),
        num_stages=3,
    )


def score_codes(
    step: Step,
    query: Tensor,
    new: tuple[Tensor, Tensor],
    keys: Codes,
    into: Choice,
    listed: Choice,
    scale: float,
    softcap: float,
) -> None:
    """Scores with the coded groups of listed nodes; pending groups before them."""
    config, layer, splits = step.config, step.layer, into.parts - 1
    nodes, fp8 = layer.node_keys, layer.node_keys.scale is not None
    channels = keys.channels.view(torch.uint8)
    score_codes_kernel[(step.selectors, splits + 1)](
        query,
        *new,
        layer.near_keys,
        layer.near_values,
        layer.near_keys.shape[2],
        layer.faults,
        nodes.data.view(torch.uint8) if fp8 else nodes.data,
        nodes.scale if fp8 else nodes.data,
        nodes.data.shape[2],
        listed.scores,
        listed.scores.shape[1],
        keys.data,
        keys.scale,
        keys.data.shape[2],
        channels,
        channels.shape[2],
        step.counts,
        listed.chosen,
        listed.counts,
        listed.chosen.shape[1],
        into.scores,
        into.scores.shape[1],
        into.peaks,
        into.totals,
        step.kv_heads,
        config.sink_tokens,
        config.window_tokens,
        scale,
        softcap,
        step.width,
        **step.tile,
        QB=max(16, triton.next_power_of_2(step.width // NUMBERS_PER_BYTE)),
        NODES=max(1, CODED_BLOCK // step.per_node),
        SPLITS=splits,
        GROUP=config.group_size,
        PER_NODE=step.per_node,
        PER_CHUNK=config.chunk_size // config.node_size,
        FIRST=step.first,
        CAPPED=softcap > 0,  # else registers for it would leave an SM half as many programs
        FP8=fp8,
        BY_BITS=lacks_fp8(query.device),
        DTYPE=widened(query.dtype),
        num_stages=2,
    )


def choose_columns(step: Step, choice: Choice, units: int, first: int, listed: Choice | None = None) -> None:
    """Choose the `keep` columns with the largest mass."""
    config, splits = step.config, choice.histogram.shape[1]
    columns, parts = choice.scores.shape[1], choice.parts
    per_node = 0 if listed is None else step.per_node
    listed_counts = choice.counts if listed is None else listed.counts
    grid = (step.selectors, splits)
    weigh_kernel[grid](
        choice.scores,
        columns,
        choice.peaks,
        choice.totals,
        step.counts,
        listed_counts,
        choice.mass,
        choice.histogram,
        step.kv_heads,
        config.sink_tokens if first else 1 << 30,
        config.window_tokens,
        units,
        ROWS=step.tile["ROWS"],
        SELECTORS=step.selectors_each,
        RP=triton.next_power_of_2(step.tile["ROWS"]),
        PARTS=parts,
        PARTS_B=triton.next_power_of_2(parts),
        SPLITS=splits,
        BLOCK=SELECTION_BLOCK,
        GROUP=config.group_size,
        PER_NODE=per_node,
        FIRST=first,
        num_warps=4,
    )
    collect_kernel[grid](
        choice.mass,
        columns,
        choice.histogram,
        step.counts,
        listed_counts,
        choice.keep,
        choice.chosen,
        choice.chosen.shape[1],
        choice.limits,
        choice.counts,
        step.kv_heads,
        units,
        SELECTORS=step.selectors_each,
        SPLITS=splits,
        BLOCK=SELECTION_BLOCK,
        PER_NODE=per_node,
        FIRST=first,
        num_warps=4 if splits <= 32 else 8,  # histograms of more take all registers of four
    )


def assign_slots(step: Step, groups: Choice, listed: Choice, direct: bool) -> None:
    """Give every chosen group a slot and list the missing ones; if `direct`, tell where the store has them."""
    slots, layer = step.layer.slots, step.layer
    count = slots.owner.shape[1]
    wide = triton.next_power_of_2(count)
    assign_kernel[(step.problems,)](
        groups.chosen,
        groups.chosen.shape[1],
        groups.counts,
        listed.chosen,
        listed.chosen.shape[1],
        step.counts,
        slots.slot_of,
        slots.slot_of.shape[1],
        slots.owner,
        slots.used_at,
        count,
        layer.addresses,
        layer.addresses.shape[1],
        layer.scratch.places,
        layer.scratch.sources,
        slots.missing_groups,
        slots.missing_places,
        slots.missing_slots,
        slots.missing_counts,
        slots.traffic,
        step.kv_heads,
        groups.keep,
        step.config.chunk_size // step.config.group_size,
        step.group_bytes,
        SELECTORS=step.selectors_each,
        SLOTS_B=wide,
        KEEP_B=max(64, triton.next_power_of_2(groups.keep)),
        PER_NODE=step.per_node,
        FIRST=step.first,
        DIRECT=direct,
        num_warps=min(32, max(8 if wide <= 1024 else 16, wide // 512)),
    )


def fetch_groups(step: Step, bring: Bring | None) -> None:
    """Copy missing groups from the store to their slots."""
    slots, layer, config = step.layer.slots, step.layer, step.config
    addresses = layer.addresses
    if bring is not None:
        missing = slots.missing_counts.cpu()
        if not missing.any():
            return
        addresses = bring(missing, slots.missing_groups.cpu())
    words = step.group_bytes // 8
    fetch_kernel[(step.problems, _FETCH_PROGRAMS)](
        slots.missing_groups,
        slots.missing_slots,
        slots.missing_counts,
        addresses,
        layer.addresses.shape[1],
        slots.records.view(torch.int64),
        slots.owner.shape[1],
        step.kv_heads,
        config.chunk_size // config.group_size,
        WORDS=words,
        WORDS_B=triton.next_power_of_2(words),
        BLOCK=4,
        PROGRAMS=_FETCH_PROGRAMS,
        BROUGHT=bring is not None,
    )
