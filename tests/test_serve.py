"""The server on a tiny model: limits, keys, bad requests, failures, and what it keeps."""

import concurrent.futures
import http.client
import json
import queue
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("fastapi")
from server import SMALL, Running, model_and_tokenizer, serving
from tiny_model import byte_tokenizer, tiny_model

import hga
from hga.cache.row import Row
from hga.serving.contexts import Contexts, find_saved
from hga.serving.engine import Done, Failed, Job

KEYS = ("first-key-of-the-test", "second-key-of-the-test")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(*model_and_tokenizer(), SMALL, max_requests=4, max_body_bytes=200_000) as running:
        yield running


def complete(server: Running, prompt: Any = "a prompt", key: str = "none", **fields: Any) -> httpx.Response:
    body = {"model": "served", "prompt": prompt, "max_tokens": 4, "temperature": 0} | fields
    return httpx.post(f"{server.url}/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=60)


def chat(server: Running, *messages: dict[str, Any], **fields: Any) -> httpx.Response:
    body = {"model": "served", "messages": list(messages), "max_tokens": 4, "temperature": 0} | fields
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def generated(server: Running, text: str, tokens: int, **options: Any) -> str:
    server.wait_until_idle()
    prompt = torch.tensor([server.tokenizer(text).input_ids])
    options |= {"attention_mask": torch.ones_like(prompt), "max_new_tokens": tokens, "do_sample": False}
    out = server.model.generate(prompt, **options)
    return server.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)


def refused(response: httpx.Response, status: int, reason: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert reason in error["message"], error
    assert "Traceback" not in response.text
    assert ".py" not in response.text


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 100, 257, 700])
def test_prompts_of_odd_lengths(server: Running, length: int) -> None:
    prompt = ("The quick brown fox jumps over the lazy dog. " * 20)[-length:]
    for _ in range(2):  # the second time all but the last token is there already
        answer = complete(server, prompt, max_tokens=40)
        assert answer.json()["choices"][0]["text"] == generated(server, prompt, 40)
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == length - 1
    assert complete(server, list(prompt.encode()), max_tokens=2).status_code == 200


def test_repetition_penalty(server: Running) -> None:
    answer = complete(server, "again and again", max_tokens=40, repetition_penalty=1.3).json()
    assert answer["choices"][0]["text"] == generated(server, "again and again", 40, repetition_penalty=1.3)
    assert answer["choices"][0]["text"] != generated(server, "again and again", 40)


def test_a_temperature_near_zero_is_greedy(server: Running) -> None:
    for temperature in (1e-4, 1e-40, 1e-320):
        answer = complete(server, "cold", max_tokens=20, temperature=temperature, repetition_penalty=0.01)
        expected = generated(server, "cold", 20, repetition_penalty=0.01)
        assert answer.json()["choices"][0]["text"] == expected, answer.text
    refused(complete(server, repetition_penalty=1e-40), 400, "repetition_penalty: ")


@pytest.mark.parametrize("prefill", ["auto", "nodes"])
def test_a_prompt_that_comes_again_is_answered_alike(prefill: str) -> None:
    """A long prompt is read otherwise than a token that is read alone, which its last one is both times."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(32, 127, (4, 900), generator=generator).tolist()
    with serving(*model_and_tokenizer(), SMALL.replace(prefill=prefill)) as server:
        for prompt in prompts:
            first, again = (complete(server, prompt, max_tokens=20).json() for _ in range(2))
            assert (first["usage"]["prompt_tokens_details"]["cached_tokens"], again["usage"]["prompt_tokens"]) == (
                0,
                900,
            )
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 899
            assert first["choices"][0]["text"] == again["choices"][0]["text"]


def test_exact_prefill_reuses_too() -> None:
    model, tokenizer = model_and_tokenizer()
    with serving(model, tokenizer, SMALL.replace(prefill="exact")) as server:
        for prompt in ("b" * 200, "b" * 200, "b" * 200 + "c" * 57 + "d", "b" * 256 + "c" * 2):
            answer = complete(server, prompt, max_tokens=30).json()
            assert answer["choices"][0]["text"] == generated(server, prompt, 30)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 200


def test_a_model_that_cannot_go_back_is_read_again_or_reused_whole() -> None:
    import families

    model = families.build("qwen2-sliding")
    model.generation_config.eos_token_id = None
    with serving(model, byte_tokenizer(), SMALL) as server:
        ids = [5 + n % 40 for n in range(150)]
        first = complete(server, ids, max_tokens=3).json()
        again = complete(server, ids, max_tokens=3).json()
        assert again["choices"] == first["choices"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        longer = complete(server, [*ids, *range(70, 90)], max_tokens=3).json()
        assert longer["usage"]["prompt_tokens_details"]["cached_tokens"] == 150


@pytest.mark.parametrize("name", ["qwen2-sliding", "qwen3_next"])
def test_layers_that_do_not_route_count_for_the_limit(name: str) -> None:
    import families

    model = families.build(name)
    with hga.enabled(model, SMALL), torch.no_grad():
        cache = hga.HGACache(config=model.config, hga_config=SMALL)
        model(torch.arange(5, 40)[None], past_key_values=cache)
        own = cache.stats().device_bytes
        others = [layer for layer in cache.layers if layer not in cache.routed]
        assert others
        assert cache.held_bytes(set())["device"] > own


BAD = {
    "n": (2, "n: "),
    "logprobs": (3, "logprobs: "),
    "echo": (True, "echo: "),
    "suffix": ("x", "suffix: "),
    "best_of": (3, "best_of: "),
    "temperature": (-1, "temperature: "),
    "top_p": (0, "top_p: "),
    "max_tokens": (0, "max_tokens: "),
    "stop": ("", "stop"),
    "logit_bias": ({"1": 1}, "logit_bias: "),
    "presence_penalty": (0.5, "presence_penalty: "),
    "seed": (2**70, "seed: "),
    "grammar": ("x", "grammar: Extra inputs"),
    "context": ("/etc/passwd", "context: Extra inputs"),
    "stream": ("perhaps", "stream: "),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_supported_is_refused(server: Running, name: str) -> None:
    value, reason = BAD[name]
    refused(complete(server, **{name: value}), 400, reason)


def test_bad_prompts_are_refused(server: Running) -> None:
    refused(complete(server, ""), 400, "no token")
    refused(complete(server, []), 400, "")
    refused(complete(server, [5, 257]), 400, "vocabulary's size, 257")
    refused(complete(server, ["a", "b"]), 400, "prompt")
    refused(complete(server, model="other"), 404, "other")
    refused(chat(server), 400, "messages")
    refused(chat(server, {"role": "developer", "content": "x"}), 400, "no developers")
    refused(chat(server, {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}), 400, "content")
    refused(chat(server, {"role": "user", "content": "x"}, tools=[{"type": "function"}]), 400, "tools")
    refused(chat(server, {"role": "user", "content": "x"}, top_logprobs=2), 400, "top_logprobs")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "served", "prompt": "\\ud800"}',
        b'{"model": "served", "prompt": "x", "temperature": NaN}',
        b'{"model": "served", "prompt": "x", "temperature": 1e999}',
        b'{"model": "served", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 50_000,
        b"\xff\xfe\x00",
    ],
)
def test_malformed_bodies_are_refused(server: Running, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    refused(response, 400, "")


def test_a_flood_of_wrong_values_is_told_of_once(server: Running) -> None:
    flood = {str(number): number for number in range(10_000)}
    refused(complete(server, [-1] * 10_000), 400, "prompt")
    assert " at 0x" not in complete(server, stop=[1] * 20).text
    refused(complete(server, **flood), 400, "10004 fields; the most is 100")
    refused(complete(server, logit_bias=flood), 400, "logit_bias: Value error, an object with 10000 fields")
    message = {"role": "user", "content": "x"}
    refused(chat(server, message, metadata=flood), 400, "metadata: Value error, an object with 10000 fields")
    refused(chat(server, message | flood), 400, "messages.0: Value error, an object with 10002 fields")
    several = chat(server, *[{"role": "nobody", "content": "x"}] * 1000)
    refused(several, 400, "messages.0.role")
    assert "messages.1" not in several.text
    refused(chat(server, {"role": "user", "content": [{"type": "image"}] * 1000}), 400, "content")


def test_other_pages_cannot_send_simple_requests(server: Running) -> None:
    body = json.dumps({"model": "served", "prompt": "x"})
    response = httpx.post(f"{server.url}/v1/completions", content=body, headers={"content-type": "text/plain"})
    refused(response, 400, "")
    response = httpx.get(f"{server.url}/v1/models", headers={"host": "attacker.example"})
    refused(response, 421, "127.0.0.1")


def test_limits(server: Running) -> None:
    refused(complete(server, "x" * 2047, max_tokens=2), 413, "2048 tokens")
    refused(complete(server, "x" * 2048, max_tokens=None), 413, "2048 tokens")
    assert complete(server, "x" * 2047, max_tokens=None).json()["usage"]["completion_tokens"] == 1
    refused(complete(server, "x" * 200_000), 413, "200,000 bytes")
    refused(complete(server, "x" * 100_000), 413, "100,000 characters")  # not worth being tokenised
    refused(chat(server, {"role": "user", "content": "x" * 100_000}), 413, "characters")
    refused(complete(server, "x" * 10_000), 413, "10000 tokens")

    def pieces() -> Iterator[bytes]:  # no content-length: counted as it comes
        yield b'{"prompt": "'
        for _ in range(40):
            yield b"x" * 10_000

    response = httpx.post(
        f"{server.url}/v1/completions", content=pieces(), headers={"content-type": "application/json"}
    )
    refused(response, 413, "200,000 bytes")
    refused(httpx.get(f"{server.url}/v1/nothing"), 404, "")
    refused(httpx.get(f"{server.url}/v1/completions"), 405, "")


def test_too_many_requests(server: Running) -> None:
    with concurrent.futures.ThreadPoolExecutor(12) as clients:
        prompts = [f"{n} a prompt" for n in range(12)]
        responses = list(clients.map(lambda prompt: complete(server, prompt, max_tokens=300), prompts))
    statuses = [response.status_code for response in responses]
    assert set(statuses) == {200, 429}
    for response in responses:
        if response.status_code == 429:
            refused(response, 429, "4 requests")
            assert response.headers["retry-after"]
    assert complete(server).status_code == 200


def test_keys_are_asked_for_and_never_share() -> None:
    with serving(*model_and_tokenizer(), SMALL, keys=KEYS) as server:
        prompt = "a secret that only one client sent " * 4
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            refused(httpx.get(server.url + path), 401, "API key")
        for key in ("wrong", KEYS[0][:-1], KEYS[0] + "x", "\xe9" * 20):
            headers = {"authorization": f"Bearer {key}".encode("latin-1")}
            refused(httpx.get(f"{server.url}/v1/models", headers=headers), 401, "API key")
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/").status_code == 200
        cached = []
        for key in (KEYS[0], KEYS[0], KEYS[1], KEYS[1]):
            usage = complete(server, prompt, key).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert cached == [0, len(prompt) - 1, 0, len(prompt) - 1]
        # Neither does a prompt wait for, or begin with, what another key is just reading.
        with concurrent.futures.ThreadPoolExecutor(2) as clients:
            both = list(clients.map(lambda key: complete(server, "z" * 1500, key), KEYS))
        assert [r.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for r in both] == [0, 0]


def test_least_recently_used_contexts_go_first() -> None:
    model, tokenizer = model_and_tokenizer()
    with serving(model, tokenizer, SMALL, limit_bytes=1 << 30) as server:
        complete(server, "a" * 500)
        one_bytes = sum(server.contexts.held_bytes().values())
    with serving(model, tokenizer, SMALL, limit_bytes=int(3.5 * one_bytes)) as server:
        for letter in "abcadef":  # a is used again, and stays longest
            complete(server, letter * 500)
        server.wait_until_idle()
        assert sum(server.contexts.held_bytes().values()) <= 3.5 * one_bytes
        metrics = server.metrics()
        assert metrics["hga_contexts_evicted"] > 0
        assert metrics["hga_contexts"] == len(server.contexts)

        def cached(letter: str) -> int:
            return complete(server, letter * 500).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert cached("f") == 499
        assert cached("b") == 0
    with serving(model, tokenizer, SMALL, limit_bytes=0) as server:
        for _ in range(2):
            assert complete(server, "a" * 500).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert not len(server.contexts)


def test_forks_of_one_document_count_its_archive_once() -> None:
    with serving(*model_and_tokenizer(), SMALL) as server:
        document = "the document that all ask about; " * 40
        complete(server, document)
        alone = server.contexts.held_bytes()
        for question in ("1?", "2?", "3?"):
            complete(server, document + question)
        server.wait_until_idle()
        assert len(server.contexts) >= 3
        assert server.contexts.held_bytes()["ram"] < 1.5 * alone["ram"]


def test_failures_end_one_request_alone(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = server.model.forward
    failure: Exception = RuntimeError("secret.py has a traceback")

    def fail(input_ids: Any, **kwargs: Any) -> Any:
        if 0 in input_ids:
            raise failure
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(server.model, "forward", fail)
    prompt = [*range(5, 200), 0]
    refused(complete(server, prompt), 500, "log says why")
    failure = MemoryError("17 bytes")
    refused(complete(server, prompt), 503, "not enough memory")
    body = {"model": "served", "prompt": prompt, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as stream:
        lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
    assert "error" in json.loads(lines[-1][6:])
    assert complete(server).json()["choices"][0]["text"] == generated(server, "a prompt", 4)


def test_a_failed_forward_leaves_no_memory_to_the_collector(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Row.attend
    rows: list[Row] = []

    def fail(row: Row, *arguments: Any) -> Any:
        rows.append(row)
        if len(rows) == 4:  # the last layer's, in the second of the prompt's two blocks
            raise MemoryError("in the middle of a forward")
        return attend(row, *arguments)

    complete(server, "something to forget " * 9)
    monkeypatch.setattr(Row, "attend", fail)
    assert complete(server, [7] * 1500).status_code == 200  # begun anew, with half of what was kept forgotten
    server.wait_until_idle()
    assert len(rows) > 4
    assert not any(row.window_bytes() + row.chunks for row in rows[:4])


def test_a_client_that_goes_away_frees_everything(server: Running) -> None:
    server.wait_until_idle()
    cancelled = server.metrics()["hga_requests_cancelled_total"]
    body = {"model": "served", "prompt": "gone " * 300, "max_tokens": 500, "temperature": 0}
    port = int(server.url.rpartition(":")[2])
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request(
            "POST",
            "/v1/completions",
            json.dumps(body | {"stream": stream}),
            {"content-type": "application/json"},
        )
        time.sleep(0.2)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        started = time.monotonic()
        server.wait_until_idle()
        assert time.monotonic() - started < 3
    assert server.metrics()["hga_requests_cancelled_total"] == cancelled + 2


def test_a_job_cancelled_while_it_reads_leaves_no_context(server: Running) -> None:
    from hga.serving.answer import Request

    server.wait_until_idle()
    kept = len(server.contexts)
    events: queue.Queue[Any] = queue.Queue()
    caches = []

    def report(event: Any) -> None:
        if job.answer is not None:
            caches.append(weakref.ref(job.answer.cache))
        server.engine.cancel(job)
        events.put(event)

    job = Job("", Request([7] * 2000, 5), report)
    server.engine.submit(job)
    seen = []
    while not seen or not isinstance(seen[-1], Done | Failed):
        seen.append(events.get(timeout=20))
    assert isinstance(seen[-1], Failed)
    assert len(seen) == 2  # it was cancelled after its first report, and did not read on
    assert len(server.contexts) == kept
    server.wait_until_idle()
    assert len(caches) == 1
    assert caches[0]() is None


def test_streams_are_never_silent(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hga.serving.app._SILENCE_SECONDS", 0.001)
    body = {"model": "served", "prompt": "a long one " * 60, "max_tokens": 30, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as stream:
        lines = list(stream.iter_lines())
    assert ": waiting" in lines
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == generated(server, "a long one " * 60, 30)


def test_chats(server: Running) -> None:
    question = {"role": "user", "content": "hi"}
    answer = chat(server, question).json()
    assert answer["choices"][0]["message"]["content"] == generated(server, "<user>hi<assistant>", 4)
    parts = {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
    assert chat(server, parts).json()["choices"] == answer["choices"]
    thinking = chat(server, question, enable_thinking=True).json()
    expected = generated(server, "<user>hi<assistant><think>", 4)
    assert thinking["choices"][0]["message"]["content"] == expected
    config = json.dumps({"do_sample": False, "max_new_tokens": 3, "transformers_version": "5.0"})
    three = chat(server, question, generation_config=config, max_tokens=None, temperature=None).json()
    assert three["choices"][0]["message"]["content"] == generated(server, "<user>hi<assistant>", 3)
    refused(chat(server, question, generation_config='{"num_beams": 3}'), 400, "num_beams")
    refused(chat(server, question, generation_config="{"), 400, "JSON")


def test_metrics_add_up(server: Running) -> None:
    server.wait_until_idle()
    before = server.metrics()
    usages = [complete(server, f"{n} add up {'x' * 90}").json()["usage"] for n in (1, 2, 1)]
    complete(server, n=3)
    after = server.metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('hga_requests_total{path="/v1/completions",status="200"}') == 3
    assert grown('hga_requests_total{path="/v1/completions",status="400"}') == 1
    assert grown("hga_prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)
    assert grown("hga_new_tokens_total") == sum(usage["completion_tokens"] for usage in usages) == 12
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert grown("hga_cached_tokens_total") == cached
    assert grown("hga_read_tokens_total") == grown("hga_prompt_tokens_total") - cached
    assert grown("hga_first_token_seconds_count") == 3


def test_saved_contexts_serve_every_key(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer()
    document = "a document that was saved " * 20
    ids = tokenizer(document).input_ids
    with hga.enabled(model, SMALL), torch.no_grad():
        cache = hga.HGACache(config=model.config, hga_config=SMALL)
        model(torch.tensor([ids]), past_key_values=cache)
        cache.save(tmp_path / "document.hga", model, ids)
    with serving(model, tokenizer, SMALL, keys=KEYS, saved=find_saved(tmp_path, SMALL)) as server:
        for key in KEYS:
            answer = complete(server, document + key, key, max_tokens=9).json()
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(ids)
            assert answer["choices"][0]["text"] == generated_by(server, key, document + key)
    # A key that has sent just the saved text does not keep others from it.
    contexts = Contexts(1 << 30, find_saved(tmp_path, SMALL))
    contexts.add("one", ids, cache.fork())
    assert contexts.find("other", [*ids, 5], model)[1] == len(ids)
    with pytest.raises(ValueError, match="another routing rule"):
        find_saved(tmp_path, hga.HGAConfig())
    other = tiny_model(hidden_size=16)
    other.generation_config.eos_token_id = None
    with serving(other, tokenizer, SMALL, saved=find_saved(tmp_path, SMALL)) as server:  # of another model: read anew
        assert complete(server, document).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    (tmp_path / "document.hga").write_bytes(b"x" * 5000)
    with pytest.raises(ValueError, match=r"document\.hga"):
        find_saved(tmp_path, SMALL)
    with pytest.raises(ValueError, match="no folder"):
        find_saved(tmp_path / "missing", SMALL)


def generated_by(server: Running, key: str, text: str) -> str:
    while server.metrics(key)["hga_requests_under_way"]:
        time.sleep(0.02)
    prompt = torch.tensor([server.tokenizer(text).input_ids])
    out = server.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, do_sample=False)
    return server.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
