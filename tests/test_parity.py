"""With a budget of the whole context, routed attention is the model's own: same tokens, logits within 1e-9.

Each scenario is plain transformers code that runs twice on one model: as it is, and inside `hga.enabled`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

import hga
from hga import HGACache, HGAConfig
from hga.cache import HGALayer
from hga.cache.families import SUPPORTED, routed_layers

TOLERANCE = 1e-9
PROMPT_TOKENS = 200  # with chunks of 32, five close
NEW_TOKENS = 16

FULL = HGAConfig(
    chunk_size=32,
    group_size=4,
    node_size=16,
    overselection=2,
    sink_tokens=4,
    window_tokens=16,
    budget_tokens=1024,
    prefill="routed",
)
SMALL = FULL.replace(budget_tokens=32, overselection=3)
"""Sink, window and three routed groups."""

LAYOUTS = [("content", "ram"), ("position", "device"), ("content", "device"), ("position", "ram")]


@dataclass
class Outcome:
    """What a scenario gave: tokens (B, n), logits (..., vocabulary) and the cache that it leaves."""

    tokens: Tensor
    logits: Tensor
    cache: Cache


def assert_same(ours: Outcome, reference: Outcome) -> None:
    assert torch.equal(ours.tokens, reference.tokens)
    assert_close(ours.logits, reference.logits)
    assert isinstance(ours.cache, HGACache)
    assert not isinstance(reference.cache, HGACache)
    assert ours.cache.stats().store_bytes > 0, "no chunk closed: this scenario showed nothing"


def assert_close(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours, reference, rtol=0, atol=TOLERANCE)


def generate(model: PreTrainedModel, ids: Tensor, **options: Any) -> Outcome:
    """Greedy generation unless `options` say otherwise."""
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    out = model.generate(ids, **settings | options)
    return Outcome(out.sequences, torch.stack(out.logits, 1), out.past_key_values)


@torch.no_grad()
def forward(
    model: PreTrainedModel,
    ids: Tensor,
    cache: Cache | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> Outcome:
    """One forward, all logits; with a mask, positions count from a row's first real token, as in generate."""
    if mask is not None:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        options |= {"attention_mask": mask, "position_ids": positions}
    out = model(ids, past_key_values=cache, use_cache=True, **options)
    return Outcome(ids, out.logits, out.past_key_values)


def left_padded(pads: list[int], tokens: int = PROMPT_TOKENS) -> tuple[Tensor, Tensor]:
    """A batch of prompts, row i with pads[i] pad tokens at its left, and its attention mask."""
    ids = families.prompt(tokens, rows=len(pads))
    mask = torch.arange(tokens)[None, :] >= torch.tensor(pads)[:, None]
    return ids * mask, mask.long()


@functools.cache
def noisy_twin(name: str) -> PreTrainedModel:
    """An assistant that agrees with the family's model at times, so that some of its tokens are rejected.

    transformers 5.17 cannot have an assistant whose window slides: this one's is longer than its context.
    """
    sliding = len(families.ALL[name].routed) < families.ALL[name].config().num_hidden_layers
    twin = families.build(name, sliding_window=2048 if sliding else None)
    torch.manual_seed(1)
    with torch.no_grad():
        twin.get_output_embeddings().weight += 0.1 * torch.randn_like(twin.get_output_embeddings().weight)
    twin.generation_config.num_assistant_tokens = 4
    twin.generation_config.num_assistant_tokens_schedule = "constant"
    twin.generation_config.assistant_confidence_threshold = 0.0
    return twin


# ---- scenarios ---------------------------------------------------------------------------------------------


def plain(name: str, model: PreTrainedModel) -> Outcome:
    return generate(model, families.prompt(PROMPT_TOKENS))


def batch(name: str, model: PreTrainedModel) -> Outcome:
    ids, mask = left_padded([0, 37, 110])
    return generate(model, ids, attention_mask=mask)


def sampling(name: str, model: PreTrainedModel) -> Outcome:
    torch.manual_seed(7)
    return generate(model, families.prompt(PROMPT_TOKENS, rows=2), do_sample=True, top_k=20, temperature=0.9)


def beam(name: str, model: PreTrainedModel) -> Outcome:
    ids, mask = left_padded([0, 21])
    return generate(model, ids, attention_mask=mask, num_beams=3)


def assisted(name: str, model: PreTrainedModel) -> Outcome:
    return generate(model, families.prompt(PROMPT_TOKENS), assistant_model=noisy_twin(name), max_new_tokens=30)


def prompt_lookup(name: str, model: PreTrainedModel) -> Outcome:
    repeated = families.prompt(20).repeat(1, PROMPT_TOKENS // 20)
    return generate(model, repeated, prompt_lookup_num_tokens=5, max_matching_ngram_size=2, max_new_tokens=30)


def crop(name: str, model: PreTrainedModel) -> Outcome:
    """Feed, forget far more than the window, feed something else: as if the forgotten had never been fed."""
    first, second = families.prompt(230), families.prompt(60, seed=1)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()  # without it sliding layers forget what a crop needs back
    forward(model, first, cache)
    cache.crop(-120)
    refed = forward(model, second, cache)
    fresh = forward(model, torch.cat([first[:, :110], second], 1))
    assert_close(refed.logits, fresh.logits[:, 110:])
    return refed


def multi_turn(name: str, model: PreTrainedModel) -> Outcome:
    one = generate(model, families.prompt(120))
    longer = torch.cat([one.tokens, families.prompt(70, seed=1)], 1)
    two = generate(model, longer, past_key_values=one.cache)
    return Outcome(two.tokens, torch.cat([one.logits, two.logits], 1), two.cache)


def block_prefill(name: str, model: PreTrainedModel) -> Outcome:
    """All logits of one prompt, then the last logits of a second one behind it."""
    one = forward(model, families.prompt(192))
    two = forward(model, families.prompt(128, seed=1), one.cache, logits_to_keep=50)
    return Outcome(two.tokens, torch.cat([one.logits, two.logits], 1), two.cache)


def rows(name: str, model: PreTrainedModel) -> Outcome:
    """Two rows become four, then two of those in another order, each going its own way."""
    first = forward(model, families.prompt(PROMPT_TOKENS, rows=2))
    first.cache.batch_repeat_interleave(2)
    four = forward(model, families.prompt(30, seed=1, rows=4), first.cache)
    first.cache.batch_select_indices(torch.tensor([3, 0]))
    two = forward(model, families.prompt(80, seed=2, rows=2), first.cache)
    return Outcome(two.tokens, torch.cat([four.logits.flatten(0, 1), two.logits.flatten(0, 1)]), two.cache)


SCENARIOS: dict[str, Callable[[str, PreTrainedModel], Outcome]] = {
    scenario.__name__: scenario
    for scenario in (
        plain,
        batch,
        sampling,
        beam,
        assisted,
        prompt_lookup,
        crop,
        multi_turn,
        block_prefill,
        rows,
    )
}
SPECULATIVE = {"assisted", "prompt_lookup"}
REFUSED_BY_TRANSFORMERS = {
    # "assisted generation is not supported with stateful models": linear layers cannot take tokens back.
    *(("qwen3_next", scenario) for scenario in (*SPECULATIVE, "crop")),
    ("qwen3_next", "rows"),  # "LinearAttentionLayer has no attribute batch_repeat_interleave"
}
BLOCK_TOKENS = {"qwen3_next": 64}
"""Its linear layers compute runs of 64 tokens in float32: cut elsewhere, the dense model rounds otherwise."""


def cases() -> list[Any]:
    """Every family with every scenario; over the families each scenario meets each ordering and store."""
    found = []
    for (row, name), (column, scenario) in itertools.product(enumerate(families.FAMILIES), enumerate(SCENARIOS)):
        if (name, scenario) not in REFUSED_BY_TRANSFORMERS:
            ordering, store = LAYOUTS[(row + column) % len(LAYOUTS)]
            found.append(pytest.param(name, scenario, ordering, store, id=f"{name}-{scenario}-{ordering}-{store}"))
    return found


@pytest.fixture(autouse=True)
def softmax_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager Gemma2 asks for a float32 softmax: it rounds the reference, and in float64 makes pad rows NaN."""
    softmax = torch.nn.functional.softmax

    def at_least_as_given(logits: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(logits, dim, dtype=torch.promote_types(logits.dtype, dtype or logits.dtype))

    monkeypatch.setattr(torch.nn.functional, "softmax", at_least_as_given)


@pytest.fixture
def crops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each crop of a routed layer took back."""
    seen: list[int] = []
    original = HGALayer.crop

    def crop_and_note(layer: HGALayer, tokens_to_remove: int) -> None:
        seen.append(-int(tokens_to_remove))
        original(layer, tokens_to_remove)

    monkeypatch.setattr(HGALayer, "crop", crop_and_note)
    return seen


def test_every_supported_family_is_here() -> None:
    assert set(families.FAMILIES) == set(SUPPORTED)
    assert {families.build(name).config.model_type for name in families.FAMILIES} == set(SUPPORTED)


@pytest.mark.parametrize("name", families.ALL)
def test_these_models_read_their_whole_context(name: str) -> None:
    """Else parity would be cheap: an early token has to change the last logits."""
    ids = families.prompt(PROMPT_TOKENS)
    changed = ids.clone()
    changed[0, 40] = changed[0, 40] % (families.VOCABULARY - 1) + 1
    difference = forward(families.shared(name), ids).logits - forward(families.shared(name), changed).logits
    assert difference[0, -1].abs().max() > 1e6 * TOLERANCE


@pytest.mark.parametrize(("name", "scenario", "ordering", "store"), cases())
def test_full_budget_is_dense(name: str, scenario: str, ordering: str, store: str, crops: list[int]) -> None:
    model, run = families.shared(name), SCENARIOS[scenario]
    blocks = BLOCK_TOKENS.get(name, 37) if scenario == "block_prefill" else 1024
    config = FULL.replace(ordering=ordering, store=store, block_tokens=blocks)
    reference = run(name, model)
    with hga.enabled(model, config):
        ours = run(name, model)
    assert_same(ours, reference)
    if scenario in SPECULATIVE:
        assert any(crops), "no token was taken back: the scenario showed nothing"


@pytest.mark.parametrize("name", families.VARIANTS)
@pytest.mark.parametrize("scenario", ["plain", "batch", "multi_turn", "block_prefill"])
def test_variants_are_dense_too(name: str, scenario: str) -> None:
    model, run = families.shared(name), SCENARIOS[scenario]
    reference = run(name, model)
    with hga.enabled(model, FULL.replace(block_tokens=48)):
        ours = run(name, model)
    assert_same(ours, reference)


@pytest.mark.parametrize(
    "changes",
    [
        {"selection": "per_head"},
        {"selection": "mixed"},
        {"far_field": False},
        {"overselection": "all", "node_size": 4, "coded": False},
        {"ordering": "position", "summary": "mixed_rope", "coded": False},
        {"sink_tokens": 0, "window_tokens": 4},
        {"chunk_size": 64, "group_size": 16, "node_size": 64},
        {"dense_layers": (1,)},
        {"dense_below": 150},
        {"prefill": "auto"},
    ],
    ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items()),
)
@pytest.mark.parametrize("name", ["smollm3", "gpt_oss", "gemma2", "phi3"])
def test_every_option_is_dense_at_full_budget(name: str, changes: dict[str, Any]) -> None:
    model = families.shared(name)
    reference = generate(model, families.prompt(PROMPT_TOKENS))
    with hga.enabled(model, FULL.replace(block_tokens=90, **changes)):
        ours = generate(model, families.prompt(PROMPT_TOKENS))
    assert torch.equal(ours.tokens, reference.tokens)
    assert_close(ours.logits, reference.logits)


@pytest.mark.parametrize("ordering", ["content", "position"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_exact_prefill_is_dense_at_any_budget(name: str, ordering: str) -> None:
    model = families.shared(name)
    reference = block_prefill(name, model)
    with hga.enabled(model, SMALL.replace(prefill="exact", ordering=ordering, block_tokens=BLOCK_TOKENS.get(name, 45))):
        ours = block_prefill(name, model)
    assert_same(ours, reference)


# ---- ways to switch it on and off --------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.FAMILIES)
def test_explicit_cache(name: str) -> None:
    model = families.build(name)
    ids, mask = left_padded([0, 30])
    reference = generate(model, ids, attention_mask=mask)
    model.set_attn_implementation("hga")
    routed = HGACache(config=model.config, hga_config=FULL)
    ours = generate(model, ids, attention_mask=mask, past_key_values=routed)
    assert ours.cache is routed
    assert_same(ours, reference)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_loaded_with_attention_hga(name: str) -> None:
    """Without an HGACache the implementation is dense; with one it routes."""
    reference_model, model = families.shared(name), families.build(name, attention="hga")
    assert model.config._attn_implementation == "hga"
    ids, mask = left_padded([0, 30])
    reference = generate(reference_model, ids, attention_mask=mask)
    dense = generate(model, ids, attention_mask=mask)
    assert torch.equal(dense.tokens, reference.tokens)
    assert_close(dense.logits, reference.logits)
    assert type(dense.cache) is DynamicCache
    routed = HGACache(config=model.config, hga_config=FULL)
    assert_same(generate(model, ids, attention_mask=mask, past_key_values=routed), reference)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_attention_hga_with_a_static_cache(name: str) -> None:
    """Its mask is wider than the tokens seen: dense attention, by the real 4-D mask."""
    model = families.build(name, attention="hga")
    ids, mask = left_padded([0, 30], 60)
    reference = generate(families.shared(name), ids, attention_mask=mask)
    ours = generate(model, ids, attention_mask=mask, cache_implementation="static")
    assert torch.equal(ours.tokens, reference.tokens)
    assert_close(ours.logits, reference.logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3_next"])
def test_disable_restores_the_model(name: str) -> None:
    model, ids = families.build(name), families.prompt(90)
    before, attributes = forward(model, ids).logits, set(vars(model))
    hga.enable(model, SMALL)
    routed = forward(model, ids).logits
    assert not torch.equal(routed, before)
    hga.enable(model, FULL)
    hga.disable(model)
    hga.disable(model)
    assert model.config._attn_implementation == families.ALL[name].reference
    assert model.forward == type(model).forward.__get__(model)
    assert set(vars(model)) == attributes
    assert torch.equal(forward(model, ids).logits, before)
    assert type(forward(model, ids).cache) is DynamicCache


def test_enabled_restores_after_an_error() -> None:
    model, ids = families.build("llama"), families.prompt(90)
    before = forward(model, ids).logits
    with pytest.raises(ZeroDivisionError), hga.enabled(model, SMALL):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(forward(model, ids).logits, before)


def test_disable_keeps_a_forward_that_was_wrapped_before() -> None:
    """accelerate's hooks replace the instance's forward, too."""
    model = families.build("llama")
    inner, calls = model.forward, []

    @functools.wraps(inner)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = hooked
    with hga.enabled(model, FULL):
        forward(model, families.prompt(20))
        assert calls
    assert model.forward is hooked


def test_enable_again_changes_the_config() -> None:
    model, ids = families.build("llama"), families.prompt(PROMPT_TOKENS)
    reference = generate(model, ids)
    hga.enable(model, SMALL)
    hga.enable(model, FULL)
    assert_same(generate(model, ids), reference)


def test_a_tuple_where_one_is_asked_for() -> None:
    """Longer than a block: tuples are not joined over blocks, so this prompt is fed as one."""
    model, ids = families.shared("llama"), families.prompt(90)
    with hga.enabled(model, FULL.replace(block_tokens=40)), torch.no_grad():
        assert_close(model(ids, return_dict=False)[0], model(ids, return_dict=True).logits)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2", "gpt_oss"])
def test_training_stays_dense(name: str) -> None:
    model, ids = families.build(name), families.prompt(70, rows=2)
    model.train()

    def step() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), [x.grad.clone() for x in model.parameters() if x.grad is not None]

    loss, gradients = step()
    with hga.enabled(model, SMALL):
        our_loss, our_gradients = step()
    assert_close(our_loss, loss)
    assert len(our_gradients) == len(gradients)
    for ours, reference in zip(our_gradients, gradients, strict=True):
        assert_close(ours, reference)


# ---- at a small budget -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_padded_row_equals_the_row_alone(name: str) -> None:
    """At a tenth of the context, where what is routed shows in the logits."""
    model = families.shared(name)
    unit = BLOCK_TOKENS.get(name, 45)
    pads = [0, unit, 3 * unit]
    ids, mask = left_padded(pads, 320)
    dense = forward(model, ids, mask=mask).logits
    with hga.enabled(model, SMALL.replace(block_tokens=64)):
        generated = generate(model, ids, attention_mask=mask)
        prefilled = forward(model, ids, mask=mask).logits
        for row, pad in enumerate(pads):
            alone = generate(model, ids[row : row + 1, pad:])
            assert torch.equal(alone.tokens[0], generated.tokens[row, pad:])
            assert_close(alone.logits[0], generated.logits[row])
            assert_close(forward(model, ids[row : row + 1, pad:]).logits[0], prefilled[row, pad:])
    changed = (prefilled - dense)[:, -1].abs().amax(-1)
    assert (changed > 1e6 * TOLERANCE).all(), "the budget changed nothing"


@pytest.mark.parametrize("selection", ["shared", "per_head", "mixed"])
def test_a_padded_row_equals_the_row_alone_at_a_32nd(selection: str) -> None:
    model, pads = families.shared("llama"), [0, 101]
    ids, mask = left_padded(pads, 1124)
    with hga.enabled(model, SMALL.replace(selection=selection)):
        together = forward(model, ids, mask=mask)
        for row, pad in enumerate(pads):
            assert_close(forward(model, ids[row : row + 1, pad:]).logits[0], together.logits[row, pad:])
        together.cache.reset_counters()
        forward(model, families.prompt(1, rows=2), together.cache, torch.nn.functional.pad(mask, (0, 1), value=1))
    assert 0 < together.cache.stats().attended <= 1 / 32


@pytest.mark.parametrize("scenario", ["assisted", "prompt_lookup"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_speculation_changes_no_token_at_a_small_budget(name: str, scenario: str, crops: list[int]) -> None:
    """A query is routed alike whether it is decoded alone or verified among others."""
    model = families.shared(name)
    with hga.enabled(model, SMALL):
        ours = SCENARIOS[scenario](name, model)
        new = ours.logits.shape[1]
        alone = generate(model, ours.tokens[:, :PROMPT_TOKENS], max_new_tokens=new)
    assert any(crops)
    assert torch.equal(ours.tokens, alone.tokens)
    assert_close(ours.logits, alone.logits)


@pytest.mark.parametrize("name", ["llama", "smollm3", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("store", ["ram", "device"])
def test_crop_equals_never_having_fed_at_a_small_budget(name: str, store: str) -> None:
    with hga.enabled(families.shared(name), SMALL.replace(store=store)) as model:
        assert crop(name, model).cache.stats().store_bytes > 0


# ---- which layers are routed -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.ALL)
def test_routed_layers(name: str) -> None:
    model, expected = families.shared(name), families.ALL[name].routed
    routed = HGACache(config=model.config, hga_config=FULL)
    assert tuple(index for index, x in enumerate(routed.layers) if isinstance(x, HGALayer)) == expected
    assert routed_layers(model.config, FULL) == expected
    plain_cache = DynamicCache(config=model.config)
    for index, (layer, own) in enumerate(zip(routed.layers, plain_cache.layers, strict=True)):
        if index not in expected:
            assert type(layer) is type(own)
            assert type(layer) is not DynamicLayer


def test_dense_layers_keep_their_own_cache() -> None:
    model, ids = families.shared("smollm3"), families.prompt(PROMPT_TOKENS)
    with hga.enabled(model, SMALL.replace(dense_layers=(0, 2))):
        cache = forward(model, ids).cache
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, HGALayer, DynamicLayer, HGALayer]
    assert cache.layers[0].keys.shape[2] == PROMPT_TOKENS
