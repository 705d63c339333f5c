"""Attention over parts (exact tokens, far field) merged by log-sum-exp (design section 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hga.ops.routing import NEVER


class Part(NamedTuple):
    """Logits (H, R, M, K), -inf where not attended, and the values (H, K / sharing, D) that they weigh.

    Each `sharing` neighbours weigh one value. Values may come in blocks along K, so that decoded summaries need
    not be held at once.
    """

    logits: Tensor
    values: Tensor | Iterable[Tensor]
    sharing: int = 1


class FarField(NamedTuple):
    """Unopened nodes, and the unopened groups of nodes whose groups were scored.

    node_logits (H, R, M, N), -inf for scored nodes; group_logits (H, R, M, U, groups a node), -inf for opened
    groups and for nodes that a query did not score; nodes (H, U), the ids of the scored nodes; values
    (H, N, D): a group's mass weighs the mean value of its node.
    """

    node_logits: Tensor
    group_logits: Tensor
    nodes: Tensor
    values: Tensor | Iterable[Tensor]


class Output(NamedTuple):
    """Attention output (H, R, M, D) and the log-sum-exp (H, R, M, 1) of the logits behind it."""

    value: Tensor
    logsumexp: Tensor


def attend(parts: list[Part], far: FarField | None = None) -> Output:
    """One softmax over all parts and the far field. A query that attends to nothing gets 0, log-sum-exp -inf."""
    joined, sizes = _join(parts, far)
    weights = torch.softmax(joined, -1)
    peak = joined.amax(-1, keepdim=True)
    nothing = peak == NEVER
    # The largest weight is exp(0) / sum, which gives the log-sum-exp back: exp and logsumexp themselves take a
    # slow path for -inf on a CPU (measured 10 times slower), softmax does not.
    logsumexp = (peak - torch.log(weights.amax(-1, keepdim=True))).masked_fill_(nothing, NEVER)
    return Output(_weigh_parts(weights, sizes, parts, far).masked_fill_(nothing, 0.0), logsumexp)


def attend_once(parts: list[Part], far: FarField | None = None, sinks: Tensor | None = None) -> Tensor:
    """The output (H, R, M, D) where nothing is merged later and every query attends to something.

    sinks: learned sink logits (H, R), which enter the sum once.
    """
    if sinks is not None:
        return add_sinks(attend(parts, far), sinks)
    joined, sizes = _join(parts, far)
    return _weigh_parts(torch.softmax(joined, -1), sizes, parts, far)


def _join(parts: list[Part], far: FarField | None) -> tuple[Tensor, list[int]]:
    logits = [part.logits for part in parts]
    if far is not None:
        logits += [far.node_logits, far.group_logits.flatten(-2)]
    return (logits[0] if len(logits) == 1 else torch.cat(logits, -1)), [x.shape[-1] for x in logits]


def _weigh_parts(weights: Tensor, sizes: list[int], parts: list[Part], far: FarField | None) -> Tensor:
    shares = weights.split(sizes, -1)
    total = _weigh(_pool(shares[0], parts[0].sharing), parts[0].values)
    for share, part in zip(shares[1 : len(parts)], parts[1:], strict=True):
        total += _weigh(_pool(share, part.sharing), part.values)
    if far is not None:
        total += _weigh(_fold(shares[-2], shares[-1], far), far.values)
    return total


def _weigh(weights: Tensor, values: Tensor | Iterable[Tensor]) -> Tensor:
    heads, repeats, queries, count = weights.shape
    flat = weights.reshape(heads, repeats * queries, count)
    total, start = None, 0
    for block in (values,) if isinstance(values, Tensor) else values:
        share = flat[..., start : start + block.shape[1]] @ block
        total, start = share if total is None else total + share, start + block.shape[1]
    assert total is not None
    return total.view(heads, repeats, queries, -1)


def _fold(node_weights: Tensor, group_weights: Tensor, far: FarField) -> Tensor:
    """Add the weights of groups to those of their nodes: (H, R, M, N)."""
    inner = _pool(group_weights, far.group_logits.shape[-1])  # (H, R, M, U)
    index = far.nodes[:, None, None, :].expand_as(inner)
    return node_weights.scatter_add(-1, index, inner)


def _pool(weights: Tensor, size: int) -> Tensor:
    """Sums of each `size` neighbours along the last dimension."""
    # A product with ones: on a CPU four times faster than a sum over a short last dimension.
    return weights if size == 1 else weights.contiguous().unflatten(-1, (-1, size)) @ weights.new_ones(size)


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
