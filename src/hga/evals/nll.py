"""Negative log-likelihood of a document under routing rules, through the real cache and routed path."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from hga.config import TILE_TOKENS
from hga.evals.rule import Rule, Rules, held_bytes, open_rule, reset_counters

_LOGITS_AT_ONCE = 1 << 26  # 256 MiB in float32

Progress = Callable[[int], object]
"""Called with the number of tokens just read."""


@dataclass(frozen=True)
class RuleScore:
    """What one rule lost and used on a document.

    tokens: tokens read. budget_tokens: exact tokens a query, None for dense. attended: share of the context
    that a query head attended exactly; fetched: the same for the unique tokens of a KV head; both are means
    over the scored positions. device_bytes: summaries, window and working set (all K/V for dense).
    store_bytes: the archive. summary_share: summary bytes over K/V bytes of an archived token. nll: nats a
    token, mean over the second half. gap_nats: nll less that of dense; se_nats: its standard error over
    tokens; both None without a dense run. seconds: the whole reading. losses: float32, one a scored token.
    """

    rule: str
    tokens: int
    budget_tokens: int | None
    attended: float
    fetched: float
    device_bytes: int
    store_bytes: int
    summary_share: float
    nll: float
    gap_nats: float | None
    se_nats: float | None
    seconds: float
    losses: Tensor = field(repr=False, compare=False)

    def row(self) -> dict[str, Any]:
        """Every field but the losses, ready for JSON."""
        fields = asdict(self)
        del fields["losses"]
        return fields


def paired_gap(losses: Tensor, dense: Tensor) -> tuple[float, float]:
    """Mean of `losses - dense` (both (n,), nats) and its standard error over tokens."""
    difference = (losses - dense).double()
    return difference.mean().item(), (difference.std() / difference.numel() ** 0.5).item()


@torch.no_grad()
def read(
    model: Any,
    ids: Tensor,
    cache: DynamicCache,
    *,
    score_from: int,
    block_tokens: int = 1024,
    at_scoring: Callable[[], object] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Feed all of `ids` (1, N) but the last token to the model, block by block, and keep K/V in `cache`.

    Returns the losses (N - 1 - score_from,) in nats, float32, of predicting ids[i + 1] at the positions i
    from `score_from` on. The last token is left to the caller: nothing is known to follow it, and it is where
    decoding goes on. at_scoring is called before the first scored block.
    """
    count = ids.shape[1] - 1
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    scoring_block = min(block_tokens, max(TILE_TOKENS, _LOGITS_AT_ONCE // vocabulary // TILE_TOKENS * TILE_TOKENS))
    losses: list[Tensor] = []
    start = 0
    while start < count:
        scored = start >= score_from
        if scored and at_scoring is not None and not losses:
            at_scoring()
        stop = min(start + (scoring_block if scored else block_tokens), count if scored else score_from)
        logits = model(
            ids[:, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=0 if scored else 1
        ).logits
        if scored:
            losses.append(cross_entropy(logits[0].float(), ids[0, start + 1 : stop + 1], reduction="none"))
        if progress is not None:
            progress(stop - start)
        start = stop
    return torch.cat(losses)


def evaluate_nll(
    model: Any,
    ids: Tensor,
    rules: Rules,
    *,
    block_tokens: int = 1024,
    progress: Callable[[str, int], object] | None = None,
) -> Iterator[RuleScore]:
    """Score every token of the second half of `ids` (1, N) under each rule, teacher forcing, dense first.

    The document is fed in blocks of `block_tokens`; the result does not depend on them. Counters cover the
    scored positions only. progress is called with the rule and the number of tokens just read. ValueError if
    the document is too short to have a second half, or the model's family is unsupported.
    """
    if ids.shape[1] < 4:
        raise ValueError(f"{ids.shape[1]} tokens are too few to score a second half; give at least 4")
    dense: Tensor | None = None
    for name in sorted(rules, key=lambda name: rules[name] is not None):
        rule = rules[name]
        started = time.perf_counter()
        losses, held = _read_by_rule(
            model, ids, rule, block_tokens, None if progress is None else functools.partial(progress, name)
        )
        if rule is None:
            dense = losses
        gap, error = (None, None) if dense is None else paired_gap(losses, dense)
        yield RuleScore(
            rule=name,
            tokens=ids.shape[1],
            budget_tokens=None if rule is None else rule.budget_tokens,
            **held,
            nll=losses.double().mean().item(),
            gap_nats=gap,
            se_nats=error,
            seconds=time.perf_counter() - started,
            losses=losses,
        )


def _read_by_rule(
    model: Any, ids: Tensor, rule: Rule, block_tokens: int, progress: Progress | None
) -> tuple[Tensor, dict[str, Any]]:
    with open_rule(model, rule) as cache:
        losses = read(
            model,
            ids,
            cache,
            score_from=ids.shape[1] // 2,
            block_tokens=block_tokens,
            at_scoring=functools.partial(reset_counters, cache),
            progress=progress,
        )
    return losses, held_bytes(cache)


def first_tokens(tokenizer: Any, text: str, tokens: int) -> Tensor:
    """The first `tokens` token ids of a text, (1, tokens). ValueError, with its length, if it is shorter."""
    ids: list[int] = []
    # Tokenizing megabytes for a few thousand tokens takes long; 16 characters a token are mostly plenty.
    for part in (text[: 16 * tokens], text):
        ids = tokenizer(part, verbose=False).input_ids
        if len(ids) >= tokens or len(part) == len(text):
            break
    if len(ids) < tokens:
        raise ValueError(f"the document has {len(ids)} tokens, fewer than the {tokens} asked for; lower --tokens")
    return torch.tensor([ids[:tokens]])
