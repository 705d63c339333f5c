"""`hga.enable(model)`: one line that gives a loaded model routed attention."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from hga.cache import HGACache
from hga.cache.families import check_model_config, routed_layers
from hga.config import HGAConfig
from hga.integrations.transformers.attention import EMPTY_PROMPT
from hga.integrations.transformers.forward import cache_argument, split_evenly
from hga.integrations.transformers.step import Stepper

Model = TypeVar("Model", bound=PreTrainedModel)
_STATE = "_hga_enabled"


@dataclass(frozen=True)
class _Enabled:
    """What `disable` puts back."""

    implementation: str
    forward: Callable[..., Any] | None
    """An instance's own forward (accelerate's hooks set one); None where it was the class's."""


def enable(model: Model, config: HGAConfig | str = "balanced") -> Model:
    """Route this model's attention: `model.generate(...)` and `model(...)` then read long contexts.

    Sets attention "hga" and wraps the instance's `forward`, which turns a new cache into an `HGACache` and feeds
    a long prompt in blocks of `config.block_tokens`. The weights are untouched; `disable` undoes it. Calling it
    again changes the config. ValueError if the model is unsupported or the preset unknown.
    """
    hga_config = HGAConfig.preset(config) if isinstance(config, str) else config
    if not isinstance(hga_config, HGAConfig):
        raise TypeError(f"config={config!r} must be an HGAConfig or the name of a preset")
    check_model_config(model.config)
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} is no causal language model; hga.enable takes a ...ForCausalLM "
            "(of a PEFT model: model.get_base_model())"
        )
    routed_layers(model.config.get_text_config(decoder=True), hga_config)
    disable(model)
    inner, argument = model.forward, cache_argument(model)
    state = _Enabled(model.config._attn_implementation, vars(model).get("forward"))
    model.set_attn_implementation("hga")
    # An instance attribute over the class's method, as accelerate's hooks do; wraps keeps the signature, which
    # generate inspects.
    model.forward = functools.wraps(inner)(functools.partial(_forward, model, inner, argument, hga_config))
    setattr(model, _STATE, state)
    return model


def disable(model: Model) -> Model:
    """Give the model back its attention implementation and its forward. A model that is not enabled stays as is."""
    state: _Enabled | None = getattr(model, _STATE, None)
    if state is not None:
        if state.forward is None:
            del model.forward
        else:
            model.forward = state.forward
        model.set_attn_implementation(state.implementation)
        delattr(model, _STATE)
    return model


@contextmanager
def enabled(model: Model, config: HGAConfig | str = "balanced") -> Iterator[Model]:
    """`with hga.enabled(model, config):` routes inside the block only."""
    try:
        yield enable(model, config)
    finally:
        disable(model)


def _forward(
    model: PreTrainedModel,
    inner: Callable[..., Any],
    argument: str,
    hga_config: HGAConfig,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    cache: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    **kwargs: Any,
) -> Any:
    """The model's forward with a routed cache, under either of its names, a long input fed block by block."""
    tokens = inputs_embeds if inputs_embeds is not None else input_ids
    if tokens is None or tokens.shape[1] == 0:
        raise ValueError(EMPTY_PROMPT)
    strange = [name for name, value in kwargs.items() if isinstance(value, Cache)]
    if strange:  # an unknown name for the model's cache: routing it would be left out without a sign
        raise ValueError(
            f"this transformers passes a cache as {strange}, which hga does not know; use a version of transformers "
            f"below 6, or call hga.disable(model)"
        )
    cache = _routed_cache(model, hga_config, past_key_values if cache is None else cache, use_cache)
    call = functools.partial(inner, **{argument: cache}, use_cache=use_cache, **kwargs)
    count = tokens.shape[1]
    if count == 1 and isinstance(cache, HGACache) and input_ids is not None:
        plain = _is_plain_step(model.config, attention_mask, position_ids, kwargs) and cache.can_begin_token()
        if plain and not cache.has_padding(None if attention_mask is None else attention_mask.bool()):
            if cache.stepper is None or cache.stepper.inner is not inner:
                cache.stepper = Stepper(model, inner, argument)
            return cache.stepper.step(functools.partial(call, attention_mask=None), cache, input_ids, position_ids)
    if (
        count <= hga_config.block_tokens
        or not isinstance(cache, HGACache)
        or not _splittable(attention_mask, logits_to_keep, kwargs)
    ):
        return call(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            logits_to_keep=logits_to_keep,
        )
    cache.check_room(count, rows=tokens.shape[0], dtype=model.dtype)
    past, kept = cache.get_seq_length(), int(logits_to_keep) or count
    logits, out = [], None
    for start, stop in split_evenly(0, count, hga_config.block_tokens):
        wanted = max(0, stop - max(start, count - kept))
        out = call(
            input_ids=None if input_ids is None else input_ids[:, start:stop],
            inputs_embeds=None if inputs_embeds is None else inputs_embeds[:, start:stop],
            position_ids=None if position_ids is None else position_ids[..., start:stop],
            attention_mask=None if attention_mask is None else attention_mask[:, : past + stop],
            logits_to_keep=max(1, wanted),
        )
        if wanted:
            logits.append(out.logits)
    assert out is not None
    out.logits = logits[0] if len(logits) == 1 else torch.cat(logits, 1)
    return out


def _routed_cache(model: PreTrainedModel, hga_config: HGAConfig, cache: Any, use_cache: bool | None) -> Any:
    """The cache of this call, routed where it is new. Training and use_cache=False stay without one."""
    if isinstance(cache, HGACache):
        cache.check_model(model.config)
        if cache.hga_config != hga_config:
            raise ValueError(
                f"this cache was built for {cache.hga_config}, the model is enabled with {hga_config}; "
                "call hga.enable(model, cache.hga_config), or build the cache with the model's config"
            )
        return cache
    config = model.config.get_text_config(decoder=True)
    wanted = config.use_cache if use_cache is None else use_cache
    if cache is None:
        if not wanted or model.training or torch.is_grad_enabled():
            return None
        return HGACache(config=model.config, hga_config=hga_config)
    if type(cache) is DynamicCache and cache.get_seq_length() == 0:
        return HGACache.adopt(cache, model.config, hga_config)
    if type(cache) is DynamicCache:
        raise ValueError(
            f"a DynamicCache that already holds {cache.get_seq_length()} tokens cannot be routed; start with an empty "
            "cache or an HGACache, or call hga.disable(model) to continue densely"
        )
    raise ValueError(
        f"{type(cache).__name__} cannot be routed; leave past_key_values (and cache_implementation) out, or pass an "
        "HGACache"
    )


def _is_plain_step(config: Any, attention_mask: Any, position_ids: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a step asks for nothing but logits, so that the same kernels serve it whatever the token."""
    if position_ids is not None and position_ids.ndim != 2:
        return False
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
        return False
    extra = ("output_hidden_states", "output_attentions", "output_router_logits")
    if kwargs.get("return_dict") is False or not getattr(config, "return_dict", True):
        return False
    if any(getattr(config, name, False) for name in extra):
        return False
    return all(value is None or value is False or name == "return_dict" for name, value in kwargs.items())


def _splittable(attention_mask: Any, logits_to_keep: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a forward over blocks gives what one forward gives: a 2-D mask, and only logits asked for."""
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
        return False
    if kwargs.get("return_dict") is False:
        return False
    asked = ("labels", "output_hidden_states", "output_attentions")
    return isinstance(logits_to_keep, int) and not any(
        kwargs.get(name) is not None and kwargs[name] is not False for name in asked
    )
