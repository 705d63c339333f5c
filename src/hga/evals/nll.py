"""Negative log-likelihood of a document under routing rules, through the real cache and routed path."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from hga.config import TILE_TOKENS
from hga.evals.baseline import Baseline, check_logits, divergence, logits_of, output_layer_inputs
from hga.evals.rule import Rule, Rules, check_rules, held_bytes, open_rule, read_prompt_exactly, reset_counters
from hga.integrations.transformers.forward import forward_with_cache

_LOGITS_AT_ONCE = 1 << 26  # 256 MiB in float32

BUCKET_EDGES = (0, *(4096 << power for power in range(9)))
"""Positions at which buckets of losses begin: 0, 4K, 8K, 16K, 32K, 64K, ..."""

Progress = Callable[[int], object]
"""Called with the number of tokens just read."""


@dataclass(frozen=True)
class Bucket:
    """The scored positions from `from_tokens` up to, not including, `to_tokens`; se_nats is None for a single one."""

    from_tokens: int
    to_tokens: int
    scored: int
    nll: float
    gap_nats: float | None
    se_nats: float | None
    kl_mean: float | None


@dataclass(frozen=True)
class RuleScore:
    """What one rule lost and used on a document.

    tokens: tokens read. scored: positions scored, the last ones. budget_tokens: exact tokens a query, None for
    dense. attended: share of the context that a query head attended exactly; fetched: the same for the unique
    tokens of a KV head; both are means over the scored positions. device_bytes: summaries, window and working set
    (all K/V for dense) at the end; mean_device_bytes: mean over the scored positions. store_bytes: the archive.
    summary_share: summary bytes over K/V bytes of an archived token. nll: nats a token, mean over the scored
    positions. gap_nats: nll less that of dense; se_nats: its standard error over tokens. kl_mean, kl_se, kl_p99:
    mean, standard error and 99th percentile of KL(dense || rule); top1_agreement: share of positions at which both
    find the same token most likely. These are None without a dense run. buckets: the losses by position. seconds:
    the whole reading. losses: float32, one a scored token.
    """

    rule: str
    tokens: int
    scored: int
    budget_tokens: int | None
    attended: float
    fetched: float
    device_bytes: int
    mean_device_bytes: float
    store_bytes: int
    summary_share: float
    nll: float
    gap_nats: float | None
    se_nats: float | None
    kl_mean: float | None
    kl_se: float | None
    kl_p99: float | None
    top1_agreement: float | None
    buckets: tuple[Bucket, ...]
    seconds: float
    losses: Tensor = field(repr=False, compare=False)

    def row(self) -> dict[str, Any]:
        """Every field but the losses, ready for JSON."""
        fields = asdict(self)
        del fields["losses"]
        return fields


def paired_gap(losses: Tensor, dense: Tensor) -> tuple[float, float]:
    """Mean of `losses - dense` (both (n,), nats, n at least 2) and its standard error over tokens."""
    difference = (losses - dense).double()
    return difference.mean().item(), standard_error(difference)


def standard_error(values: Tensor) -> float:
    """The standard error of the mean of `values` (n,), n at least 2."""
    return values.double().std().item() / math.sqrt(values.numel())


@torch.no_grad()
def read(
    model: Any,
    ids: Tensor,
    cache: DynamicCache,
    *,
    score_from: int,
    block_tokens: int = 1024,
    at_scoring: Callable[[], object] | None = None,
    at_logits: Callable[[Tensor], object] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Feed all of `ids` (1, N) but the last token to the model, block by block, and keep K/V in `cache`.

    Returns the losses (N - 1 - score_from,) in nats, float32, of predicting ids[i + 1] at the positions i
    from `score_from` on. The last token is left to the caller: nothing is known to follow it, and it is where
    decoding goes on. at_scoring is called before the first scored block, at_logits with each one's logits (T, V).
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
        logits = forward_with_cache(model, ids[:, start:stop], cache, logits_to_keep=0 if scored else 1).logits
        if scored:
            losses.append(cross_entropy(logits[0].float(), ids[0, start + 1 : stop + 1], reduction="none"))
            if at_logits is not None:
                at_logits(logits[0])
        if progress is not None:
            progress(stop - start)
        start = stop
    return torch.cat(losses)


def evaluate_nll(
    model: Any,
    ids: Tensor,
    rules: Rules,
    *,
    score_from: int | None = None,
    exact_prompt: bool = False,
    block_tokens: int = 1024,
    progress: Callable[[str, int], object] | None = None,
) -> Iterator[RuleScore]:
    """Score the tokens of `ids` (1, N) under each rule, teacher forcing, dense first.

    score_from: the first position scored; by default the second half is. exact_prompt: whether what lies before it is
    read densely. The document is fed in blocks of `block_tokens`; the result does not depend on them (but with
    prefill="nodes", which reads a last block of less than 64 tokens by groups). Counters cover the scored positions
    only. progress is called with the rule and the number of tokens just read. ValueError as `score_rule` and
    `read_prompt_exactly`.
    """
    if exact_prompt:
        first = ids.shape[1] // 2 if score_from is None else score_from
        rules = {name: read_prompt_exactly(name, rule, first) for name, rule in rules.items()}
    check_rules(model, rules.values())
    baseline: Baseline | None = None
    for name in sorted(rules, key=lambda name: rules[name] is not None):
        report = None if progress is None else functools.partial(progress, name)
        score, baseline = score_rule(
            model, ids, name, rules[name], baseline, score_from=score_from, block_tokens=block_tokens, progress=report
        )
        yield score


def score_rule(
    model: Any,
    ids: Tensor,
    name: str,
    rule: Rule,
    baseline: Baseline | None,
    *,
    score_from: int | None = None,
    block_tokens: int = 1024,
    progress: Progress | None = None,
) -> tuple[RuleScore, Baseline | None]:
    """Score one rule against the dense reading of the same positions, if there is one; dense makes it.

    Returns the score and the baseline for the rules to come. ValueError if fewer than two tokens would be scored,
    the baseline is of other positions, or the model's family is unsupported.
    """
    first = ids.shape[1] // 2 if score_from is None else score_from
    scored = ids.shape[1] - 1 - first
    if scored < 2:
        raise ValueError(f"{ids.shape[1]} tokens are too few to score from position {first} on; give at least 5")
    if baseline is not None and baseline.losses.shape[0] != scored:
        raise ValueError(f"the dense reading scored {baseline.losses.shape[0]} tokens, this one {scored}")
    started = time.perf_counter()
    with ExitStack() as stack:
        cache = stack.enter_context(open_rule(model, rule))
        inputs = stack.enter_context(output_layer_inputs(model)) if rule is None else None
        notes = _Notes(model, cache, inputs, None if rule is None else baseline)
        losses = read(
            model,
            ids,
            cache,
            score_from=first,
            block_tokens=block_tokens,
            at_scoring=notes.begin,
            at_logits=notes.take,
            progress=progress,
        ).cpu()
        held = held_bytes(cache)
    if rule is None:
        baseline = Baseline(losses, torch.cat(notes.hidden))
        notes.kl, notes.same = [torch.zeros_like(losses)], [torch.ones_like(losses, dtype=torch.bool)]
    gap, error = (None, None) if baseline is None else paired_gap(losses, baseline.losses)
    kl = torch.cat(notes.kl) if notes.kl else None
    score = RuleScore(
        rule=name,
        tokens=ids.shape[1],
        scored=scored,
        budget_tokens=None if rule is None else rule.budget_tokens,
        **held,
        mean_device_bytes=notes.token_bytes / scored,
        nll=losses.double().mean().item(),
        gap_nats=gap,
        se_nats=error,
        kl_mean=None if kl is None else kl.double().mean().item(),
        kl_se=None if kl is None else standard_error(kl),
        kl_p99=None if kl is None else kl.quantile(0.99).item(),
        top1_agreement=None if kl is None else torch.cat(notes.same).double().mean().item(),
        buckets=tuple(_buckets(first, losses, baseline, kl)),
        seconds=time.perf_counter() - started,
        losses=losses,
    )
    return score, baseline


class _Notes:
    """What is noted down as scored blocks pass: bytes beside the model, and hidden states or the distance from them."""

    def __init__(self, model: Any, cache: DynamicCache, inputs: list[Tensor] | None, baseline: Baseline | None) -> None:
        """inputs: of the output layer, where this is the dense reading."""
        self._model, self._cache, self._inputs, self._baseline = model, cache, inputs, baseline
        self._scored = 0
        self._bytes_before = 0
        self.token_bytes = 0.0
        self.hidden: list[Tensor] = []
        self.kl: list[Tensor] = []
        self.same: list[Tensor] = []

    def begin(self) -> None:
        """From here on positions are scored."""
        if self._cache.get_seq_length():
            self._bytes_before = held_bytes(self._cache)["device_bytes"]
        reset_counters(self._cache)

    def take(self, logits: Tensor) -> None:
        """Note a scored block, from its logits (T, V)."""
        start, count = self._scored, logits.shape[0]
        self._scored += count
        # What is held grows through a block: its tokens count with the mean of both ends.
        bytes_after = held_bytes(self._cache)["device_bytes"]
        self.token_bytes += (self._bytes_before + bytes_after) / 2 * count
        self._bytes_before = bytes_after
        if self._inputs is not None:
            hidden = self._inputs.pop()
            self._inputs.clear()
            if not self.hidden:
                check_logits(self._model, hidden, logits)
            self.hidden.append(hidden.cpu())
        elif self._baseline is not None:
            dense = self._baseline.hidden[start : start + count].to(logits.device)
            kl, same = divergence(logits_of(self._model, dense), logits)
            self.kl.append(kl.cpu())
            self.same.append(same.cpu())


def _buckets(first: int, losses: Tensor, baseline: Baseline | None, kl: Tensor | None) -> Iterator[Bucket]:
    """The scored positions from `first` on, cut at BUCKET_EDGES; empty buckets are left out."""
    last = first + losses.shape[0]
    for lower, upper in itertools.pairwise(BUCKET_EDGES):
        within = slice(max(lower, first) - first, max(min(upper, last) - first, 0))
        part = losses[within].double()
        if not part.numel():
            continue
        lost = None if baseline is None else part - baseline.losses[within]
        yield Bucket(
            from_tokens=lower,
            to_tokens=upper,
            scored=part.numel(),
            nll=part.mean().item(),
            gap_nats=None if lost is None else lost.mean().item(),
            se_nats=None if lost is None or lost.numel() < 2 else standard_error(lost),
            kl_mean=None if kl is None else kl[within].double().mean().item(),
        )


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
