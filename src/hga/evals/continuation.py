"""Long generation: where a rule's greedy text leaves that of dense, and how far what it samples drifts from dense."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hga.evals.exam import feed
from hga.evals.nll import read, standard_error
from hga.evals.rule import Rule, held_bytes, open_rule, reset_counters

Progress = Callable[[int], object]
"""Called with the number of tokens just read or written."""


@dataclass(frozen=True)
class Agreement:
    """Greedy decoding of a rule beside that of dense, from the same prompt.

    new_tokens: how many dense wrote. equal: share of them that the rule finds most likely too, given dense's tokens
    before (teacher forcing). first_divergence: the first that it does not, which is where free decoding leaves
    dense; None if there is none. written: dense's tokens. held: `held_bytes` while decoding.
    """

    new_tokens: int
    equal: float
    first_divergence: int | None
    written: list[int]
    held: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Drift:
    """What a rule sampled, and what dense thinks of it.

    new_tokens: how many were sampled at temperature 1. own_nll, dense_nll: nats a token that the rule, and dense over
    the same text, give to them. drift_nats: dense_nll less own_nll, an estimate of KL(rule || dense) where the rule's
    own text leads; drift_se: its standard error over tokens. dense_nll_quarters, drift_quarters: the same, by quarters
    of the text. held: `held_bytes` while decoding.
    """

    new_tokens: int
    own_nll: float
    dense_nll: float
    drift_nats: float
    drift_se: float
    dense_nll_quarters: list[float]
    drift_quarters: list[float]
    held: dict[str, Any]
    seconds: float


@torch.no_grad()
def agree(
    model: Any,
    ids: Tensor,
    rule: Rule,
    dense: list[int] | None = None,
    *,
    new_tokens: int = 256,
    progress: Progress | None = None,
) -> Agreement:
    """Decode behind a prompt (1, N), token by token; without `dense`, what dense writes greedily comes first.

    dense: the tokens that dense wrote for this prompt. The end of a text is a token like any other here.
    """
    started = time.perf_counter()
    forced = dense or []
    chosen: list[Tensor] = []

    def choose(step: int, logits: Tensor) -> Tensor:
        chosen.append(logits.argmax(-1))
        return chosen[-1] if not forced else ids.new_tensor([forced[step]])

    count = len(forced) or new_tokens
    held = _decode(model, ids, rule, count, choose, progress)
    written = torch.cat(chosen).tolist()
    equal = [own == other for own, other in zip(written, forced or written, strict=True)]
    return Agreement(
        new_tokens=count,
        equal=sum(equal) / count,
        first_divergence=None if all(equal) else equal.index(False),
        written=forced or written,
        held=held,
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def drift(
    model: Any,
    ids: Tensor,
    rule: Rule,
    *,
    new_tokens: int = 4096,
    seed: int = 0,
    ends: set[int] | None = None,
    progress: Progress | None = None,
) -> Drift:
    """Sample `new_tokens` behind a prompt (1, N) under a rule, at temperature 1, and let dense read them.

    ends: tokens that end a text; they are never drawn, so that the text goes on. ValueError below 8 tokens.
    """
    if new_tokens < 8:
        raise ValueError(f"{new_tokens} sampled tokens cannot be cut into quarters; ask for at least 8")
    started = time.perf_counter()
    generator = torch.Generator(ids.device).manual_seed(seed)
    banned = torch.tensor(sorted(ends or ()), dtype=torch.long, device=ids.device)
    drawn: list[Tensor] = []
    own: list[Tensor] = []

    def draw(step: int, logits: Tensor) -> Tensor:
        chances = logits.index_fill(-1, banned, -torch.inf).softmax(-1)
        drawn.append(torch.multinomial(chances, 1, generator=generator)[0])
        own.append(cross_entropy(logits, drawn[-1], reduction="none"))
        return drawn[-1]

    held = _decode(model, ids, rule, new_tokens, draw, progress)
    text = torch.cat([ids, torch.stack(drawn).T], 1)
    with open_rule(model, None) as cache:
        losses = read(model, text, cache, score_from=ids.shape[1] - 1, progress=progress).cpu()
    apart = losses - torch.cat(own).cpu()
    return Drift(
        new_tokens=new_tokens,
        own_nll=torch.cat(own).double().mean().item(),
        dense_nll=losses.double().mean().item(),
        drift_nats=apart.double().mean().item(),
        drift_se=standard_error(apart),
        dense_nll_quarters=[part.mean().item() for part in losses.tensor_split(4)],
        drift_quarters=[part.mean().item() for part in apart.tensor_split(4)],
        held=held,
        seconds=time.perf_counter() - started,
    )


def _decode(
    model: Any,
    ids: Tensor,
    rule: Rule,
    count: int,
    choose: Callable[[int, Tensor], Tensor],
    progress: Progress | None,
) -> dict[str, Any]:
    """Decode `count` tokens; `choose` takes the step and logits (1, V) in float32 and gives the next token (1,)."""
    with open_rule(model, rule) as cache:
        feed(model, ids[:, :-1], cache, progress)
        reset_counters(cache)
        token = ids[:, -1:]
        for step in range(count):
            logits = model(token, past_key_values=cache, use_cache=True).logits[:, -1].float()
            token = choose(step, logits)[:, None]
            if progress is not None:
                progress(1)
        return held_bytes(cache)
