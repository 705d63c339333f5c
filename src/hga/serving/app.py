"""The HTTP server: OpenAI's routes, health, metrics and the chat page, over an `Engine`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException

from hga import __version__
from hga.serving.answer import Request
from hga.serving.engine import Busy, Done, Engine, Event, Failed, Job, Progress, Text
from hga.serving.gate import App, Gate
from hga.serving.metrics import Metrics
from hga.serving.protocol import DEFAULT_TOKENS, ChatRequest, CompletionRequest, Reply, error_body
from hga.serving.sampling import Sampling

_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
_SILENCE_SECONDS = 10
"""A stream says something this often, or clients and proxies would take it for dead while its prompt waits."""
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request says something that is wrong or not supported."},
    401: {"description": "The API key is missing or wrong."},
    404: {"description": "No such model."},
    413: {"description": "The request is longer than the server's limits."},
    429: {"description": "As many requests as the server takes are under way."},
    503: {"description": "There is not enough memory now."},
}


@dataclass(frozen=True)
class Served:
    """What is served to whom. name: the model's, as clients know it; hosts and keys: as in `Gate`."""

    name: str
    max_context_tokens: int
    max_body_bytes: int
    keys: Sequence[str] = ()
    hosts: Sequence[str] = ()


class Refused(Exception):  # noqa: N818
    """A request that cannot be served, with the status that says why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def build_app(engine: Engine, metrics: Metrics, served: Served) -> App:
    """The whole server as an ASGI application."""
    app = FastAPI(title="hga", version=__version__, docs_url=None, redoc_url=None)
    desk = _Desk(engine, served)
    page = (files("hga.serving") / "page.html").read_text(encoding="utf-8")

    @app.post("/v1/chat/completions", responses=_ERRORS)
    async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
        """Answer a chat."""
        desk.check_model(body.model)
        return await desk.serve("chat", await asyncio.to_thread(desk.chat_ids, body), body, http)

    @app.post("/v1/completions", responses=_ERRORS)
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        """Continue a text."""
        desk.check_model(body.model)
        return await desk.serve("text", await asyncio.to_thread(desk.prompt_ids, body), body, http)

    @app.get("/v1/models", responses={401: _ERRORS[401]})
    async def models() -> dict[str, Any]:
        """The one model there is."""
        model = {"id": served.name, "object": "model", "created": 0, "owned_by": "hga"}
        return {"object": "list", "data": [model | {"max_model_len": served.max_context_tokens}]}

    @app.post("/load_model", include_in_schema=False)
    async def load_model(body: dict[str, Any]) -> Response:
        """transformers' chat client asks for its model first; it is loaded already."""
        desk.check_model(body.get("model"))
        ready = {"status": "ready", "model": served.name, "cached": True}
        return Response(f"data: {json.dumps(ready)}\n\n", media_type="text/event-stream")

    @app.get("/health", responses={503: {"description": "The engine has stopped."}})
    async def health() -> Response:
        """Whether requests can be served."""
        return JSONResponse(
            {"status": "ok"} if engine.is_alive else {"status": "stopped"}, 200 if engine.is_alive else 503
        )

    @app.get("/metrics", responses={401: _ERRORS[401]})
    async def prometheus() -> Response:
        """Counters for Prometheus."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        """The chat page."""
        return HTMLResponse(page, headers={"content-security-policy": _PAGE_POLICY, "x-frame-options": "DENY"})

    for body in ("ChatRequest", "CompletionRequest"):  # the description names the model that there is
        app.openapi()["components"]["schemas"][body]["properties"]["model"]["enum"] = [served.name]
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Refused, _refused)
    return Gate(app, keys=served.keys, hosts=served.hosts, max_body_bytes=served.max_body_bytes, metrics=metrics)


class _Desk:
    """Takes requests in, and hands out what the engine says about them."""

    def __init__(self, engine: Engine, served: Served) -> None:
        self._engine = engine
        self._served = served
        self._sampling = Sampling.default(engine.model.generation_config)
        longest = max(len(token) for token in engine.tokenizer.get_vocab())
        self._most_characters = served.max_context_tokens * longest
        self._encoding = threading.Lock()  # fast tokenizers cannot be set up by two threads at once

    def check_model(self, name: Any) -> None:
        """Refused for a model that is not served here."""
        if name != self._served.name:
            raise Refused(
                404, f"the model {str(name)[:100]!r} is not served here; the one that is: {self._served.name}"
            )

    def chat_ids(self, body: ChatRequest) -> list[int]:
        """The token ids of a chat, by the model's template."""
        tokenizer = self._engine.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise Refused(400, "the model has no chat template; use /v1/completions")
        messages = [{"role": message.role, "content": message.text()} for message in body.messages]
        options = {} if body.enable_thinking is None else {"enable_thinking": body.enable_thinking}
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise Refused(400, f"the model's chat template refuses these messages: {error}") from error
        return self._encode(text, add_special_tokens=False)

    def prompt_ids(self, body: CompletionRequest) -> list[int]:
        """The token ids of a prompt."""
        prompt = body.prompt
        if isinstance(prompt, str):
            return self._encode(prompt, add_special_tokens=True)
        if prompt and isinstance(prompt[0], str):
            return self._encode(prompt[0], add_special_tokens=True)
        ids = [token for token in prompt if isinstance(token, int)]
        vocabulary = self._engine.model.get_input_embeddings().num_embeddings
        if ids and max(ids) >= vocabulary:
            raise Refused(400, f"token id {max(ids)} is not below the vocabulary's size, {vocabulary}")
        return ids

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) > self._most_characters:  # refused before all others wait for its tokens
            raise Refused(
                413,
                f"a text of {len(text):,} characters exceeds the {self._served.max_context_tokens} tokens of this "
                "server's context, even if all were the longest",
            )
        with self._encoding:
            return list(self._engine.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids)

    async def serve(
        self, kind: Literal["chat", "text"], ids: list[int], body: ChatRequest | CompletionRequest, http: HttpRequest
    ) -> Response:
        """Answer a prompt, in one piece or as a stream."""
        request = Request(ids, self._room(ids, body.wanted_tokens()), body.sampling(self._sampling), body.stops())
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def report(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it whoever asked
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(getattr(http.state, "owner", ""), request, report)
        try:
            self._engine.submit(job)
        except Busy as error:
            raise Refused(429, str(error)) from error
        reply = Reply(kind, self._served.name, len(ids))
        watch = asyncio.create_task(_cancel_when_gone(http, self._engine, job))
        if not body.stream:
            try:
                return await _whole(events, reply)
            finally:
                watch.cancel()
                self._engine.cancel(job)
        usage = body.stream_options is not None and body.stream_options.include_usage
        stream = self._stream(events, reply, job, watch, usage=usage)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-store"})

    def _room(self, ids: list[int], wanted: int | None) -> int:
        """Tokens that the answer may have. Refused if the prompt leaves none."""
        most = self._served.max_context_tokens
        if not ids:
            raise Refused(400, "the prompt holds no token; send at least a word")
        if len(ids) >= most or (wanted is not None and len(ids) + wanted > most):
            asked = "" if wanted is None else f" and max_tokens {wanted}"
            raise Refused(
                413, f"a prompt of {len(ids)} tokens{asked} exceed the {most} tokens of this server's context"
            )
        return min(DEFAULT_TOKENS, most - len(ids)) if wanted is None else wanted

    async def _stream(
        self, events: asyncio.Queue[Event], reply: Reply, job: Job, watch: asyncio.Task[None], *, usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events. Progress comes as comments, which clients that do not know them pass over."""
        try:
            opening = reply.opening()
            if opening is not None:
                yield _event(opening)
            while True:
                try:
                    event = await asyncio.wait_for(events.get(), _SILENCE_SECONDS)
                except TimeoutError:
                    yield ": waiting\n\n"
                    continue
                match event:
                    case Progress() as progress:
                        told = [progress.read_tokens, progress.cached_tokens, progress.prompt_tokens]
                        yield f": read {json.dumps(told)}\n\n"
                    case Text(text):
                        yield _event(reply.piece(text))
                    case Failed() as failed:
                        yield _event(error_body(failed.status, failed.reason))
                        return
                    case Done() as done:
                        yield _event(reply.closing(done))
                        if usage:
                            yield _event(reply.usage(done))
                        yield "data: [DONE]\n\n"
                        return
        finally:
            watch.cancel()
            self._engine.cancel(job)


async def _whole(events: asyncio.Queue[Event], reply: Reply) -> Response:
    """The answer as one object."""
    pieces: list[str] = []
    while True:
        match await events.get():
            case Text(text):
                pieces.append(text)
            case Failed() as failed:
                raise Refused(failed.status, failed.reason)
            case Done() as done:
                return JSONResponse(reply.whole("".join(pieces), done))


async def _cancel_when_gone(http: HttpRequest, engine: Engine, job: Job) -> None:
    """Cancel a job when its client goes away, even while there is nothing to send."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    engine.cancel(job)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _invalid(http: HttpRequest, error: Exception) -> Response:
    """Bad JSON, or a field that is wrong: where and why, without repeating what was sent."""
    assert isinstance(error, RequestValidationError)
    reasons = []
    for problem in error.errors()[:3]:
        place = ".".join(str(part) for part in problem["loc"][1:] if "function-" not in str(part))
        reasons.append(f"{place[:100]}: {problem['msg']}" if place else str(problem["msg"]))
    reason = "; ".join(reasons).encode("utf-8", "replace").decode()
    return JSONResponse(error_body(400, reason or "the request is malformed"), 400)


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    """No such path, or not by this method."""
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)


async def _refused(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {"retry-after": "5"} if error.status in (429, 503) else None
    return JSONResponse(error_body(error.status, str(error)), error.status, headers)
