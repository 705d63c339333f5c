"""Triton kernels of exact prefill; `hga.ops.prefill` is the reference and says what each function does."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga.ops.attention import Output
from hga.ops.kernels.flash import LOG2_E, absorb, choose_launch, dot_logits, finish, load_rows, padded_width
from hga.ops.prefill import check_shapes


def attend_causal(
    query: Tensor, keys: Tensor, values: Tensor, first: int, scale: float, softcap: float | None = None
) -> Output:
    """See `hga.ops.prefill.attend_causal`. float16, bfloat16 or float32; the output is float32."""
    check_shapes(query, keys, values, first + query.shape[2])
    return _launch(query, _as_records(keys), _as_records(values), first, scale, softcap, None)


def attend_all(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None = None,
    onto: Output | None = None,
) -> Output:
    """See `hga.ops.prefill.attend_all`. Records are read where they lie; `onto` is continued, not merged later."""
    check_shapes(query, keys, values)
    if keys.ndim == 3:
        keys, values = _as_records(keys), _as_records(values)
    return _launch(query, keys, values, None, scale, softcap, onto)


def _as_records(rows: Tensor) -> Tensor:
    """Rows (Hkv, n, D) as chunks of one group of one token, (n, Hkv, 1, 1, D): a view."""
    return rows.transpose(0, 1)[:, :, None, None]


def _launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    first: int | None,
    scale: float,
    softcap: float | None,
    onto: Output | None,
) -> Output:
    """Keys and values (N, Hkv, G, g, D); `first` None: every query sees every key."""
    heads, repeats, queries, width = query.shape
    launch = choose_launch(width, query.dtype, query.device)
    query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values))
    value = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    logsumexp = torch.empty((*query.shape[:3], 1), dtype=torch.float32, device=query.device)
    before = Output(value, logsumexp) if onto is None else Output(*(x.float().contiguous() for x in onto))
    count = keys.shape[0] * keys.shape[2] * keys.shape[3]
    _attend_kernel[(triton.cdiv(queries * repeats, launch.rows), heads)](
        query,
        keys,
        values,
        before.value,
        before.logsumexp,
        value,
        logsumexp,
        queries,
        count,
        0 if first is None else first,
        scale,
        *query.stride()[:3],
        *keys.stride()[:4],
        *values.stride()[:4],
        REPEATS=repeats,
        WIDTH=width,
        CHUNK=keys.shape[2] * keys.shape[3],
        GROUP=keys.shape[3],
        CAUSAL=first is not None,
        CONTINUES=onto is not None,
        SOFTCAP=softcap or 0.0,
        PRECISION="ieee",
        ROWS=launch.rows,
        KEYS=launch.keys,
        BLOCK_WIDTH=padded_width(width),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return Output(value, logsumexp)


@triton.jit(do_not_specialize=("queries", "count", "first"))  # they differ from block to block
def _attend_kernel(
    query,
    keys,
    values,
    before_value,
    before_logsumexp,
    out_value,
    out_logsumexp,
    queries,
    count,
    first,
    scale,
    query_head_stride,
    query_repeat_stride,
    query_stride,
    key_chunk_stride,
    key_head_stride,
    key_group_stride,
    key_stride,
    value_chunk_stride,
    value_head_stride,
    value_group_stride,
    value_stride,
    REPEATS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    CONTINUES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """One tile of rows of one KV head. The R heads of a query are neighbouring rows, so K/V are read once for all."""
    head = tl.program_id(1).to(tl.int64)
    # The last tiles see the most keys: started first, they do not end last.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tile * ROWS + tl.arange(0, ROWS)
    real = row < queries * REPEATS
    place = tl.minimum(row // REPEATS, queries - 1)  # rows behind the last one repeat it, and are not stored
    repeat = row % REPEATS
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < WIDTH
    shape_mask = real[:, None] & inside[None, :]
    query_at = head * query_head_stride + repeat.to(tl.int64) * query_repeat_stride + place.to(tl.int64) * query_stride
    tile_query = tl.load(query + query_at[:, None] + column[None, :], mask=shape_mask, other=0.0)

    out_row = (head * REPEATS + repeat) * queries + place
    out_at = out_row[:, None] * WIDTH + column[None, :]
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
    if CONTINUES:
        peak = tl.load(before_logsumexp + out_row) * LOG2_E
        total = tl.where(peak > float("-inf"), 1.0, 0.0)
        output = tl.load(before_value + out_at, mask=shape_mask, other=0.0)

    keys += head * key_head_stride
    values += head * value_head_stride
    clear = count // KEYS * KEYS  # keys in whole tiles that every row sees
    end = count
    if CAUSAL:
        clear = (first + tile * ROWS // REPEATS + 1) // KEYS * KEYS
        end = first + tl.minimum((tile * ROWS + ROWS - 1) // REPEATS, queries - 1) + 1
    for start in range(0, clear, KEYS):
        token = start + tl.arange(0, KEYS)
        key_at = _token_at(token, key_chunk_stride, key_group_stride, key_stride, CHUNK, GROUP)
        value_at = _token_at(token, value_chunk_stride, value_group_stride, value_stride, CHUNK, GROUP)
        key = load_rows(keys, key_at, column, WIDTH, BLOCK_WIDTH)
        value = load_rows(values, value_at, column, WIDTH, BLOCK_WIDTH)
        logits = dot_logits(tile_query, key, scale, SOFTCAP, PRECISION)
        peak, total, output = absorb(logits, value, peak, total, output, PRECISION)
    for start in range(clear, end, KEYS):
        token = start + tl.arange(0, KEYS)
        seen = token < end
        token = tl.minimum(token, count - 1)
        key_at = _token_at(token, key_chunk_stride, key_group_stride, key_stride, CHUNK, GROUP)
        value_at = _token_at(token, value_chunk_stride, value_group_stride, value_stride, CHUNK, GROUP)
        key = load_rows(keys, key_at, column, WIDTH, BLOCK_WIDTH)
        value = load_rows(values, value_at, column, WIDTH, BLOCK_WIDTH)
        logits = dot_logits(tile_query, key, scale, SOFTCAP, PRECISION)
        visible = seen[None, :]
        if CAUSAL:
            visible = visible & (token[None, :] <= first + place[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        peak, total, output = absorb(logits, value, peak, total, output, PRECISION)

    value, logsumexp = finish(peak, total, output)
    tl.store(out_value + out_at, value, mask=shape_mask)
    tl.store(out_logsumexp + out_row, logsumexp, mask=real)


@triton.jit
def _token_at(token, chunk_stride, group_stride, stride, CHUNK: tl.constexpr, GROUP: tl.constexpr):
    """Offset of tokens, counted in the order in which they are stored."""
    chunk = (token // CHUNK).to(tl.int64)
    within = token % CHUNK
    return chunk * chunk_stride + (within // GROUP) * group_stride + (within % GROUP) * stride
