"""Closing chunks: order their tokens, lay out their records, summarise their groups and nodes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hga.ops.coding import Codes, encode_differences
from hga.ops.nibbles import Nibbles, encode_nibbles
from hga.ops.ordering import content_order
from hga.ops.precision import Rows, compute_dtype, decode_rows, encode_rows
from hga.ops.routing import take_rows
from hga.ops.summaries import mean_rows, summarise_keys


class Closed(NamedTuple):
    """N chunks as a store and a row's summaries take them.

    records: (N, Hkv, G, 2, g, D) in the K/V's type, the K and V of each group side by side.
    order: int16 (N, Hkv, C), position inside the chunk of the token at each place; None for ordering="position".
    node_keys, node_values: encoded means a node, (Hkv, N C / node_size, D); no values without a far field.
    group_keys: encoded means a group, (Hkv, N C / group_size, D); None where a node is a group.
    """

    records: Tensor
    order: Tensor | None
    node_keys: Rows
    node_values: Rows | Nibbles | None
    group_keys: Rows | Codes | None


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
    """Close whole chunks of post-RoPE keys and values, (Hkv, N C, D) in position order.

    Sizes are tokens, as in `HGAConfig`. ordering: "content" or "position". summary_dtype: how means are encoded
    (`encode_rows`); coded: group keys as `Codes`, node values as `Nibbles` instead. inverse_frequencies: (r,) for
    mixed-RoPE key summaries (ordering="position" only), None for plain means. ValueError if keys and values are not the
    same whole number of chunks.
    """
    check_chunks(keys, values, chunk_size)
    order = None
    if ordering == "content":
        order = content_order(_in_chunks(keys, chunk_size), _in_chunks(values, chunk_size), group_size)  # (Hkv, N, C)
        starts = torch.arange(0, keys.shape[1], chunk_size, device=keys.device)
        places = (order + starts[:, None]).flatten(1)  # (Hkv, N C)
        keys, values = take_rows(keys, places), take_rows(values, places)
        order = order.transpose(0, 1).to(torch.int16)  # (N, Hkv, C)
    # A chunk is a record, so chunks come before heads.
    by_chunk = [_in_chunks(x, chunk_size).transpose(0, 1) for x in (keys, values)]
    records = pack_records(by_chunk[0], by_chunk[1], group_size)
    work = compute_dtype(keys.dtype)
    keys, values = keys.to(work), values.to(work)

    node_keys = encode_rows(summarise_keys(keys, node_size, inverse_frequencies), summary_dtype)
    group_keys: Rows | Codes | None = None
    if node_size > group_size:
        means = summarise_keys(keys, group_size, inverse_frequencies)
        if not coded:
            group_keys = encode_rows(means, summary_dtype)
        else:
            group_keys = encode_differences(means, decode_rows(node_keys, work), keys.shape[1] // chunk_size)
    node_values: Rows | Nibbles | None = None
    if far_field:
        means = mean_rows(values, node_size)
        node_values = encode_nibbles(means) if coded else encode_rows(means, summary_dtype)
    return Closed(records, order, node_keys, node_values, group_keys)


def pack_records(keys: Tensor, values: Tensor, group_size: int) -> Tensor:
    """Lay chunks out: keys, values (N, Hkv, C, D) in group order -> (N, Hkv, G, 2, g, D), contiguous."""
    return torch.stack([x.unflatten(2, (-1, group_size)) for x in (keys, values)], 3)


def check_chunks(keys: Tensor, values: Tensor, chunk_size: int) -> None:
    """ValueError unless keys and values are of one shape (Hkv, N C, D) with N at least 1."""
    if keys.ndim != 3 or keys.shape != values.shape:
        raise ValueError(f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must have one shape (Hkv, N C, D)")
    if keys.shape[1] == 0 or keys.shape[1] % chunk_size:
        raise ValueError(
            f"{keys.shape[1]} tokens are not a whole number of chunks of chunk_size={chunk_size}; "
            "leave the rest in the window until its chunk is full"
        )


def _in_chunks(rows: Tensor, chunk_size: int) -> Tensor:
    """(Hkv, N C, D) -> (Hkv, N, C, D)."""
    return rows.unflatten(1, (-1, chunk_size))  # type: ignore[no-any-return]
