"""On a real GPU: whole models decode by kernels and CUDA graphs, and give what they give without."""

from __future__ import annotations

import contextlib
import gc
import logging
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

import hga
from hga.cache import layer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 65536,
}
ROUTED = {"prefill": "routed", "budget_tokens": 256, "block_tokens": 512}


def make_model(dtype: torch.dtype, moe: bool = False) -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SMALL, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128) if moe else None
    model = AutoModelForCausalLM.from_config(config or Qwen3Config(**SMALL), dtype=dtype)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:  # attention that tells tokens apart
            parameter.data.mul_(4)
    return model.to("cuda").eval()


@torch.no_grad()
def generate(model: Any, ids: torch.Tensor, config: hga.HGAConfig | None, tokens: int, **kwargs: Any) -> torch.Tensor:
    asked = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0} | kwargs
    if config is None:
        return model.generate(ids, **asked)
    with hga.enabled(model, config):
        return model.generate(ids, **asked)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode through PyTorch; prefill stays with the kernels, whose rounding may decide near ties otherwise."""
    monkeypatch.setattr(layer, "kernels_serve", lambda *args: False)


@pytest.mark.parametrize("preset", ["balanced", "fidelity", "lean", "mixed"])
@pytest.mark.parametrize("store", ["ram", "device"])
def test_kernels_and_graphs_give_the_same_tokens(preset: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(torch.float32)
    ids = torch.randint(1, 512, (1, 1500), device="cuda")
    config = hga.HGAConfig.preset(preset, **ROUTED, store=store)
    fast = generate(model, ids, config, 200)
    without_kernels(monkeypatch)
    assert torch.equal(fast, generate(model, ids, config, 200))


def test_full_budget_equals_sdpa() -> None:
    model = make_model(torch.float32)
    ids = torch.randint(1, 512, (2, 1200), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :300] = 0
    config = hga.HGAConfig.preset("balanced", prefill="routed", budget_tokens=4096)
    dense = generate(model, ids, None, 60, attention_mask=mask)
    assert torch.equal(generate(model, ids, config, 60, attention_mask=mask), dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_float32(dtype: torch.dtype) -> None:
    model = make_model(torch.float32)
    ids = torch.randint(1, 512, (1, 1500), device="cuda")
    config = hga.HGAConfig.preset("balanced", **ROUTED, summary_dtype="fp8")
    losses = {}
    for kind in (torch.float32, dtype):
        cast = model.to(kind)
        with torch.no_grad(), hga.enabled(cast, config):
            cache = hga.HGACache(config=cast.config, hga_config=config)
            cast(ids[:, :1000], past_key_values=cache)
            logits = [cast(ids[:, t : t + 1], past_key_values=cache).logits[0, -1].float() for t in range(1000, 1200)]
        losses[kind] = torch.nn.functional.cross_entropy(torch.stack(logits), ids[0, 1001:1201])
    assert abs(losses[torch.float32] - losses[dtype]) < 0.02


def test_moe_step_is_captured(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(torch.bfloat16, moe=True)
    model.set_experts_implementation("batched_mm")
    ids = torch.randint(1, 512, (1, 900), device="cuda")
    config = hga.HGAConfig.preset("balanced", **ROUTED)
    with caplog.at_level(logging.WARNING, "hga"), torch.no_grad(), hga.enabled(model, config):
        cache = hga.HGACache(config=model.config, hga_config=config)
        model.generate(ids, past_key_values=cache, max_new_tokens=20, pad_token_id=0)
    assert cache.stepper._graph is not None
    assert not caplog.records


def test_a_capture_leaves_garbage_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Another cache's graph and locked memory, garbage by the time of a capture, would end it if they were freed."""
    model = make_model(torch.float32)
    ids = torch.randint(1, 512, (1, 900), device="cuda")
    config = hga.HGAConfig.preset("balanced", **ROUTED)
    enter, kept = torch.cuda.graph.__enter__, []

    def litter(self: torch.cuda.graph) -> None:
        enter(self)
        if kept:
            cycle = [kept.pop()]
            cycle.append(cycle)
            del cycle
            if gc.isenabled():  # then Python may collect whenever anything is made
                gc.collect()

    monkeypatch.setattr(torch.cuda.graph, "__enter__", litter)
    tokens = []
    with caplog.at_level(logging.WARNING, "hga"), torch.no_grad(), hga.enabled(model, config):
        for _ in range(3):
            cache = hga.HGACache(config=model.config, hga_config=config)
            tokens.append(model.generate(ids, past_key_values=cache, max_new_tokens=12, pad_token_id=0))
            assert cache.stepper._graph is not None
            kept.append(cache)
    assert not caplog.records
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


def test_beams_and_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(torch.float32)
    ids = torch.randint(1, 512, (1, 900), device="cuda")
    config = hga.HGAConfig.preset("balanced", **ROUTED)
    beams = generate(model, ids, config, 40, num_beams=3)
    looked_up = generate(model, ids, config, 40, prompt_lookup_num_tokens=3)
    without_kernels(monkeypatch)
    assert torch.equal(beams, generate(model, ids, config, 40, num_beams=3))
    assert torch.equal(looked_up, generate(model, ids, config, 40, prompt_lookup_num_tokens=3))


def test_long_decode_holds_its_memory() -> None:
    model = make_model(torch.bfloat16)
    ids = torch.randint(1, 512, (1, 900), device="cuda")
    config = hga.HGAConfig.preset("balanced", **ROUTED)
    cache = hga.HGACache(config=model.config, hga_config=config)
    held = []
    with torch.no_grad(), hga.enabled(model, config):
        model(ids, past_key_values=cache)
        for step in range(2000):
            model(ids[:, step % 900 : step % 900 + 1], past_key_values=cache)
            if step % 500 == 499:
                torch.cuda.synchronize()
                held.append(torch.cuda.memory_allocated() - cache.stats().device_bytes)
    assert max(held) - min(held) < 24 << 20, held
    cache.reset()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_give_the_same_tokens() -> None:
    model = make_model(torch.float32)
    ids = torch.randint(1, 512, (1, 900), device="cuda")
    config = hga.HGAConfig.preset("balanced", **ROUTED)
    alone = generate(model, ids, config, 40)
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1}
    split = dispatch_model(model, places | {"model.norm": 1, "model.rotary_emb": 0, "lm_head": 1})
    assert torch.equal(generate(split, ids, config, 40), alone)


def test_offloaded_weights_decode_without_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(torch.float32)
    ids = torch.randint(1, 512, (1, 900), device="cuda")
    config = hga.HGAConfig.preset("balanced", **ROUTED)
    alone = generate(model, ids, config, 20)
    places = {name: 0 for name, _ in model.named_modules() if name.count(".") == 3 or name in ("model.norm", "lm_head")}
    places |= {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.1.mlp": "cpu"}
    offloaded = dispatch_model(model, {name: place for name, place in places.items() if name})
    with caplog.at_level(logging.INFO, "hga"):
        assert torch.equal(generate(offloaded, ids, config, 20), alone)
    assert "without a CUDA graph" in caplog.text


def test_gpu_memory_exhausted_leaves_model_and_process_usable() -> None:
    model = make_model(torch.bfloat16)
    ids = torch.randint(1, 512, (1, 1500), device="cuda")
    config = hga.HGAConfig.preset("balanced", **ROUTED)
    expected = generate(model, ids, config, 8)
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (4 << 20)) / total)
    taken = []
    try:
        for size in (4 << 20, 256 << 10):  # what earlier tests left free in blocks that are still held
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                while True:
                    taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        del taken[-12:]  # enough to begin with
        with pytest.raises(torch.cuda.OutOfMemoryError):
            generate(model, ids, config, 8)
    finally:
        taken.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    assert torch.cuda.memory_allocated() - held < 8 << 20
    assert torch.equal(generate(model, ids, config, 8), expected)
