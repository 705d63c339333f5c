"""Negative log-likelihood of a document under routing rules, through the real cache and routed path."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

import hga
from hga.cache.families import cache_argument
from hga.config import PRESETS, TILE_TOKENS, HGAConfig

_LOGITS_AT_ONCE = 1 << 26  # 256 MiB in float32

Rules = Mapping[str, HGAConfig | None]
"""Rule names with their config; None is dense attention."""

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


def resolve_rules(
    names: Sequence[str],
    tokens: int,
    fraction: float | None = None,
    own: Mapping[str, HGAConfig] | None = None,
) -> dict[str, HGAConfig | None]:
    """Configs of the named rules for a document of `tokens` tokens, "dense" (None) first.

    names: "dense", "window" (sink and window only), presets, or keys of `own`. fraction: the budget as a
    share of `tokens`; without it each config keeps its own. Every rule routes from the first token on.
    ValueError for an unknown rule, a fraction outside (0, 1], or a budget that a rule cannot work with.
    """
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"budget {fraction} must be a share of the context above 0 and at most 1, e.g. 1/32")
    if not names:
        raise ValueError("no rule is named; for example dense,balanced")
    bases = {"window": HGAConfig()} | {name: HGAConfig.preset(name) for name in PRESETS} | dict(own or {})
    rules: dict[str, HGAConfig | None] = {"dense": None} if "dense" in names else {}
    for name in names:
        if name == "dense":
            continue
        if name not in bases:
            raise ValueError(f"rule {name!r} is unknown; choose from dense, {', '.join(bases)}")
        budget = bases[name].budget_tokens if fraction is None else int(fraction * tokens)
        try:
            if name == "window":
                rules[name] = _window_only(budget)
            else:
                rules[name] = bases[name].replace(prefill="routed", dense_below=0, budget_tokens=budget)
        except ValueError as error:
            raise ValueError(f"rule {name!r} on {tokens} tokens: {error}") from error
    return rules


def _window_only(budget: int) -> HGAConfig:
    """Sink and the most recent tokens alone, in the same budget: what long-range attention is worth.

    Without a far field a config must leave room for one routed group, so one group of four stays routed.
    """
    sink, group = HGAConfig().sink_tokens, HGAConfig().group_size
    return HGAConfig(
        sink_tokens=sink,
        far_field=False,
        window_tokens=max(group, budget - sink - group),
        budget_tokens=budget,
        prefill="routed",
    )


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
    count, argument = ids.shape[1] - 1, cache_argument(model)
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
            ids[:, start:stop], use_cache=True, logits_to_keep=0 if scored else 1, **{argument: cache}
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
    if model.config._attn_implementation == "hga":
        raise ValueError("the model is enabled already; call hga.disable(model), each rule enables it for itself")
    dense: Tensor | None = None
    for rule in sorted(rules, key=lambda name: rules[name] is not None):
        config = rules[rule]
        started = time.perf_counter()
        losses, held = _read_by_rule(
            model, ids, config, block_tokens, None if progress is None else functools.partial(progress, rule)
        )
        if config is None:
            dense = losses
        gap, error = (None, None) if dense is None else paired_gap(losses, dense)
        yield RuleScore(
            rule=rule,
            tokens=ids.shape[1],
            budget_tokens=None if config is None else config.budget_tokens,
            **held,
            nll=losses.double().mean().item(),
            gap_nats=gap,
            se_nats=error,
            seconds=time.perf_counter() - started,
            losses=losses,
        )


def held_bytes(cache: DynamicCache) -> dict[str, Any]:
    """What a cache holds where and what its queries attended, in `RuleScore`'s terms; dense caches too."""
    if isinstance(cache, hga.HGACache):
        stats = cache.stats()
        names = ("attended", "fetched", "device_bytes", "store_bytes", "summary_share")
        return {name: getattr(stats, name) for name in names}
    tensors = [x for layer in cache.layers for x in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    beside = sum(x.nbytes for x in tensors if isinstance(x, Tensor))
    return {"attended": 1.0, "fetched": 1.0, "device_bytes": beside, "store_bytes": 0, "summary_share": 0.0}


def _read_by_rule(
    model: Any, ids: Tensor, config: HGAConfig | None, block_tokens: int, progress: Progress | None
) -> tuple[Tensor, dict[str, Any]]:
    half = ids.shape[1] // 2
    if config is None:
        cache = DynamicCache(config=model.config)
        losses = read(model, ids, cache, score_from=half, block_tokens=block_tokens, progress=progress)
        return losses, held_bytes(cache)
    routed = hga.HGACache(config=model.config, hga_config=config)
    with hga.enabled(model, config):
        losses = read(
            model,
            ids,
            routed,
            score_from=half,
            block_tokens=block_tokens,
            at_scoring=routed.reset_counters,
            progress=progress,
        )
    return losses, held_bytes(routed)


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
