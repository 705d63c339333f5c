"""Attention over parts (exact tokens, far field) merged by log-sum-exp (design section 3)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Logits (H, R, M, K), -inf where not attended, and the values (H, K, D) that they weigh."""

    logits: Tensor
    values: Tensor


class FarField(NamedTuple):
    """Unopened nodes, and the unopened groups of nodes whose groups were scored.

    node_logits (H, R, M, N), -inf for scored nodes; group_logits (H, R, M, U, groups a node), -inf for opened
    groups and for nodes that a query did not score; nodes (H, U), the ids of the scored nodes; values
    (H, N, D): a group's mass weighs the mean value of its node.
    """

    node_logits: Tensor
    group_logits: Tensor
    nodes: Tensor
    values: Tensor


class Output(NamedTuple):
    """Attention output (H, R, M, D) and the log-sum-exp (H, R, M, 1) of the logits behind it."""

    value: Tensor
    logsumexp: Tensor


def attend(parts: list[Part], far: FarField | None = None) -> Output:
    """One softmax over all parts and the far field. Every query must attend to something."""
    logits = [part.logits for part in parts]
    if far is not None:
        logits += [far.node_logits, far.group_logits.flatten(-2)]
    joined = logits[0] if len(logits) == 1 else torch.cat(logits, -1)
    # softmax alone handles -inf at full speed on a CPU (exp and logsumexp take a slow path there, measured 10
    # times slower); its largest weight is exp(0) / sum, which gives the log-sum-exp back.
    weights = torch.softmax(joined, -1)
    logsumexp = joined.amax(-1, keepdim=True) - torch.log(weights.amax(-1, keepdim=True))
    shares = weights.split([x.shape[-1] for x in logits], -1)
    value = sum(_weigh(share, part.values) for share, part in zip(shares, parts, strict=False))
    if far is not None:
        value = value + _weigh(_fold(shares[-2], shares[-1], far), far.values)
    assert isinstance(value, Tensor)
    return Output(value, logsumexp)


def _weigh(weights: Tensor, values: Tensor) -> Tensor:
    heads, repeats, queries, count = weights.shape
    out = weights.reshape(heads, repeats * queries, count) @ values
    return out.view(heads, repeats, queries, -1)


def _fold(node_weights: Tensor, group_weights: Tensor, far: FarField) -> Tensor:
    """Add the weights of groups to those of their nodes: (H, R, M, N)."""
    inner = group_weights.unflatten(-1, far.group_logits.shape[-2:]).sum(-1)  # (H, R, M, U)
    index = far.nodes[:, None, None, :].expand_as(inner)
    return node_weights.scatter_add(-1, index, inner)


def merge(one: Output, other: Output) -> Output:
    """Merge two outputs over disjoint sets of tokens by their log-sum-exps."""
    both = torch.logaddexp(one.logsumexp, other.logsumexp)
    left, right = torch.exp(one.logsumexp - both), torch.exp(other.logsumexp - both)
    return Output(left * one.value + right * other.value, both)


def add_sinks(output: Output, sinks: Tensor | None) -> Tensor:
    """The output (H, R, M, D), shrunk by learned sink logits (H, R) where a model has them: they enter the sum once."""
    if sinks is None:
        return output.value
    logit = sinks[:, :, None, None].to(output.value.dtype)
    return output.value * torch.sigmoid(output.logsumexp - logit)


def far_logits(scores: Tensor, tokens: int) -> Tensor:
    """Logits of summaries: each mean key counts for its `tokens` tokens."""
    return scores + math.log(tokens)
