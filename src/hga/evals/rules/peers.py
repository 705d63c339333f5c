"""The other systems' rules by name, at one budget."""

from __future__ import annotations

from collections.abc import Callable

from hga.evals.rules.fixed import RandomGroups, SinksAndWindow
from hga.evals.rules.infllm import InfLLMRule
from hga.evals.rules.oracle import OracleTokens
from hga.evals.rules.paper import PaperRule
from hga.evals.rules.quantised import QuantisedRule
from hga.evals.rules.quest import QuestRule
from hga.evals.rules.retroinfer import RetroInferRule
from hga.evals.rules.shadowkv import ShadowKVRule
from hga.evals.rules.simulated import SimulatedRule

PEERS: dict[str, Callable[[int], SimulatedRule]] = {
    "paper-strict": lambda budget: PaperRule(budget_tokens=budget),
    "paper-leaking": lambda budget: PaperRule(budget_tokens=budget, leaking=True),
    "quest": lambda budget: QuestRule(budget_tokens=budget, selection="in_turn"),
    "quest-per-head": lambda budget: QuestRule(budget_tokens=budget, selection="per_head"),
    "shadowkv": lambda budget: ShadowKVRule(budget_tokens=budget),
    "shadowkv-per-head": lambda budget: ShadowKVRule(budget_tokens=budget, selection="per_head"),
    "infllm": lambda budget: InfLLMRule(budget_tokens=budget),
    "infllm-per-head": lambda budget: InfLLMRule(budget_tokens=budget, selection="per_head"),
    "retroinfer": lambda budget: RetroInferRule(budget_tokens=budget),
    "retroinfer-per-head": lambda budget: RetroInferRule(budget_tokens=budget, selection="per_head"),
    "sinks-window": lambda budget: SinksAndWindow(budget_tokens=budget),
    "random": lambda budget: RandomGroups(budget_tokens=budget),
    "oracle": lambda budget: OracleTokens(budget_tokens=budget),
    "oracle-per-head": lambda budget: OracleTokens(budget_tokens=budget, selection="per_head"),
    "kv-8bit": lambda _: QuantisedRule(bits=8),
    "kv-4bit": lambda _: QuantisedRule(bits=4),
    "kv-2bit": lambda _: QuantisedRule(bits=2),
}
"""Rules for a budget in tokens. Those of one choice a KV head attend and fetch the same number of tokens; "-per-head"
attends as many and fetches more. Quantised K/V has no budget: it attends to everything."""
