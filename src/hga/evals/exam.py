"""Tasks put to a model: prompts of a given length, greedy replies under a rule, and how many are right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hga.evals.material import Material
from hga.evals.rule import Rule, held_bytes, open_rule, reset_counters
from hga.evals.tasks import TASKS, Example, candidates, grade
from hga.integrations.transformers.forward import forward_with_cache, split_evenly

_LEAST_FILLED = 0.95
_BLOCK_TOKENS = 4096
_CHARACTERS_PER_TOKEN = 2  # a first guess; low, so that it never asks for more text than the answer needs


@dataclass(frozen=True)
class Answered:
    """One reply. prompt_tokens: what was read; score: `grade`'s; held: `held_bytes` while the reply was written."""

    prompt_tokens: int
    reply: str
    score: float
    held: dict[str, Any]
    seconds: float


def material_of(document: str) -> Material:
    """The document, with the package's own text beside it."""
    return Material(document, (files("hga") / "data" / "thursday.txt").read_text(encoding="utf-8"))


def check_tasks(names: Iterable[str]) -> list[str]:
    """The names. ValueError for an unknown task, or none."""
    named = list(names)
    for name in named:
        if name not in TASKS:
            raise ValueError(f"task {name!r} is unknown; choose from {', '.join(TASKS)}")
    if not named:
        raise ValueError(f"no task is named; choose from {', '.join(TASKS)}")
    return named


def make_example(tokenizer: Any, material: Material, task: str, tokens: int, seed: int, index: int) -> Example:
    """The example of this seed and index whose prompt and answer fill `tokens`: mostly 95% to 100% of them.

    The same arguments make the same example. ValueError if the material is too short, or `tokens` too few.
    """
    characters = _CHARACTERS_PER_TOKEN * tokens
    best, longest = None, 0
    for _ in range(8):
        example = TASKS[task](material, Random(f"{task} {seed} {index}"), characters)
        count = encode(tokenizer, example).shape[1] + example.answer_tokens
        if longest < count <= tokens:
            best, longest = example, count
            if count >= _LEAST_FILLED * tokens:
                break
        characters = int(characters * 0.985 * tokens / count)
    if best is None:
        raise ValueError(f"task {task!r} does not fit into {tokens} tokens; raise --tokens")
    return best


def encode(tokenizer: Any, example: Example) -> Tensor:
    """The prompt's token ids (1, N): in the chat template where there is one; the answer's lead ends it."""
    text = f"{example.context}\n\n{example.question}"
    template = bool(getattr(tokenizer, "chat_template", None))
    if template:
        # Thinking models are told to answer at once; other templates do not read the switch.
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    else:
        text += "\n"
    return torch.tensor([tokenizer(text + example.lead, add_special_tokens=not template, verbose=False).input_ids])


def answer(model: Any, tokenizer: Any, example: Example, rule: Rule) -> Answered:
    """Read the prompt under a rule, its last token as one that is written, and write the reply greedily."""
    started = time.perf_counter()
    ids = encode(tokenizer, example).to(model.device)
    with open_rule(model, rule) as cache:
        feed(model, ids[:, :-1], cache)
        reset_counters(cache)
        reply = _write(model, tokenizer, ids[:, -1:], cache, example)
        held = held_bytes(cache)
    return Answered(ids.shape[1], reply, grade(example, reply), held, time.perf_counter() - started)


@torch.no_grad()
def feed(model: Any, ids: Tensor, cache: DynamicCache, progress: Callable[[int], object] | None = None) -> None:
    """Read ids (1, T) into the cache, block by block. progress is called with the tokens just read."""
    for start, stop in split_evenly(0, ids.shape[1], _BLOCK_TOKENS):
        forward_with_cache(model, ids[:, start:stop], cache)
        if progress is not None:
            progress(stop - start)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids of the tokens that end a text."""
    named = getattr(model.generation_config, "eos_token_id", None)
    several = named if isinstance(named, list) else [named]
    return {token for token in (*several, tokenizer.eos_token_id) if token is not None}


@torch.no_grad()
def _write(model: Any, tokenizer: Any, token: Tensor, cache: DynamicCache, example: Example) -> str:
    """Continue greedily from `token` (1, 1) until the answers are there, the text ends, or enough is written."""
    ends, written = end_tokens(model, tokenizer), list[int]()
    for _ in range(example.answer_tokens):
        token = forward_with_cache(model, token, cache).logits[:, -1:].argmax(-1)
        if int(token) in ends:
            break
        written.append(int(token))
        reply = tokenizer.decode(written)
        named = candidates(example, reply)
        # The last candidate may still grow: it counts once something follows it.
        if len(named) >= len(example.answers) and not reply.endswith(named[-1]):
            break
    return str(tokenizer.decode(written))
