"""A cache that decodes by kernels gives what the same cache gives through PyTorch, whatever happens in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import rows
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hga
from hga import HGAConfig
from hga.cache import decoding, kernels, layer
from hga.cache.layer import Handshake, HGALayer
from hga.cache.routed import Scoring
from hga.cache.shape import LayerShape
from hga.cache.summaries import Summaries
from hga.integrations.transformers import step
from hga.store import MemoryStore

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, REPEATS, WIDTH = 2, 2, 16
CONFIG = rows.SMALL.replace(summary_dtype="auto", dense_below=100)
CONFIGS = {
    "shared": CONFIG,
    "per head, device": CONFIG.replace(selection="per_head", store="device"),
    "two levels": CONFIG.replace(node_size=8, overselection=2),
    "coded": CONFIG.replace(node_size=8, overselection=2, coded=True),
}


def serve(*args: Any) -> bool:
    return True


@pytest.fixture(autouse=True)
def _readable(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":  # the interpreter reads any memory
        monkeypatch.setattr(MemoryStore, "gpu_readable", True)


def attend(one: HGALayer, query: Tensor, keys: Tensor, values: Tensor, padding: Tensor | None = None) -> Tensor:
    keys, values = one.update(keys.clone(), values.clone())
    return one.attend(query, values, padding, Scoring(0.3))


def random_tokens(batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    query = 2 * torch.randn(batch, HEADS * REPEATS, tokens, WIDTH, device=DEVICE)
    return query, *(torch.randn(batch, HEADS, tokens, WIDTH, device=DEVICE) for _ in range(2))


class Pair:
    """Two layers that are fed alike: one decodes by kernels, the other through PyTorch."""

    def __init__(self, config: HGAConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        shape = LayerShape(HEADS, HEADS * REPEATS, WIDTH, None)
        self.fast, self.plain = (HGALayer(config, 0, shape, Handshake()) for _ in range(2))
        self._monkeypatch = monkeypatch

    def feed(self, batch: int, tokens: int, padding: Tensor | None = None) -> None:
        parts = random_tokens(batch, tokens)
        self._monkeypatch.setattr(layer, "kernels_serve", serve)
        fast = attend(self.fast, *parts, padding)
        self._monkeypatch.setattr(layer, "kernels_serve", lambda *args: False)
        plain = attend(self.plain, *parts, padding)
        torch.testing.assert_close(fast, plain, rtol=0, atol=3e-6)

    def call(self, name: str, *args: Any) -> None:
        for one in (self.fast, self.plain):
            getattr(one, name)(*args)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_close_chunks_and_crop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(CONFIGS[name], monkeypatch)
    pair.feed(1, 118)
    for _ in range(4):
        pair.feed(1, 1)
    assert pair.fast.traffic()[2] > 0, "the kernels have run"
    pair.feed(1, 67)  # closes chunks
    pair.feed(1, 1)
    pair.call("crop", -70)  # reopens them
    pair.feed(1, 68)  # the same chunks again, other tokens
    pair.feed(1, 1)
    pair.feed(1, 1)


def test_decoded_tokens_close_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(CONFIG, monkeypatch)
    pair.feed(1, 174)
    for _ in range(22):  # a tile starts at 192
        pair.feed(1, 1)
    assert pair.fast.rows[0].chunks == pair.plain.rows[0].chunks


def test_padded_batch_and_beams(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(CONFIG, monkeypatch)
    mask = torch.ones(2, 180, dtype=torch.bool, device=DEVICE)
    mask[1, :37] = False
    pair.feed(2, 180, mask)
    for _ in range(2):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        pair.feed(2, 1, mask)
    pair.call("reorder_cache", torch.tensor([1, 1]))
    mask = torch.cat([mask, mask.new_ones(2, 1)], 1)[[1, 1]]
    pair.feed(2, 1, mask)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about the infinity
def test_bad_kv_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "kernels_serve", serve)
    one = HGALayer(CONFIG, 0, LayerShape(HEADS, HEADS * REPEATS, WIDTH, None), Handshake())
    attend(one, *random_tokens(1, 118))
    query, keys, values = random_tokens(1, 1)
    keys[0, 1, 0, 3] = float("inf")
    attend(one, query, keys, values)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(ValueError, match="NaN or infinite"):
        attend(one, *random_tokens(1, 1))


def test_kernels_serve_only_what_they_can() -> None:
    cuda = torch.device("cuda")
    assert not kernels.kernels_serve(CONFIG, torch.float32, torch.device("cpu"))
    assert not kernels.kernels_serve(CONFIG, torch.float64, cuda)
    assert not kernels.kernels_serve(HGAConfig.preset("paper"), torch.bfloat16, cuda)
    assert kernels.kernels_serve(CONFIG, torch.bfloat16, cuda)


def test_failed_step_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(CONFIG, monkeypatch)
    mask = torch.ones(2, 180, dtype=torch.bool, device=DEVICE)
    pair.feed(2, 180, mask)
    lengths = [row.length for row in pair.fast.rows]
    monkeypatch.setattr(layer, "kernels_serve", serve)
    with monkeypatch.context() as patched:
        patched.setattr(decoding.LayerDecoder, "prepare", raise_memory_error)
        assert pair.fast.can_begin_token()
        with pytest.raises(MemoryError):
            pair.fast.begin_token(181)
    assert [row.length for row in pair.fast.rows] == lengths
    pair.feed(2, 1, torch.cat([mask, mask.new_ones(2, 1)], 1))


def raise_memory_error(*args: Any) -> None:
    raise MemoryError("no room")


@pytest.mark.parametrize("part", ["summaries", "store"])
def test_chunks_close_all_or_nothing(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "kernels_serve", lambda *args: False)
    shape = LayerShape(HEADS, HEADS * REPEATS, WIDTH, None)
    one, other = (HGALayer(CONFIG, 0, shape, Handshake()) for _ in range(2))
    first, second = random_tokens(1, 120), random_tokens(1, 60)
    for each in (one, other):
        attend(each, *first)
    row, chunks = one.rows[0], one.rows[0].chunks
    row.append(second[1][0], second[2][0])
    with monkeypatch.context() as patched:
        name = (Summaries, "append") if part == "summaries" else (MemoryStore, "append")
        patched.setattr(*name, raise_memory_error)
        with pytest.raises(MemoryError):
            row.attend(second[0][0].unflatten(0, (HEADS, REPEATS)), Scoring(0.3))
    assert row.chunks == chunks == row.archive.summaries.chunks
    out = row.attend(second[0][0].unflatten(0, (HEADS, REPEATS)), Scoring(0.3))
    torch.testing.assert_close(out.flatten(0, 1)[None], attend(other, *second), rtol=0, atol=1e-6)


def test_layers_that_disagree_are_refused() -> None:
    shape, handshake = LayerShape(HEADS, HEADS * REPEATS, WIDTH, None), Handshake()
    one, other = (HGALayer(CONFIG, index, shape, handshake) for index in range(2))
    for each in (one, other):
        attend(each, *random_tokens(1, 20))
    attend(one, *random_tokens(1, 5))  # and then the forward was interrupted
    attend(one, *random_tokens(1, 1))
    with pytest.raises(RuntimeError, match="interrupted"):
        attend(other, *random_tokens(1, 1))


def test_direct_calls_count_padding_in_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tiny = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16
    )
    model = LlamaForCausalLM(tiny).to(DEVICE).eval()
    ids = torch.randint(1, 64, (2, 122), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    logits = []
    for served in (True, False):
        monkeypatch.setattr(layer, "kernels_serve", lambda *args, served=served: served)
        with torch.no_grad(), hga.enabled(model, CONFIG):
            cache = hga.HGACache(config=tiny, hga_config=CONFIG)
            model(ids[:, :120], attention_mask=mask[:, :120], past_key_values=cache)
            for end in (121, 122):
                last = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache).logits
            logits.append(last)
        assert (cache.stepper is not None) == served
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_only_experts_in_a_loop_keep_a_step_from_a_graph(family: str, tmp_path: Path) -> None:
    """Checkpoints give dense models an experts implementation too, "eager", which says nothing of them."""
    families.build(family).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.config._experts_implementation = "eager"
    assert step._loops_over_experts(model) == (family != "llama")
    if family != "llama":
        model.set_experts_implementation("batched_mm")
        assert not step._loops_over_experts(model)


TINY = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16
)


@pytest.mark.parametrize(("repeats", "apart"), [(1, 24), (2, 24), (3, 16), (4, 12), (6, 8), (7, 8), (16, 8)])
def test_mixed_layers_are_the_fewer_the_more_heads_share_keys(repeats: int, apart: int) -> None:
    config = CONFIGS["two levels"].replace(selection="mixed")
    choices = [config.of_layer(index, 24, repeats).selectors(repeats) for index in range(24)]
    assert choices == [1] * (24 - apart) + [repeats] * apart


@torch.no_grad()
def test_mixed_layers_choose_as_their_own_rule_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With R = 3 two thirds of the layers per head, by kernels as by PyTorch, in forks and in saved contexts."""
    monkeypatch.setattr(step, "_can_capture", lambda model: False)
    config = CONFIGS["two levels"].replace(selection="mixed")
    model = LlamaForCausalLM(
        LlamaConfig(
            **TINY.to_dict()
            | {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
        )
    )
    model.to(DEVICE).eval()
    ids = torch.randint(1, 64, (1, 130), device=DEVICE)
    logits = []
    with hga.enabled(model, config):
        cache = hga.HGACache(model.config, config)
        model(ids[:, :120], past_key_values=cache)
        assert [one.hga_config.selection for one in cache.routed] == ["shared", "per_head", "per_head"]
        saved = cache.save(tmp_path / "context.hga", model, ids[0, :120])
        loaded = hga.HGACache.load(saved.path, model, store="ram")
        for by_kernels in (True, False):
            monkeypatch.setattr(layer, "kernels_serve", lambda *args, by_kernels=by_kernels: by_kernels)
            for one in (cache.fork(), loaded.fork()):
                assert [each.hga_config.selection for each in one.routed] == ["shared", "per_head", "per_head"]
                logits.append([model(ids[:, at : at + 1], past_key_values=one).logits for at in (120, 121)])
                assert (one.stepper is not None) == by_kernels
    for other in logits[1:]:
        for one, expected in zip(other, logits[0], strict=True):
            torch.testing.assert_close(one, expected, rtol=0, atol=3e-6)
    for name in ("shared", "per_head"):  # the rule makes a difference here
        with hga.enabled(model, config.replace(selection=name)):
            other = hga.HGACache(model.config, config.replace(selection=name))
            model(ids[:, :120], past_key_values=other)
            assert (model(ids[:, 120:121], past_key_values=other).logits - logits[0][0]).abs().max() > 1e-5
