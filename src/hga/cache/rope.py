"""Rotary frequencies of a layer, read from the model's config (for the paper's mixed-RoPE summaries)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Types whose frequencies do not depend on the length of the sequence: every block rotates alike."""


def rope_parameters(config: Any, layer_idx: int) -> dict[str, Any] | None:
    """The RoPE parameters of one layer; None where the layer has no rotary positions (NoPE)."""
    no_rope_layers = getattr(config, "no_rope_layers", None)
    if no_rope_layers is not None and not no_rope_layers[layer_idx]:
        return None
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None or "rope_type" in parameters:
        return parameters
    own: dict[str, Any] | None = parameters.get(config.layer_types[layer_idx])
    return own


def inverse_frequencies(config: Any, layer_idx: int) -> Tensor | None:
    """Inverse frequencies (r,) of a layer's first 2 r key dimensions, float32; None for a NoPE layer."""
    parameters = rope_parameters(config, layer_idx)
    if parameters is None:
        return None
    if parameters["rope_type"] == "default":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        share = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
        width = int(head_dim * share)
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return torch.tensor(float(parameters["rope_theta"])) ** -exponents
    nested = "rope_type" not in config.rope_parameters
    layer_type = {"layer_type": config.layer_types[layer_idx]} if nested else {}
    frequencies: Tensor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), **layer_type)[0]
    return frequencies.float()


def position_limit(config: Any) -> int | None:
    """Positions that the model was trained or scaled for; None where the config does not say."""
    trained: int | None = getattr(config, "max_position_embeddings", None)
    if trained is None:
        return None
    nested = getattr(config, "rope_parameters", None) or {}
    scaled = [trained]
    for parameters in [nested] if "rope_type" in nested else list(nested.values()):
        if parameters and parameters.get("factor"):
            original = parameters.get("original_max_position_embeddings") or trained
            scaled.append(int(parameters["factor"] * original))
    return max(scaled)
