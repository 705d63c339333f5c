"""Archives on NVMe through the cache: the same tokens and logits bit for bit, and nothing left of a run."""

import copy
import errno
import functools
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import families
import pytest
import rows
import test_parity
import torch
from tiny_model import tiny_model

import hga
from hga import HGACache, HGAConfig
from hga.cache.routed import Tile
from hga.store import NvmeStore

SCENARIOS = {
    name: getattr(test_parity, name) for name in ("plain", "batch", "beam", "assisted", "prompt_lookup", "crop")
}
RULES = {
    "one level": test_parity.SMALL,
    "each head": test_parity.SMALL.replace(selection="per_head", overselection="all", node_size=4, coded=False),
    "by nodes": test_parity.SMALL.replace(prefill="nodes", block_tokens=64, node_budget_tokens=100),
    "by position": test_parity.SMALL.replace(ordering="position", prefill="auto"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HGA_SCRATCH", str(tmp_path))
    return tmp_path


def multi_turn(name, model):
    """Three turns on one cache."""
    cache, ids = None, families.prompt(150)
    for turn in range(3):
        ids = torch.cat([ids, families.prompt(40, seed=turn + 1)], 1)
        outcome = test_parity.generate(model, ids, **({} if cache is None else {"past_key_values": cache}))
        cache, ids = outcome.cache, outcome.tokens
    return outcome


SCENARIOS["multi_turn"] = multi_turn


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_cache_size_gives_the_bits_of_ram(scenario, rule):
    model = families.shared("qwen3")
    with hga.enabled(model, RULES[rule]):
        reference = SCENARIOS[scenario]("qwen3", model)
    for store, cache_bytes in (("nvme", 1), ("nvme", 1 << 16), ("nvme", None), ("auto", 1 << 16), ("auto", None)):
        with hga.enabled(model, RULES[rule].replace(store=store, ram_cache_bytes=cache_bytes)):
            ours = SCENARIOS[scenario]("qwen3", model)
        assert torch.equal(ours.tokens, reference.tokens)
        assert torch.equal(ours.logits, reference.logits)
        stats = ours.cache.stats()
        assert stats.store_bytes == reference.cache.stats().store_bytes > 0
        assert stats.storage is not None
        spilled = store == "nvme" or cache_bytes is not None
        assert (stats.storage.written_bytes + stats.storage.queued_bytes > 0) == spilled


@pytest.mark.weights
def test_the_default_model_writes_the_same_from_ram_and_from_nvme(default_model):
    model, tokenizer = default_model
    text = (Path(hga.__file__).parent / "data" / "thursday.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :900]
    written, logits = {}, {}
    for name, changes in {
        "ram": {},
        "nvme": {"ram_cache_bytes": 1 << 20},
        "auto": {"ram_cache_bytes": 1 << 24},
    }.items():
        config = HGAConfig(budget_tokens=256, prefill="routed", store=name, **changes)
        with hga.enabled(model, config):
            out = test_parity.generate(model, ids, max_new_tokens=4, pad_token_id=0)
        written[name], logits[name] = out.tokens, out.logits
        if name == "nvme":
            stats = out.cache.stats().storage
            assert stats.read_operations > 0
            assert 0 < stats.ram_hit_rate < 1
    assert torch.equal(written["nvme"], written["ram"])
    assert torch.equal(logits["nvme"], logits["ram"])


# ---- faults --------------------------------------------------------------------------------------------

TINY = rows.SMALL.replace(summary_dtype="auto")


@torch.no_grad()
def read(model, cache, ids):
    return model(ids, past_key_values=cache, use_cache=True).logits


def test_a_full_disk_during_prefill_is_a_clear_error_and_the_cache_can_be_read_again(small_disk):
    small_disk(256 << 10)
    model, ids = tiny_model(), torch.arange(1, 401)[None] % 250
    config = TINY.replace(store="nvme", ram_cache_bytes=1)

    def read_on(cache):
        for _ in range(4):
            read(model, cache, ids)

    with hga.enabled(model, config):
        cache = HGACache(config=model.config, hga_config=config)
        with pytest.raises(OSError, match="no room for 4,096 bytes more"):
            read_on(cache)
        assert cache.stats().store_bytes > 200_000
        with pytest.raises(RuntimeError, match="interrupted"):
            read(model, cache, ids)
        cache.reset()
        again = read(model, cache, ids)
    with hga.enabled(model, TINY):
        assert torch.equal(again, read(model, HGACache(config=model.config, hga_config=TINY), ids))


@pytest.mark.parametrize("store", ["nvme", "auto"])
def test_a_prompt_for_which_the_disk_has_no_room_is_refused_before_it_is_read(store, small_disk):
    place = small_disk(256 << 10)
    model, config = tiny_model(), TINY.replace(store=store, ram_cache_bytes=1 << 17, block_tokens=512)
    with hga.enabled(model, config), torch.no_grad():
        cache = HGACache(config=model.config, hga_config=config)
        message = (
            rf"the archive of 1,900 tokens, prompt and answer, needs [\d,]+ bytes in the scratch folder {place}, whose "
        )
        with pytest.raises(
            OSError, match=message + r"disk has [\d,]+ left. Give a shorter prompt.*HGA_SCRATCH"
        ) as caught:
            model(torch.ones(1, 1900, dtype=torch.long), past_key_values=cache)
        assert caught.value.errno == errno.ENOSPC
        assert cache.get_seq_length() == 0
        read(model, cache, torch.ones(1, 600, dtype=torch.long))  # the cache is as before, and this fits
        wanted = sum(layer.growth_bytes(1000, 1, torch.float32) for layer in cache.routed)
        chunk = cache.routed[0]._stores[0]._chunk_bytes
        assert 10 * 2 * chunk < wanted <= 1100 // 32 * 2 * chunk  # less what the files have reserved already
        with pytest.raises(OSError, match="1,000 tokens"):
            cache.check_room(1000)
        cache.check_room(30)


def test_what_stays_in_ram_asks_for_no_disk(small_disk):
    small_disk(64 << 10)
    model, config = tiny_model(), TINY.replace(store="auto", ram_cache_bytes=400_000, block_tokens=512)
    with hga.enabled(model, config), torch.no_grad():
        cache = HGACache(config=model.config, hga_config=config)
        model(torch.ones(1, 1500, dtype=torch.long), past_key_values=cache)
        cache.check_room(30)
        with pytest.raises(OSError, match="needs"):
            cache.check_room(500)


def test_eio_in_a_decode_step_is_a_clear_error_and_never_a_token(monkeypatch):
    model, ids = tiny_model(), torch.arange(1, 401)[None] % 250
    config = TINY.replace(store="nvme", ram_cache_bytes=1)

    def preadv(descriptor, buffers, offset):
        raise OSError(5, os.strerror(5))

    with hga.enabled(model, config):
        cache = HGACache(config=model.config, hga_config=config)
        read(model, cache, ids)
        for layer in cache.routed:
            wait_for(lambda store=layer._stores[0]: not store.traffic.queued_bytes)
            layer._stores[0]._files.reader._preadv = preadv
        with pytest.raises(OSError, match="Input/output error"):
            read(model, cache, ids[:, :1])
        with pytest.raises(RuntimeError, match="interrupted"):
            read(model, cache, ids[:, :1])


def test_a_prefill_that_fails_while_the_next_tiles_groups_come_leaves_a_store_that_can_be_used(monkeypatch):
    model, ids = tiny_model(), torch.arange(1, 601)[None] % 250
    config = TINY.replace(store="nvme", ram_cache_bytes=1, block_tokens=600)
    with hga.enabled(model, TINY):
        wanted = read(model, HGACache(config=model.config, hga_config=TINY), ids)
    attend, begun = Tile.attend, []

    def fail(tile):
        begun.append(any(block.started is not None for block in tile.blocks))
        if len(begun) == 6:
            raise MemoryError("no room for logits")
        return attend(tile)

    with hga.enabled(model, config):
        cache = HGACache(config=model.config, hga_config=config)
        monkeypatch.setattr(Tile, "attend", fail)
        with pytest.raises(MemoryError, match="no room for logits"):
            read(model, cache, ids)
        assert any(begun)  # tiles of the same closed chunks: the second's groups come while the third is routed
        monkeypatch.setattr(Tile, "attend", attend)
        cache.reset()
        assert torch.equal(read(model, cache, ids), wanted)

        def preadv(descriptor, buffers, offset):
            raise OSError(5, os.strerror(5))

        monkeypatch.setattr(NvmeStore, "__init__", functools.partialmethod(NvmeStore.__init__, preadv=preadv))
        with pytest.raises(OSError, match="Input/output error"):
            read(model, HGACache(config=model.config, hga_config=config), ids)


def test_an_interrupt_of_a_prefill_does_not_wait_for_the_device(monkeypatch):
    model, ids = tiny_model(), torch.arange(1, 601)[None] % 250
    config = TINY.replace(store="nvme", ram_cache_bytes=1, block_tokens=600)
    with hga.enabled(model, TINY):
        wanted = read(model, HGACache(config=model.config, hga_config=TINY), ids)
    attend, fetch, inside, released = Tile.attend, NvmeStore.fetch, threading.Event(), threading.Event()

    def interrupt(tile):
        if any(block.started is not None for block in tile.blocks):
            assert inside.wait(20)
            raise KeyboardInterrupt
        return attend(tile)

    def hang(self, ids, groups):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert released.wait(60)
        return fetch(self, ids, groups)

    with hga.enabled(model, config):
        cache = HGACache(config=model.config, hga_config=config)
        monkeypatch.setattr(Tile, "attend", interrupt)
        monkeypatch.setattr(NvmeStore, "fetch", hang)
        with pytest.raises(KeyboardInterrupt):
            read(model, cache, ids)
        assert not released.is_set()  # the fetch is under way still: nobody has waited for it
        monkeypatch.setattr(Tile, "attend", attend)
        released.set()
        cache.reset()
        assert torch.equal(read(model, cache, ids), wanted)


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(5e-3)


def held_files(pid="self"):
    """Names behind a process's file descriptors."""
    names = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        try:
            names.append(os.readlink(f"/proc/{pid}/fd/{entry}"))
        except OSError:  # the listing's own
            continue
    return names


def test_a_killed_run_leaves_no_scratch(folder):
    program = textwrap.dedent(
        """
        import sys, torch
        sys.path.insert(0, sys.argv[1])
        import hga
        from test_nvme import TINY
        from tiny_model import tiny_model
        model, config = tiny_model(), TINY.replace(store="nvme", ram_cache_bytes=1)
        hga.enable(model, config)
        cache = hga.HGACache(config=model.config, hga_config=config)
        with torch.no_grad():
            while True:
                model(torch.ones(1, 64, dtype=torch.long), past_key_values=cache, use_cache=True)
                print("read", flush=True)
                if cache.get_seq_length() > 1500:
                    cache.reset()
        """
    )
    tests = str(Path(__file__).parent)
    child = subprocess.Popen([sys.executable, "-c", program, tests], stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(8):
            assert child.stdout.readline() == "read\n"
        assert any(str(folder) in name for name in held_files(child.pid))
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert list(folder.iterdir()) == []


def test_files_go_with_reset_and_with_the_cache(folder):
    model, config = tiny_model(), TINY.replace(store="nvme", ram_cache_bytes=1)

    def scratches():
        return [name for name in held_files() if str(folder) in name]

    with hga.enabled(model, config):
        cache = HGACache(config=model.config, hga_config=config)
        read(model, cache, torch.ones(1, 300, dtype=torch.long))
        assert len(scratches()) == 2  # one a layer
        cache.reset()
        wait_for(lambda: not scratches())
        read(model, cache, torch.ones(1, 300, dtype=torch.long))
        assert len(scratches()) == 2
        gc.disable()
        try:
            del cache  # without the garbage collector's help
            wait_for(lambda: not scratches())
        finally:
            gc.enable()


def test_a_deep_copy_outlives_its_original():
    model, config = tiny_model(), TINY.replace(store="nvme")
    ids = torch.randint(1, 250, (1, 301))
    with hga.enabled(model, config), torch.no_grad():
        cache = HGACache(config=model.config, hga_config=config)
        read(model, cache, ids[:, :300])
        copied = copy.deepcopy(cache)
        expected = model(ids[:, 300:], past_key_values=cache).logits
        cache.reset()
        assert torch.equal(model(ids[:, 300:], past_key_values=copied).logits, expected)


# ---- configuration -------------------------------------------------------------------------------------


def test_the_ram_cache_is_shared_by_the_layers():
    model, config = tiny_model(), TINY.replace(store="nvme", ram_cache_bytes=1 << 20)
    with hga.enabled(model, config):
        cache = HGACache(config=model.config, hga_config=config)
        read(model, cache, torch.ones(1, 300, dtype=torch.long))
    stores = [layer._stores[0] for layer in cache.routed]
    assert all(isinstance(store, NvmeStore) for store in stores)
    assert [store._cached.cache.slots * store._cached.cache.piece_bytes for store in stores] == [1 << 19] * 2


def test_ram_cache_bytes_is_checked():
    with pytest.raises(TypeError, match=r"ram_cache_bytes=0.5 must be an integer number of bytes"):
        HGAConfig(store="nvme", ram_cache_bytes=0.5)
    with pytest.raises(ValueError, match="ram_cache_bytes=0 must be at least 1"):
        HGAConfig(store="auto", ram_cache_bytes=0)
    with pytest.raises(ValueError, match="has no meaning with store='ram'"):
        HGAConfig(ram_cache_bytes=1)
    config = HGAConfig(store="auto", ram_cache_bytes=1 << 30)
    assert HGAConfig.from_json(config.to_json()) == config
