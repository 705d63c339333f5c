"""What goes wrong while the server answers: full memory, damaged files, and what answers must not leave behind."""

import errno
import json
import os
import sys
import time
import weakref
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import torch

pytest.importorskip("fastapi")
from server import SMALL, Running, model_and_tokenizer, serving
from tiny_model import byte_tokenizer, tiny_model

import hga
from hga.cache import layer
from hga.cache.saved import read_context
from hga.integrations.transformers import step
from hga.serving.answer import Answer, Request
from hga.serving.contexts import find_saved
from hga.store import MemoryStore
from hga.store.host import HostRoomError, return_freed_memory


def complete(server: Running, prompt: str, **fields: Any) -> httpx.Response:
    body = {"model": "served", "prompt": prompt, "max_tokens": 6, "temperature": 0} | fields
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def cached(server: Running, prompt: str) -> int:
    return int(complete(server, prompt, max_tokens=1).json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def generated(server: Running, text: str, tokens: int = 6) -> str:
    server.wait_until_idle()
    prompt = torch.tensor([server.tokenizer(text).input_ids])
    out = server.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
    return str(server.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))


def test_a_request_without_room_costs_the_oldest_contexts_and_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(*model_and_tokenizer(), SMALL) as server:
        one_bytes = 0
        for letter in "abcd":
            complete(server, letter * 500)
            one_bytes = one_bytes or sum(server.contexts.held_bytes().values())
        check_room = hga.HGACache.check_room
        asked = []

        def refuse(cache: Any, tokens: int, **options: Any) -> None:
            if tokens >= 600:  # the long prompt: half a context too much, until one has gone
                asked.append(tokens)
                if server.contexts.evictions == 0:
                    raise HostRoomError("the archive needs too much", one_bytes // 2)
            check_room(cache, tokens, **options)

        monkeypatch.setattr(hga.HGACache, "check_room", refuse)
        answer = complete(server, "z" * 600)
        assert answer.json()["choices"][0]["text"] == generated(server, "z" * 600)
        assert len(asked) == 2
        assert cached(server, "d" * 500) == cached(server, "b" * 500) == 499
        assert cached(server, "a" * 500) == 0


def test_a_request_that_never_fits_costs_nobody_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(*model_and_tokenizer(), SMALL) as server:
        complete(server, "a" * 500)
        held = sum(server.contexts.held_bytes().values())
        check_room = hga.HGACache.check_room

        def refuse(cache: Any, tokens: int, **options: Any) -> None:
            if tokens >= 600:
                raise HostRoomError("the archive needs far too much", held + 1)
            check_room(cache, tokens, **options)

        monkeypatch.setattr(hga.HGACache, "check_room", refuse)
        assert complete(server, "z" * 600).status_code == 503
        assert cached(server, "a" * 500) == 499


def test_room_is_asked_for_the_answer_as_for_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an answer would end in the middle, on a disk or in a host that held its prompt."""
    model, tokenizer = model_and_tokenizer()
    prompt = tokenizer("a" * 100).input_ids

    def begin(max_tokens: int) -> Answer:
        cache = hga.HGACache(config=model.config, hga_config=SMALL)
        return Answer(model, tokenizer, cache, Request(prompt, max_tokens))

    wanted = []
    monkeypatch.setattr("hga.cache.cache.check_host_room", lambda size_bytes, purpose: wanted.append(size_bytes))
    begin(1)
    begin(400)
    per_token = 2 * model.config.num_key_value_heads * model.config.head_dim * model.dtype.itemsize
    assert wanted[1] - wanted[0] >= 399 // SMALL.chunk_size * SMALL.chunk_size * per_token

    def refuse(size_bytes: int, purpose: str) -> None:
        if size_bytes > wanted[0]:
            raise HostRoomError("the archive needs too much", size_bytes - wanted[0])

    monkeypatch.setattr("hga.cache.cache.check_host_room", refuse)
    begin(1)
    with pytest.raises(HostRoomError, match="needs too much"):
        begin(400)


def test_a_disk_without_room_is_told_as_such_and_old_contexts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(*model_and_tokenizer(), SMALL) as server:
        complete(server, "a" * 300)
        check = hga.HGACache.check_room
        refusals = [OSError(errno.ENOSPC, "the archive needs more than the disk has")] * 2

        def refuse(self: hga.HGACache, *args: Any, **kwargs: Any) -> None:
            if refusals:
                raise refusals.pop()
            check(self, *args, **kwargs)

        monkeypatch.setattr(hga.HGACache, "check_room", refuse)
        answer = complete(server, "b" * 300)  # refused, and begun anew without the context that was kept; refused again
        assert answer.status_code == 503
        assert "lower max_tokens" in answer.json()["error"]["message"]
        assert complete(server, "b" * 300).status_code == 200
        assert cached(server, "a" * 300) == 0


def test_a_long_answer_that_may_end_soon_asks_for_a_share_of_its_room_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_and_tokenizer()
    wanted = []
    monkeypatch.setattr("hga.cache.cache.check_host_room", lambda size_bytes, purpose: wanted.append(size_bytes))
    for max_tokens in (1024, 100_000):
        cache = hga.HGACache(config=model.config, hga_config=SMALL)
        Answer(model, tokenizer, cache, Request(tokenizer("a" * 100).input_ids, max_tokens))
    assert wanted[0] == wanted[1]


@pytest.mark.parametrize("kind", ["python", "torch on a CPU"])
def test_memory_that_ends_in_a_forward_costs_half_of_what_is_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(*model_and_tokenizer(), SMALL) as server:
        for letter in "abcd":
            complete(server, letter * 500)
        forward, kept = server.model.forward, len(server.contexts)

        def fail(input_ids: Any, **kwargs: Any) -> Any:
            if 0 in input_ids:
                if kind == "python":
                    raise MemoryError("no room")
                torch.empty(1 << 48)  # PyTorch's own words for it
            return forward(input_ids, **kwargs)

        monkeypatch.setattr(server.model, "forward", fail)
        body = {"model": "served", "prompt": [*range(5, 200), 0], "max_tokens": 3}
        refused = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert refused.status_code == 503
        assert "not enough memory" in refused.text
        assert 0 < len(server.contexts) < kept
        assert cached(server, "d" * 500) == 499


def saved_document(folder: Path, model: Any, tokenizer: Any) -> tuple[str, Path]:
    document = "a document that was saved, and damaged since; " * 14
    ids = tokenizer(document).input_ids
    with hga.enabled(model, SMALL), torch.no_grad():
        cache = hga.HGACache(config=model.config, hga_config=SMALL)
        model(torch.tensor([ids]), past_key_values=cache)
        cache.save(folder / "document.hga", model, ids)
    return document, folder / "document.hga"


def test_a_damaged_record_is_read_anew_from_the_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = model_and_tokenizer()
    document, path = saved_document(tmp_path, model, tokenizer)
    saved, raw = read_context(path), bytearray(path.read_bytes())
    for index in range(2):  # every record: whichever is opened
        start = saved.file.offsets[f"layers.{index}.records"]
        for offset in range(start, start + saved.file.specs[f"layers.{index}.records"].size_bytes, 16):
            raw[offset] ^= 1
    path.write_bytes(raw)
    with serving(model, tokenizer, SMALL, saved=find_saved(tmp_path, SMALL)) as server:
        for expected in (0, len(document) + 4):
            answer = complete(server, document + "Why?").json()
            assert answer["choices"][0]["text"] == generated(server, document + "Why?")
            spared = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert spared == max(0, expected - 1)
        assert not any(context.file for context in server.contexts._live)
    assert "document.hga is not used any more" in caplog.text


def test_a_record_that_fails_behind_the_first_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_and_tokenizer()
    document, _ = saved_document(tmp_path, model, tokenizer)
    advance = Answer.advance

    def fail(answer: Answer) -> str:
        if answer.cached_tokens > 100 and len(answer.written) == 2:
            raise ValueError("the record of chunk 3, KV head 0 is damaged")
        return advance(answer)

    with serving(model, tokenizer, SMALL, saved=find_saved(tmp_path, SMALL)) as server:
        complete(server, "another context " * 20)
        monkeypatch.setattr(Answer, "advance", fail)
        body = {"model": "served", "prompt": document + "Why?", "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as stream:
            lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
        assert "log says why" in json.loads(lines[-1][6:])["error"]["message"]
        answer = complete(server, document + "Why?").json()
        assert answer["choices"][0]["text"] == generated(server, document + "Why?")
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 1  # of another, that begins with "a", too
        monkeypatch.setattr(Answer, "advance", advance)
        assert cached(server, "another context " * 20) == 319  # what shares no chunk with it stays


class Graph:
    """Stands in for a captured step, which only a GPU can have."""

    living: ClassVar["weakref.WeakSet[Graph]"] = weakref.WeakSet()
    captured: ClassVar[int] = 0

    def __init__(self, model: Any, forward: Any, argument: str, input_ids: Any, position_ids: Any) -> None:
        self._argument = argument
        Graph.living.add(self)
        Graph.captured += 1

    def serves(self) -> bool:
        return True

    def replay(self, cache: Any, input_ids: Any, position_ids: Any) -> Any:
        own = {self._argument: cache, "use_cache": True, "attention_mask": None}
        return cache.stepper.inner(input_ids=input_ids, position_ids=position_ids, **own)


def test_answers_take_their_graphs_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    model, tokenizer = tiny_model(num_hidden_layers=1), byte_tokenizer()
    model.generation_config.eos_token_id = None
    prompt = "some prompt " * 9
    with serving(model, tokenizer, SMALL) as server:
        expected = complete(server, prompt, max_tokens=4).json()["choices"]
    monkeypatch.setattr(layer, "kernels_serve", lambda *args: True)  # interpreted, without a GPU
    monkeypatch.setattr(MemoryStore, "gpu_readable", True)
    monkeypatch.setattr(step, "_can_capture", lambda model: True)
    monkeypatch.setattr(step, "StepGraph", Graph)
    with serving(model, tokenizer, SMALL) as server:
        assert complete(server, prompt, max_tokens=4).json()["choices"] == expected
        assert Graph.captured == 1
        complete(server, prompt, max_tokens=2)  # two steps, the last one of the prompt among them: too few
        assert Graph.captured == 1
        server.wait_until_idle()
        assert not Graph.living
        assert len(server.contexts)
        for context in server.contexts._live:
            assert context.cache.stepper is None
            assert context.cache.decoding.held_bytes() == 0
            assert all(one.cached_bytes() == 0 for one in context.cache.routed)


def test_freed_memory_goes_back_when_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[float] = []
    monkeypatch.setattr("hga.serving.engine.return_freed_memory", lambda: returned.append(time.monotonic()))
    with serving(*model_and_tokenizer(), SMALL) as server:
        complete(server, "a prompt")
        answered = time.monotonic()
        while not returned:
            assert time.monotonic() < answered + 20
            time.sleep(0.01)
        assert returned[0] > answered + 0.5
        time.sleep(1.5)
        assert len(returned) == 1  # once an idle time
        monkeypatch.setattr("hga.serving.engine.BUSY_SECONDS", 0.0)
        complete(server, "another one", max_tokens=50)
        assert len(returned) > 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_gaps_between_held_blocks_are_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    blocks = [bytearray(100_000) for _ in range(2000)]  # below malloc's threshold for mappings of their own
    full = resident()
    del blocks[::2]
    kept = resident()
    return_freed_memory()
    assert full - kept < 20e6
    assert kept - resident() > 50e6
