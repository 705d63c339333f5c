"""A chat with one cache: each turn reads only from where its prompt differs from what the cache holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hga.cache import HGACache, common_prefix
from hga.cache.saved import SavedContext, read_context
from hga.config import HGAConfig
from hga.integrations.transformers.forward import forward_with_cache
from hga.serving.answer import Answer, Request, usable
from hga.serving.sampling import Sampling

MARK = "\ue000"
"""A character for private use, which no template and hardly any text holds: it marks where a question begins."""
BETWEEN = "\n\n"


class Conversation:
    """Turns of a user and the model. `begin` asks, `Answer.advance` reads and writes, `end` keeps what came of it.

    The model must be enabled with `config`. Templates may rewrite earlier turns, as those of thinking models do: what
    is held and what is asked are compared token by token. ValueError for a model without a chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, config: HGAConfig, documents: Sequence[str] = ()) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the model has no chat template; use hga generate, or load an instruction-tuned model")
        self.cache = HGACache(config=model.config, hga_config=config)
        self.messages: list[dict[str, str]] = []
        self._model = model
        self._tokenizer = tokenizer
        self._config = config
        self._documents = list(documents)
        self._held: list[int] = []
        self._saved: Path | None = None
        self._prefix: list[int] = []

    @classmethod
    def resume(cls, path: Path, model: Any, tokenizer: Any) -> Conversation:
        """Go on where a saved context ends. ValueError if that is no chat; else as `HGACache.load`."""
        saved = read_context(path)
        if not saved.suffix:
            raise ValueError(f"{path} holds a text and no chat; save it again: hga context save --chat ...")
        made = cls(model, tokenizer, saved.config)
        made._saved = path
        made.reset()
        return made

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds."""
        return len(self._held)

    def begin(self, question: str, sampling: Sampling, max_tokens: int) -> Answer:
        """Ask. ValueError if the conversation has become longer than the model's positions."""
        ids = self._encode([*self.messages, {"role": "user", "content": self._opened(question)}])
        most = getattr(self._model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        room = max_tokens if most is None else min(max_tokens, most - len(ids))
        if room < 1:
            raise ValueError(f"{len(ids)} tokens leave no room in the model's {most} positions; begin anew with /reset")
        kept = usable(self.cache, common_prefix(self._held, ids), len(ids))
        if kept:
            self.cache.keep_first(kept)
        else:
            self.cache.reset()
        self._held = self._held[:kept]
        return Answer(self._model, self._tokenizer, self.cache, Request(ids, room, sampling))

    def end(self, question: str, answer: Answer, text: str) -> None:
        """Keep a turn, its answer whole or cut off; one that had not begun is forgotten, what it read is not."""
        self._held = answer.ids[: answer.fed_tokens]
        if answer.written:
            self.messages.append({"role": "user", "content": self._opened(question)})
            self.messages.append({"role": "assistant", "content": text})

    def reset(self) -> None:
        """Begin anew, with the documents or the saved context that there were."""
        self.messages = []
        if self._saved is None:
            self.cache.reset()
            self._held = []
        else:
            self.cache = HGACache.load(self._saved, self._model)
            self._held = self._prefix = list(self.cache.loaded_ids)

    def forget_cache(self) -> None:
        """After a failed forward: the next turn reads everything again."""
        self.cache = HGACache(config=self._model.config, hga_config=self._config)
        self._held = []

    @torch.no_grad()
    def save(self, path: Path, report: Callable[[int, int], object]) -> SavedContext:
        """Save the conversation up to where the next question begins. Errors as `HGACache.save`."""
        text = self._render([*self.messages, {"role": "user", "content": self._opened(MARK)}])
        before, mark, suffix = text.rpartition(MARK)
        if not mark:
            raise ValueError("the model's chat template changes the message that it is given; it cannot be saved")
        one, other = (self._tokens(before + start) for start in ("What", "7"))
        ids = self._prefix + one[: common_prefix(one, other)]  # a token that merges with the question is left out
        fork = self.cache.fork()
        kept = usable(fork, common_prefix(self._held, ids), len(ids))
        if kept:
            fork.keep_first(kept)
        else:
            fork.reset()
        forward_with_cache(self._model, torch.tensor([ids[kept:]], device=self._model.device), fork)
        return fork.save(path, self._model, ids, suffix=suffix, report=report)

    def _opened(self, question: str) -> str:
        """A question as it is sent: the first one behind the documents."""
        return question if self.messages else BETWEEN.join([*self._documents, question])

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        return self._prefix + self._tokens(self._render(messages))

    def _render(self, messages: list[dict[str, str]]) -> str:
        """The prompt's text, from where the saved context ends."""
        if self._prefix:
            messages = [{**messages[0], "content": MARK + messages[0]["content"]}, *messages[1:]]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text.partition(MARK)[2] if self._prefix else text)

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
