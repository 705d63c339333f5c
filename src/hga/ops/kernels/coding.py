"""Group keys in two bits, coded from the records of closing chunks; `scores.py` reads them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga.ops import coding
from hga.ops.coding import NUMBERS_PER_BYTE, Codes, check_codable
from hga.ops.kernels.encode import encode_e4m3, round_bfloat16
from hga.ops.kernels.scores import load_summaries, widen_e4m3
from hga.ops.precision import Rows

_TILE_NUMBERS = 4096
_PACKED = tl.constexpr(NUMBERS_PER_BYTE)
_STEP, _PEAK, _LEAST = tl.constexpr(coding.STEP), tl.constexpr(coding.PEAK), tl.constexpr(coding.LEAST)
_TINY = tl.constexpr(1.1754943508222875e-38)


def code_groups(records: Tensor, node_keys: Rows) -> Codes:
    """As `hga.ops.coding.encode_differences`, the groups' means taken from records (N, Hkv, G, 2, g, D).

    node_keys: of the same chunks (Hkv, N nodes, D), encoded. ValueError if D is no multiple of 4.
    """
    chunks, heads, groups, _, group_size, width = records.shape
    check_codable(width)
    data = records.new_empty(heads, chunks * groups, width // NUMBERS_PER_BYTE, dtype=torch.uint8)
    scale = records.new_empty(heads, chunks * groups, 1, dtype=torch.bfloat16)
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
        scale = round_bfloat16(tl.maximum(tl.sqrt(tl.sum(even * even, 1) / D) * _STEP, _TINY))
        levels = tl.minimum(tl.maximum(tl.floor(even / scale[:, None]), -2.0), 1.0).to(tl.int32) + 2
        levels = tl.reshape(levels, [AT_ONCE, D_PADDED // _PACKED, _PACKED])
        packed = tl.sum(levels << (tl.arange(0, _PACKED) * 2)[None, None, :], 2)  # (AT_ONCE, D_PADDED / 4)
        byte = tl.arange(0, D_PADDED // _PACKED)
        row = place * GROUPS + start + group
        inside = start + group < GROUPS
        tl.store(scales + row, scale.to(tl.bfloat16), mask=inside)
        at = row[:, None] * (D // _PACKED) + byte[None, :]
        tl.store(data + at, packed.to(tl.uint8), mask=inside[:, None] & (byte < D // _PACKED)[None, :])
