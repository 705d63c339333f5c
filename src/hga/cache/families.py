"""Which model families are supported, and which of a model's layers are routed."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hga.cache.rope import STATIC_ROPE_TYPES, rope_parameters
from hga.config import HGAConfig

SUPPORTED: dict[str, str] = {
    "llama": "every layer",
    "qwen2": "every layer (layers with a sliding window keep their own cache)",
    "qwen3": "every layer (layers with a sliding window keep their own cache)",
    "qwen3_moe": "every layer",
    "mistral": "every layer, when sliding_window is null",
    "smollm3": "every layer, NoPE layers included",
    "phi3": "every layer, when sliding_window is null",
    "gemma2": "the full-attention layers (every other one); soft caps kept",
    "gemma3_text": "the full-attention layers (every sixth)",
    "gpt_oss": "the full-attention layers (every other one); learned sinks kept",
    "qwen3_next": "the full-attention layers (every fourth)",
}
"""Tested families by `config.model_type`, and the layers that are routed."""

_REFUSED = {
    "deepseek_v4": "its attention transforms keys behind the cache",
    "inkling2": "its attention transforms keys behind the cache",
    "moshi": "it drives two decoders through one cache",
    "diffllama": "its differential attention subtracts two softmaxes over one cache",
    "jetmoe": "its experts share keys across query heads",
    "doge": "its dynamic mask attention scores keys by itself",
    "gemma3": "it takes images; load the text model alone (AutoModelForCausalLM, Gemma3ForCausalLM)",
}


def check_model_config(config: Any) -> None:
    """ValueError, with the reason and the remedy, if HGA cannot serve a model of this config."""
    kind = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model_type={kind!r} is an encoder-decoder; hga routes decoder-only models")
    if kind in _REFUSED:
        raise ValueError(f"model_type={kind!r} is not supported: {_REFUSED[kind]}")
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        raise ValueError(f"model_type={kind!r} takes images or sound; hga supports text-only models so far")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"model_type={kind!r} compresses K/V (MLA, kv_lora_rank={config.kv_lora_rank}); "
            "hga needs keys and values per head"
        )
    if kind not in SUPPORTED:
        raise ValueError(
            f"model_type={kind!r} is not on the list of tested families ({', '.join(SUPPORTED)}); an untested "
            "family could give wrong tokens silently"
        )
    for layer_idx in range(config.num_hidden_layers):
        parameters = rope_parameters(config, layer_idx)
        rope_type = "default" if parameters is None else parameters["rope_type"]
        if rope_type not in STATIC_ROPE_TYPES:
            raise ValueError(
                f"rope_type={rope_type!r}: its factors depend on the length of the sequence, so blocks of one prompt "
                f"would be rotated differently. Load the model with one of {', '.join(STATIC_ROPE_TYPES)}, for example "
                'config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": ...}'
            )


def fingerprint(config: Any) -> dict[str, Any]:
    """What tells the K/V of one model's config from those of another; the weights are not seen."""
    names = (
        *("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
        *("vocab_size", "layer_types", "rope_parameters"),
    )
    return {name: getattr(config, name, None) for name in names}


def routed_layers(config: Any, hga_config: HGAConfig) -> tuple[int, ...]:
    """Indices of the layers that HGA routes: full attention, and not in `dense_layers`.

    ValueError if the model is unsupported, if `dense_layers` names layers that it does not have, or if no
    layer is left to route.
    """
    check_model_config(config)
    layers = DynamicCache(config=config).layers
    beyond = [index for index in hga_config.dense_layers if index >= len(layers)]
    if beyond:
        raise ValueError(f"dense_layers={beyond} do not exist: the model has layers 0 to {len(layers) - 1}")
    full = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if not full:
        raise ValueError(
            f"model_type={config.model_type!r} has no full-attention layer to route: all {len(layers)} use a sliding "
            f"window (sliding_window={getattr(config, 'sliding_window', None)}). If the checkpoint was trained with "
            "full attention, load it with sliding_window=None; else it needs no hga"
        )
    routed = tuple(index for index in full if index not in hga_config.dense_layers)
    if not routed:
        raise ValueError(
            f"dense_layers={hga_config.dense_layers} leaves no layer to route; keep at least one of {full}"
        )
    return routed
