"""One answer of the model: reading what its cache does not hold yet, then writing, in small steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hga.cache import HGACache
from hga.integrations.transformers.forward import forward_with_cache, split_evenly
from hga.serving.sampling import Sampler, Sampling
from hga.serving.text import TextStream

RESERVED_TOKENS = 1024
"""Of an answer, for which room is asked before its prompt is read: most end long before they may."""
CPU_BLOCK_TOKENS = 512
"""A prompt's tokens between two looks at who else waits, on a CPU: up to twice as many, so that no block is shorter and
read otherwise (`HGAConfig.prefill`); larger ones are hardly faster.
"""


@dataclass(frozen=True)
class Request:
    """What is asked: the prompt's token ids, and how the answer is written and where it ends."""

    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()


class Answer:
    """Reads a prompt and writes behind it; each `advance` is one block read or one token written.

    cache: of the first tokens of the prompt, for this answer alone to write to. finish: None until the answer has
    ended, then "stop" (an end token or a stop string) or "length".
    """

    def __init__(self, model: Any, tokenizer: Any, cache: HGACache, request: Request) -> None:
        self.request = request
        self.cache = cache
        self.cached_tokens = cache.get_seq_length()
        self.fed_tokens = self.cached_tokens
        self.written: list[int] = []
        self.finish: str | None = None
        self.started = time.perf_counter()
        self.read_seconds = 0.0
        self.write_seconds = 0.0
        self._model = model
        self._sampler = Sampler(request.sampling)
        self._text = TextStream(tokenizer, request.stop)
        self._ends = end_tokens(model)
        config = cache.hga_config
        # The last token is read alone, as it is when the same prompt comes again: then the answer is the same.
        last = len(request.prompt_ids) - config.tells_blocks_apart
        count, most = last - self.fed_tokens, config.block_tokens
        if model.device.type != "cuda":
            most = min(most, max(1, -(-count // max(1, count // CPU_BLOCK_TOKENS))))
        self._stops = [stop for _, stop in split_evenly(self.fed_tokens, last, most)]
        cache.reset_counters()
        wanted = len(request.prompt_ids) - self.fed_tokens + min(request.max_tokens, RESERVED_TOKENS)
        cache.check_room(wanted, dtype=model.dtype)

    @property
    def ids(self) -> list[int]:
        """Prompt and answer so far."""
        return self.request.prompt_ids + self.written

    @property
    def is_reading(self) -> bool:
        """Whether the prompt is not read whole yet."""
        return not self.written and self.finish is None

    @torch.no_grad()
    def advance(self) -> str:
        """Read the next block, or write the next token; returns text that became certain."""
        start = time.perf_counter()
        ids = self.ids
        last = next((stop for stop in self._stops if stop > self.fed_tokens), len(ids))
        logits = self._feed(ids[self.fed_tokens : last])
        self.fed_tokens = last
        if last < len(ids):
            self.read_seconds += time.perf_counter() - start
            return ""
        token = self._sampler.choose(ids, logits)
        if self.written:
            self.write_seconds += time.perf_counter() - start
        else:
            self.read_seconds += time.perf_counter() - start
            self.cache.reset_counters()  # what was attended is told of the answer, not of the prompt
        return self._take(token)

    def _take(self, token: int) -> str:
        self.written.append(token)
        if token in self._ends:
            self.finish = "stop"
            return self._text.end()
        text = self._text.add(token)
        if self._text.stopped:
            self.finish = "stop"
        elif len(self.written) >= self.request.max_tokens:
            self.finish = "length"
            text += self._text.end()
            if self._text.stopped:
                self.finish = "stop"
        return text

    def _feed(self, ids: Sequence[int]) -> Any:
        tokens = torch.tensor([ids], device=self._model.device)
        return forward_with_cache(self._model, tokens, self.cache).logits[:, -1]


def usable(cache: HGACache, common: int, prompt_tokens: int) -> int:
    """Tokens of a cache that can serve a prompt of which it holds the first `common`."""
    left = 2 if cache.hga_config.prefill == "exact" else 1
    kept = min(common, max(0, prompt_tokens - left))
    return kept if cache.can_crop_to(kept) else 0


def end_tokens(model: Any) -> frozenset[int]:
    """Ids that end an answer."""
    ends = model.generation_config.eos_token_id
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
