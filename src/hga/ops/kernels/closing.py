"""Closing chunks on the GPU: a launch a level of the tree, then one that writes records and encoded means.

Features are never written out: every pass gathers rows of K/V through the order reached so far, which the cache
holds. A program sees one chunk and KV head alone, so a chunk's order cannot depend on what closes beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga.ops.closing import Closed, check_chunks
from hga.ops.kernels.coding import code_groups, code_values
from hga.ops.kernels.encode import encode_e4m3, round_bfloat16
from hga.ops.ordering import POWER_ITERATIONS, VALUE_WEIGHT, start_vector
from hga.ops.precision import Rows

MOST_CHUNK_TOKENS = 512  # a node's projections are sorted in one program's registers
_TILE_NUMBERS = 8192  # of keys, and as many of values: 64 float32 registers a thread in 8 warps
_KV_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SUMMARY_DTYPES = (*_KV_DTYPES, torch.float8_e4m3fn)


def close_chunks(
    keys: Tensor,
    values: Tensor,
    *,
    chunk_size: int,
    group_size: int,
    node_size: int,
    ordering: str,
    summary_dtype: torch.dtype,
    far_field: bool,
    coded: bool = False,
    inverse_frequencies: Tensor | None = None,
) -> Closed:
    """As `hga.ops.closing.close_chunks`: keys, values (Hkv, N C, D) in position order, float16, bfloat16 or float32.

    ValueError for mixed-RoPE summaries (`inverse_frequencies`) and chunks above 512 tokens, TypeError for other
    types: the reference takes those.
    """
    check_chunks(keys, values, chunk_size)
    _check_supported(keys, values, chunk_size, summary_dtype, inverse_frequencies)
    keys, values = (x if x.stride(2) == 1 else x.contiguous() for x in (keys, values))
    heads, tokens, width = keys.shape
    chunks = tokens // chunk_size
    records = keys.new_empty(chunks, heads, chunk_size // group_size, 2, group_size, width)

    def rows(size: int) -> Rows:
        data = keys.new_empty(heads, tokens // size, width, dtype=summary_dtype)
        scaled = summary_dtype == torch.float8_e4m3fn
        return Rows(data, keys.new_empty(*data.shape[:2], 1, dtype=torch.bfloat16) if scaled else None)

    node_keys = rows(node_size)
    node_values = rows(node_size) if far_field and not coded else None
    group_keys = rows(group_size) if node_size > group_size and not coded else None
    padded_width, padded_group = (triton.next_power_of_2(x) for x in (width, group_size))
    groups = triton.next_power_of_2(node_size // group_size)
    groups = max(1, min(groups, _TILE_NUMBERS // 2 // (padded_group * padded_width)))
    with torch.cuda.device_of(keys):  # Triton launches on the current device
        order = _order_tokens(keys, values, chunk_size, group_size) if ordering == "content" else None
        _pack_nodes[(chunks * heads, chunk_size // node_size)](
            *(keys, values, order, records, *_pointers(node_keys), *_pointers(node_values), *_pointers(group_keys)),
            *(keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), heads, chunks),
            CHUNK=chunk_size,
            NODE=node_size,
            GROUP=group_size,
            GROUP_PADDED=padded_group,
            GROUPS=groups,
            D=width,
            D_PADDED=padded_width,
            num_warps=_warps(groups * padded_group * padded_width, 512),
        )
    if coded:
        coded_values = code_values(records, node_size) if far_field else None
        return Closed(records, order, node_keys, coded_values, code_groups(records, node_keys))
    return Closed(records, order, node_keys, node_values, group_keys)


def _order_tokens(keys: Tensor, values: Tensor, chunk_size: int, group_size: int) -> Tensor:
    """The content order of each chunk and head of K/V (Hkv, N C, D): int16 (N, Hkv, C)."""
    heads, tokens, width = keys.shape
    units = tokens // chunk_size * heads  # a chunk of one head
    padded_width = triton.next_power_of_2(width)
    strides = (keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), heads)
    factors = keys.new_empty(units, 2, dtype=torch.float32)

    def block(size: int) -> dict[str, int]:
        padded = triton.next_power_of_2(size)
        rows = max(1, min(padded, _TILE_NUMBERS // padded_width))
        warps = _warps(rows * padded_width, 1024)
        return {"ROWS": rows, "D": width, "D_PADDED": padded_width, "num_warps": warps}

    _measure_spread[(units,)](
        keys, values, factors, *strides, CHUNK=chunk_size, VALUE_WEIGHT=VALUE_WEIGHT, **block(chunk_size)
    )
    start = start_vector(2 * width, torch.float32, keys.device)
    order = torch.arange(chunk_size, dtype=torch.int16, device=keys.device).repeat(units, 1)
    split = torch.empty_like(order)
    size = chunk_size
    while size > group_size:
        _split_nodes[(units, chunk_size // size)](
            *(keys, values, factors, start, order, split, *strides),
            CHUNK=chunk_size,
            SIZE=size,
            SIZE_PADDED=triton.next_power_of_2(size),
            ITERATIONS=POWER_ITERATIONS,
            **block(size),
        )
        order, split = split, order
        size //= 2
    return order.view(-1, heads, chunk_size)


def _check_supported(
    keys: Tensor, values: Tensor, chunk_size: int, summary_dtype: torch.dtype, inverse_frequencies: Tensor | None
) -> None:
    if inverse_frequencies is not None:
        raise ValueError(
            "the closing kernel takes plain means only, got inverse_frequencies for mixed-RoPE summaries; "
            "use hga.ops.closing.close_chunks"
        )
    if chunk_size > MOST_CHUNK_TOKENS:
        raise ValueError(
            f"chunk_size={chunk_size} must be at most {MOST_CHUNK_TOKENS} in the closing kernel; "
            "use hga.ops.closing.close_chunks"
        )
    if keys.dtype not in _KV_DTYPES or values.dtype != keys.dtype or summary_dtype not in _SUMMARY_DTYPES:
        raise TypeError(
            f"keys of {keys.dtype}, values of {values.dtype}, summaries of {summary_dtype}: the closing kernel takes "
            f"K/V of one type among {', '.join(map(str, _KV_DTYPES))} and summaries of these or fp8; "
            "use hga.ops.closing.close_chunks"
        )


def _pointers(rows: Rows | None) -> tuple[Tensor | None, Tensor | None]:
    """What a kernel stores encoded rows through; fp8 as bytes."""
    if rows is None or rows.scale is None:
        return (None if rows is None else rows.data), None
    return rows.data.view(torch.uint8), rows.scale


def _warps(numbers: int, per_warp: int) -> int:
    """Warps for a tile of `numbers`, a power of two."""
    return max(1, min(8, numbers // per_warp))


@triton.jit
def _load_rows(rows, index, inside, stride, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Rows (n, D) at `index` as float32, zero where not inside: (ROWS, D_PADDED)."""
    feature = tl.arange(0, D_PADDED)
    places = index[:, None] * stride + feature[None, :]
    return tl.load(rows + places, mask=inside[:, None] & (feature < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _spread(rows, stride, CHUNK: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Standard deviation of all numbers of a chunk's rows; 1 where there is none."""
    row = tl.arange(0, ROWS)
    real = (tl.arange(0, D_PADDED) < D)[None, :]
    total = tl.zeros([ROWS, D_PADDED], tl.float32)
    for start in range(0, CHUNK, ROWS):
        total += _load_rows(rows, start + row, start + row < CHUNK, stride, D, D_PADDED)
    mean = tl.sum(tl.sum(total, 1), 0) / (CHUNK * D)
    squares = tl.zeros([ROWS, D_PADDED], tl.float32)
    for start in range(0, CHUNK, ROWS):
        inside = start + row < CHUNK
        away = _load_rows(rows, start + row, inside, stride, D, D_PADDED) - mean
        squares += tl.where(inside[:, None] & real, away * away, 0.0)
    spread = tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / (CHUNK * D))
    return tl.where(spread < 1.1754943508222875e-38, 1.0, spread)


@triton.jit
def _measure_spread(
    keys,
    values,
    factors,
    key_head_stride,
    key_stride,
    value_head_stride,
    value_stride,
    heads,
    CHUNK: tl.constexpr,
    VALUE_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    """What keys and values of each chunk and head are multiplied by to become features: factors (units, 2)."""
    unit = tl.program_id(0)
    head = (unit % heads).to(tl.int64)
    token = (unit // heads).to(tl.int64) * CHUNK
    keys += head * key_head_stride + token * key_stride
    values += head * value_head_stride + token * value_stride
    tl.store(factors + 2 * unit, 1.0 / _spread(keys, key_stride, CHUNK, ROWS, D, D_PADDED))
    tl.store(factors + 2 * unit + 1, VALUE_WEIGHT / _spread(values, value_stride, CHUNK, ROWS, D, D_PADDED))


@triton.jit
def _load_node(
    rows,
    order,
    start,
    stride,
    mean,
    factor,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    """(row - mean) * factor of a node's rows from place `start` on, zero behind its end: (ROWS, D_PADDED)."""
    place = start + tl.arange(0, ROWS)
    inside = place < SIZE
    token = tl.load(order + place, mask=inside, other=0).to(tl.int32)
    loaded = _load_rows(rows, token, inside, stride, D, D_PADDED)
    return tl.where(inside[:, None], (loaded - mean) * factor, 0.0)


@triton.jit
def _split_nodes(
    keys,
    values,
    factors,
    start_axis,
    order,
    split,
    key_head_stride,
    key_stride,
    value_head_stride,
    value_stride,
    heads,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    ITERATIONS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    """Sort each node of SIZE tokens along its leading principal direction: order -> split, both (units, C)."""
    unit = tl.program_id(0)
    head = (unit % heads).to(tl.int64)
    token = (unit // heads).to(tl.int64) * CHUNK
    keys += head * key_head_stride + token * key_stride
    values += head * value_head_stride + token * value_stride
    first = unit.to(tl.int64) * CHUNK + tl.program_id(1) * SIZE
    order += first
    split += first
    key_factor = tl.load(factors + 2 * unit)
    value_factor = tl.load(factors + 2 * unit + 1)

    key_mean = tl.zeros([D_PADDED], tl.float32)
    value_mean = tl.zeros([D_PADDED], tl.float32)
    for start in range(0, SIZE, ROWS):
        key_mean += tl.sum(_load_node(keys, order, start, key_stride, 0.0, 1.0, SIZE, ROWS, D, D_PADDED), 0)
        value_mean += tl.sum(_load_node(values, order, start, value_stride, 0.0, 1.0, SIZE, ROWS, D, D_PADDED), 0)
    key_mean = key_mean[None, :] / SIZE
    value_mean = value_mean[None, :] / SIZE

    feature = tl.arange(0, D_PADDED)
    key_axis = tl.load(start_axis + feature, mask=feature < D, other=0.0)
    value_axis = tl.load(start_axis + D + feature, mask=feature < D, other=0.0)
    for _ in range(ITERATIONS):
        key_next = tl.zeros([D_PADDED], tl.float32)
        value_next = tl.zeros([D_PADDED], tl.float32)
        for start in range(0, SIZE, ROWS):
            k = _load_node(keys, order, start, key_stride, key_mean, key_factor, SIZE, ROWS, D, D_PADDED)
            v = _load_node(values, order, start, value_stride, value_mean, value_factor, SIZE, ROWS, D, D_PADDED)
            along = tl.sum(k * key_axis[None, :] + v * value_axis[None, :], 1)  # (ROWS,)
            key_next += tl.sum(k * along[:, None], 0)
            value_next += tl.sum(v * along[:, None], 0)
        norm = tl.sqrt(tl.sum(key_next * key_next + value_next * value_next, 0)) + 1e-9
        key_axis = key_next / norm
        value_axis = value_next / norm

    along = tl.zeros([SIZE_PADDED // ROWS, ROWS], tl.float32)
    block = tl.arange(0, SIZE_PADDED // ROWS)[:, None]
    for start in range(0, SIZE, ROWS):
        k = _load_node(keys, order, start, key_stride, key_mean, key_factor, SIZE, ROWS, D, D_PADDED)
        v = _load_node(values, order, start, value_stride, value_mean, value_factor, SIZE, ROWS, D, D_PADDED)
        here = tl.sum(k * key_axis[None, :] + v * value_axis[None, :], 1)
        along = tl.where(block == start // ROWS, here[None, :], along)
    along = tl.reshape(along, [SIZE_PADDED])

    # Projection, place and token in one integer: its order is theirs, ties stay in place, and no NaN is lost.
    place = tl.arange(0, SIZE_PADDED)
    token = tl.load(order + place, mask=place < SIZE, other=0).to(tl.int32)
    bits = tl.where(along == 0, 0.0, along).to(tl.int32, bitcast=True)
    ascending = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    packed = (ascending << 32) | ((place << 16) | token).to(tl.int64)
    packed = tl.sort(tl.where(place < SIZE, packed, 0x7FFFFFFFFFFFFFFF))
    tl.store(split + place, (packed & 0xFFFF).to(tl.int16), mask=place < SIZE)


@triton.jit
def _store_means(means, data, scales, index, inside, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Encode rows of means (K, D_PADDED) into rows `index` (K,), as `encode_rows` does."""
    feature = tl.arange(0, D_PADDED)
    places = index[:, None] * D + feature[None, :]
    mask = inside[:, None] & (feature < D)[None, :]
    if scales is not None:
        peak = tl.max(tl.abs(means), 1)
        scale = round_bfloat16(tl.maximum(tl.div_rn(peak, 448.0), 1.1754943508222875e-38))
        tl.store(scales + index, scale.to(tl.bfloat16), mask=inside)
        scaled = tl.div_rn(means, tl.broadcast_to(scale[:, None], means.shape))
        tl.store(data + places, encode_e4m3(tl.minimum(tl.maximum(scaled, -448.0), 448.0)), mask=mask)
    elif data.dtype.element_ty == tl.bfloat16:
        tl.store(data + places, round_bfloat16(means).to(tl.bfloat16), mask=mask)
    else:
        tl.store(data + places, means.to(data.dtype.element_ty), mask=mask)


@triton.jit
def _pack_nodes(
    keys,
    values,
    order,
    records,
    node_keys,
    node_key_scales,
    node_values,
    node_value_scales,
    group_keys,
    group_key_scales,
    key_head_stride,
    key_stride,
    value_head_stride,
    value_stride,
    heads,
    chunks,
    CHUNK: tl.constexpr,
    NODE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    """Write the records of each node's groups and the encoded means of groups and node, GROUPS groups at a time."""
    unit = tl.program_id(0).to(tl.int64)
    head, chunk, node = unit % heads, unit // heads, tl.program_id(1)
    keys += head * key_head_stride + chunk * CHUNK * key_stride
    values += head * value_head_stride + chunk * CHUNK * value_stride
    first_group = node * (NODE // GROUP)
    records += (unit * (CHUNK // GROUP) + first_group) * 2 * GROUP * D
    row = tl.arange(0, GROUPS * GROUP_PADDED)
    group, member = row // GROUP_PADDED, row % GROUP_PADDED
    feature = tl.arange(0, D_PADDED)
    key_sum = tl.zeros([1, D_PADDED], tl.float32)
    value_sum = tl.zeros([1, D_PADDED], tl.float32)
    for start in range(0, NODE // GROUP, GROUPS):
        inside = (start + group < NODE // GROUP) & (member < GROUP)
        token = (first_group + start + group) * GROUP + member
        if order is not None:
            token = tl.load(order + unit * CHUNK + token, mask=inside, other=0).to(tl.int32)
        k = _load_rows(keys, token, inside, key_stride, D, D_PADDED)
        v = _load_rows(values, token, inside, value_stride, D, D_PADDED)
        place = ((start + group) * 2 * GROUP + member)[:, None] * D + feature[None, :]
        mask = inside[:, None] & (feature < D)[None, :]
        tl.store(records + place, k.to(records.dtype.element_ty), mask=mask)
        tl.store(records + place + GROUP * D, v.to(records.dtype.element_ty), mask=mask)
        sums = tl.sum(tl.reshape(k, [GROUPS, GROUP_PADDED, D_PADDED]), 1)  # (GROUPS, D_PADDED)
        if group_keys is not None:
            of_node = start + tl.arange(0, GROUPS)
            index = (head * chunks + chunk) * (CHUNK // GROUP) + first_group + of_node
            means = sums / GROUP
            _store_means(means, group_keys, group_key_scales, index, of_node < NODE // GROUP, D, D_PADDED)
        key_sum += tl.sum(sums, 0)[None, :]
        value_sum += tl.sum(v, 0)[None, :]
    index = (head * chunks + chunk) * (CHUNK // NODE) + node + tl.zeros([1], tl.int64)
    _store_means(key_sum / NODE, node_keys, node_key_scales, index, index >= 0, D, D_PADDED)
    if node_values is not None:
        _store_means(value_sum / NODE, node_values, node_value_scales, index, index >= 0, D, D_PADDED)
