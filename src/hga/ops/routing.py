"""Routing: score summaries, keep the best nodes, then the best groups inside them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

NEVER = float("-inf")


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


def choose(scores: Tensor, keep: int, selection: str) -> Tensor:
    """Mark the `keep` candidates with the largest attention mass.

    scores: (H, R, M, K), -inf where a query may not choose. With selection "shared" the R query heads of a KV
    head add their masses and make one choice; with "per_head" each makes its own.
    Returns bool (H, R', M, K), R' = 1 or R. Never marks a candidate that is -inf; marks all that are
    finite when there are at most `keep`, which is what makes a full budget dense. ValueError for another selection.
    """
    if selection not in ("shared", "per_head"):
        raise ValueError(f"selection={selection!r} must be shared or per_head; take HGAConfig.of_layer of a mixed one")
    allowed = (scores[:, :1] if selection == "shared" else scores) > NEVER
    if keep >= scores.shape[-1]:
        return allowed
    mass = torch.softmax(scores, -1)
    if selection == "shared":
        mass = mass.sum(1, keepdim=True)
    # Not allowed is below any mass, even one that underflows to 0, or NaN where a query has no candidate at all.
    mass = mass.where(allowed, -1.0)
    chosen = torch.zeros_like(allowed)
    if keep > 0:
        chosen.scatter_(-1, mass.topk(keep, -1, sorted=False).indices, True)
    return chosen.logical_and_(allowed)


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
