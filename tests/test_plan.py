"""Planning from configs alone, held against what a real cache holds."""

import dataclasses
import json

import pytest
import torch
from tiny_model import tiny_config, tiny_model
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig

import hga
from hga.cache.layout import archived_chunks
from hga.config import PRESETS
from hga.plan import GIB, find_config, plan

SMALL = hga.HGAConfig(chunk_size=64, budget_tokens=128, prefill="routed", block_tokens=128)


def test_qwen3_30b_is_planned_offline(monkeypatch):
    monkeypatch.setattr("hga.plan.load_config", lambda name: pytest.fail("asked the hub"))
    made = plan(find_config("QWEN3-30b-a3B"), hga.HGAConfig(), 65536, gpu_bytes=80 * GIB)
    assert made.parameters == 30_532_122_624
    assert made.weight_bytes == 2 * made.parameters
    assert made.routed_layers == tuple(range(48))
    assert made.dense_kv_bytes == 65536 * 96 * 1024
    assert made.dense_kv_4bit_bytes * 4 == made.dense_kv_bytes
    assert made.summary_bytes <= 0.13 * made.dense_kv_bytes
    assert made.max_position_embeddings == 40960


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("store", ["ram", "device"])
def test_plan_agrees_with_a_real_cache(preset, store):
    budget = 1152 if preset == "paper" else 160
    config = hga.HGAConfig.preset(preset, budget_tokens=budget, prefill="routed", store=store)
    model, tokens = tiny_model(dtype=torch.bfloat16), 1900
    model.config.dtype = torch.bfloat16
    cache = hga.HGACache(config=model.config, hga_config=config)
    with hga.enabled(model, config), torch.no_grad():
        model(torch.randint(0, 257, (1, tokens)), past_key_values=cache)
    stats, made = cache.stats(), plan(model.config, config, tokens)
    assert stats.store_bytes == made.store_bytes > 0
    # Growing buffers hold an eighth of slack.
    assert made.summary_bytes <= stats.summary_bytes <= 1.13 * made.summary_bytes
    assert stats.window_bytes <= made.window_bytes
    assert 0 < stats.working_bytes <= made.working_bytes
    assert stats.kv_bytes == made.dense_kv_bytes


def test_peak_is_the_sum_of_its_parts():
    made = plan(tiny_config(), SMALL, 2000)
    parts = ("weight", "summary", "window", "other_cache", "working", "buffer", "runtime")
    assert made.peak_bytes == sum(getattr(made, f"{part}_bytes") for part in parts)
    beside = plan(tiny_config(), SMALL.replace(store="device"), 2000)
    assert beside.peak_bytes == made.peak_bytes + made.store_bytes


def test_dense_beginning_counts_for_the_peak():
    routed, auto = SMALL, SMALL.replace(prefill="auto", budget_tokens=24_000)
    contexts = 100_000
    assert plan(tiny_config(), auto, contexts).peak_bytes > plan(tiny_config(), routed, contexts).peak_bytes


def test_masses_of_heads_that_choose_apart_count_where_no_batch_can_cut_them():
    config, tokens = find_config("qwen3-30b-a3b"), 1 << 21  # R = 8
    shared, apart = (plan(config, hga.HGAConfig.preset(name), tokens).buffer_bytes for name in ("balanced", "mixed"))
    groups = archived_chunks(hga.HGAConfig(), tokens) * 128
    assert apart - shared == 8 * 2 * 64 * groups - (3 << 28)


def test_longest_context_is_the_longest():
    config, gpu = tiny_config(), 2 * GIB
    longest = plan(config, SMALL, 1000, gpu_bytes=gpu).longest_context
    assert longest > 0
    assert plan(config, SMALL, longest, gpu_bytes=gpu).fits
    assert not plan(config, SMALL, longest + SMALL.chunk_size, gpu_bytes=gpu).fits
    assert plan(config, SMALL, 1000, gpu_bytes=1 << 20).longest_context == 0


def test_weight_bits_spare_embeddings_and_head():
    config = tiny_config(dtype="bfloat16")
    full, quarter = plan(config, SMALL, 100), plan(config, SMALL, 100, weight_bits=4)
    ends = 2 * 257 * 32
    norms = 5 * 32
    assert quarter.weight_bytes == 2 * (ends + norms) + (full.parameters - ends - norms) // 2
    config.quantization_config = {"quant_method": "fp8"}
    assert (
        plan(config, SMALL, 100).weight_bytes
        == plan(tiny_config(dtype="bfloat16"), SMALL, 100, weight_bits=8).weight_bytes
    )


def test_tied_embeddings_count_once():
    assert (
        plan(tiny_config(), SMALL, 10).parameters - plan(tiny_config(tie_word_embeddings=True), SMALL, 10).parameters
        == 257 * 32
    )


def test_sliding_layers_keep_their_window_only():
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=512, dtype="bfloat16",
    )  # fmt: skip
    made = plan(config, SMALL, 100_000)
    row = 2 * 2 * 8 * 2
    assert made.routed_layers == (5,)
    assert made.other_cache_bytes == 5 * 512 * row
    assert made.dense_kv_bytes == (5 * 512 + 100_000) * row


def test_longest_context_grows_with_the_gpu():
    config = tiny_config()
    contexts = [plan(config, SMALL, 10, gpu_bytes=size * GIB).longest_context for size in (1, 2, 4)]
    assert contexts == sorted(set(contexts))


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="at least 1 token"):
        plan(tiny_config(), SMALL, 0)
    with pytest.raises(ValueError, match="weight_bits"):
        plan(tiny_config(), SMALL, 10, weight_bits=64)
    with pytest.raises(ValueError, match="sliding"):
        plan(MistralConfig(num_hidden_layers=2, sliding_window=128), SMALL, 10)
    with pytest.raises(ValueError, match="does not exist"):
        find_config(str(tmp_path / "config.json"))
    broken = tmp_path / "broken.json"
    for text in ("{", "[]", '{"model_type": "no such family"}', "{}"):
        broken.write_text(text)
        with pytest.raises(ValueError, match=r"broken\.json") as error:
            find_config(str(broken))
        assert "\n" not in str(error.value)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        find_config(str(broken))


def test_a_config_file_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config().to_dict()))
    found = find_config(str(path))
    assert isinstance(found, LlamaConfig)
    assert plan(found, SMALL, 10).parameters == plan(tiny_config(), SMALL, 10).parameters


def test_row_is_json():
    made = plan(tiny_config(), SMALL, 500)
    assert set(json.loads(json.dumps(made.row()))) == {field.name for field in dataclasses.fields(made)}


def test_nvme_is_counted_apart_from_host_memory():
    needs = find_config("smollm2-135m")
    in_ram = plan(needs, SMALL, 8000)
    assert (in_ram.host_bytes, in_ram.nvme_bytes) == (in_ram.store_bytes, 0)
    on_nvme = plan(needs, SMALL.replace(store="nvme", ram_cache_bytes=1 << 20), 8000)
    order_bytes = on_nvme.store_bytes - on_nvme.nvme_bytes
    assert on_nvme.store_bytes == in_ram.store_bytes
    assert 0 < order_bytes < on_nvme.nvme_bytes // 10
    assert on_nvme.host_bytes == order_bytes + (1 << 20)
    assert on_nvme.peak_bytes == in_ram.peak_bytes
    assert plan(needs, SMALL.replace(store="auto", ram_cache_bytes=1 << 20), 8000).nvme_bytes == on_nvme.nvme_bytes
    fits = plan(needs, SMALL.replace(store="auto", ram_cache_bytes=1 << 32), 8000)
    assert (fits.host_bytes, fits.nvme_bytes) == (fits.store_bytes, 0)
    assert plan(needs, SMALL.replace(store="device"), 8000).host_bytes == 0
