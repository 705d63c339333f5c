"""What an evaluation compares: dense attention, a config, or a peer's rule; and how a model is put under one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import DynamicCache

import hga
from hga.cache.families import routed_layers
from hga.config import PRESETS, TILE_TOKENS, HGAConfig
from hga.evals.rules.peers import PEERS
from hga.evals.rules.simulated import SimulatedRule, check_simulated


@runtime_checkable
class Peer(Protocol):
    """Another system's rule, simulated: a frozen dataclass, whose repr says everything that it is made of."""

    @property
    def budget_tokens(self) -> int | None:
        """Exact tokens a query; None for a rule that attends to all."""

    def opened(self, model: Any) -> AbstractContextManager[DynamicCache]:
        """Inside, the model attends by this rule. Gives a new cache that has `CountingCache`'s methods."""


Rule = HGAConfig | Peer | None
"""None is dense attention."""

Rules = Mapping[str, Rule]
"""Rules by name."""

_BY_NODES: dict[str, Any] = {"prefill": "nodes", "block_tokens": 2 * TILE_TOKENS}
"""Small enough for blocks whose logits are scored to be long ones (`HGAConfig.node_block_tokens`)."""


@runtime_checkable
class CountingCache(Protocol):
    """A cache that knows what its queries used; `HGACache` is one."""

    def reset_counters(self) -> None:
        """Start the averages again."""

    def stats(self) -> Any:
        """An object with `attended`, `fetched`, `device_bytes`, `store_bytes` and `summary_share`."""


@contextmanager
def open_rule(model: Any, rule: Rule) -> Iterator[DynamicCache]:
    """Put the model under a rule: gives a new cache, and the model back as it was.

    ValueError if the model is enabled already, or of an unsupported family.
    """
    if model.config._attn_implementation == "hga":
        raise ValueError("the model is enabled already; call hga.disable(model), each rule enables it for itself")
    if rule is None:
        yield DynamicCache(config=model.config)
    elif isinstance(rule, HGAConfig):
        cache = hga.HGACache(config=model.config, hga_config=rule)
        with hga.enabled(model, rule):
            yield cache
    else:
        with rule.opened(model) as simulated:
            yield simulated


def check_rules(model: Any, rules: Iterable[Rule]) -> None:
    """ValueError if a rule cannot work on the model, before dense has read for long."""
    for rule in rules:
        if isinstance(rule, HGAConfig):
            routed_layers(model.config.get_text_config(decoder=True), rule)
        elif isinstance(rule, SimulatedRule):
            check_simulated(model.config)


def reset_counters(cache: DynamicCache) -> None:
    """Start the averages of what the cache's queries used again; dense ones have none."""
    if isinstance(cache, CountingCache):
        cache.reset_counters()


def held_bytes(cache: DynamicCache) -> dict[str, Any]:
    """What a cache holds where and what its queries attended since the counters were reset; dense caches too.

    attended: share of the context that a query head attended exactly; fetched: the same for the unique tokens of
    a KV head. device_bytes: beside the model; store_bytes: in the store. summary_share: summary bytes over K/V
    bytes of an archived token.
    """
    if isinstance(cache, CountingCache):
        stats = cache.stats()
        names = ("attended", "fetched", "device_bytes", "store_bytes", "summary_share")
        return {name: getattr(stats, name) for name in names}
    tensors = [x for layer in cache.layers for x in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    beside = sum(x.nbytes for x in tensors if isinstance(x, Tensor))
    return {"attended": 1.0, "fetched": 1.0, "device_bytes": beside, "store_bytes": 0, "summary_share": 0.0}


def resolve_rules(
    names: Sequence[str],
    tokens: int,
    fraction: float | None = None,
    own: Mapping[str, HGAConfig] | None = None,
) -> dict[str, Rule]:
    """The named rules for a document of `tokens` tokens, "dense" (None) first.

    names: "dense", "window" (sink and window only), presets, other systems' rules (`PEERS`), or keys of `own`.
    fraction: the budget as a share of `tokens`; without it each config keeps its own, and the other systems have
    that of the defaults. Every rule routes from the first token on (prefill="nodes": from `dense_positions` on).
    ValueError for an unknown rule, a fraction outside (0, 1], or a budget that a rule cannot work with.
    """
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"budget {fraction} must be a share of the context above 0 and at most 1, e.g. 1/32")
    if not names:
        raise ValueError("no rule is named; for example dense,balanced")
    bases = {"window": HGAConfig()} | {name: HGAConfig.preset(name) for name in PRESETS} | dict(own or {})
    rules: dict[str, Rule] = {"dense": None} if "dense" in names else {}
    for name in names:
        if name == "dense":
            continue
        if name not in bases and name not in PEERS:
            raise ValueError(f"rule {name!r} is unknown; choose from dense, {', '.join([*bases, *PEERS])}")
        budget = bases.get(name, HGAConfig()).budget_tokens if fraction is None else int(fraction * tokens)
        try:
            if name in PEERS:
                rules[name] = PEERS[name](budget)
            elif name == "window":
                rules[name] = _window_only(budget)
            else:
                base = bases[name]
                routing = _BY_NODES if base.prefill == "nodes" else {"prefill": "routed"}
                if base.node_budget_tokens is not None:
                    routing = routing | {"node_budget_tokens": base.node_budget_tokens * budget // base.budget_tokens}
                rules[name] = base.replace(**routing, dense_below=0, budget_tokens=budget)
        except ValueError as error:
            raise ValueError(f"rule {name!r} on {tokens} tokens: {error}") from error
    return rules


def read_prompt_exactly(name: str, rule: Rule, tokens: int | None = None) -> Rule:
    """The rule for what comes behind a prompt that is read densely, as hga reads prompts unless it is told otherwise.

    tokens: of the prompt; by default all that comes in blocks of several tokens is one. ValueError for another
    system's rule, which is simulated from the first token on.
    """
    if rule is None:
        return None
    if not isinstance(rule, HGAConfig):
        raise ValueError(f"rule {name!r} is simulated and routes every token; leave --exact-prompt out, or the rule")
    return (
        rule.replace(prefill="exact", node_budget_tokens=None) if tokens is None else rule.replace(dense_below=tokens)
    )


def _window_only(budget: int) -> HGAConfig:
    """Sink and the most recent tokens alone, in the same budget: what long-range attention is worth.

    Without a far field a config must leave room for one routed group, so one group stays routed.
    """
    sink, group = HGAConfig().sink_tokens, HGAConfig().group_size
    return HGAConfig(
        sink_tokens=sink,
        far_field=False,
        window_tokens=max(group, budget - sink - group),
        budget_tokens=budget,
        prefill="routed",
    )
