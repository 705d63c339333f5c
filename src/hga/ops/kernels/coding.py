"""Group keys in two bits and node values in four, coded from the records of closing chunks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga.ops import coding, nibbles
from hga.ops.coding import NUMBERS_PER_BYTE, Codes, check_codable
from hga.ops.kernels.encode import encode_e4m3, encode_step, round_bfloat16
from hga.ops.kernels.scores import load_summaries, widen_e4m3, widen_step
from hga.ops.nibbles import Nibbles
from hga.ops.precision import Rows

_TILE_NUMBERS = 4096
_PACKED = tl.constexpr(NUMBERS_PER_BYTE)
_STEP, _PEAK, _LEAST = tl.constexpr(coding.STEP), tl.constexpr(coding.PEAK), tl.constexpr(coding.LEAST)
_TENTHS, _END = tl.constexpr(nibbles.TENTHS.start), tl.constexpr(nibbles.TENTHS.stop)
_TINY = tl.constexpr(1.1754943508222875e-38)


def code_groups(records: Tensor, node_keys: Rows) -> Codes:
    """As `hga.ops.coding.encode_differences`, the groups' means taken from records (N, Hkv, G, 2, g, D).

    node_keys: of the same chunks (Hkv, N nodes, D), encoded. ValueError if D is no multiple of 4.
    """
    chunks, heads, groups, _, group_size, width = records.shape
    check_codable(width)
    data = records.new_empty(heads, chunks * groups, width // NUMBERS_PER_BYTE, dtype=torch.uint8)
    scale = records.new_empty(heads, chunks * groups, 1, dtype=torch.uint8)
    channels = records.new_empty(heads, chunks, width, dtype=torch.float8_e4m3fn)
    padded = triton.next_power_of_2(width)
    at_once = max(1, min(triton.next_power_of_2(groups), _TILE_NUMBERS // padded))
    fp8 = node_keys.scale is not None
    with torch.cuda.device_of(records):  # Triton launches on the current device
        _code_groups[(chunks * heads,)](
            *(records, node_keys.data.view(torch.uint8) if fp8 else node_keys.data),
            *(node_keys.scale if fp8 else node_keys.data, data, scale, channels.view(torch.uint8)),
            *(heads, chunks),
            GROUPS=groups,
            AT_ONCE=at_once,
            GROUP=group_size,
            PER_NODE=chunks * groups // node_keys.data.shape[1],
            D=width,
            D_PADDED=padded,
            FP8=fp8,
            num_warps=max(1, min(8, at_once * padded // 512)),
        )
    return Codes(data, scale, channels)


@triton.jit
def _load_rest(
    records,
    node_keys,
    node_scales,
    node_first,
    start,
    GROUPS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    GROUP: tl.constexpr,
    PER_NODE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    FP8: tl.constexpr,
):
    """Differences of the means of groups from `start` on from their nodes' keys, as kept: (AT_ONCE, D_PADDED)."""
    group, d = start + tl.arange(0, AT_ONCE), tl.arange(0, D_PADDED)
    inside = group < GROUPS
    mask = inside[:, None] & (d < D)[None, :]
    total = tl.zeros([AT_ONCE, D_PADDED], tl.float32)
    for member in range(GROUP):
        at = (group * 2 * GROUP + member)[:, None] * D + d[None, :]
        total += tl.load(records + at, mask=mask, other=0.0).to(tl.float32)
    rows = node_first + group // PER_NODE
    node, scale = load_summaries(node_keys, node_scales, rows, inside, d, D, FP8, True, tl.float32)
    if FP8:
        node *= scale[:, None]
    return tl.where(mask, total / GROUP - node, 0.0)


@triton.jit
def _code_groups(
    records,
    node_keys,
    node_scales,
    data,
    scales,
    channels,
    heads,
    chunks,
    GROUPS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    GROUP: tl.constexpr,
    PER_NODE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    FP8: tl.constexpr,
):
    """Code the groups of one chunk and head: the channels' spread over all of them first, then each."""
    unit = tl.program_id(0).to(tl.int64)
    head, chunk = unit % heads, unit // heads
    place = head * chunks + chunk
    records += unit * GROUPS * 2 * GROUP * D
    node_first = place * (GROUPS // PER_NODE)
    group, d = tl.arange(0, AT_ONCE), tl.arange(0, D_PADDED)
    squares = tl.zeros([D_PADDED], tl.float32)
    for start in range(0, GROUPS, AT_ONCE):
        rest = _load_rest(
            records, node_keys, node_scales, node_first, start, GROUPS, AT_ONCE, GROUP, PER_NODE, D, D_PADDED, FP8
        )
        squares += tl.sum(rest * rest, 0)
    spread = tl.sqrt(squares / GROUPS)
    peak = tl.maximum(tl.max(spread, 0), _TINY)
    channel = encode_e4m3(tl.minimum(tl.maximum(spread / peak * _PEAK, _LEAST), _PEAK))
    tl.store(channels + place * D + d, channel, mask=d < D)
    width = widen_e4m3(channel)[None, :]
    for start in range(0, GROUPS, AT_ONCE):
        rest = _load_rest(
            records, node_keys, node_scales, node_first, start, GROUPS, AT_ONCE, GROUP, PER_NODE, D, D_PADDED, FP8
        )
        even = rest / width
        scale = encode_step(tl.sqrt(tl.sum(even * even, 1) / D) * _STEP)
        levels = tl.minimum(tl.maximum(tl.floor(even / widen_step(scale)[:, None]), -2.0), 1.0).to(tl.int32) + 2
        levels = tl.reshape(levels, [AT_ONCE, D_PADDED // _PACKED, _PACKED])
        packed = tl.sum(levels << (tl.arange(0, _PACKED) * 2)[None, None, :], 2)  # (AT_ONCE, D_PADDED / 4)
        byte = tl.arange(0, D_PADDED // _PACKED)
        row = place * GROUPS + start + group
        inside = start + group < GROUPS
        tl.store(scales + row, scale.to(tl.uint8), mask=inside)
        at = row[:, None] * (D // _PACKED) + byte[None, :]
        tl.store(data + at, packed.to(tl.uint8), mask=inside[:, None] & (byte < D // _PACKED)[None, :])


def code_values(records: Tensor, node_size: int) -> Nibbles:
    """As `hga.ops.nibbles.encode_nibbles`, of the mean values of nodes, taken from records (N, Hkv, G, 2, g, D).

    ValueError if D is no multiple of 4.
    """
    chunks, heads, groups, _, group_size, width = records.shape
    check_codable(width)
    nodes, half = groups * group_size // node_size, triton.next_power_of_2(width // 2)
    data = records.new_empty(heads, chunks * nodes, width // 2, dtype=torch.uint8)
    scale = records.new_empty(heads, chunks * nodes, 1, dtype=torch.bfloat16)
    at_once = max(1, min(triton.next_power_of_2(nodes), _TILE_NUMBERS // 4 // half))
    with torch.cuda.device_of(records):  # Triton launches on the current device
        _code_values[(chunks * heads, triton.cdiv(nodes, at_once))](
            *(records, data, scale, heads, chunks),
            NODES=nodes,
            AT_ONCE=at_once,
            NODE=node_size,
            GROUP=group_size,
            HALF=width // 2,
            HALF_PADDED=half,
            num_warps=max(1, min(8, at_once * half // 256)),
        )
    return Nibbles(data, scale)


@triton.jit
def _find_levels(means, step):
    """The level of each number, from -8 to 7, under a row's step."""
    steps = tl.broadcast_to(step[:, None], means.shape)
    return tl.minimum(tl.maximum(tl.floor(tl.div_rn(means, steps)), -8.0), 7.0)


@triton.jit
def _sum_errors(means, step, mask):
    """Squared errors of rows under steps, summed over a row."""
    away = (_find_levels(means, step) + 0.5) * step[:, None] - means
    return tl.sum(tl.where(mask, away * away, 0.0), 1)


@triton.jit
def _code_values(
    records,
    data,
    scales,
    heads,
    chunks,
    NODES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    NODE: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
):
    """Code the mean values of AT_ONCE nodes of one chunk and head, the two halves of a row apart."""
    unit = tl.program_id(0).to(tl.int64)
    node, d = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE), tl.arange(0, HALF_PADDED)
    inside = node < NODES
    mask = inside[:, None] & (d < HALF)[None, :]
    records += unit * NODES * NODE * 4 * HALF  # keys and values of as many tokens
    low = tl.zeros([AT_ONCE, HALF_PADDED], tl.float32)
    high = tl.zeros([AT_ONCE, HALF_PADDED], tl.float32)
    for member in range(NODE):
        row = (node * (NODE // GROUP) + member // GROUP) * 2 * GROUP + GROUP + member % GROUP
        at = row[:, None] * (2 * HALF) + d[None, :]
        low += tl.load(records + at, mask=mask, other=0.0).to(tl.float32)
        high += tl.load(records + at + HALF, mask=mask, other=0.0).to(tl.float32)
    low /= NODE
    high /= NODE
    peak = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    best = tl.zeros([AT_ONCE], tl.float32)
    least = tl.full([AT_ONCE], float("inf"), tl.float32)
    for tenths in tl.static_range(_TENTHS, _END):
        step = round_bfloat16(tl.maximum(peak * (tenths / 75), _TINY))
        error = _sum_errors(low, step, mask) + _sum_errors(high, step, mask)
        best = tl.where(error <= least, step, best)
        least = tl.minimum(error, least)
    codes = (_find_levels(low, best) + 8).to(tl.int32) | ((_find_levels(high, best) + 8).to(tl.int32) << 4)
    index = unit % heads * chunks * NODES + unit // heads * NODES + node
    tl.store(scales + index, best.to(tl.bfloat16), mask=inside)
    tl.store(data + index[:, None] * HALF + d[None, :], codes.to(tl.uint8), mask=mask)
