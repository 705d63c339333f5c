"""Saved contexts: what was read once answers later questions, in this process and in others, as if read again."""

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import families
import pytest
import torch
from asking import answer, new_cache, read
from rows import SMALL
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

import hga
from hga.cache import HGACache, HGALayer
from hga.cache.saved import read_context, verify_context
from hga.cache.saved.file import PAGE_BYTES
from hga.store import LazyStore

DOCUMENT = families.prompt(417)
QUESTION = families.prompt(50, seed=1)
PROMPT = torch.cat([DOCUMENT, QUESTION], 1)
NAMES = ["llama", "gemma2", "gpt_oss", "qwen3_next", "qwen2-sliding"]
CONFIGS = {
    "one level": SMALL,
    "two levels, fp8": SMALL.replace(node_size=16, overselection=2, summary_dtype="fp8"),
    "coded": SMALL.replace(node_size=16, overselection=2, coded=True),
    "by position": SMALL.replace(ordering="position", summary="mixed_rope", far_field=False),
    "a dense layer": SMALL.replace(dense_layers=(0,)),
}


def save(model: PreTrainedModel, path: Path, config: hga.HGAConfig = SMALL, ids: Tensor = DOCUMENT) -> HGACache:
    """Read and save; returns the cache that was saved."""
    cache = new_cache(model, config)
    read(model, ids, cache)
    cache.save(path, model, ids)
    return cache


def stores(cache: HGACache) -> list[LazyStore]:
    return [layer._stores[0] for layer in cache.layers if isinstance(layer, HGALayer)]


def missing(cache: HGACache) -> int:
    """Bytes of records that nobody has asked for yet."""
    return sum(store.missing_bytes for store in stores(cache))


def no_report(done_bytes: int, all_bytes: int) -> None:
    assert 0 < done_bytes <= all_bytes


# ---- the same answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("store", [None, "ram", "device", "nvme", "auto"])
def test_a_loaded_context_answers_as_the_cache_that_was_saved(name: str, store: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.hga"
    with hga.enabled(families.shared(name), SMALL) as model:
        cache = save(model, path)
        expected = answer(model, PROMPT, cache)
    verify_context(path, no_report)
    with hga.enabled(families.shared(name), SMALL.replace(store=store or "ram")) as model:
        loaded = HGACache.load(path, model, store=store)
        assert loaded.loaded_ids == tuple(DOCUMENT[0].tolist())
        assert loaded.get_seq_length() == 417
        assert torch.equal(answer(model, PROMPT, loaded), expected)
        assert loaded.stats().store_bytes > 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_layout(config: hga.HGAConfig, tmp_path: Path) -> None:
    path = tmp_path / "a.hga"
    with hga.enabled(families.shared("llama"), config) as model:
        cache = save(model, path, config)
        loaded = HGACache.load(path, model)
        assert loaded.hga_config == config
        assert torch.equal(answer(model, PROMPT, loaded), answer(model, PROMPT, cache))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    path, config = tmp_path / "a.hga", SMALL.replace(summary_dtype="auto")
    with hga.enabled(families.build("llama").to(dtype), config) as model:
        cache = save(model, path, config)
        assert torch.equal(answer(model, PROMPT, HGACache.load(path, model)), answer(model, PROMPT, cache))


def test_a_file_that_was_written_before_a_config_field_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, to_json = tmp_path / "a.hga", hga.HGAConfig.to_json

    def to_older_json(config: hga.HGAConfig) -> str:
        fields = json.loads(to_json(config))
        del fields["node_budget_tokens"]
        return json.dumps(fields, sort_keys=True)

    with hga.enabled(families.shared("llama"), SMALL) as model:
        with monkeypatch.context() as older:
            older.setattr(hga.HGAConfig, "to_json", to_older_json)
            cache = save(model, path)
        assert b"node_budget_tokens" not in path.read_bytes()
        verify_context(path, no_report)
        assert read_context(path).config == SMALL
        assert torch.equal(answer(model, PROMPT, HGACache.load(path, model)), answer(model, PROMPT, cache))


@pytest.mark.parametrize("tokens", [1, 30, 90])
def test_a_short_context_without_records(tokens: int, tmp_path: Path) -> None:
    path, ids = tmp_path / "a.hga", families.prompt(tokens)
    with hga.enabled(families.shared("gemma2"), SMALL) as model:
        cache = save(model, path, ids=ids)
        verify_context(path, no_report)
        prompt = torch.cat([ids, QUESTION], 1)
        loaded = HGACache.load(path, model)
        assert torch.equal(answer(model, prompt, loaded), answer(model, prompt, cache))


def test_answers_come_before_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.hga"
    ids = families.prompt(1900)
    with hga.enabled(families.shared("llama"), SMALL) as model:
        cache = save(model, path, ids=ids)
        loaded = HGACache.load(path, model)
        records = read_context(path).record_bytes
        assert missing(loaded) == records > 400_000
        fork = loaded.fork()
        assert torch.equal(read(model, QUESTION[:, :1], loaded), read(model, QUESTION[:, :1], cache))
        assert 0.5 * records < missing(loaded) < records
        assert missing(fork) == missing(loaded)  # what one has read, the others need not read
        assert HGACache.load(path, model, store="ram").layers[0]._stores[0].gpu_readable is False  # no GPU here
        assert missing(HGACache.load(path, model, store="ram")) == 0


@pytest.mark.parametrize("store", ["nvme", "auto"])
@pytest.mark.parametrize("cache_bytes", [1, 1 << 16, None])
def test_a_disks_store_reads_the_saved_file_where_it_is(store: str, cache_bytes: int | None, tmp_path: Path) -> None:
    path = tmp_path / "a.hga"
    with hga.enabled(families.shared("llama"), SMALL) as model:
        cache = save(model, path)
        raw = path.read_bytes()
        expected = answer(model, PROMPT, cache.fork())
        longer = torch.cat([PROMPT, families.prompt(300, seed=2)], 1)
        longer_expected = answer(model, longer, cache)
    config = SMALL.replace(store=store, ram_cache_bytes=cache_bytes)
    with hga.enabled(families.shared("llama"), config) as model:
        loaded = HGACache.load(path, model, store=store, ram_cache_bytes=cache_bytes)
        stats = loaded.stats().storage
        assert stats is not None
        assert (stats.read_bytes, stats.written_bytes) == (0, 0)
        first, second = loaded.fork(), loaded.fork()
        assert torch.equal(answer(model, PROMPT, first), expected)
        stats = loaded.stats().storage
        assert stats.read_bytes > 0
        assert stats.written_bytes + stats.queued_bytes < read_context(path).record_bytes / 4  # new chunks alone
        assert torch.equal(answer(model, longer, second), longer_expected)  # closes chunks behind the saved ones
        stats = loaded.stats().storage
        assert stats.written_bytes + stats.queued_bytes > 0
        assert torch.equal(answer(model, PROMPT, loaded), expected)
        second.keep_first(longer.shape[1])
        second.save(tmp_path / "b.hga", model, longer)
        assert path.read_bytes() == raw
    with hga.enabled(families.shared("llama"), SMALL.replace(store="nvme")) as model:
        again = HGACache.load(tmp_path / "b.hga", model, store="nvme")
        assert again.get_seq_length() == longer.shape[1]
        again.keep_first(300)  # reopens saved chunks
        assert torch.equal(answer(model, PROMPT, again), expected)


def test_records_whose_pieces_are_no_pages_are_copied(tmp_path: Path) -> None:
    path = tmp_path / "a.hga"
    with hga.enabled(families.shared("llama"), SMALL) as model:
        expected = answer(model, PROMPT, save(model, path))
    with hga.enabled(families.shared("llama"), SMALL.replace(store="nvme")) as model, pytest.MonkeyPatch.context() as p:
        p.setattr("hga.cache.saved.load.PAGE_BYTES", 1 << 20)
        loaded = HGACache.load(path, model, store="nvme")
        stats = loaded.stats().storage
        assert stats is not None
        assert stats.written_bytes + stats.queued_bytes > 0
        assert torch.equal(answer(model, PROMPT, loaded), expected)


def test_crop_and_keep_common_on_a_loaded_context(tmp_path: Path) -> None:
    path = tmp_path / "a.hga"
    with hga.enabled(families.shared("llama"), SMALL) as model:
        save(model, path)
        for shared in (0, 1, 100, 416, 417):
            prompt = torch.cat([DOCUMENT[:, :shared], QUESTION], 1)
            loaded = HGACache.load(path, model)
            assert loaded.keep_common(prompt[0].tolist()) == shared
            assert torch.equal(answer(model, prompt, loaded)[:, 0], answer(model, prompt, new_cache(model))[:, 0])
        loaded = HGACache.load(path, model)
        assert loaded.keep_common(DOCUMENT[0].tolist()) == 416  # a token is left to read
        assert loaded.loaded_ids == tuple(DOCUMENT[0, :416].tolist())
        loaded.keep_first(400)
        read(model, QUESTION[:, :17], loaded)  # as long as it was, and another text
        with pytest.raises(ValueError, match="400 ids are not those of the 417 tokens"):
            loaded.keep_common(PROMPT[0].tolist())


def test_the_size_of_the_ram_cache_stays_with_the_machine(tmp_path: Path) -> None:
    path, config = tmp_path / "a.hga", SMALL.replace(store="nvme", ram_cache_bytes=1 << 16)
    with hga.enabled(families.shared("llama"), config) as model:
        save(model, path, config)
        assert HGACache.load(path, model).hga_config == config.replace(ram_cache_bytes=None)
        assert HGACache.load(path, model, store="ram").hga_config == SMALL


def test_what_cannot_go_back_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.hga"
    with hga.enabled(families.shared("gemma2"), SMALL) as model:
        save(model, path)
        loaded = HGACache.load(path, model)
        assert loaded.fork().keep_common(PROMPT[0].tolist()) == 417
        prompt = torch.cat([DOCUMENT[:, :400], QUESTION], 1)
        assert loaded.keep_common(prompt[0].tolist()) == 0
        assert torch.equal(answer(model, prompt, loaded), answer(model, prompt, new_cache(model)))


# ---- several at once ---------------------------------------------------------------------------------------


def test_questions_on_one_context_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.hga"
    before = None
    with hga.enabled(families.shared("llama"), SMALL) as model:
        save(model, path)
        before = path.read_bytes()
        first, second = HGACache.load(path, model), HGACache.load(path, model)
        caches = [first, first.fork(), second, second.fork()]
        fed = [families.prompt(60, seed=seed) for seed in range(4)]
        for start in range(0, 60, 20):
            logits = [read(model, ids[:, start : start + 20], cache) for ids, cache in zip(fed, caches, strict=True)]
        del first, second
        for ids, last in zip(fed, logits, strict=True):
            alone = HGACache.load(path, model, store="ram")
            for start in range(0, 60, 20):
                expected = read(model, ids[:, start : start + 20], alone)
            assert torch.equal(last, expected)
    assert path.read_bytes() == before


def test_another_process_answers_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.hga"
    script = (
        "import sys, torch, families, hga\n"
        "from asking import answer\n"
        "from rows import SMALL\n"
        "with hga.enabled(families.shared('llama'), SMALL) as model:\n"
        "    cache = hga.HGACache.load(sys.argv[1], model)\n"
        "    ids = torch.tensor([[*cache.loaded_ids, *families.prompt(50, seed=1)[0].tolist()]])\n"
        "    print(answer(model, ids, cache)[:, 0].long().tolist())\n"
    )
    with hga.enabled(families.shared("llama"), SMALL) as model:
        expected = answer(model, PROMPT, save(model, path))[:, 0].long().tolist()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    runs = [
        subprocess.Popen([sys.executable, "-c", script, path], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for run in runs:
        assert json.loads(run.communicate(timeout=120)[0]) == expected
        assert run.returncode == 0


def test_a_loaded_context_is_extended_and_saved_over_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.hga"
    with hga.enabled(families.shared("llama"), SMALL) as model:
        save(model, path)
        loaded = HGACache.load(path, model)
        other = HGACache.load(path, model)  # still reads the old file, which no name leads to any more
        read(model, QUESTION, loaded)
        loaded.save(path, model, PROMPT, suffix="the end")
        assert (read_context(path).tokens, read_context(path).suffix) == (467, "the end")
        longer = torch.cat([PROMPT, families.prompt(40, seed=2)], 1)
        expected = answer(model, longer, loaded)
        again = HGACache.load(path, model)
        assert torch.equal(answer(model, longer, again), expected)
        assert other.get_seq_length() == 417
        read(model, QUESTION, other)
        assert torch.equal(answer(model, longer, other), expected)
    assert os.listdir(tmp_path) == ["a.hga"]


def test_files_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "a.hga"

    def open_files() -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(path) for fd in os.listdir("/proc/self/fd"))

    with hga.enabled(families.shared("llama"), SMALL) as model:
        save(model, path)
        gc.disable()
        try:
            loaded = HGACache.load(path, model)
            fork = loaded.fork()
            assert open_files() == 1
            loaded.reset()
            del loaded
            assert open_files() == 1
            read(model, QUESTION, fork)
            del fork
            assert open_files() == 0
            whole = HGACache.load(path, model, store="ram")
            assert open_files() == 0
            assert whole.get_seq_length() == 417
        finally:
            gc.enable()


# ---- the format --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_it_is_a_safetensors_file_of_aligned_records(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.hga"
    odd = SMALL.replace(chunk_size=24, ordering="position")  # records of no whole number of pages
    with hga.enabled(families.shared(name), odd) as model:
        cache = save(model, path, odd)
    saved = read_context(path)
    assert len(saved.file.header) % PAGE_BYTES == 0
    assert saved.record_bytes == cache.stats().store_bytes
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(saved.file.specs)
        assert file.get_tensor("token_ids").tolist() == DOCUMENT[0].tolist()
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, HGALayer):
                name = f"layers.{index}.records"
                assert saved.file.offsets[name] % PAGE_BYTES == 0
                archive = layer.rows[0].archive
                assert torch.equal(file.get_tensor(name), archive.store.read(archive.chunks)[0])
                assert (
                    saved.file.specs[name].size_bytes % PAGE_BYTES == 0 or f"layers.{index}.padding" in saved.file.specs
                )
    config = json.loads(safe_open(path, "pt").metadata()["config"])
    assert hga.HGAConfig(**config) == odd


def test_info_reads_the_header_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.hga"
    with hga.enabled(families.shared("llama"), SMALL) as model:
        save(model, path)
    saved = read_context(path)
    assert (saved.tokens, saved.config, len(saved.layers)) == (417, SMALL, 2)
    assert saved.size_bytes == path.stat().st_size
    with path.open("r+b") as file:  # what it did not need to read, it did not read
        file.seek(saved.file.offsets["layers.0.records"])
        file.write(b"damage")
    assert read_context(path).tokens == 417


# ---- one model, and no other -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks for it
def test_a_model_with_an_active_adapter_is_another_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    path, adapted_path = tmp_path / "plain.hga", tmp_path / "adapted.hga"
    model = families.build("llama")
    with hga.enabled(model, SMALL):
        save(model, path)
        expected = answer(model, PROMPT, HGACache.load(path, model))
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    with hga.enabled(model, SMALL):
        with pytest.raises(ValueError, match=r"other weights .* another active adapter"):
            HGACache.load(path, model)
        save(model, adapted_path)
        HGACache.load(adapted_path, model)
        with adapted.disable_adapter():  # off, it is the model that it was
            assert torch.equal(answer(model, PROMPT, HGACache.load(path, model)), expected)
            with pytest.raises(ValueError, match="other weights"):
                HGACache.load(adapted_path, model)
        adapted.add_adapter("second", settings)
        adapted.set_adapter("second")
        with pytest.raises(ValueError, match="other weights"):
            HGACache.load(adapted_path, model)
    plain = families.build("llama")
    with hga.enabled(plain, SMALL):
        HGACache.load(path, plain)
    merged = peft.get_peft_model(plain, settings).merge_and_unload()  # the same tensors, changed behind their backs
    with hga.enabled(merged, SMALL), pytest.raises(ValueError, match="other weights"):
        HGACache.load(path, merged)
    merged = adapted.merge_and_unload()
    with hga.enabled(merged, SMALL), pytest.raises(ValueError, match="other weights"):
        HGACache.load(path, merged)


@torch.no_grad()
def test_one_changed_weight_is_another_model(tmp_path: Path) -> None:
    path = tmp_path / "a.hga"
    model = families.build("llama")
    with hga.enabled(model, SMALL):
        save(model, path)
        weight = model.model.layers[1].mlp.up_proj.weight
        before = weight[3, 5].item()
        weight[3, 5] += 1e-6
        with pytest.raises(ValueError, match="other weights of the same architecture"):
            HGACache.load(path, model)
        weight[3, 5] = before
        HGACache.load(path, model)


# ---- what cannot be saved ----------------------------------------------------------------------------------


def test_bad_calls(tmp_path: Path) -> None:
    path = tmp_path / "a.hga"
    with hga.enabled(families.shared("llama"), SMALL) as model:
        cache = new_cache(model)
        with pytest.raises(ValueError, match="an empty cache cannot be saved"):
            cache.save(path, model, [])
        read(model, DOCUMENT, cache)
        with pytest.raises(ValueError, match=r"shape \(416,\) are not those of this cache, which holds 417"):
            cache.save(path, model, DOCUMENT[0, 1:])
        with pytest.raises(ValueError, match="built for another model"):
            cache.save(path, families.shared("qwen3"), DOCUMENT)
        with pytest.raises(FileNotFoundError, match="there is no saved context at"):
            HGACache.load(path, model)
        cache.save(path, model, DOCUMENT)
        with pytest.raises(ValueError, match="store='nvm' must be one of ram, device"):
            HGACache.load(path, model, store="nvm")
        path.unlink()
        batch = new_cache(model)
        read(model, families.prompt(40, rows=2), batch)
        with pytest.raises(ValueError, match="only a cache of one sequence can be saved, this one has 2 rows"):
            batch.save(path, model, families.prompt(40))
        padded = new_cache(model)
        mask = torch.ones(1, 41, dtype=torch.long)
        mask[0, 0] = 0
        with torch.no_grad():
            model(families.prompt(41), attention_mask=mask, position_ids=mask.cumsum(1), past_key_values=padded)
        with pytest.raises(ValueError, match="holds padding cannot be saved"):
            padded.save(path, model, families.prompt(41))
        cache.update(torch.zeros(1, 2, 3, 8).double(), torch.zeros(1, 2, 3, 8).double(), 0)
        with pytest.raises(RuntimeError, match="neither forked nor saved in the middle"):
            cache.save(path, model, families.prompt(420))
    assert os.listdir(tmp_path) == []


# ---- the default model -------------------------------------------------------------------------------------


@pytest.mark.weights
def test_a_question_starts_soon_on_real_weights(default_model, tmp_path: Path) -> None:
    from importlib.resources import files

    model, tokenizer = default_model
    path, config = tmp_path / "a.hga", hga.HGAConfig(budget_tokens=128)
    text = (files("hga.data") / "thursday.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :1000]
    question = tokenizer("\n\nThe man with the red hair", return_tensors="pt").input_ids
    prompt = torch.cat([ids, question], 1)
    with hga.enabled(model, config):
        save(model, path, config, ids)
        started = time.perf_counter()
        fresh = new_cache(model, config)
        read(model, ids, fresh)
        expected = answer(model, prompt, fresh.fork(), tokens=1)
        with_prefill = time.perf_counter() - started
        started = time.perf_counter()
        loaded = HGACache.load(path, model)
        assert missing(loaded) == read_context(path).record_bytes
        first = answer(model, prompt, loaded.fork(), tokens=1)
        reused = time.perf_counter() - started
        assert torch.equal(first[:, 0], expected[:, 0])
        longer = answer(model, prompt, loaded, tokens=12)
        assert torch.equal(longer[:, 0], answer(model, prompt, fresh, tokens=12)[:, 0])
    assert reused < with_prefill / 4  # benchmarks/context_reuse.py: more than 10 at 8K
