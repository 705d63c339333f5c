"""Where a rule loses: attention mass recalled and output error, per layer and head, on sampled queries."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from hga.config import TILE_TOKENS, HGAConfig
from hga.evals.rule import Rule
from hga.evals.rules.routed import RoutedRule
from hga.evals.rules.simulated import SimulatedRule, check_simulated, is_routed, tiles_of
from hga.integrations.transformers.attention import hga_attention, hga_mask

ATTENTION = "hga_recall"


@dataclass
class Recall:
    """What one rule recalled of dense attention on a document, means over sampled queries of the second half.

    rule: its name; tokens: read. layers (L,): indices of the layers measured. recalled (L, Hq): share of the dense
    attention mass that lies on tokens attended exactly. output_error (L, Hq): L2 norm of the output's difference to
    dense, over the norm of dense, both over the sampled queries; layer_error (L,): the same for all heads of a layer
    together. attended, fetched: shares of the context.
    """

    rule: str
    tokens: int
    layers: list[int]
    recalled: Tensor
    output_error: Tensor
    layer_error: Tensor
    attended: float
    fetched: float

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row a layer and head, ready for JSON."""
        for layer, recalled, error in zip(self.layers, self.recalled.tolist(), self.output_error.tolist(), strict=True):
            for head, (mass, lost) in enumerate(zip(recalled, error, strict=True)):
                yield {
                    "kind": "recall",
                    "tokens": self.tokens,
                    "rule": self.rule,
                    "layer": layer,
                    "head": head,
                    "recalled": mass,
                    "output_error": lost,
                }


class _Sums:
    """Sums of one rule over the tiles of a forward."""

    def __init__(self) -> None:
        self.by_layer: dict[int, list[Tensor]] = {}
        self.used = torch.zeros(2, dtype=torch.float64)
        self.queries = 0


@torch.no_grad()
def measure_recall(
    model: Any, ids: Tensor, rules: Mapping[str, Rule], *, queries: int = 256, block_tokens: int = 1024
) -> list[Recall]:
    """Read `ids` (1, N) once, densely; on the way every layer also attends by each rule, for sampled queries.

    Errors therefore do not add up over layers: each layer's is its own. The sampled queries are `queries` positions
    of the second half in whole tiles, evenly spread (all of it where there are fewer). Rules are `HGAConfig`s or
    simulated rules; "dense" (None) recalls everything and is left out. ValueError for a document of fewer than 4
    tokens, for fewer than one query, or a model of an unsupported family.
    """
    check_simulated(model.config)
    tokens = ids.shape[1]
    if tokens < 4 or queries < 1:
        raise ValueError(f"{tokens} tokens, {queries} queries: give at least 4 tokens and 1 query")
    simulated = {name: rule for name, rule in rules.items() if isinstance(rule, (HGAConfig, SimulatedRule))}
    sums = {name: _Sums() for name in simulated}
    before = model.config._attn_implementation
    chosen = _sampled_tiles(tokens, queries)
    attention = functools.partial(_recording_attention, simulated, sums, chosen)
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, hga_mask)
    model.set_attn_implementation(ATTENTION)
    try:
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
    return [_recall_of(name, tokens, sums[name]) for name in simulated]


def _sampled_tiles(tokens: int, queries: int) -> set[int]:
    """Starts of the tiles measured: from the second half, evenly spread."""
    starts = list(range(tokens // 2 // TILE_TOKENS * TILE_TOKENS, tokens, TILE_TOKENS))
    wanted = min(len(starts), max(1, -(-queries // TILE_TOKENS)))
    return {starts[(2 * i + 1) * len(starts) // (2 * wanted)] for i in range(wanted)}


def _recording_attention(
    rules: Mapping[str, HGAConfig | SimulatedRule],
    sums: Mapping[str, _Sums],
    chosen: set[int],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Dense attention that also measures every rule on the sampled tiles: query (1, Hq, T, D), a whole sequence."""
    out, weights = hga_attention(module, query, key, value, attention_mask, **kwargs)
    if not is_routed(module.layer_idx, key, attention_mask, kwargs):
        return out, weights
    tiles = list(tiles_of(module, query, key, value, {}, **kwargs))  # those measured keep their logits for all rules
    repeats = query.shape[1] // key.shape[1]
    for name, rule in rules.items():
        if isinstance(rule, HGAConfig):
            rule = rule.of_layer(module.layer_idx, module.config.num_hidden_layers, repeats)
            rule = RoutedRule.of(rule.by_nodes() if rule.prefill == "nodes" else rule)
        notes: dict[str, Tensor] = {}  # of this rule and layer
        for tile in tiles:
            tile.notes = notes
            rule.observe(tile)
            if tile.start not in chosen:
                continue
            attended = rule.attend(tile)
            heads, repeats, count, width = tile.query.shape
            mass = torch.softmax(tile.logits, -1)
            dense = (mass.view(heads, repeats * count, -1) @ tile.value).view(heads, repeats, count, width)
            recalled = (mass * attended.exact).sum(-1).sum(-1).flatten().double()
            wrong = (attended.out - dense).double().square().sum((-2, -1)).flatten()
            norm = dense.double().square().sum((-2, -1)).flatten()
            held = sums[name]
            fresh = torch.stack([recalled, wrong, norm, torch.full_like(norm, count)]).cpu()
            held.by_layer.setdefault(module.layer_idx, []).append(fresh)
            context = (tile.positions + 1).double()
            used = [attended.exact, attended.exact.any(1, keepdim=True)]
            held.used += torch.stack([(x.sum(-1) / context).flatten(0, -2).mean(0).sum().cpu() for x in used])
            held.queries += count
    return out, weights


def _recall_of(name: str, tokens: int, sums: _Sums) -> Recall:
    layers = sorted(sums.by_layer)
    recalled, wrong, norm, count = torch.stack([torch.stack(sums.by_layer[i]).sum(0) for i in layers]).unbind(1)
    attended, fetched = (sums.used / sums.queries).tolist()
    tiny = torch.finfo(torch.float64).tiny
    return Recall(
        rule=name,
        tokens=tokens,
        layers=layers,
        recalled=recalled / count,
        output_error=(wrong / norm.clamp(min=tiny)).sqrt(),
        layer_error=(wrong.sum(1) / norm.sum(1).clamp(min=tiny)).sqrt(),
        attended=attended,
        fetched=fetched,
    )
