"""Tiny random models of every supported family, in float64 so that parity means 1e-9.

Weights are drawn wide (`initializer_range`), so that attention looks far back: with the usual 0.02 a model of
this size ignores its context, and any routing would pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)

VOCABULARY = 101
SLIDING_WINDOW = 24

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@dataclass(frozen=True)
class Family:
    """A tiny config, the layers that hga routes in it, and the attention that it is measured against."""

    config: Callable[[], PreTrainedConfig]
    routed: tuple[int, ...]
    reference: str = "sdpa"


def _llama(**rope: Any) -> Callable[[], PreTrainedConfig]:
    parameters = {"rope_type": "default", "rope_theta": 10_000.0} | rope
    return lambda: LlamaConfig(**_SIZES, head_dim=8, rope_parameters=parameters)


def _qwen2(**changes: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: Qwen2Config(**_SIZES | {"num_attention_heads": 6, "hidden_size": 48} | changes)


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama(), (0, 1)),
    "qwen2": Family(_qwen2(), (0, 1)),
    "qwen3": Family(lambda: Qwen3Config(**_SIZES, head_dim=16), (0, 1)),
    "qwen3_moe": Family(lambda: Qwen3MoeConfig(**_SIZES, **_EXPERTS, head_dim=8), (0, 1)),
    "mistral": Family(lambda: MistralConfig(**_SIZES, head_dim=8, sliding_window=None), (0, 1)),
    # Layers 1 and 3 have no rotary positions.
    "smollm3": Family(
        lambda: SmolLM3Config(**_SIZES | {"num_hidden_layers": 4}, no_rope_layer_interval=2), (0, 1, 2, 3)
    ),
    "phi3": Family(
        lambda: Phi3Config(
            **_SIZES,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        ),
        (0, 1),
    ),
    "gemma2": Family(
        lambda: Gemma2Config(
            **_SIZES | {"num_hidden_layers": 4},
            head_dim=8,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=5.0,
            sliding_window=SLIDING_WINDOW,
        ),
        (1, 3),
        "eager",
    ),
    "gemma3_text": Family(
        lambda: Gemma3TextConfig(
            **_SIZES | {"num_hidden_layers": 6},
            head_dim=8,
            query_pre_attn_scalar=16,
            sliding_window=SLIDING_WINDOW,
        ),
        (5,),
    ),
    "gpt_oss": Family(
        lambda: GptOssConfig(
            **_SIZES | {"num_hidden_layers": 4},
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=SLIDING_WINDOW,
            rope_parameters=_YARN | {"rope_theta": 150_000.0, "truncate": False},
        ),
        (1, 3),
        "eager",
    ),
    "qwen3_next": Family(
        lambda: Qwen3NextConfig(
            **_SIZES | {"num_hidden_layers": 4},
            **_EXPERTS,
            head_dim=16,
            shared_expert_intermediate_size=16,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
        ),
        (3,),
    ),
}
"""One model of every family in `hga.cache.families.SUPPORTED`."""

VARIANTS: dict[str, Family] = {
    "llama-linear": Family(_llama(rope_type="linear", factor=4.0), (0, 1)),
    "llama-llama3": Family(
        _llama(
            rope_type="llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=128,
        ),
        (0, 1),
    ),
    "llama-yarn": Family(_llama(**_YARN), (0, 1)),
    "qwen2-sliding": Family(
        _qwen2(
            num_hidden_layers=3,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            use_sliding_window=True,
            sliding_window=SLIDING_WINDOW,
        ),
        (0, 2),
    ),
}
"""Position encodings and layer mixes that the families above do not show."""

ALL = FAMILIES | VARIANTS


def build(name: str, attention: str | None = None, sliding_window: int | None = None) -> PreTrainedModel:
    """A fresh float64 model in eval mode, with its own attention and window unless others are given."""
    family = ALL[name]
    config = family.config()
    if sliding_window is not None:
        config.sliding_window = sliding_window
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config,
        attn_implementation=attention or family.reference,
        experts_implementation="eager",  # grouped_mm, the default, knows no float64 on a CPU
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms, biases and learned sinks start at ones and zeros, which tell nothing
                parameter += 0.2 * torch.randn(parameter.shape)
    return model.double().eval()


@cache
def shared(name: str) -> PreTrainedModel:
    """The family's one model for tests that leave it as they found it (hga.enabled does)."""
    return build(name)


def prompt(tokens: int, seed: int = 0, rows: int = 1) -> Tensor:
    """Random token ids (rows, tokens), none of them the pad token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=generator)
