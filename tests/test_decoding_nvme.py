"""Kernels decode from a disk what they decode from host memory, bit for bit, whatever happens in between."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decode_kernels import decode_layer, filled_row, random_step
from test_decoding import CONFIG, CONFIGS, DEVICE, HEADS, REPEATS, WIDTH, attend, random_tokens, serve
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import hga
from hga import HGAConfig
from hga.cache import layer
from hga.cache.decoding import Decoding
from hga.cache.layer import Handshake, HGALayer
from hga.cache.shape import LayerShape
from hga.ops.decode import attend_decode
from hga.store import LazyStore, MemoryStore, NvmeStore

pytest.importorskip("triton")
SHAPE = LayerShape(HEADS, HEADS * REPEATS, WIDTH, None)
RULES = {
    "shared": CONFIG,
    "per head": CONFIG.replace(selection="per_head"),
    "two levels": CONFIGS["two levels"],
    "groups of two": CONFIG.replace(group_size=2, node_size=2),
    "no far field": CONFIG.replace(far_field=False),
}


@pytest.fixture(autouse=True)
def _by_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HGA_SCRATCH", str(tmp_path))
    if DEVICE == "cpu":  # the interpreter reads any memory
        monkeypatch.setattr(MemoryStore, "gpu_readable", True)
        monkeypatch.setattr(layer, "kernels_serve", serve)


class Pair:
    """Two layers that are fed alike, their archives in host memory and on a disk."""

    def __init__(self, config: HGAConfig, **changes: Any) -> None:
        configs = (config.replace(store="ram"), config.replace(**({"store": "nvme", "ram_cache_bytes": 1} | changes)))
        self.ram, self.nvme = (HGALayer(one, 0, SHAPE, Handshake()) for one in configs)

    def feed(self, batch: int, tokens: int, padding: Tensor | None = None) -> None:
        parts = random_tokens(batch, tokens)
        assert torch.equal(attend(self.ram, *parts, padding), attend(self.nvme, *parts, padding))

    def call(self, name: str, *args: Any) -> None:
        for one in (self.ram, self.nvme):
            getattr(one, name)(*args)

    @property
    def store(self) -> NvmeStore:
        (store,) = self.nvme._stores
        assert isinstance(store, NvmeStore)
        return store

    def settle(self) -> None:
        """Wait until everything is in the file."""
        deadline = time.monotonic() + 20
        while self.store.traffic.queued_bytes:
            assert time.monotonic() < deadline
            time.sleep(1e-3)


@pytest.mark.parametrize("name", RULES)
def test_tokens_close_chunks_and_crop(name: str) -> None:
    pair = Pair(RULES[name], ram_cache_bytes=1 << 14)
    pair.feed(1, 174)
    for _ in range(2):
        pair.feed(1, 1)
    assert pair.nvme.traffic()[2] > 0, "the kernels have run"
    assert pair.nvme.traffic() == pair.ram.traffic()
    pair.feed(1, 67)  # closes chunks
    pair.feed(1, 1)
    pair.call("crop", -70)  # reopens them
    pair.feed(1, 68)  # the same chunks again, other tokens
    pair.feed(1, 1)
    assert pair.store.traffic.ram_hits + pair.store.traffic.ram_misses > 0


@pytest.mark.parametrize("store", ["nvme", "auto"])
def test_decoded_tokens_close_chunks(store: str) -> None:
    pair = Pair(CONFIG, store=store, ram_cache_bytes=1 << 15)
    pair.feed(1, 190)
    for _ in range(4):  # a tile starts at 192
        pair.feed(1, 1)
    assert pair.ram.rows[0].chunks == pair.nvme.rows[0].chunks
    assert pair.nvme.traffic() == pair.ram.traffic()


def test_padded_batch_beams_and_turns() -> None:
    pair = Pair(CONFIG)
    mask = torch.ones(2, 180, dtype=torch.bool, device=DEVICE)
    mask[1, :37] = False
    pair.feed(2, 180, mask)
    mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    pair.feed(2, 1, mask)
    pair.call("reorder_cache", torch.tensor([1, 1]))
    mask = torch.cat([mask, mask.new_ones(2, 1)], 1)[[1, 1]]
    pair.feed(2, 1, mask)
    mask = torch.cat([mask, mask.new_ones(2, 40)], 1)
    pair.feed(2, 40, mask)
    pair.call("batch_select_indices", torch.tensor([1]))
    pair.feed(1, 1, torch.cat([mask, mask.new_ones(2, 1)], 1)[1:])


@pytest.mark.parametrize("name", ["balanced", "per_head", "two levels"])
def test_kernels_equal_reference_where_groups_are_brought(name: str) -> None:
    from test_decode_kernels import CONFIGS as RULES_OF_KERNELS

    from hga.ops.kernels import decode as kernels

    config, dtype = RULES_OF_KERNELS[name], torch.float32
    rows = [filled_row(config, length, HEADS, 24, dtype) for length in (301, 157)]
    made, counts = decode_layer(config, rows, REPEATS)
    found = made.addresses.cpu().tolist()
    kept = []

    def bring(wanted: Tensor, groups: Tensor) -> Tensor:
        brought = []
        for problem, count in enumerate(wanted.tolist()):
            row, head = divmod(problem, HEADS)
            store, ids = rows[row].archive.store, torch.tensor(rows[row].archive.chunks)
            group = groups[problem, :count].long()
            out = torch.empty(count, 2, config.group_size, 24, pin_memory=DEVICE == "cuda")
            per_chunk = config.chunk_size // config.group_size
            store.collect(ids[group // per_chunk], torch.full_like(group, head), group % per_chunk, out)
            brought.append(out)
        kept.append(brought)
        return torch.tensor([out.data_ptr() for out in brought]).to(DEVICE)

    query, keys, values = random_step(2, HEADS, REPEATS, 24, dtype)
    expected = attend_decode(query, keys, values, made, counts, config, 0.3)
    by_address = kernels.attend_decode(query, keys, values, made, counts, config, 0.3)
    made.slots.forget()
    made.addresses.zero_()
    assert torch.equal(attend_decode(query, keys, values, made, counts, config, 0.3, None, None, bring), expected)
    brought = kernels.attend_decode(query, keys, values, made, counts, config, 0.3, None, None, bring)
    assert torch.equal(brought, by_address)
    assert any(map(any, found))


def test_a_saved_archive_decodes_by_kernels_before_all_of_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if DEVICE == "cpu":
        monkeypatch.setattr(layer, "kernels_serve", serve)
        monkeypatch.setattr(MemoryStore, "gpu_readable", property(lambda self: True))
    whole, lazy = (HGALayer(CONFIG, 0, SHAPE, Handshake()) for _ in range(2))
    prompt = random_tokens(1, 174)
    for one in (whole, lazy):
        attend(one, *prompt)
    (memory,) = whole._stores
    ids = whole.rows[0].archive.chunks
    records, order = memory.read(ids, torch.device("cpu"))
    raw = records.contiguous().view(torch.uint8).view(-1)

    def read(firsts: Sequence[int], targets: Sequence[memoryview]) -> None:
        for first, target in zip(firsts, targets, strict=True):
            start = first * memory.layout.group_bytes
            target[:] = raw[start : start + len(target)].numpy().tobytes()

    assert order is not None
    filled = LazyStore(memory.layout, len(ids), order.to(torch.int16), 1, read, torch.device(DEVICE))
    lazy._stores[:] = [filled]
    lazy.rows[0].archive.store = filled
    lazy.rows[0].archive.chunks = list(range(len(ids)))
    missing = []
    for step in range(4):
        if step == 2:
            filled.fill(lazy.rows[0].archive.chunks)
        missing.append(filled.missing_bytes)
        assert lazy.can_begin_token()
        assert lazy.can_capture_token() == (step >= 2)
        token = random_tokens(1, 1)
        assert torch.equal(attend(whole, *token), attend(lazy, *token))
    assert missing[0] > missing[1] > 0 == missing[2]


# ---- faults --------------------------------------------------------------------------------------------


def test_a_step_whose_read_fails_is_taken_back_and_the_next_one_is_right() -> None:
    pair = Pair(CONFIG)
    pair.feed(1, 174)
    pair.feed(1, 1)
    pair.settle()
    token, broken = random_tokens(1, 1), [True]
    assert pair.store._files.reader is not None

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        if broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)

    pair.store._files.reader._preadv = preadv
    one = pair.nvme
    for _ in range(2):
        assert one.can_begin_token()
        one.begin_token(one.get_seq_length() + 1)
        one._decoding.active = True
        with pytest.raises(OSError, match="Input/output error"):
            attend(one, *token)
        one._decoding.active = False
        one.abandon_token()
    broken.clear()
    assert torch.equal(attend(one, *token), attend(pair.ram, *token))
    pair.feed(1, 1)


def test_what_was_assigned_before_a_failure_is_not_taken_for_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(CONFIG)
    pair.feed(1, 174)
    pair.feed(1, 1)
    with monkeypatch.context() as patched:

        def interrupt(*args: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(NvmeStore, "collect", interrupt)
        decoder = pair.nvme._decoder
        assert decoder is not None
        decoder.forget()
        with pytest.raises(KeyboardInterrupt):
            attend(pair.nvme, *random_tokens(1, 1))
        assert decoder._layer is not None
        assert (decoder._layer.slots.slot_of == -1).all()
    with pytest.raises(RuntimeError, match="interrupted"):
        attend(pair.nvme, *random_tokens(1, 1))


def test_room_for_groups_is_shared_and_grows() -> None:
    decoding, device = Decoding(), torch.device("cpu")
    decoding._on(device, 1)
    first = decoding.room_for_groups(10, device)
    assert decoding.room_for_groups(1 << 20, device) is first
    assert decoding.room_for_groups((1 << 20) + 1, device).bytes.numel() == 1 << 21


# ---- whole models --------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
}


def test_a_model_says_that_it_decodes_without_a_graph(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hga.integrations.transformers.step._can_capture", lambda model: False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).to(DEVICE).eval()
    ids = torch.randint(1, 64, (1, 123), device=DEVICE)
    logits = []
    for store in ("ram", "nvme"):
        config = CONFIG.replace(store=store, ram_cache_bytes=None if store == "ram" else 1)
        with torch.no_grad(), hga.enabled(model, config), caplog.at_level(logging.INFO, "hga"):
            cache = hga.HGACache(config=model.config, hga_config=config)
            steps = [model(ids[:, :120], past_key_values=cache).logits[:, -1:]]
            caplog.clear()
            steps += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(120, 123)]
        assert cache.stepper is not None
        assert cache.can_capture_token() == (store == "ram")
        assert ("the host brings" in caplog.text) == (store == "nvme")
        assert caplog.text.count("the host brings") <= 1
        logits.append(torch.cat(steps, 1))
    assert torch.equal(*logits)


BIG = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 65536,
}


@pytest.fixture(scope="module")
def big_model() -> Callable[[torch.dtype], Any]:
    def make(dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**BIG)).to("cuda", dtype).eval()
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:  # attention that tells tokens apart
                parameter.data.mul_(4)
        return model

    return make


@torch.no_grad()
def read_and_decode(model: Any, config: HGAConfig, ids: Tensor, steps: int) -> tuple[Tensor, Any]:
    """Logits of all steps of two turns, with a crop between them."""
    logits = []
    with hga.enabled(model, config):
        cache = hga.HGACache(config=model.config, hga_config=config)
        logits.append(model(ids[:, :1200], past_key_values=cache).logits[:, -1:])
        for at in range(1200, 1200 + steps // 2):
            logits.append(model(ids[:, at : at + 1], past_key_values=cache).logits)
        cache.crop(-steps // 4)
        logits.append(model(ids[:, 100:700], past_key_values=cache).logits[:, -1:])
        for at in range(steps // 2):
            logits.append(model(ids[:, at : at + 1], past_key_values=cache).logits)
    return torch.cat(logits, 1), cache


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", ["balanced", "fidelity", "lean", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_200_steps_on_a_gpu_have_the_bits_of_ram(
    preset: str,
    dtype: torch.dtype,
    batch: int,
    big_model: Callable[[torch.dtype], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Under a graph the libraries may choose another matrix product, which is no matter of the store.
    monkeypatch.setattr("hga.integrations.transformers.step._can_capture", lambda model: False)
    model = big_model(dtype)
    ids = torch.randint(1, 512, (batch, 1600), device="cuda")
    routed = {"prefill": "routed", "budget_tokens": 256, "block_tokens": 512}
    ram, _ = read_and_decode(model, HGAConfig.preset(preset, **routed), ids, 200)
    for store, cache_bytes in (("nvme", 1), ("nvme", 1 << 20), ("auto", 1 << 20), ("auto", None)):
        config = HGAConfig.preset(preset, **routed, store=store, ram_cache_bytes=cache_bytes)
        nvme, cache = read_and_decode(model, config, ids, 200)
        assert torch.equal(ram, nvme)
        assert cache.stepper is not None, "kernels decoded"
        assert cache.stepper._graph is None
        assert cache.stats().storage.ram_hits + cache.stats().storage.ram_misses > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_beams_and_prompt_lookup_on_a_gpu_are_those_of_ram(big_model: Callable[[torch.dtype], Any]) -> None:
    model = big_model(torch.float32)
    ids = torch.randint(1, 512, (1, 900), device="cuda")
    asked = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    base = HGAConfig.preset("balanced", prefill="routed", budget_tokens=256, block_tokens=512)
    for more in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        written = []
        for config in (base, base.replace(store="nvme", ram_cache_bytes=1 << 19)):
            with hga.enabled(model, config):
                written.append(model.generate(ids, **asked, **more))
        assert torch.equal(*written)
