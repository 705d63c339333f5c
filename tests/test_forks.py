"""Forks of a cache: several questions about one document, each as if it had read the document itself."""

import copy
import gc
import weakref
from pathlib import Path

import families
import pytest
import torch
from asking import answer, new_cache, read
from rows import SMALL, feed, new_row, random_sequence

import hga
from hga.cache import common_prefix
from hga.cache.summaries import GrowingRows
from hga.ops.precision import Rows

DOCUMENT_TOKENS = 217
NAMES = ["llama", "gemma2", "qwen3_next", "qwen2-sliding"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("store", ["ram", "device"])
def test_questions_on_forks_are_answered_as_by_fresh_caches(name: str, store: str) -> None:
    config = SMALL.replace(store=store)
    document = families.prompt(DOCUMENT_TOKENS)
    prompts = [torch.cat([document, families.prompt(tokens, seed=tokens)], 1) for tokens in (1, 50, 90)]
    with hga.enabled(families.shared(name), config) as model:
        cache = new_cache(model, config)
        read(model, document, cache)
        forks = [cache.fork() for _ in prompts]
        # Each goes some way before the others go on: what one writes, no other sees.
        for fork, prompt in zip(forks, prompts, strict=True):
            alone = new_cache(model, config)
            read(model, document, alone)
            answered = answer(model, prompt, fork)
            assert torch.equal(answered, answer(model, prompt, alone))
            assert torch.equal(answered[:, 0], answer(model, prompt, new_cache(model, config))[:, 0])
        assert torch.equal(answer(model, prompts[2], cache), answered)
        for fork, prompt in zip(forks, prompts, strict=True):
            assert fork.get_seq_length() == prompt.shape[1] + 39


def test_forks_step_by_turns() -> None:
    document = families.prompt(DOCUMENT_TOKENS)
    with hga.enabled(families.shared("llama"), SMALL) as model:
        cache = new_cache(model)
        read(model, document, cache)
        forks, fed = [cache, cache.fork(), cache.fork()], [document] * 3
        for step in range(150):  # chunks of 32 tokens close in all of them
            turn = step % 3
            token = families.prompt(1, seed=step)
            fed[turn] = torch.cat([fed[turn], token], 1)
            logits = read(model, token, forks[turn])
        alone = new_cache(model)
        read(model, fed[2][:, :-1], alone)
        torch.testing.assert_close(logits, read(model, fed[2][:, -1:], alone), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("end", ["reset", "drop", "crop"])
def test_ending_one_does_not_disturb_the_other(end: str) -> None:
    document, question = families.prompt(DOCUMENT_TOKENS), families.prompt(70, seed=1)
    prompt = torch.cat([document, question], 1)
    with hga.enabled(families.shared("llama"), SMALL) as model:
        alone = answer(model, prompt, new_cache(model))
        for original_ends in (True, False):
            cache = new_cache(model)
            read(model, document, cache)
            fork = cache.fork()
            ended, kept = (cache, fork) if original_ends else (fork, cache)
            read(model, question, ended)
            del cache, fork
            if end == "reset":
                ended.reset()
                read(model, families.prompt(90, seed=2), ended)  # a store of its own: not the other's places
            elif end == "crop":
                ended.keep_first(3)
                read(model, families.prompt(90, seed=2), ended)
            else:
                del ended
            assert torch.equal(answer(model, prompt, kept), alone)


def test_memory_comes_back() -> None:
    document = families.prompt(DOCUMENT_TOKENS)
    with hga.enabled(families.shared("llama"), SMALL) as model:
        cache = new_cache(model)
        read(model, document, cache)
        alone_bytes = cache.stats().store_bytes
        fork = cache.fork()
        assert cache.stats().store_bytes == alone_bytes  # nothing is copied
        assert fork.stats().summary_bytes == cache.stats().summary_bytes
        shared = fork.layers[0].rows[0].archive.summaries.node_keys.buffers.data
        assert shared.data_ptr() == cache.layers[0].rows[0].archive.summaries.node_keys.buffers.data.data_ptr()
        read(model, families.prompt(100, seed=1), fork)
        assert cache.stats().store_bytes > alone_bytes
        stores = [weakref.ref(layer._stores[0]) for layer in cache.layers]
        gc.disable()  # what is dropped gives back at once, not when cycles are collected
        try:
            del fork
            assert cache.stats().store_bytes == alone_bytes
            held = cache.fork()
            cache.reset()
            assert held.stats().store_bytes == alone_bytes
            held.reset()
            assert all(store() is None for store in stores)
        finally:
            gc.enable()


def test_a_dropped_row_gives_its_chunks_back_at_the_stores_next_call() -> None:
    sequence = random_sequence(200, seed=0)
    row, opened = new_row(SMALL)
    feed(row, sequence, 0, 200)
    store, held = opened["store"], opened["store"].held_bytes()
    twin = row.fork()
    feed(twin, random_sequence(300, seed=1), 200, 300)
    assert store.held_bytes()["ram"] > held["ram"]
    del twin
    assert store.held_bytes() == held
    row.release()
    assert store.allocated_bytes() == {"ram": 0}


def test_summaries_are_copied_before_either_side_appends() -> None:
    def rows(first: int, last: int) -> Rows:
        numbers = torch.arange(first, last).view(1, -1, 1).expand(2, -1, 3)
        return Rows(numbers.float(), numbers[..., :1].bfloat16())

    held = GrowingRows()
    held.append(rows(0, 90))  # room for some more
    twin = held.fork()
    third = twin.fork()
    assert twin.buffers.data.data_ptr() == held.buffers.data.data_ptr()
    held.append(rows(90, 93))
    twin.append(rows(50, 54))
    third.truncate(80)
    third.append(rows(20, 25))
    for own, expected in (
        (held, range(93)),
        (twin, [*range(90), *range(50, 54)]),
        (third, [*range(80), *range(20, 25)]),
    ):
        data, scale = own.held()
        assert data[1, :, 2].tolist() == list(expected)
        assert scale[0, :, 0].tolist() == list(expected)
    before = held.buffers.data.data_ptr()
    held.append(rows(93, 95))
    assert held.buffers.data.data_ptr() == before  # copied once


def test_a_fork_of_an_empty_cache() -> None:
    prompt = families.prompt(DOCUMENT_TOKENS)
    with hga.enabled(families.shared("llama"), SMALL) as model:
        cache = new_cache(model)
        fork = cache.fork()
        assert torch.equal(answer(model, prompt, fork), answer(model, prompt, cache))


def test_a_batch_is_forked_with_its_rows() -> None:
    rows, question = families.prompt(DOCUMENT_TOKENS, rows=3), families.prompt(40, seed=1, rows=3)
    with hga.enabled(families.shared("llama"), SMALL) as model:
        cache = new_cache(model)
        read(model, rows, cache)
        fork = cache.fork()
        fork.batch_select_indices(torch.tensor([2, 0]))
        part = read(model, question[:2], fork)
        whole = read(model, torch.stack([question[1], question[0], question[0]]), cache)
        torch.testing.assert_close(part, whole[[2, 0]], rtol=1e-9, atol=1e-9)


def test_a_deep_copy_is_a_fork() -> None:
    with hga.enabled(families.shared("llama"), SMALL) as model:
        cache = new_cache(model)
        read(model, families.prompt(DOCUMENT_TOKENS), cache)
        bytes_before = cache.stats().store_bytes
        copied = copy.deepcopy(cache)
        assert copied.stats().store_bytes == bytes_before
        question = families.prompt(5, seed=1)
        assert torch.equal(read(model, question, copied), read(model, question, cache))


def test_no_fork_in_the_middle_of_a_forward() -> None:
    model = families.shared("llama")
    cache = new_cache(model)
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    with pytest.raises(RuntimeError, match="middle of a forward"):
        cache.fork()


# ---- going back to what two prompts share ------------------------------------------------------------------


def test_no_fork_hides_that_a_step_went_wrong() -> None:
    with hga.enabled(families.shared("llama"), SMALL) as model:
        cache = new_cache(model)
        read(model, families.prompt(300), cache)
        cache.decoding._on(torch.device("cpu"), 1).faults[0] = 1  # as a kernel reports it
        with pytest.raises(ValueError, match="hold NaN or infinite numbers"):
            cache.fork()


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == common_prefix([2], [1]) == 0


@pytest.mark.parametrize("kept", [0, 3, 100, DOCUMENT_TOKENS])
def test_keep_first_on_a_fork(kept: int) -> None:
    document = families.prompt(DOCUMENT_TOKENS)
    other = torch.cat([document[:, :kept], families.prompt(150, seed=1)], 1)
    assert common_prefix(document[0].tolist(), other[0].tolist()) == kept
    with hga.enabled(families.shared("llama"), SMALL) as model:
        cache = new_cache(model)
        read(model, document, cache)
        fork = cache.fork()
        fork.keep_first(kept)
        assert torch.equal(answer(model, other, fork)[:, 0], answer(model, other, new_cache(model))[:, 0])
        question = torch.cat([document, families.prompt(9, seed=2)], 1)
        assert torch.equal(answer(model, question, cache), answer(model, question, new_cache(model)))


@pytest.mark.parametrize("name", ["gemma2", "qwen3_next"])
def test_layers_that_cannot_go_back_say_so(name: str) -> None:
    with hga.enabled(families.shared(name), SMALL) as model:
        cache = new_cache(model)
        read(model, families.prompt(DOCUMENT_TOKENS), cache)
        assert cache.can_crop_to(DOCUMENT_TOKENS)
        assert not cache.can_crop_to(DOCUMENT_TOKENS - 1)
        with pytest.raises(ValueError, match=r"cannot go back from 217 to 216.*Read the prompt again"):
            cache.keep_first(DOCUMENT_TOKENS - 1)
        assert {layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length")} == {217}
        cache.keep_first(DOCUMENT_TOKENS)
        with pytest.raises(ValueError, match="holds 217 tokens"):
            cache.keep_first(DOCUMENT_TOKENS + 1)


@pytest.mark.parametrize("store", ["ram", "device", "nvme"])
@pytest.mark.parametrize("kept", [1, 3, 30, 100])
def test_a_fork_that_leaves_a_book_early_takes_little_along(
    store: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HGA_SCRATCH", str(tmp_path))
    config, document = SMALL.replace(store=store), families.prompt(600)
    other = torch.cat([document[:, :kept], families.prompt(150, seed=1)], 1)
    with hga.enabled(families.shared("llama"), config) as model:
        cache = new_cache(model, config)
        read(model, document, cache)
        fork, asked = cache.fork(), list[int]()
        with monkeypatch.context() as patch:
            for layer in cache.routed:
                whole = layer._stores[0].read
                patch.setattr(
                    layer._stores[0], "read", lambda ids, *a, whole=whole: asked.extend(ids) or whole(ids, *a)
                )
            fork.keep_first(kept)
        per_layer = -(-(kept - config.sink_tokens) // config.chunk_size)
        assert len(asked) <= max(0, per_layer) * len(cache.routed)
        shares = fork.routed[0].rows[0].chunks > 0
        assert fork.shares_store(cache) == shares
        assert shares == (kept == 100)
        for one in (fork, cache.fork()):  # no room for more, and nothing of what was left
            row = one.routed[0].rows[0]
            assert row.window_bytes() == 2 * row._keys[:, :1].numel() * row._keys.element_size() * row.near_length
        assert torch.equal(answer(model, other, fork)[:, 0], answer(model, other, new_cache(model, config))[:, 0])
        question = torch.cat([document, families.prompt(9, seed=2)], 1)
        assert torch.equal(answer(model, question, cache), answer(model, question, new_cache(model, config)))
