"""Launches of a decode step that attend: near tokens, cached groups, the far field, and the merge of all parts."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from hga.ops.decode import CACHED_SPLITS, NEAR_SPLITS, Choice
from hga.ops.kernels.decode_step import TYPES, Step
from hga.ops.kernels.partial_attention import attend_kernel, merge_kernel

_REGISTERS = 168
"""A thread's registers in attention: an SM holds three programs so, two with all that the compiler would take.

Wider heads than 128 would spill hundreds of bytes.
"""


def attend_parts(
    step: Step,
    query: Tensor,
    groups: Choice,
    listed: Choice | None,
    scale: float,
    softcap: float,
) -> None:
    """Attend to everything, in parts, and take missing groups from the store where `assign_slots` said so."""
    config, layer, scratch = step.config, step.layer, step.layer.scratch
    units = groups if listed is None else listed
    attend_kernel[(step.selectors, step.used_parts)](
        query,
        layer.near_keys,
        layer.near_values,
        layer.near_keys.shape[2],
        step.counts,
        groups.scores,
        groups.mass,
        groups.scores.shape[1],
        groups.limits,
        groups.peaks,
        groups.parts,
        layer.slots.records,
        layer.slots.owner.shape[1],
        scratch.places,
        scratch.sources,
        scratch.places.shape[1],
        groups.counts,
        *step.values,
        units.scores,
        units.mass,
        units.scores.shape[1],
        units.limits,
        units.peaks,
        units.parts,
        units.chosen,
        units.chosen.shape[1],
        units.counts,
        *step.parts,
        step.kv_heads,
        config.sink_tokens,
        config.window_tokens,
        scale,
        softcap,
        config.chunk_size // config.node_size,
        math.log(config.node_size),
        math.log(config.group_size),
        step.width,
        step.values[0].shape[3],
        step.parts_stride,
        step.far_splits,
        **step.tile,
        GROUP=config.group_size,
        FIRST=step.first,
        PER_NODE=step.per_node,
        PER_NODE_B=triton.next_power_of_2(max(1, step.per_node)),
        ALIGN=math.gcd(16, step.group_bytes),
        FAR=config.far_field,
        FAR_BLOCK=step.far_block,
        UNIT_PARTS_B=triton.next_power_of_2(units.parts),
        GROUP_PARTS_B=triton.next_power_of_2(groups.parts),
        **step.encoding,
        DTYPE=TYPES[query.dtype],
        NEAR_SPLITS=NEAR_SPLITS,
        CACHED_SPLITS=CACHED_SPLITS,
        num_stages=1,  # staged for a product and for a store at once, banks would collide
        maxnreg=_REGISTERS if step.wide <= 128 else None,
    )


def merge_parts(step: Step, query: Tensor, sinks: Tensor | None) -> Tensor:
    """Merge all parts: the step's output (B, Hq, 1, D)."""
    out = torch.empty_like(query)
    share = min(64, step.wide)
    merge_kernel[(query.shape[0] * step.heads, step.wide // share)](
        *step.parts,
        out if sinks is None else sinks,
        out,
        step.parts_stride,
        step.used_parts,
        step.heads,
        step.width,
        PARTS_B=triton.next_power_of_2(step.used_parts),
        SHARE=share,
        DB=step.wide,
        SINKS=sinks is not None,
        num_warps=4 if step.used_parts <= 128 else 8,
    )
    return out
