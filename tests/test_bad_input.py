"""Bad input is refused with an error that names the value, the rule and the remedy, and harms nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DeepseekV3Config,
    DynamicCache,
    Gemma3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
    T5Config,
)

import hga
from hga import HGACache, HGAConfig
from hga.cache import HGALayer
from hga.cache.families import routed_layers
from hga.config import PRESETS
from hga.integrations.transformers.attention import hga_attention
from hga.integrations.transformers.forward import cache_argument

CONFIG = HGAConfig(
    chunk_size=32,
    group_size=4,
    node_size=16,
    overselection=3,
    sink_tokens=4,
    window_tokens=16,
    budget_tokens=32,
    prefill="routed",
    block_tokens=64,
)
PROMPT = families.prompt(100)


@pytest.fixture
def model() -> PreTrainedModel:
    """A tiny Llama with hga enabled."""
    return hga.enable(families.build("llama"), CONFIG)


def new_cache(model: PreTrainedModel) -> HGACache:
    return HGACache(config=model.config, hga_config=CONFIG)


# ---- the config --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"budget_tokens": 19},
            r"budget_tokens=19 must be at least 20 = sink and window.*raise the budget or lower",
        ),
        (
            {"budget_tokens": 23, "far_field": False},
            "budget_tokens=23 must be at least 24 = .*one routed group",
        ),
        ({"group_size": 5}, "group_size=5 must divide chunk_size=32; 32 % 5 = 2"),
        ({"node_size": 6}, "node_size=6 must be a multiple of group_size=4 and divide chunk_size=32"),
        ({"node_size": 4}, "overselection=3 with node_size=4, group_size=4: .* needs node_size > group_size"),
        ({"overselection": "all"}, "'all' scores every group, which needs node_size = group_size"),
        ({"overselection": 0}, "overselection=0 must be an integer of at least 1, or 'all'"),
        ({"chunk_size": 48}, "chunk_size / group_size = 12 must be a power of two for ordering='content'"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"sink_tokens": -1}, "sink_tokens=-1 must be at least 0"),
        ({"window_tokens": 3}, "window_tokens=3 must be at least group_size=4"),
        ({"ordering": "random"}, "ordering='random' must be one of content, position"),
        ({"store": "disk"}, "store='disk' must be one of ram, device, nvme, auto"),
        (
            {"prefill": "nodes", "window_tokens": 15},
            "prefill='nodes' opens whole nodes of node_size=16, .*: window_tokens=15",
        ),
        (
            {"prefill": "nodes", "node_budget_tokens": 19},
            "with node_budget_tokens=19 .* must be at least 20",
        ),
        ({"prefill": "nodes", "node_budget_tokens": 0}, "with node_budget_tokens=0 .* must be at least 1"),
        ({"node_budget_tokens": 64}, "node_budget_tokens=64 has no meaning with prefill='routed'"),
        ({"prefill": "sparse"}, "prefill='sparse' must be one of auto, exact, routed, nodes"),
        ({"summary": "mixed_rope"}, "mixed_rope.* needs ordering='position', got 'content'"),
        ({"kv_dtype": "int8"}, "kv_dtype='int8': .*not built yet; use kv_dtype='model'"),
        (
            {"overselection": "all", "node_size": 4},
            "coded=True keeps differences .* needs a numeric overselection .* got 'all' and 'mean'",
        ),
        (
            {"ordering": "position", "summary": "mixed_rope"},
            "coded=True keeps .* summary='mean', got 3 and 'mixed_rope'; use coded=False",
        ),
        (
            {"chunk_size": 96, "node_size": 12, "ordering": "position"},
            "node_size / group_size = 3 must be a power of two",
        ),
        ({"kv_dtype": "fp8"}, "kv_dtype='fp8': .*not built yet; use kv_dtype='model'"),
        ({"kv_dtype": "int4"}, "kv_dtype='int4' must be one of model, int8, fp8"),
        ({"dense_layers": (-1,)}, r"dense_layers=\(-1,\) must be layer indices, 0 or more"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_config_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CONFIG.replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget_tokens": 0.03}, "budget_tokens=0.03 must be an integer.*fractions .* only in `hga eval`"),
        ({"node_budget_tokens": 64.0}, "node_budget_tokens=64.0 must be an integer number of tokens, or None"),
        ({"budget_tokens": "64"}, "budget_tokens='64' must be an integer"),
        ({"chunk_size": True}, "chunk_size=True must be an integer"),
        ({"far_field": 1}, "far_field=1 must be True or False"),
        ({"coded": 2}, "coded=2 must be True or False"),
    ],
)
def test_config_types(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        CONFIG.replace(**changes)


@pytest.mark.parametrize("budget", [512, 640])
def test_paper_needs_a_routed_group(budget: int) -> None:
    with pytest.raises(ValueError, match=f"budget_tokens={budget} must be at least 656.*raise the budget"):
        HGAConfig.preset("paper", budget_tokens=budget)
    assert HGAConfig.preset("paper", budget_tokens=656).routed_groups == 1


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="preset='blanced' is unknown; choose one of balanced, mixed, fidelity, lean"):
        HGAConfig.preset("blanced")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_go_to_json_and_back(name: str) -> None:
    config = HGAConfig.preset(name, dense_layers=(0, 3))
    assert HGAConfig.from_json(config.to_json()) == config
    assert hash(HGAConfig.from_json(config.to_json())) == hash(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"chunk_size": 64, "chunks": 3}',
            r"unknown HGAConfig fields \['chunks'\]; they may come from another version of hga",
        ),
        ("[1]", "expected a JSON object of HGAConfig fields, got list"),
        ("{", "not a JSON text"),
        ('{"budget_tokens": 3}', "budget_tokens=3 must be at least"),
    ],
)
def test_json_is_checked(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HGAConfig.from_json(text)


# ---- models that hga cannot serve --------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LENGTH_RULE = "its factors depend on the length.*Load the model with one of default, linear, llama3, yarn"

UNSUPPORTED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "gpt2": (lambda: GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=101), "'gpt2' is not on the list"),
    "gpt_neox": (
        lambda: GPTNeoXConfig(**TINY),
        "'gpt_neox' is not on the list of tested families.*wrong tokens",
    ),
    "mla": (lambda: DeepseekV3Config(**TINY, kv_lora_rank=16), r"compresses K/V \(MLA, kv_lora_rank=16\)"),
    "encoder-decoder": (lambda: T5Config(), "'t5' is an encoder-decoder; hga routes decoder-only models"),
    "vision": (
        lambda: Gemma3Config(),
        "'gemma3' is not supported: it takes images; load the text model alone",
    ),
    "sliding-only": (
        lambda: MistralConfig(**TINY, num_key_value_heads=2),
        r"no full-attention layer to route: .*\(sliding_window=4096\).*load it with sliding_window=None",
    ),
    "longrope": (
        lambda: Phi3Config(
            **TINY,
            pad_token_id=0,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "factor": 2.0,
                "original_max_position_embeddings": 2048,
            },
        ),
        f"rope_type='longrope': {LENGTH_RULE}",
    ),
    "dynamic": (
        lambda: LlamaConfig(**TINY, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        f"rope_type='dynamic': {LENGTH_RULE}",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models(name: str) -> None:
    make, message = UNSUPPORTED[name]
    with pytest.raises(ValueError, match=message):
        HGACache(config=make(), hga_config=CONFIG)


@pytest.mark.parametrize("name", ["gpt2", "mla", "sliding-only", "dynamic"])
def test_a_refused_model_is_left_as_it_was(name: str) -> None:
    make, message = UNSUPPORTED[name]
    refused = AutoModelForCausalLM.from_config(make())
    before = refused.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        hga.enable(refused, CONFIG)
    assert refused.config._attn_implementation == before
    assert "forward" not in vars(refused)


@pytest.mark.parametrize("head", [AutoModel, AutoModelForSequenceClassification])
def test_enable_takes_causal_language_models(head: Any) -> None:
    other = head.from_config(families.build("llama").config)
    with pytest.raises(ValueError, match=f"{type(other).__name__} is no causal language model"):
        hga.enable(other, CONFIG)


def test_enable_checks_its_config(model: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match="config=640 must be an HGAConfig or the name of a preset"):
        hga.enable(model, 640)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="preset='fast' is unknown"):
        hga.enable(model, "fast")
    assert model(PROMPT, use_cache=True).past_key_values is not None


@pytest.mark.parametrize(
    ("dense_layers", "message"),
    [
        ((1, 2, 7), r"dense_layers=\[2, 7\] do not exist: the model has layers 0 to 1"),
        ((0, 1), r"dense_layers=\(0, 1\) leaves no layer to route; keep at least one of \[0, 1\]"),
    ],
)
def test_dense_layers_beyond_the_model(dense_layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        routed_layers(families.shared("llama").config, CONFIG.replace(dense_layers=dense_layers))


# ---- caches that do not fit --------------------------------------------------------------------------------


def feed_twice(model: PreTrainedModel, cache: HGACache) -> None:
    for _ in range(2):
        model(PROMPT, past_key_values=cache)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@torch.no_grad()
def test_sdpa_model_with_an_hga_cache(name: str) -> None:
    """Seen by the next routed layer, or, where only the last layer routes, by the second forward."""
    dense = families.build(name)
    cache = new_cache(dense)
    with pytest.raises(RuntimeError, match=r"took K/V that no hga attention read: .*call hga.enable\(model\)"):
        feed_twice(dense, cache)
    with pytest.raises(RuntimeError, match="no hga attention read"):
        dense.generate(PROMPT, past_key_values=new_cache(dense), max_new_tokens=3)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("mistral", "another model: model_type=mistral, this one has llama; build HGACache"),
        ("smollm3", "another model: model_type=smollm3, this one has llama"),
        ("gemma2", "another model: model_type=gemma2, this one has llama"),
        ("llama-yarn", "another model: rope_parameters=.*yarn.*, this one has .*default"),
    ],
)
@torch.no_grad()
def test_cache_of_another_model(other: str, message: str, enabled: bool) -> None:
    """Also where the shapes agree, as Mistral's and Llama's do here."""
    reader = families.build("llama", attention="hga")
    if enabled:
        hga.enable(reader, CONFIG)
    with pytest.raises(ValueError, match=message):
        reader(PROMPT, past_key_values=HGACache(config=families.ALL[other].config(), hga_config=CONFIG))


@torch.no_grad()
def test_cache_from_an_equal_config_is_welcome(model: PreTrainedModel) -> None:
    own = HGACache(config=type(model.config)(**model.config.to_dict()), hga_config=CONFIG)
    assert torch.equal(model(PROMPT, past_key_values=own).logits, model(PROMPT).logits)


@torch.no_grad()
def test_cache_of_another_hga_config(model: PreTrainedModel) -> None:
    other = HGACache(config=model.config, hga_config=CONFIG.replace(budget_tokens=64))
    with pytest.raises(ValueError, match=r"budget_tokens=64.* the model is enabled with .*budget_tokens=32"):
        model(PROMPT, past_key_values=other)


@torch.no_grad()
def test_other_caches(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="StaticCache cannot be routed; leave past_key_values"):
        model(PROMPT, past_key_values=StaticCache(config=model.config, max_cache_len=128))
    with pytest.raises(ValueError, match="StaticCache cannot be routed"):
        model.generate(PROMPT, cache_implementation="static", max_new_tokens=2)
    used = DynamicCache(config=model.config)
    hga.disable(model)(PROMPT, past_key_values=used)
    with pytest.raises(ValueError, match=r"already holds 100 tokens cannot be routed; .*hga.disable\(model\)"):
        hga.enable(model, CONFIG)(PROMPT, past_key_values=used)
    with pytest.raises(ValueError, match="only an empty cache can be adopted; this one holds 100 tokens"):
        HGACache.adopt(used, model.config, CONFIG)


def keys(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.fixture
def layer() -> HGALayer:
    """The first layer of a cache for the tiny Llama (2 KV heads, D = 8), with ten tokens in it."""
    routed = new_cache(families.shared("llama")).routed[0]
    feed(routed, keys(1, 2, 10, 8), keys(1, 2, 10, 8))
    return routed


def feed(layer: HGALayer, k: Tensor, v: Tensor) -> None:
    layer.update(k, v)
    layer._new, layer._handshake.awaiting = None, None  # as attend() does


@pytest.mark.parametrize(
    ("k", "v", "error", "message"),
    [
        (
            keys(1, 2, 3, 8, dtype=torch.float32),
            None,
            TypeError,
            "torch.float32 .* cache that holds torch.float64",
        ),
        (keys(1, 2, 3, 8), keys(1, 2, 3, 8, dtype=torch.bfloat16), TypeError, "torch.bfloat16 do not fit"),
        (keys(1, 2, 3, 8, device="meta"), None, ValueError, r"meta .* cache on cpu; call cache.reset\(\)"),
        (
            keys(1, 2, 3, 8),
            keys(1, 2, 3, 8, device="meta"),
            ValueError,
            "cpu and meta do not fit a cache on cpu",
        ),
        (keys(2, 2, 3, 8), None, ValueError, "a batch of 2 does not fit a cache of 1 rows"),
        (
            keys(1, 4, 3, 8),
            None,
            ValueError,
            r"\(Hkv, D\) = \(4, 8\) do not fit this cache, built for \(2, 8\)",
        ),
        (keys(1, 2, 3, 16), None, ValueError, r"\(2, 16\) do not fit .* belongs to another model"),
        (keys(1, 2, 3, 8), keys(1, 2, 3, 4), ValueError, "must have one shape"),
    ],
    ids=["dtype", "dtype-v", "device", "device-v", "batch", "heads", "width", "values"],
)
def test_keys_and_values_that_do_not_fit(
    layer: HGALayer, k: Tensor, v: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        layer.update(k, k if v is None else v)
    assert layer.get_seq_length() == 10


def test_integer_keys() -> None:
    routed = new_cache(families.shared("llama")).routed[0]
    with pytest.raises(
        TypeError, match=r"K/V of torch.int32 are not supported; load the model in one of torch.float16"
    ):
        routed.update(keys(1, 2, 3, 8, dtype=torch.int32), keys(1, 2, 3, 8, dtype=torch.int32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["keys", "values"])
@torch.no_grad()
def test_nan_or_inf(model: PreTrainedModel, where: str, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    projection = {"keys": "k_proj", "values": "v_proj"}[where]
    linear = getattr(model.model.layers[1].self_attn, projection)

    def poisoned(hidden: Tensor) -> Tensor:
        out = torch.nn.functional.linear(hidden, linear.weight)
        out[0, 7, 3] = bad
        return out

    monkeypatch.setattr(linear, "forward", poisoned)
    with pytest.raises(ValueError, match=r"keys or values of positions 0 to 49 hold NaN or Inf; .*float16 overflows"):
        model(PROMPT, past_key_values=new_cache(model))


def test_crop_takes_a_negative_number(layer: HGALayer) -> None:
    with pytest.raises(ValueError, match=r"crop\(3\): give the number of tokens to remove as a negative number"):
        layer.crop(3)


# ---- prompts, masks and arguments --------------------------------------------------------------------------

MASK_MESSAGE = "attention_mask has padding that is not at its left.*set tokenizer.padding_side = 'left'"
ROOM_MESSAGE = r"2049 tokens exceed the model's 2048 positions. Scale its RoPE before loading, .*yarn"


def mask_without(*positions: int) -> Tensor:
    mask = torch.ones_like(PROMPT)
    mask[0, list(positions)] = 0
    return mask


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no-input": ({"input_ids": None}, ValueError, "the prompt is empty: give at least one token"),
    "empty": ({"input_ids": PROMPT[:, :0]}, ValueError, "the prompt is empty"),
    "empty-embeds": (
        {"input_ids": None, "inputs_embeds": torch.zeros(1, 0, 32)},
        ValueError,
        "the prompt is empty",
    ),
    "too-long": ({"input_ids": families.prompt(2049)}, ValueError, ROOM_MESSAGE),
    "right-padding": ({"attention_mask": mask_without(98, 99)}, ValueError, f"row 0 of {MASK_MESSAGE}"),
    "hole": ({"attention_mask": mask_without(50)}, ValueError, f"row 0 of {MASK_MESSAGE}"),
    "short-mask": (
        {"attention_mask": torch.ones(1, 90)},
        ValueError,
        "attention_mask covers 90 tokens, .* are 100; it must cover all",
    ),
    "4d-mask": (
        {"attention_mask": torch.ones(1, 1, 100, 100, dtype=torch.bool).tril()},
        ValueError,
        r"takes a 2-D padding mask, got shape \(1, 1, 100, 100\); custom 4-D masks are not supported",
    ),
    "output-attentions": ({"output_attentions": True}, ValueError, r"cannot honour \['output_attentions'\]"),
    "unknown": (
        {"position_bias": torch.zeros(1)},
        ValueError,
        r"cannot honour \['position_bias'\]; leave them out",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@torch.no_grad()
def test_bad_calls(model: PreTrainedModel, name: str) -> None:
    """Refused; afterwards the model, a new cache and the old one, reset, work as before."""
    arguments, error, message = BAD_CALLS[name]
    before, cache = model(PROMPT).logits, new_cache(model)
    with pytest.raises(error, match=message):
        model(**{"input_ids": PROMPT, "past_key_values": cache} | arguments)
    assert torch.equal(model(PROMPT).logits, before)
    cache.reset()
    assert torch.equal(model(PROMPT, past_key_values=cache).logits, before)


@pytest.mark.parametrize(
    ("ids", "message"), [(PROMPT[:, :0], "the prompt is empty"), (families.prompt(2049), ROOM_MESSAGE)]
)
@pytest.mark.parametrize("enabled", [True, False])
@torch.no_grad()
def test_prompts_of_no_tokens_or_too_many(ids: Tensor, message: str, enabled: bool) -> None:
    """Seen before the first block is read, with `enable` and in the explicit form."""
    reader = families.build("llama", attention="hga")
    if enabled:
        hga.enable(reader, CONFIG)
    cache = new_cache(reader)
    with pytest.raises(ValueError, match=message):
        reader(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match=message):
        reader.generate(ids, past_key_values=new_cache(reader), max_new_tokens=2)
    assert reader.generate(PROMPT, past_key_values=cache, max_new_tokens=2).shape[1] == 102


@torch.no_grad()
def test_a_second_prompt_beyond_the_positions(model: PreTrainedModel) -> None:
    cache = model(families.prompt(2000)).past_key_values
    with pytest.raises(ValueError, match="2100 tokens exceed the model's 2048 positions"):
        model(PROMPT, past_key_values=cache)
    assert cache.get_seq_length() == 2000


@torch.no_grad()
def test_a_padded_batch_goes_on_with_its_mask(model: PreTrainedModel) -> None:
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, :30] = 0
    cache = model(families.prompt(100, rows=2), attention_mask=mask).past_key_values
    with pytest.raises(ValueError, match=r"hold \[0, 30\] pad tokens, and this call has no attention_mask"):
        model(families.prompt(1, rows=2), past_key_values=cache)


@torch.no_grad()
def test_padding_stays_where_it_was(model: PreTrainedModel) -> None:
    cache = model(PROMPT).past_key_values
    later = torch.cat([torch.zeros(1, 40), torch.ones(1, 61)], 1)
    with pytest.raises(ValueError, match=r"padding that is not at its left \(or that changed since the last call\)"):
        model(families.prompt(1), past_key_values=cache, attention_mask=later)


def test_gradients_through_a_cache(model: PreTrainedModel) -> None:
    with pytest.raises(RuntimeError, match=r"an HGACache is for inference: wrap the call in torch.no_grad\(\)"):
        model(PROMPT, past_key_values=new_cache(model))


def test_attention_without_an_update(layer: HGALayer) -> None:
    query = keys(1, 4, 3, 8)
    query_keys = keys(1, 2, 3, 8)
    query_keys._hga_layer = layer  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"layer 0: attention without a preceding update\(\)"):
        hga_attention(torch.nn.Module(), query, query_keys, query_keys, None)


def test_generate_routes_whatever_the_cache_is_called(model: PreTrainedModel) -> None:
    """transformers 5.24 renamed the argument: unknown, it would be left out, and nothing routed without a sign."""
    out = model.generate(PROMPT, max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0)
    assert isinstance(getattr(out, cache_argument(model)), HGACache)
    with torch.no_grad():
        for name in ("cache", "past_key_values"):
            cache = new_cache(model)
            model(PROMPT, **{name: cache})
            assert cache.get_seq_length() == PROMPT.shape[1]
        with pytest.raises(ValueError, match=r"passes a cache as.*memory"):
            model(PROMPT, memory=new_cache(model))
