"""RetroInfer (arXiv 2505.02922): clusters of keys; the best are opened, the next best estimated, the rest left out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from hga.evals.rules.budget import BudgetedRule
from hga.evals.rules.tile import Attended, Tile
from hga.ops.routing import NEVER, score, take_rows

_ITERATIONS = 10


@dataclass(frozen=True, kw_only=True)
class RetroInferRule(BudgetedRule):
    """Spherical k-means inside segments; a cluster is its mean key, its mean value and its size.

    Both zones count against the budget: opened tokens, and one token for each estimated cluster, which takes part by
    size times the exponential of its mean key's score. estimated_share: their part of the routed tokens (the paper:
    1.8% of the context opened, 23.2% estimated in clusters of 16, so 0.45). segment_size: tokens clustered
    together (the paper: 8192 in a prompt, which a strictly causal reading at a small budget cannot wait for).
    Tokens behind the last whole segment form clusters by position. selection "in_turn" is
    refused: clusters differ in size.
    """

    cluster_size: int = 16
    segment_size: int = 256
    estimated_share: float = 0.45

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selection == "in_turn":
            raise ValueError("selection='in_turn' counts units of one size, clusters differ; use shared or per_head")
        if self.segment_size % self.cluster_size:
            raise ValueError(f"cluster_size={self.cluster_size} must divide segment_size={self.segment_size}")

    @property
    def estimated_clusters(self) -> int:
        """Clusters that take part by their means."""
        return int(self.estimated_share * self.routed_tokens)

    def metadata_share(self, width: int, tokens: int) -> float:
        """Mean key and mean value of a cluster in 16 bits, and its size."""
        return (4 * width + 2) / self.cluster_size / (4 * width)

    def attend(self, tile: Tile) -> Attended:
        """Sink and window, opened clusters, estimated clusters."""
        size, sink = self.cluster_size, self.sink_tokens
        segments = max(0, (tile.start - self.window_tokens - sink) // self.segment_size)
        closed = segments * self.segment_size // size  # clusters of whole segments
        count = self.units(tile, size)
        member = tile.once("member", segments, lambda a, b: self._cluster(tile, a, b))  # (H, segments, tokens)
        heads = member.shape[0]
        offsets = torch.arange(segments, device=member.device)[:, None] * (self.segment_size // size)
        later = torch.arange(closed, count, device=member.device).repeat_interleave(size).expand(heads, -1)
        member = torch.cat([(member + offsets).flatten(1), later], 1)  # (H, tokens): the cluster of each token
        keys, values, sizes = self._means(tile, member, count)
        allowed = self.allowed(tile, size)
        allowed[:, :closed] = True  # every query of the tile stands behind its closed segments
        allowed = allowed & (sizes > 0)[:, None, None]
        scores = score(tile.query, keys).masked_fill(~allowed, NEVER)
        opened, estimated = self._zones(scores, sizes)
        exact = torch.zeros(*opened.shape[:3], tile.key.shape[1], dtype=torch.bool, device=opened.device)
        index = member[:, None, None].expand(*opened.shape[:3], -1)
        exact[..., sink : sink + member.shape[1]] = opened.gather(-1, index)
        far = (scores + sizes.clamp(min=1).log()[:, None, None]).masked_fill(~estimated, NEVER)
        return tile.attend(exact | self.near(tile, size), far, values)

    def _zones(self, scores: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Mark opened clusters, as many of the best as fit, and the next best for estimation: (H, R', M, K) each."""
        mass = torch.softmax(scores, -1).nan_to_num(0.0)
        allowed = scores > NEVER
        if self.selection == "shared":
            mass, allowed = mass.sum(1, keepdim=True), allowed[:, :1]
        order = mass.masked_fill(~allowed, -1.0).argsort(dim=-1, descending=True, stable=True)
        tokens = sizes[:, None, None].expand(mass.shape).gather(-1, order)
        fits = tokens.cumsum(-1) <= self.routed_tokens - self.estimated_clusters
        rank = torch.arange(order.shape[-1], device=order.device)
        behind = rank < fits.sum(-1, keepdim=True) + self.estimated_clusters
        opened = torch.zeros_like(allowed).scatter_(-1, order, fits)
        estimated = torch.zeros_like(allowed).scatter_(-1, order, behind & ~fits)
        return opened & allowed, estimated & allowed

    def _means(self, tile: Tile, member: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean keys and values (H, K, D) and sizes (H, K) of clusters whose members lie behind the sink."""
        rows = slice(self.sink_tokens, self.sink_tokens + member.shape[1])
        index = member[..., None].expand(-1, -1, tile.key.shape[-1])
        empty = tile.key.new_zeros(tile.key.shape[0], count, tile.key.shape[-1])
        sizes = empty[..., 0].scatter_add(1, member, torch.ones_like(member, dtype=empty.dtype))
        keys, values = (
            empty.scatter_add(1, index, x[:, rows]) / sizes.clamp(min=1)[..., None] for x in (tile.key, tile.value)
        )
        return keys, values, sizes

    def _cluster(self, tile: Tile, first: int, last: int) -> Tensor:
        """Spherical k-means of segments first to last - 1: the cluster of each token, (H, segments, tokens)."""
        keys = self.rows(tile.key, first, last, self.segment_size)
        heads, segments = keys.shape[:2]
        count = self.segment_size // self.cluster_size
        rows = normalize(keys.flatten(0, 1), dim=-1)  # (X, tokens, D)
        evenly = torch.arange(count, device=rows.device) * self.cluster_size
        centres = take_rows(rows, evenly.expand(rows.shape[0], -1))
        member = (rows @ centres.mT).argmax(-1)
        for _ in range(_ITERATIONS):
            sums = one_hot(member, count).to(rows.dtype).mT @ rows
            # A cluster that lost all members keeps its place.
            centres = torch.where(sums.norm(dim=-1, keepdim=True) > 0, normalize(sums, dim=-1), centres)
            member = (rows @ centres.mT).argmax(-1)
        return member.view(heads, segments, self.segment_size)
