"""One decode step of one layer in a dozen kernels: no host synchronisation, no allocation but its output.

Where missing groups have to be brought (`Bring`), the host waits once, for the list of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga.config import HGAConfig
from hga.ops.coding import NUMBERS_PER_BYTE, Codes
from hga.ops.decode import (
    CACHED_SPLITS,
    CODED_BLOCK,
    NEAR_SPLITS,
    PENDING_BLOCK,
    Bring,
    Choice,
    DecodeLayer,
    padded_width,
)
from hga.ops.kernels.code_scores import score_codes_kernel
from hga.ops.kernels.partial_attention import (
    attend_cached_kernel,
    attend_far_kernel,
    attend_listed_far_kernel,
    attend_near_kernel,
    merge_kernel,
)
from hga.ops.kernels.scores import score_kernel
from hga.ops.kernels.selection import collect_kernel, resolve_kernel, weigh_kernel
from hga.ops.kernels.slots import assign_kernel, fetch_kernel
from hga.ops.precision import Rows
from hga.ops.tiles import pending_capacity

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_FETCH_PROGRAMS = 32
_SELECTION_BLOCK = 1024  # of both passes over the columns: their splits must be the same columns


def _widened(dtype: torch.dtype) -> tl.dtype:
    """The type in which fp8 summaries meet queries and weights: e4m3 is exact in float16."""
    return tl.float32 if dtype == torch.float32 else tl.float16


@functools.cache
def _lacks_fp8(device: torch.device) -> bool:
    """Whether a device cannot convert e4m3 itself (before compute capability 8.9, and the interpreter)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)


class _Step:
    """The numbers that the kernels of one step share."""

    def __init__(self, query: Tensor, layer: DecodeLayer, counts: Tensor, config: HGAConfig) -> None:
        self.config, self.layer, self.counts = config, layer, counts
        batch, self.heads, _, self.width = query.shape
        self.kv_heads = layer.near_keys.shape[1]
        self.problems = batch * self.kv_heads
        repeats = self.heads // self.kv_heads
        self.selectors_each = repeats if config.selection == "per_head" else 1
        self.selectors = self.problems * self.selectors_each
        self.wide = padded_width(self.width)
        self.first = pending_capacity(config, PENDING_BLOCK)
        self.per_node = config.node_size // config.group_size if config.two_level else 0
        self.tile = {
            "ROWS": repeats // self.selectors_each,
            "SELECTORS": self.selectors_each,
            "RB": max(16, triton.next_power_of_2(repeats // self.selectors_each)),
            "DB": self.wide,
        }
        scratch = layer.scratch
        self.parts = (scratch.peaks, scratch.totals, scratch.sums)
        self.parts_stride = scratch.peaks.shape[1]
        if layer.node_values is not None:  # of the far field
            data, scale = layer.node_values
            fp8 = scale is not None
            bits = data.view(torch.uint8) if fp8 else data
            self.values = (bits, scale if fp8 else data, data.shape[2])
            self.encoding = {
                "FP8": fp8,
                "BY_BITS": _lacks_fp8(query.device),
                "DTYPE": _widened(query.dtype) if fp8 else _TYPES[query.dtype],
            }


def attend_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: DecodeLayer,
    counts: Tensor,
    config: HGAConfig,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bring: Bring | None = None,
) -> Tensor:
    """See `hga.ops.decode.attend_decode`; float16, bfloat16 or float32, contiguous K/V and queries."""
    query, new = query.contiguous(), (keys.contiguous(), values.contiguous())
    step, scratch, cap = _Step(query, layer, counts, config), layer.scratch, softcap or 0.0
    groups, listed = scratch.groups, scratch.nodes
    units = config.chunk_size // config.node_size
    if listed is None:
        _score(step, query, new, layer.node_keys, groups, scale, cap, units=units)
        _choose(step, groups, units=units, first=step.first)
        with _beside(query.device, "far") as join_far:
            _attend_far(step, groups, first=step.first)
    else:
        assert layer.group_keys is not None
        _score(step, query, new, layer.node_keys, listed, scale, cap, units=units, pending=False)
        _choose(step, listed, units=units, first=0)
        with _beside(query.device, "far") as join_far:
            _attend_far(step, listed, first=0)
        if isinstance(layer.group_keys, Codes):
            _score_codes(step, query, new, layer.group_keys, groups, listed, scale, cap)
        else:
            _score(step, query, new, layer.group_keys, groups, scale, cap, listed=listed)
        _choose(step, groups, units=0, first=step.first, listed=listed)
    with _beside(query.device, "near") as join_near:
        _attend_near(step, query, groups, scale, cap)
        if listed is not None:
            _attend_listed_far(step, groups, listed)
    _assign(step, groups, groups if listed is None else listed)
    _fetch(step, bring)
    _attend_cached(step, query, groups, scale, cap)
    join_far()
    join_near()
    return _merge(step, query, sinks)


def _score(
    step: _Step,
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
        BY_BITS=_lacks_fp8(query.device),
        DTYPE=_widened(query.dtype) if fp8 else (_TYPES[query.dtype] if exact else tl.float32),
        num_stages=3,
    )


def _score_codes(
    step: _Step,
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
        FP8=fp8,
        BY_BITS=_lacks_fp8(query.device),
        DTYPE=_widened(query.dtype),
        num_stages=2,
    )


def _choose(step: _Step, choice: Choice, units: int, first: int, listed: Choice | None = None) -> None:
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
        BLOCK=_SELECTION_BLOCK,
        GROUP=config.group_size,
        PER_NODE=per_node,
        FIRST=first,
        num_warps=8,
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
        choice.tied,
        choice.found,
        step.kv_heads,
        units,
        SELECTORS=step.selectors_each,
        SPLITS=splits,
        BLOCK=_SELECTION_BLOCK,
        PER_NODE=per_node,
        FIRST=first,
        num_warps=8,
    )
    resolve_kernel[(step.selectors,)](
        choice.mass,
        columns,
        choice.found,
        choice.keep,
        choice.chosen,
        choice.chosen.shape[1],
        choice.tied,
        choice.limits,
        choice.counts,
        BLOCK=512,
    )


def _assign(step: _Step, groups: Choice, listed: Choice) -> None:
    """Give every chosen group a slot and list the missing ones."""
    slots, layer = step.layer.slots, step.layer
    count = slots.owner.shape[1]
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
        slots.victims,
        layer.scratch.places,
        slots.missing_groups,
        slots.missing_slots,
        slots.missing_counts,
        slots.traffic,
        step.kv_heads,
        groups.keep,
        SELECTORS=step.selectors_each,
        SLOTS_B=triton.next_power_of_2(count),
        BLOCK=min(1024, max(64, triton.next_power_of_2(groups.keep))),
        PER_NODE=step.per_node,
        FIRST=step.first,
        num_warps=8,
    )


def _fetch(step: _Step, bring: Bring | None) -> None:
    """Copy missing groups from the store to their slots."""
    slots, layer, config = step.layer.slots, step.layer, step.config
    addresses = layer.addresses
    if bring is not None:
        missing = slots.missing_counts.cpu()
        if not missing.any():
            return
        addresses = bring(missing, slots.missing_groups.cpu())
    words = 2 * config.group_size * step.width * layer.near_keys.element_size() // 8
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


@contextmanager
def _beside(device: torch.device, branch: str) -> Iterator[Callable[[], None]]:
    """Launch beside what follows, where a graph is being captured; call the result before reading what was written."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield lambda: None
        return
    current, side = torch.cuda.current_stream(device), _side_stream(device, branch)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield lambda: current.wait_stream(side)


@functools.cache
def _side_stream(device: torch.device, branch: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _attend_near(step: _Step, query: Tensor, groups: Choice, scale: float, softcap: float) -> None:
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
        DTYPE=_TYPES[query.dtype],
    )


def _attend_cached(step: _Step, query: Tensor, groups: Choice, scale: float, softcap: float) -> None:
    """Attend to opened groups in their slots."""
    layer, scratch = step.layer, step.layer.scratch
    attend_cached_kernel[(step.selectors, CACHED_SPLITS)](
        query,
        layer.slots.records,
        layer.slots.owner.shape[1],
        scratch.places,
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
        DTYPE=_TYPES[query.dtype],
    )


def _attend_far(step: _Step, units: Choice, first: int) -> None:
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
        step.width,
        step.parts_stride,
        NEAR_SPLITS + CACHED_SPLITS,
        **step.tile,
        BLOCK=128 if step.encoding["FP8"] else 64,
        SPLITS=splits,
        PARTS_B=triton.next_power_of_2(units.parts),
        FIRST=first,
        **step.encoding,
        num_stages=3,
    )


def _attend_listed_far(step: _Step, groups: Choice, listed: Choice) -> None:
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
        step.width,
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


def _merge(step: _Step, query: Tensor, sinks: Tensor | None) -> Tensor:
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
