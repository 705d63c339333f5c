"""The attention implementation "hga" and its mask.

The attention function never sees the cache. A routed cache layer leaves a link on the key tensor that its
`update` returns; where there is none (training, sliding layers, plain caches) attention is dense.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from hga.cache import HGALayer
from hga.cache.routed import Scoring

EMPTY_PROMPT = "the prompt is empty: give at least one token in input_ids or inputs_embeds"

_HARMLESS = {
    "position_ids",
    "cache_position",
    "position_embeddings",
    "use_cache",
    "is_causal",
    "sliding_window",
    "num_items_in_batch",
    "output_router_logits",
    "output_hidden_states",
    "return_dict",
    "logits_to_keep",
}
"""Keyword arguments of an attention call that do not change what routed attention computes."""


def register_attention() -> None:
    """Make "hga" known to transformers: the attention function and, so that padding is kept, its mask."""
    AttentionInterface.register("hga", hga_attention)
    AttentionMaskInterface.register("hga", hga_mask)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def hga_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Routed attention where the key carries a link to a routed cache layer, dense attention elsewhere.

    query (B, Hq, T, D); key, value (B, Hkv, T or all, D). Returns ((B, T, Hq, D), None). ValueError for arguments
    that routed attention cannot honour.
    """
    layer: HGALayer | None = getattr(key, "_hga_layer", None)
    if layer is None:
        return _attend_dense(module, query, key, value, attention_mask, scaling, dropout, s_aux, softcap, kwargs)
    refused = sorted(
        name for name, given in kwargs.items() if given is not None and given is not False and name not in _HARMLESS
    )
    if refused or kwargs.get("sliding_window") is not None:
        raise ValueError(
            f"layer {layer.layer_idx}: routed attention cannot honour {refused or ['sliding_window']}; "
            "leave them out, or list the layer in HGAConfig(dense_layers=...)"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"layer {layer.layer_idx}: routed attention takes a 2-D padding mask, got shape "
            f"{tuple(attention_mask.shape)}; custom 4-D masks are not supported with an HGACache"
        )
    layer.shape.check_model(getattr(module, "config", None))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = None if s_aux is None else s_aux.view(key.shape[1], -1)
    out = layer.attend(query, value, attention_mask, Scoring(scale, softcap, sinks))
    return out.transpose(1, 2).contiguous(), None


def hga_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """None for plain causal attention, the 2-D padding mask (B, kv_length) with padding; never O(n^2).

    Static caches, packed sequences and sliding windows get sdpa's 4-D boolean mask. ValueError for an empty
    prompt, and for a mask that covers only part of the keys.
    """
    if q_length == 0:
        raise ValueError(EMPTY_PROMPT)
    plain = mask_function is causal_mask_function and not isinstance(q_offset, Tensor)
    if not plain or kv_offset != 0 or kv_length != q_offset + q_length:
        kwargs["allow_is_causal_skip"] = False
        mask: Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
        return mask
    if attention_mask is None:
        return None
    if attention_mask.shape[1] < kv_length:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens, cache and new tokens are {kv_length}; "
            "it must cover all"
        )
    if bool(attention_mask.all()):
        return None
    return attention_mask[:, :kv_length].bool()


def _attend_dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    s_aux: Tensor | None,
    softcap: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """What the model computes without hga: sdpa, or its own eager code where sdpa ignores sinks or soft caps."""
    if mask is None or mask.ndim == 2:
        mask = _causal_mask(query, key, mask)
    if s_aux is None and softcap is None:
        dense: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return dense
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    if s_aux is not None:
        kwargs["s_aux"] = s_aux
    if softcap is not None:
        kwargs["softcap"] = softcap
    eager = sys.modules[type(module).__module__].eager_attention_forward
    own: tuple[Tensor, Tensor | None] = eager(
        module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return own


def _causal_mask(query: Tensor, key: Tensor, padding: Tensor | None) -> Tensor | None:
    """4-D causal mask aligned to the last key; None where sdpa's own causal rule is the same."""
    tokens, length = query.shape[2], key.shape[2]
    if padding is None and tokens in (1, length):
        return None
    position = torch.arange(length - tokens, length, device=query.device)
    causal = torch.arange(length, device=query.device) <= position[:, None]
    return causal[None, None] if padding is None else causal[None, None] & padding[:, None, None, :]
