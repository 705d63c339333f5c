"""Exact prefill: a block of queries over its own keys, causally, and over the archive, which it sees whole."""

from __future__ import annotations

import torch
from torch import Tensor

from hga.ops.attention import Output, Part, attend, merge
from hga.ops.precision import compute_dtype
from hga.ops.routing import NEVER, score


def attend_causal(
    query: Tensor, keys: Tensor, values: Tensor, first: int, scale: float, softcap: float | None = None
) -> Output:
    """Dense causal attention: query t sees the keys [0, first + t].

    query (Hkv, R, T, D), not scaled yet; keys, values (Hkv, n, D), n >= first + T. Returns the value (Hkv, R, T, D)
    and the log-sum-exp (Hkv, R, T, 1) in the compute type. ValueError for shapes that do not fit.
    """
    check_shapes(query, keys, values, first + query.shape[2])
    work = compute_dtype(query.dtype)
    index = torch.arange(first, first + query.shape[2], device=query.device)[:, None]
    unseen = torch.arange(keys.shape[1], device=query.device) > index  # (T, n)
    logits = score(query.to(work) * scale, keys.to(work), softcap).masked_fill_(unseen, NEVER)
    return attend([Part(logits, values.to(work))])


def attend_all(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None = None,
    onto: Output | None = None,
) -> Output:
    """Dense attention of every query to every key: the archive, in which the order of tokens does not matter.

    query (Hkv, R, T, D), not scaled yet; keys, values (Hkv, n, D), or the two halves of records (N, Hkv, G, 2, g, D),
    `records.unbind(3)`: (N, Hkv, G, g, D). onto: the output over other tokens, to be merged. Returns the value
    (Hkv, R, T, D) and the log-sum-exp (Hkv, R, T, 1) in the compute type. ValueError for shapes that do not fit.
    """
    check_shapes(query, keys, values)
    if keys.ndim == 5:
        keys, values = (x.transpose(0, 1).flatten(1, 3) for x in (keys, values))
    if not keys.shape[1]:
        return onto or nothing_attended(query)
    work = compute_dtype(query.dtype)
    output = attend([Part(score(query.to(work) * scale, keys.to(work), softcap), values.to(work))])
    return output if onto is None else merge(onto, output)


def nothing_attended(query: Tensor) -> Output:
    """The output of queries (Hkv, R, T, D) that have seen no token: 0 and -inf."""
    value = torch.zeros_like(query, dtype=compute_dtype(query.dtype), memory_format=torch.contiguous_format)
    return Output(value, torch.full_like(value[..., :1], NEVER))


def check_shapes(query: Tensor, keys: Tensor, values: Tensor, least_keys: int = 0) -> None:
    """ValueError or TypeError unless queries, keys and values fit each other and hold `least_keys` keys."""
    if query.ndim != 4 or keys.ndim not in (3, 5) or keys.shape != values.shape:
        raise ValueError(
            f"query {tuple(query.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}: give a query "
            "(Hkv, R, T, D) and keys and values of one shape, (Hkv, n, D) or (N, Hkv, G, g, D)"
        )
    heads = keys.shape[keys.ndim == 5]
    if (query.shape[0], query.shape[3]) != (heads, keys.shape[-1]):
        raise ValueError(
            f"query has (Hkv, D) = {(query.shape[0], query.shape[3])}, the keys {(heads, keys.shape[-1])}; "
            "they must agree"
        )
    if keys.shape[1] < least_keys:
        raise ValueError(f"{keys.shape[1]} keys for queries that see {least_keys}; pass the keys of every query too")
    if not query.dtype == keys.dtype == values.dtype:
        raise TypeError(f"query {query.dtype}, keys {keys.dtype}, values {values.dtype}: cast them to one type")
