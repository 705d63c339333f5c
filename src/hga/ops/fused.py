"""Exact prefill by the fused attention that PyTorch has for CPUs: `hga.ops.prefill` in a half to a third of the time.

`scaled_dot_product_attention` itself keeps the log-sum-exp back, without which parts cannot be merged; the operator
behind it gives it. It knows no soft cap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hga.ops.attention import Output, merge
from hga.ops.precision import compute_dtype
from hga.ops.prefill import check_shapes, nothing_attended

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend_causal(
    query: Tensor, keys: Tensor, values: Tensor, first: int, scale: float, softcap: float | None = None
) -> Output:
    """`hga.ops.prefill.attend_causal` without a soft cap.

    query (Hkv, R, T, D), not scaled yet; keys, values (Hkv, n, D), n >= first + T. Returns the value (Hkv, R, T, D)
    and the log-sum-exp (Hkv, R, T, 1) in the compute type. ValueError for shapes that do not fit, or a soft cap.
    """
    _check_softcap(softcap)
    tokens, repeats = query.shape[2], query.shape[1]
    check_shapes(query, keys, values, first + tokens)
    own, weighed = (x[:, None, first : first + tokens].expand(-1, repeats, -1, -1) for x in (keys, values))
    value, logsumexp = _attend(query, own, weighed, scale, causal=True)
    return attend_all(query, keys[:, :first], values[:, :first], scale, onto=Output(value, logsumexp[..., None]))


def attend_all(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None = None,
    onto: Output | None = None,
) -> Output:
    """`hga.ops.prefill.attend_all` without a soft cap and without records.

    query (Hkv, R, T, D), not scaled yet; keys, values (Hkv, n, D). onto: the output over other tokens, to be merged.
    Returns the value (Hkv, R, T, D) and the log-sum-exp (Hkv, R, T, 1) in the compute type. ValueError for shapes
    that do not fit, or a soft cap.
    """
    _check_softcap(softcap)
    check_shapes(query, keys, values)
    if not keys.shape[1]:
        return onto or nothing_attended(query)
    heads, repeats, tokens, width = query.shape
    # One head whose R T queries share their keys: up to twice as fast as R heads that read them each.
    folded = query.reshape(1, heads, repeats * tokens, width)
    value, logsumexp = _attend(folded, keys[None], values[None], scale)
    output = Output(value.view(heads, repeats, tokens, width), logsumexp.view(heads, repeats, tokens, 1))
    return output if onto is None else merge(onto, output)


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Value and log-sum-exp in the compute type. The operator reads rows as if their numbers were neighbours."""
    work = compute_dtype(query.dtype)
    rows = (x.to(work) if x.stride(-1) == 1 else x.to(work).contiguous() for x in (query, keys, values))
    value, logsumexp = _FUSED(*rows, is_causal=causal, scale=scale)
    return value, logsumexp


def _check_softcap(softcap: float | None) -> None:
    if softcap is not None:
        raise ValueError(f"softcap={softcap} is nothing that fused attention knows; use hga.ops.prefill")
