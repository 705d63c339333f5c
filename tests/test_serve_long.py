"""A document of 6,000 tokens through the server as it comes: read once, asked twice, answered as `generate` does.

The default budget reads such a length exactly. With a small one, float32 rounds differently in other blocks, which over
thousands of routed tokens decides near ties and so a word; in float64 blocks make no difference (benchmarks/NOTES.md).
"""

import time
from importlib.resources import files
from typing import Any

import pytest

pytest.importorskip("openai")
from server import serving
from test_serve_model import ask, chat_ids, generated

import hga

pytestmark = pytest.mark.weights


def test_a_document_of_6000_tokens_is_read_once(default_model: tuple[Any, Any]) -> None:
    model, tokenizer = default_model
    book = "A book.\n" + (files("hga.data") / "thursday.txt").read_text(encoding="utf-8")
    text = tokenizer.decode(tokenizer(book).input_ids[:6000])
    chats = [[{"role": "user", "content": f"{text}\n\n{question}"}] for question in ("Who speaks?", "Where are they?")]
    waits, cached, answers = [], [], []
    with serving(model, tokenizer, hga.HGAConfig(), name="smollm2-135m", max_context=8192) as server:
        for chat in chats:
            started, wait, answer, usage = time.monotonic(), 0.0, "", None
            for chunk in ask(server, chat, 6, stream=True, stream_options={"include_usage": True}):
                piece = chunk.choices[0].delta.content if chunk.choices else ""
                wait = wait or (time.monotonic() - started if piece else 0.0)
                answer, usage = answer + (piece or ""), chunk.usage or usage
            assert usage is not None
            assert usage.prompt_tokens >= 6000
            waits.append(wait)
            cached.append(usage.prompt_tokens_details.cached_tokens)
            answers.append(answer)
        assert cached[0] == 0
        assert cached[1] >= 6000
        assert waits[0] > 5 * waits[1], waits
        server.wait_until_idle()
        cache, prompts = hga.HGACache(config=model.config), [chat_ids(server, chat) for chat in chats]
        assert answers[0] == generated(server, prompts[0], 6, past_key_values=cache)
        cache.keep_first(hga.common_prefix(*prompts))
        assert answers[1] == generated(server, prompts[1], 6, past_key_values=cache)
