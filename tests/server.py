"""A server on a free port of this machine, in a thread of the test's process."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import uvicorn
from tiny_model import byte_tokenizer, tiny_model

import hga
from hga.config import HGAConfig
from hga.serving.app import Served, build_app
from hga.serving.contexts import Contexts
from hga.serving.engine import Engine
from hga.serving.gate import LOOPBACK
from hga.serving.metrics import Metrics

SMALL = hga.HGAConfig(chunk_size=32, sink_tokens=4, window_tokens=16, budget_tokens=64, prefill="routed")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>{% if enable_thinking %}<think>{% endif %}"
)


def model_and_tokenizer() -> tuple[Any, Any]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = tiny_model()
    model.generation_config.eos_token_id = None  # answers are as long as is asked
    return model, tokenizer


@dataclass
class Running:
    url: str
    engine: Engine
    contexts: Contexts
    model: Any
    tokenizer: Any

    def client(self, timeout_seconds: float = 300) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=timeout_seconds)

    def metrics(self, key: str = "none") -> dict[str, float]:
        text = httpx.get(f"{self.url}/metrics", headers={"authorization": f"Bearer {key}"}).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 60
        while self.metrics()["hga_requests_under_way"]:
            assert time.monotonic() < deadline, "a request is stuck"
            time.sleep(0.02)


@contextlib.contextmanager
def serving(
    model: Any,
    tokenizer: Any,
    config: HGAConfig,
    *,
    name: str = "served",
    max_context: int = 2048,
    max_requests: int = 16,
    limit_bytes: int = 1 << 30,
    max_body_bytes: int = 1 << 20,
    keys: tuple[str, ...] = (),
    saved: Any = (),
) -> Iterator[Running]:
    metrics, contexts = Metrics(), Contexts(limit_bytes, saved)
    with hga.enabled(model, config):
        engine = Engine(model, tokenizer, config, contexts, max_requests=max_requests, metrics=metrics)
        served = Served(name, max_context, max_body_bytes, keys, () if keys else LOOPBACK)
        app = build_app(engine, metrics, served)
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            while not server.started:
                time.sleep(0.01)
            yield Running(url, engine, contexts, model, tokenizer)
        finally:
            server.should_exit = True
            thread.join(30)
            engine.close()
            listening.close()
            assert not thread.is_alive()
