"""The server on the default model, through OpenAI's client: every answer is the one that `model.generate` gives."""

import concurrent.futures
import time
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
import torch

pytest.importorskip("openai")
from server import Running, serving

import hga

pytestmark = pytest.mark.weights
CONFIG = hga.HGAConfig(budget_tokens=128)  # routed beyond 512 tokens
CHAT = [{"role": "user", "content": "Name a colour of the sea."}]


@pytest.fixture(scope="module")
def server(default_model: tuple[Any, Any]) -> Iterator[Running]:
    model, tokenizer = default_model
    with serving(model, tokenizer, CONFIG, name="smollm2-135m", max_context=8192) as running:
        yield running


@pytest.fixture(scope="module")
def document() -> str:
    return (files("hga.data") / "thursday.txt").read_text(encoding="utf-8")[:4200]


def chat_ids(server: Running, messages: list[dict[str, str]]) -> list[int]:
    text = server.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return server.tokenizer(text, add_special_tokens=False).input_ids


def generated(server: Running, ids: list[int], tokens: int, **options: Any) -> str:
    server.wait_until_idle()
    prompt = torch.tensor([ids])
    options |= {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 2}
    written = server.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return server.tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)


def ask(server: Running, messages: list[dict[str, str]], tokens: int, **options: Any) -> Any:
    return server.client().chat.completions.create(
        model="smollm2-135m", messages=messages, max_tokens=tokens, temperature=0, **options
    )


def test_chat_in_several_turns(server: Running) -> None:
    messages = list(CHAT)
    for question in ("And of the sky?", "Why?"):
        answer = ask(server, messages, 7)
        expected = generated(server, chat_ids(server, messages), 7)
        assert answer.choices[0].message.content == expected
        assert answer.usage.completion_tokens == 7
        assert answer.usage.prompt_tokens == len(chat_ids(server, messages))
        messages += [{"role": "assistant", "content": expected}, {"role": "user", "content": question}]
    answer = ask(server, messages, 7)
    assert answer.choices[0].message.content == generated(server, chat_ids(server, messages), 7)
    before = len(chat_ids(server, messages[:3]))
    assert answer.usage.prompt_tokens_details.cached_tokens >= before
    assert answer.choices[0].finish_reason == "length"


def test_streams_and_stops(server: Running) -> None:
    ids = server.tokenizer("The capital of France is").input_ids
    whole = generated(server, ids, 12)
    client = server.client()

    def complete(**options: Any) -> Any:
        return client.completions.create(
            model="smollm2-135m", prompt="The capital of France is", temperature=0, **{"max_tokens": 12} | options
        )

    assert complete().choices[0].text == whole
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole
    assert len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].text]) > 3
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == len(ids) - 1
    assert complete(max_tokens=3).choices[0].text == generated(server, ids, 3)
    stop = whole[4:7]
    stopped = complete(stop=["never to be seen", stop])
    assert stopped.choices[0].text == whole[: whole.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 12
    streamed = "".join(chunk.choices[0].text for chunk in complete(stop=stop, stream=True))
    assert streamed == whole[: whole.index(stop)]


def test_sampling_by_seed(server: Running) -> None:
    def sample(seed: int, **options: Any) -> str:
        answer = server.client().completions.create(
            model="smollm2-135m", prompt="Once upon a time", max_tokens=6, seed=seed, temperature=1.5, **options
        )
        return answer.choices[0].text

    texts = [sample(seed) for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]
    greedy = generated(server, server.tokenizer("Once upon a time").input_ids, 6)
    assert sample(1, extra_body={"top_k": 1}) == greedy
    assert sample(2, top_p=1e-6) == greedy


def test_a_cancelled_stream_ends_at_once(server: Running) -> None:
    cancelled = server.metrics()["hga_requests_cancelled_total"]
    stream = ask(server, CHAT, 1000, stream=True)
    for _ in range(3):
        next(stream)
    stream.close()
    started = time.monotonic()
    server.wait_until_idle()
    assert time.monotonic() - started < 5
    assert server.metrics()["hga_requests_cancelled_total"] == cancelled + 1
    assert ask(server, CHAT, 4).choices[0].message.content == generated(server, chat_ids(server, CHAT), 4)


def test_eight_clients_on_one_long_document_read_it_once(server: Running, document: str) -> None:
    chats = [[{"role": "user", "content": f"{document}\n\nQuestion {n}: who speaks?"}] for n in range(8)]
    common = len(chat_ids(server, [{"role": "user", "content": document}])) - 10
    assert common > 4 * CONFIG.budget_tokens + CONFIG.chunk_size  # some of it is in the archive
    before = server.metrics()["hga_read_tokens_total"]
    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda chat: ask(server, chat, 5), chats))
    read = server.metrics()["hga_read_tokens_total"] - before
    assert common <= read < common + 8 * 40
    assert sum(answer.usage.prompt_tokens_details.cached_tokens >= common for answer in answers) == 7
    assert all(answer.hga["attended"] < 0.3 for answer in answers)
    assert all(answer.hga["kv_bytes"]["ram"] > 0 for answer in answers)
    for n in (0, 7):
        expected = generated(server, chat_ids(server, chats[n]), 5)
        assert answers[n].choices[0].message.content == expected
