"""Launches of a decode step that attend: near tokens, cached groups, the far field, and the merge of all parts."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from hga.ops.decode import CACHED_SPLITS, NEAR_SPLITS, Choice
from hga.ops.kernels.decode_step import TYPES, Step
from hga.ops.kernels.partial_attention import (
    attend_cached_kernel,
    attend_far_kernel,
    attend_listed_far_kernel,
    attend_near_kernel,
    merge_kernel,
)


def attend_near(step: Step, query: Tensor, groups: Choice, scale: float, softcap: float) -> None:
    """Attend to the tokens beside the archive."""
    config, layer = step.config, step.layer
    attend_near_kernel[(step.selectors, NEAR_SPLITS)](
        query,
        layer.near_keys,
        layer.near_values,
        layer.near_keys.shape[2],
        step.counts,
        groups.scores,
        groups.mass,
        groups.scores.shape[1],
        groups.limits,
        *step.parts,
        step.kv_heads,
        config.sink_tokens,
        config.window_tokens,
        scale,
        softcap,
        step.width,
        step.parts_stride,
        0,
        **step.tile,
        BLOCK=32,
        SPLITS=NEAR_SPLITS,
        GROUP=config.group_size,
        FAR=config.far_field,
        DTYPE=TYPES[query.dtype],
    )


def attend_cached(step: Step, query: Tensor, groups: Choice, scale: float, softcap: float, direct: bool) -> None:
    """Attend to opened groups in their slots; if `direct`, take what is missing from the store on the way."""
    layer, scratch = step.layer, step.layer.scratch
    attend_cached_kernel[(step.selectors, CACHED_SPLITS)](
        query,
        layer.slots.records,
        layer.slots.owner.shape[1],
        scratch.places,
        scratch.sources,
        scratch.places.shape[1],
        groups.counts,
        *step.parts,
        scale,
        softcap,
        step.width,
        step.parts_stride,
        NEAR_SPLITS,
        **step.tile,
        BLOCK=64,
        SPLITS=CACHED_SPLITS,
        GROUP=step.config.group_size,
        ALIGN=math.gcd(16, step.group_bytes),
        DIRECT=direct,
        DTYPE=TYPES[query.dtype],
        num_stages=1 if direct else 3,  # staged for a product and for a store at once, banks would collide
    )


def attend_far(step: Step, units: Choice, first: int) -> None:
    """Attend to the far field's units, groups or nodes, that were not chosen."""
    config, layer, splits = step.config, step.layer, step.layer.scratch.splits
    if layer.node_values is None:
        return
    attend_far_kernel[(step.selectors, splits)](
        *step.values,
        step.counts,
        units.scores,
        units.mass,
        units.scores.shape[1],
        units.limits,
        units.peaks,
        units.parts,
        *step.parts,
        step.kv_heads,
        config.chunk_size // config.node_size,
        math.log(config.node_size),
        step.values[0].shape[3],
        step.parts_stride,
        NEAR_SPLITS + CACHED_SPLITS,
        **step.tile,
        BLOCK=64 if step.values[0].dtype.itemsize > 1 else 128,
        SPLITS=splits,
        PARTS_B=triton.next_power_of_2(units.parts),
        FIRST=first,
        **step.encoding,
        num_stages=3,
    )


def attend_listed_far(step: Step, groups: Choice, listed: Choice) -> None:
    """Attend to what was not opened of the chosen nodes."""
    config, layer, splits = step.config, step.layer, step.layer.scratch.splits
    if layer.node_values is None:
        return
    attend_listed_far_kernel[(step.selectors, CACHED_SPLITS)](
        *step.values,
        listed.chosen,
        listed.chosen.shape[1],
        listed.counts,
        groups.scores,
        groups.mass,
        groups.scores.shape[1],
        groups.limits,
        groups.peaks,
        groups.parts,
        *step.parts,
        math.log(config.group_size),
        step.values[0].shape[3],
        step.parts_stride,
        NEAR_SPLITS + CACHED_SPLITS + splits,
        **step.tile,
        BLOCK=32,
        SPLITS=CACHED_SPLITS,
        PARTS_B=triton.next_power_of_2(groups.parts),
        FIRST=step.first,
        PER_NODE=step.per_node,
        PER_NODE_B=triton.next_power_of_2(step.per_node),
        **step.encoding,
    )


def merge_parts(step: Step, query: Tensor, sinks: Tensor | None) -> Tensor:
    """Merge all parts: the step's output (B, Hq, 1, D)."""
    scratch = step.layer.scratch
    used = NEAR_SPLITS + CACHED_SPLITS
    if step.layer.node_values is not None:
        used += scratch.splits + (0 if scratch.nodes is None else CACHED_SPLITS)
    out = torch.empty_like(query)
    share = min(64, step.wide)
    merge_kernel[(query.shape[0] * step.heads, step.wide // share)](
        *step.parts,
        out if sinks is None else sinks,
        out,
        step.parts_stride,
        used,
        step.heads,
        step.width,
        PARTS_B=triton.next_power_of_2(used),
        SHARE=share,
        DB=step.wide,
        SINKS=sinks is not None,
        num_warps=8,
    )
    return out
