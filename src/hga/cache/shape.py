"""What a model's config promises of a layer's K/V, and the checks of what arrives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hga.cache.families import fingerprint


@dataclass
class LayerShape:
    """What the model's config promises of a layer's K/V, checked against what arrives.

    routed_layers: how many share what there is of host memory.
    """

    kv_heads: int
    query_heads: int
    head_dim: int
    position_limit: int | None
    inverse_frequencies: Tensor | None = field(repr=False, default=None)
    model_config: Any = field(repr=False, default=None)
    routed_layers: int = 1

    def check_positions(self, seen: int, tokens: int) -> None:
        """ValueError if a prompt of `tokens` more than the `seen` ends beyond the model's positions."""
        limit = self.position_limit
        if limit is not None and tokens > 1 and seen + tokens > limit:
            raise ValueError(
                f"{seen + tokens} tokens exceed the model's {limit} positions. Scale its RoPE before loading, "
                'e.g. config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": ..., '
                '"original_max_position_embeddings": ...} (command line: --rope-scaling yarn:4)'
            )

    def check_model(self, config: Any) -> None:
        """ValueError if `config` is of another model than the one that the cache was built for."""
        own = self.model_config
        if config is own or config is None or own is None:
            return
        other = fingerprint(config)
        for name, value in fingerprint(own).items():
            if other[name] != value:
                raise ValueError(
                    f"this cache was built for another model: {name}={value}, this one has {other[name]}; "
                    "build HGACache(config=model.config) from this model's config"
                )
        self.model_config = config  # an equal one: the next check is one comparison

    def check_kv(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """ValueError if K/V (B, Hkv, T, D) of a layer are not of this shape."""
        expected = (self.kv_heads, self.head_dim)
        found = (keys.shape[1], keys.shape[3])
        if keys.shape != values.shape:
            raise ValueError(f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must have one shape")
        if found != expected:
            raise ValueError(
                f"layer {layer_idx}: K/V with (Hkv, D) = {found} do not fit this cache, built for {expected}: "
                "it belongs to another model; build HGACache(config=model.config) from this model's config"
            )
