"""Routing: score summaries, keep the best nodes, then the best groups inside them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

NEVER = float("-inf")

MASS_STEPS, STEP_SHIFT, LOWEST_STEP = 512, 20, (127 - 59) << 3
"""A float32's bits >> STEP_SHIFT: eight steps an octave, MASS_STEPS of them from 2 ** -59 on.

Range counts for more than fineness: where a head gives one unit nearly all of its mass, a node that hides a single
token which matters may hold e ** -30 of it, and must keep its rank.
"""


def score(query: Tensor, keys: Tensor, softcap: float | None = None) -> Tensor:
    """Scores of scaled queries (H, R, M, D) with keys (H, K, D): (H, R, M, K), soft-capped where asked."""
    heads, repeats, queries, width = query.shape
    scores = (query.reshape(heads, repeats * queries, width) @ keys.mT).view(heads, repeats, queries, -1)
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def score_blocks(query: Tensor, blocks: Iterable[Tensor], softcap: float | None = None) -> Tensor:
    """`score` with keys that come in blocks along K."""
    scores = [score(query, keys, softcap) for keys in blocks]
    return scores[0] if len(scores) == 1 else torch.cat(scores, -1)


def bias(barred: Tensor, dtype: torch.dtype, value: float = 0.0) -> Tensor:
    """What to add to logits, (...) like the mask: -inf where barred, `value` elsewhere.

    Adding it is several times faster on a CPU than filling through a mask that R heads share.
    """
    return torch.full(barred.shape, value, dtype=dtype, device=barred.device).masked_fill_(barred, NEVER)


def count_steps(mass: Tensor) -> Tensor:
    """Masses (...) in whole steps of an eighth of an octave, int32: 0 below some 2 ** -59, the last from 32 on.

    NaN, as arithmetic gives it on any device, counts as the last, too, or as 0 where its sign bit is set.
    """
    bits = mass.float().view(torch.int32) >> STEP_SHIFT
    return bits.clamp_(LOWEST_STEP, LOWEST_STEP + MASS_STEPS - 1).sub_(LOWEST_STEP)


def choose(scores: Tensor, keep: int, selection: str) -> Tensor:
    """Mark the `keep` candidates with the largest attention mass.

    scores: (H, R, M, K), -inf where a query may not choose. With selection "shared" the R query heads of a KV
    head add their masses and make one choice; with "per_head" each makes its own. Masses are compared in whole steps
    (`count_steps`), and of equal ones the lower columns come first: a device finds that choice without sorting, and
    what is left out holds at most 9/8 of the least that is chosen, or less than 2 ** -58 of all.
    Returns bool (H, R', M, K), R' = 1 or R. Never marks a candidate that is -inf; marks all that are
    finite when there are at most `keep`, which is what makes a full budget dense. ValueError for another selection.
    """
    count = scores.shape[-1]
    if keep >= count:
        return _may_choose(scores, selection)
    mass = add_masses(scores, selection)
    steps = count_steps(mass)
    if count * MASS_STEPS >= 1 << 31:
        steps = steps.long()
    order = steps.mul_(count).add_(torch.arange(count - 1, -1, -1, dtype=steps.dtype, device=steps.device))
    # A mass that is NaN stays: it chooses something, as in a kernel, or the other heads that share would open nothing.
    return mark_largest(order.where(mass != -1, -1), keep)


def add_masses(scores: Tensor, selection: str) -> Tensor:
    """Softmax masses (H, R', M, K) by which candidates are chosen, -1 where barred. See `choose`."""
    allowed, mass = _may_choose(scores, selection), torch.softmax(scores, -1)
    if selection == "shared":
        mass = mass.sum(1, keepdim=True)
    # Barred is below any mass, even one that underflows to 0, or NaN where a query has no candidate at all.
    return mass.where(allowed, -1.0)


def _may_choose(scores: Tensor, selection: str) -> Tensor:
    if selection not in ("shared", "per_head"):
        raise ValueError(f"selection={selection!r} must be shared or per_head; take HGAConfig.of_layer of a mixed one")
    return (scores[:, :1] if selection == "shared" else scores) > NEVER


def mark_largest(numbers: Tensor, keep: int) -> Tensor:
    """Mark the `keep` largest of numbers (..., K) that are not negative."""
    chosen = torch.zeros_like(numbers, dtype=torch.bool)
    if keep > 0:
        chosen.scatter_(-1, numbers.topk(min(keep, numbers.shape[-1]), -1, sorted=False).indices, True)
    return chosen.logical_and_(numbers >= 0)


def unite(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The union of several queries' choices, one list per KV head, so that each unit is read once.

    chosen: bool (H, R', M, K). Returns ids int64 (H, U), distinct and ascending, U = the largest union of any
    head (smaller unions are filled with units that nobody chose), and member bool (H, R', M, U).
    """
    heads = chosen.shape[0]
    union = chosen.flatten(1, 2).any(1)  # (H, K)
    sizes = union.sum(-1).tolist()
    largest = max(sizes)
    if min(sizes) == largest:
        ids = union.nonzero()[:, 1].view(heads, largest)
    else:
        ids = union.to(torch.float32).topk(largest, -1, sorted=False).indices.sort(-1).values  # (H, U)
    index = ids.view(heads, 1, 1, largest).expand(*chosen.shape[:3], largest)
    return ids, chosen.gather(-1, index)


def take_rows(rows: Tensor, ids: Tensor) -> Tensor:
    """Rows (H, K, ...) at ids (H, U): (H, U, ...), one flat index_select (the fastest gather on a CPU)."""
    heads, count = rows.shape[:2]
    offsets = torch.arange(heads, device=ids.device)[:, None] * count
    flat = rows.flatten(0, 1).index_select(0, (ids + offsets).flatten())
    return flat.view(*ids.shape, *rows.shape[2:])
