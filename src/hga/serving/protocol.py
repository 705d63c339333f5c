"""What OpenAI's clients send, checked field by field, and what they get back."""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from hga.serving.engine import Done
from hga.serving.sampling import Sampling

DEFAULT_TOKENS = 1024
"""Tokens of an answer whose request gives no number, where the context has room for them."""
_LARGEST_SEED = 2**63 - 1
_MOST_FIELDS = 100


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair, which is no character") from None
    return text


def _few(fields: Any) -> Any:
    """Refused at once: a million wrong fields would be a million errors in memory."""
    if isinstance(fields, dict) and len(fields) > _MOST_FIELDS:
        raise ValueError(f"an object with {len(fields)} fields; the most is {_MOST_FIELDS}")
    return fields


PlainText = Annotated[str, AfterValidator(_encodable)]
Stop = Annotated[PlainText, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, strict=True)]
MaxTokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
OnlyNothing = Annotated[Literal[False] | None, Field(description="Not supported: leave it out.")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, fields: Any) -> Any:
        return _few(fields)


class TextPart(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: PlainText


class Message(_Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: PlainText | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = Field(None, description="Accepted and ignored.")

    def text(self) -> str:
        """Its parts joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Body):
    """include_usage: a last event without choices tells the usage."""

    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="Accepted and ignored.")


class ResponseFormat(_Body):
    """Only plain text."""

    type: Literal["text"]


class _Asked(_Body):
    """What both kinds of request have in common."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    seed: int | None = Field(None, ge=-_LARGEST_SEED, le=_LARGEST_SEED)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    max_tokens: MaxTokens | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = Field(None, description="One answer a request.")
    presence_penalty: float | None = Field(None, ge=0, le=0, description="Not supported.")
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="Not supported.")
    logit_bias: Annotated[dict[str, float], Field(max_length=0), BeforeValidator(_few)] | None = Field(
        None, description="Not supported."
    )
    user: str | None = Field(None, description="Accepted and ignored.")

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, default: Sampling) -> Sampling:
        """How to choose tokens: as the model would by itself, but for what is asked."""
        return default.replace(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )

    def wanted_tokens(self) -> int | None:
        """Tokens that the answer may have, None where the request does not say."""
        return self.max_tokens


class ChatRequest(_Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: MaxTokens | None = None
    enable_thinking: bool | None = Field(None, description="Handed to the chat template, which may know it.")
    generation_config: str | None = Field(None, max_length=10_000, description="What transformers' chat client sends.")
    response_format: ResponseFormat | None = None
    logprobs: OnlyNothing = None
    top_logprobs: Literal[0] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="Not supported.")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="Without tools it says nothing.")
    store: OnlyNothing = None
    metadata: Annotated[dict[str, str], BeforeValidator(_few)] | None = Field(None, description="Accepted and ignored.")

    @model_validator(mode="before")
    @classmethod
    def _flatten(cls, fields: Any) -> Any:
        """Read transformers' generation config as the fields that it stands for."""
        if not isinstance(fields, dict) or not isinstance(fields.get("generation_config"), str):
            return fields
        given = {name: value for name, value in fields.items() if value is not None}
        return _from_generation_config(fields["generation_config"]) | given

    def wanted_tokens(self) -> int | None:
        """Tokens that the answer may have, None where the request does not say."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Asked):
    """POST /v1/completions."""

    prompt: (
        PlainText
        | Annotated[list[PlainText], Field(min_length=1, max_length=1)]
        | Annotated[list[TokenId], Field(fail_fast=True)]
    )
    max_tokens: MaxTokens | None = 16
    logprobs: None = Field(None, description="Not supported.")
    echo: OnlyNothing = None
    suffix: None = Field(None, description="Not supported.")
    best_of: Literal[1] | None = None


def _from_generation_config(text: str) -> dict[str, Any]:
    """The fields of a request that a transformers GenerationConfig in JSON asks for. ValueError for any other."""
    try:
        asked = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("generation_config is no JSON object") from None
    if not isinstance(asked, dict):
        raise ValueError("generation_config is no JSON object")
    asked = {name: value for name, value in asked.items() if value is not None}
    fields = {}
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        if name in asked:
            fields[name] = asked.pop(name)
    if "max_new_tokens" in asked:
        fields["max_tokens"] = asked.pop("max_new_tokens")
    if asked.pop("do_sample", True) is False:
        fields["temperature"] = 0
    else:
        fields.setdefault("temperature", 1.0)
    for name in ("transformers_version", "max_length", "eos_token_id", "bos_token_id", "pad_token_id", "use_cache"):
        asked.pop(name, None)
    unknown = {name for name, value in asked.items() if value is not False and not name.startswith("_")}
    if unknown:
        raise ValueError(f"generation_config asks for {', '.join(sorted(unknown))}, which this server does not do")
    return fields


class Reply:
    """Makes the objects that one request is answered with."""

    def __init__(self, kind: Literal["chat", "text"], model: str, prompt_tokens: int) -> None:
        self.id = ("chatcmpl-" if kind == "chat" else "cmpl-") + uuid.uuid4().hex
        self._kind = kind
        self._model = model
        self._created = int(time.time())
        self._prompt_tokens = prompt_tokens

    def whole(self, text: str, done: Done) -> dict[str, Any]:
        """The answer at once."""
        own = {"message": {"role": "assistant", "content": text, "refusal": None}}
        choice = own if self._kind == "chat" else {"text": text}
        choices = [{"index": 0, **choice, "logprobs": None, "finish_reason": done.finish}]
        return self._object(choices, chunk=False) | {"usage": self._usage(done), "hga": told(done)}

    def opening(self) -> dict[str, Any] | None:
        """The first event of a stream."""
        return self._chunk({"role": "assistant", "content": ""}) if self._kind == "chat" else None

    def piece(self, text: str) -> dict[str, Any]:
        """An event with text."""
        return self._chunk({"content": text} if self._kind == "chat" else {"text": text})

    def closing(self, done: Done) -> dict[str, Any]:
        """The event that says why the answer ended."""
        return self._chunk({} if self._kind == "chat" else {"text": ""}, done.finish) | {"hga": told(done)}

    def usage(self, done: Done) -> dict[str, Any]:
        """The event with the usage."""
        return self._object([], chunk=True) | {"usage": self._usage(done)}

    def _chunk(self, content: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        own = {"delta": content} if self._kind == "chat" else content
        return self._object([{"index": 0, **own, "logprobs": None, "finish_reason": finish}], chunk=True)

    def _object(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        name = ("chat.completion.chunk" if chunk else "chat.completion") if self._kind == "chat" else "text_completion"
        return {"id": self.id, "object": name, "created": self._created, "model": self._model, "choices": choices}

    def _usage(self, done: Done) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": done.new_tokens,
            "total_tokens": self._prompt_tokens + done.new_tokens,
            "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
        }


def told(done: Done) -> dict[str, Any]:
    """Where the context lies, what of it was attended, and how long things took: beyond OpenAI's format."""
    return {
        "kv_bytes": done.held_bytes,
        "dense_kv_bytes": done.stats.kv_bytes,
        "attended": done.stats.attended,
        "fetched": done.stats.fetched,
        "hit_rate": done.stats.hit_rate,
        "read_seconds": done.read_seconds,
        "write_seconds": done.write_seconds,
    }


def error_body(status: int, reason: str) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
    return {"error": {"message": reason, "type": kind, "param": None, "code": None}}
