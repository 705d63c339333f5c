"""What a model must have in common with the one that read a context: its config, its weights, its adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from hga.cache.families import fingerprint

_NAMES = (
    *("head_dim", "intermediate_size", "hidden_act", "hidden_activation", "rms_norm_eps", "tie_word_embeddings"),
    *("sliding_window", "attention_bias", "query_pre_attn_scalar", "partial_rotary_factor"),
    *("attn_logit_softcapping", "final_logit_softcapping", "no_rope_layers", "use_bidirectional_attention"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size"),
    *("swiglu_alpha", "swiglu_limit"),
)
_HASHED_AT_ONCE = 64 << 20


def model_fingerprint(model: Any) -> dict[str, Any]:
    """A model's identity in JSON: fields of its config, its type and `weights`, a hash of all of them.

    The weights are read whole, some GB a second, each time: nothing tells reliably that none has changed since.
    ValueError if they cannot be read.
    """
    config = model.config.get_text_config(decoder=True)
    fields = fingerprint(config) | {name: getattr(config, name, None) for name in _NAMES}
    fields |= {"dtype": str(model.dtype).removeprefix("torch."), "weights": _hash_weights(model)}
    plain: dict[str, Any] = json.loads(json.dumps(fields, sort_keys=True, default=str))
    return plain


def check_same_model(saved: dict[str, Any], own: dict[str, Any], place: str) -> None:
    """ValueError that names what differs between the model that a context was saved with and this one."""
    for name in sorted(own.keys() | saved.keys(), key=lambda name: (name == "weights", name)):
        if saved.get(name) == own.get(name):
            continue
        if name == "weights":
            raise ValueError(
                f"{place} was saved with other weights of the same architecture: a fine-tune, another quantisation, "
                "or a model with another active adapter. Load the model that read it, or read the document again"
            )
        raise ValueError(
            f"{place} was saved for another model: {name}={saved.get(name)}, this one has {own.get(name)}. Load the "
            "model that read it, or read the document again"
        )


def _hash_weights(model: nn.Module) -> str:
    adapters = _active_adapters(model)
    digest = xxhash.xxh3_128(repr(adapters).encode())
    hashed: set[tuple[int, int]] = set()
    for name, tensor in _weights(model, bool(adapters)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if (tensor.data_ptr(), tensor.numel()) not in hashed:  # tied weights have two names
            _update(digest, name, tensor)
            hashed.add((tensor.data_ptr(), tensor.numel()))
    return digest.hexdigest()


def _weights(model: nn.Module, with_adapters: bool) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, by name. Without an active adapter those of the model below them."""
    weights = model.state_dict()
    if not with_adapters:
        weights = {n.replace(".base_layer.", "."): tensor for n, tensor in weights.items() if not _is_adapter(n)}
    yield from sorted(weights.items())


def _is_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _active_adapters(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Modules whose adapters take part in a forward, with what is active in them; PEFT's layers say so themselves."""
    found = []
    for name, module in model.named_modules():
        active = getattr(module, "active_adapters", None)
        if not isinstance(active, (list, tuple)) or not hasattr(module, "base_layer"):
            continue
        merged = list(getattr(module, "merged_adapters", ()))
        active = [] if getattr(module, "disable_adapters", False) else list(active)
        if active or merged:
            scaling = getattr(module, "scaling", {})
            found.append((name, repr((active, merged, sorted(scaling.items()) if isinstance(scaling, dict) else ()))))
    return tuple(found)


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    """Feed a tensor's bytes to a hash, some at a time: weights on a GPU are never copied whole."""
    if tensor.device.type == "meta":
        raise ValueError(
            f"weight {name} is offloaded and cannot be hashed, so contexts of this model can neither be saved nor "
            "loaded; load the model without offloading"
        )
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _HASHED_AT_ONCE):
        digest.update(flat[start : start + _HASHED_AT_ONCE].cpu().numpy())
