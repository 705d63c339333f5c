"""A model whose attention follows a rule on dense K/V, and what the rule's queries used."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from hga.cache.families import check_model_config
from hga.cache.rope import inverse_frequencies
from hga.evals.rules.tile import Attended, Tile, cut_tiles
from hga.integrations.transformers.attention import hga_attention, hga_mask

ATTENTION = "hga_rule"


@dataclass(frozen=True)
class SimulatedStats:
    """Means over queries, heads and layers, as shares of the query's context, and bytes.

    attended: tokens a query head attended exactly; fetched: unique tokens of a KV head; estimated: rows of
    summaries that took part. device_bytes: metadata and the K/V of a budget; store_bytes: the K/V kept elsewhere.
    summary_share: metadata bytes on the GPU over bytes of 16-bit K/V, a token.
    """

    attended: float
    fetched: float
    estimated: float
    device_bytes: int
    store_bytes: int
    summary_share: float


class SimulatedCache(DynamicCache):
    """All K/V, dense; beside them each layer's notes of the rule, and counters."""

    def __init__(self, config: Any, rule: SimulatedRule) -> None:
        super().__init__(config=config)
        self._rule = rule
        self.notes: dict[int, dict[str, Tensor]] = {}
        self.reset_counters()

    def reset_counters(self) -> None:
        """Start the averages again."""
        self._sums: Tensor | None = None
        self._queries = 0

    def count(self, tile: Tile, attended: Attended) -> None:
        """Add a tile's queries to the averages."""
        context = (tile.positions + 1).double()
        exact = attended.exact
        used = [exact.sum(-1), exact.any(1).sum(-1), attended.estimated]
        shares = torch.stack([(x.double() / context).flatten(0, -2).mean(0).sum() for x in used])
        self._sums = shares if self._sums is None else self._sums + shares  # on the device: nothing waits for it
        self._queries += tile.query.shape[2]

    def stats(self) -> SimulatedStats:
        """What queries used since the counters were reset, and what is kept where. ValueError before any query."""
        if self._sums is None:
            raise ValueError("no query was counted yet; let the model read first")
        attended, fetched, estimated = (self._sums / self._queries).tolist()
        layers: list[Any] = [self.layers[index] for index in self.notes]
        stored = sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in layers)
        length, width = layers[0].keys.shape[2:]
        share = self._rule.metadata_share(width, length)
        working = 0 if self._rule.budget_tokens is None else min(length, self._rule.budget_tokens) * stored // length
        kept = 0 if self._rule.budget_tokens is None else stored
        return SimulatedStats(attended, fetched, estimated, int(share * stored) + working, kept, share)


@dataclass(frozen=True, kw_only=True)
class SimulatedRule:
    """Base of the rules: a frozen dataclass is the method, and gives `attend` and `metadata_share`."""

    budget_tokens: int | None

    def observe(self, tile: Tile) -> None:
        """Called for every tile in order, before any `attend` to it: what has to be noted of its queries."""

    def attend(self, tile: Tile) -> Attended:
        """The rule on one tile, strictly causal unless the rule says otherwise."""
        raise NotImplementedError

    def metadata_share(self, width: int, tokens: int) -> float:
        """Bytes kept on the GPU beside K/V, over bytes of 16-bit K/V; `width` numbers a key, `tokens` tokens."""
        raise NotImplementedError

    @contextmanager
    def opened(self, model: Any) -> Iterator[SimulatedCache]:
        """Inside, the model's full-attention layers follow the rule; gives the cache to read with.

        ValueError as `check_simulated`.
        """
        check_simulated(model.config)
        cache = SimulatedCache(model.config, self)
        before = model.config._attn_implementation
        AttentionInterface.register(ATTENTION, functools.partial(rule_attention, self, cache))
        AttentionMaskInterface.register(ATTENTION, hga_mask)
        model.set_attn_implementation(ATTENTION)
        try:
            yield cache
        finally:
            model.set_attn_implementation(before)


def check_simulated(config: Any) -> None:
    """ValueError if a model's family is unsupported, or its attention has what the rules do not know."""
    check_model_config(config)
    if getattr(config, "attn_logit_softcapping", None) is not None or config.model_type == "gpt_oss":
        raise ValueError(
            f"model_type={config.model_type!r} has soft-capped scores or learned sinks, which simulated rules do not "
            "know; measure presets on it by `hga eval nll`, which runs the real path"
        )


def is_routed(layer_idx: int, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether a layer attends to its whole past. ValueError for batches and padding, which no rule here knows."""
    if kwargs.get("sliding_window") is not None or (mask is not None and mask.ndim == 4):
        return False
    if key.shape[0] != 1 or mask is not None:
        raise ValueError(f"layer {layer_idx}: simulated rules read one plain sequence, got a batch or padding")
    return True


def tiles_of(
    module: Any, query: Tensor, key: Tensor, value: Tensor, notes: dict[str, Tensor], **kwargs: Any
) -> Iterator[Tile]:
    """The tiles of one attention call: query (1, Hq, T, D), key and value (1, Hkv, N, D)."""
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    frequencies = inverse_frequencies(module.config, module.layer_idx)
    return cut_tiles(query[0], key[0], value[0], scale, frequencies, notes)


def rule_attention(
    rule: SimulatedRule,
    cache: SimulatedCache,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function "hga_rule": query (1, Hq, T, D), key and value (1, Hkv, N, D)."""
    if not is_routed(module.layer_idx, key, attention_mask, kwargs):
        dense: tuple[Tensor, Tensor | None] = hga_attention(module, query, key, value, attention_mask, **kwargs)
        return dense
    outputs = []
    notes = cache.notes.setdefault(module.layer_idx, {})
    for tile in tiles_of(module, query, key, value, notes, **kwargs):
        rule.observe(tile)
        attended = rule.attend(tile)
        cache.count(tile, attended)
        outputs.append(attended.out)
    out = torch.cat(outputs, 2).flatten(0, 1).to(query.dtype)  # (Hq, T, D)
    return out[None].transpose(1, 2).contiguous(), None
