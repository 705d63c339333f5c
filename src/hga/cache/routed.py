"""Routed attention of one tile: choose nodes, choose groups, fetch them, attend, add the far field."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hga.cache.archive import Archive
from hga.config import HGAConfig
from hga.ops.attention import FarField, Part, add_sinks, attend, attend_once, merge
from hga.ops.routing import NEVER, choose, score, score_blocks, unite
from hga.ops.summaries import mean_rows, summarise_keys

NUMBERS_AT_ONCE = 1 << 22
"""Logits, or K/V numbers, held at once while queries are attended (16 MiB in float32): keeps memory bounded."""


@dataclass(frozen=True)
class Scoring:
    """What a layer's attention adds to the dot product: scale, soft cap, learned sinks (Hkv, R)."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Near:
    """What a row keeps beside the model in position order: the sink, then all that follows the last closed chunk.

    keys, values (Hkv, n, D) in the compute type. The M queries are those of consecutive tokens, the first of
    which sits at place `first`.
    """

    keys: Tensor
    values: Tensor
    first: int


@dataclass(frozen=True)
class Candidates:
    """The archive's scores. nodes (H, U): whose groups were scored; member bool (H, R', M, U): by which query
    (None: all by all); node_scores (H, R, M, N); group_scores (H, R, M, U, groups a node), -inf where not scored.
    """

    nodes: Tensor
    member: Tensor | None
    node_scores: Tensor
    group_scores: Tensor


@dataclass(frozen=True)
class Routed:
    """A tile's output (H, R, M, D) and what it cost: unique tokens of a KV head (M,) opened by its R heads, bytes."""

    output: Tensor
    unique_opened: Tensor | None
    fetched_bytes: int


def attend_routed(
    config: HGAConfig,
    query: Tensor,
    near: Near,
    archive: Archive | None,
    scoring: Scoring,
    inverse_frequencies: Tensor | None,
) -> Routed:
    """Route and attend scaled queries of one tile (H, R, M, D) whose closed chunks are in `archive`.

    A query attends exactly to the sink, its window and the groups that it opens; groups between the archive
    and its window are formed by position and opened like any other.
    """
    size, sink = config.group_size, config.sink_tokens
    device, queries, softcap = query.device, query.shape[2], scoring.softcap
    groups = int(pending_groups(config, torch.tensor(near.first + queries - 1)))
    index = torch.arange(near.first, near.first + queries, device=device)[:, None]  # (M, 1)
    pending = pending_groups(config, index)
    span = slice(sink, sink + groups * size)
    too_new = torch.arange(groups, device=device) >= pending  # (M, P)
    pending_scores = score(query, summarise_keys(near.keys[:, span], size, inverse_frequencies), softcap)
    pending_scores.masked_fill_(too_new, NEVER)
    candidates = None if archive is None else score_archive(config, query, archive, softcap)
    scores = pending_scores
    if candidates is not None:
        scores = torch.cat([pending_scores, candidates.group_scores.flatten(-2)], -1)
    opened = choose(scores, config.routed_groups, config.selection)  # (H, R', M, P + K)
    opened_near, opened_far = opened[..., :groups], opened[..., groups:]

    place = torch.arange(near.keys.shape[1], device=device)
    always = (place <= index) & ((place < sink) | (place >= sink + pending * size))  # (M, n)
    exact = always.expand(*opened.shape[:3], -1).clone()  # (H, R', M, n)
    exact[..., span] |= opened_near.repeat_interleave(size, -1)
    parts = [Part(score(query, near.keys, softcap).masked_fill_(~exact, NEVER), near.values)]
    if config.far_field and groups:
        # From here on the scores are needed as far-field logits only: each mean key counts for its tokens.
        unopened = pending_scores.add_(math.log(size)).masked_fill_(opened_near, NEVER)
        parts.append(Part(unopened, mean_rows(near.values[:, span], size)))
    opened_blocks, far = [], None
    if archive is not None and candidates is not None:
        opened_blocks = _opened_blocks(config, query, archive, candidates, opened_far)
        if config.far_field and config.two_level:
            far = _far_field(config, archive, candidates, opened_far, query.dtype)
        elif config.far_field:
            unopened = candidates.node_scores.add_(math.log(size)).masked_fill_(opened_far, NEVER)
            parts.append(Part(unopened, archive.summaries.node_values.blocks(query.dtype)))
    unique = opened.any(1).sum(-1).double().mean(0) * size if opened.shape[1] > 1 else None
    fetched_bytes = 0
    if len(opened_blocks) <= 1:
        for block in opened_blocks:
            part, fetched_bytes = block.fetch(query, softcap)
            parts.append(part)
        return Routed(attend_once(parts, far, scoring.sinks), unique, fetched_bytes)
    output = attend(parts, far)
    for block in opened_blocks:
        part, block_bytes = block.fetch(query, softcap)
        output, fetched_bytes = merge(output, attend([part])), max(fetched_bytes, block_bytes)
    return Routed(add_sinks(output, scoring.sinks), unique, fetched_bytes)


def pending_groups(config: HGAConfig, index: Tensor) -> Tensor:
    """Groups by position, behind the archive, that the query at each place of `near` may open.

    The window starts on a group boundary; what is older than it is routed.
    """
    older = (index - config.window_tokens + 1 - config.sink_tokens).clamp(min=0)
    return (older + config.group_size - 1) // config.group_size


def score_archive(config: HGAConfig, query: Tensor, archive: Archive, softcap: float | None) -> Candidates:
    """Score the nodes, keep the best for each query, and score their groups."""
    work, summaries = query.dtype, archive.summaries
    node_scores = score_blocks(query, summaries.node_keys.blocks(work), softcap)  # (H, R, M, N)
    heads, nodes = node_scores.shape[0], node_scores.shape[-1]
    every = torch.arange(nodes, device=query.device).expand(heads, nodes)
    if not config.two_level:
        return Candidates(every, None, node_scores, node_scores[..., None])
    per_node = config.node_size // config.group_size
    if nodes <= config.candidate_nodes:
        scores = score_blocks(query, summaries.group_keys.blocks(work), softcap)
        return Candidates(every, None, node_scores, scores.unflatten(-1, (-1, per_node)))
    ids, member = unite(choose(node_scores, config.candidate_nodes, config.selection))
    scores = score(query, summaries.group_keys.decode_units(ids, per_node, work), softcap)
    scores = scores.unflatten(-1, (-1, per_node)).masked_fill_(~member[..., None], NEVER)
    return Candidates(ids, member, node_scores, scores)


@dataclass(frozen=True)
class OpenedBlock:
    """Opened groups, few enough to be held at once: places in the store (H, V), member bool (H, R', M, V)."""

    config: HGAConfig
    archive: Archive
    places: Tensor
    member: Tensor

    def fetch(self, query: Tensor, softcap: float | None) -> tuple[Part, int]:
        """Fetch the groups, once for all queries of the tile: their part, and the bytes fetched."""
        keys, values = self.archive.fetch(self.places)
        fetched_bytes = keys.numel() * keys.element_size() * 2
        logits = score(query, keys.to(query.dtype), softcap)
        logits.masked_fill_(~self.member.repeat_interleave(self.config.group_size, -1), NEVER)
        return Part(logits, values.to(query.dtype)), fetched_bytes


def _opened_blocks(
    config: HGAConfig, query: Tensor, archive: Archive, candidates: Candidates, opened: Tensor
) -> list[OpenedBlock]:
    """The groups that the queries of a tile opened, each once, in blocks whose K/V and logits stay bounded."""
    units, member = unite(opened)  # (H, V), (H, R', M, V)
    if not units.shape[-1]:
        return []
    per_node = candidates.group_scores.shape[-1]
    groups = candidates.nodes.gather(1, units // per_node) * per_node + units % per_node
    places, order = archive.places(groups).sort(-1)  # a tier reads in its own order
    member = member.gather(-1, order[:, None, None].expand_as(member))
    heads, repeats, queries, width = query.shape
    numbers = heads * config.group_size * max(2 * width, repeats * queries)
    size = max(1, NUMBERS_AT_ONCE // numbers)
    return [
        OpenedBlock(config, archive, places[:, start : start + size], member[..., start : start + size])
        for start in range(0, places.shape[1], size)
    ]


def _far_field(
    config: HGAConfig, archive: Archive, candidates: Candidates, opened: Tensor, work: torch.dtype
) -> FarField:
    """Every archived token that a query did not open: by its group where that was scored, else by its node."""
    nodes = candidates.node_scores.add_(math.log(config.node_size))
    if candidates.member is None:
        nodes = torch.full_like(nodes, NEVER)
    else:
        index = candidates.nodes[:, None, None, :].expand(*nodes.shape[:3], -1)
        kept = nodes.gather(-1, index).masked_fill(candidates.member, NEVER)
        nodes.scatter_(-1, index, kept)
    groups = candidates.group_scores.add_(math.log(config.group_size))
    groups.masked_fill_(opened.unflatten(-1, groups.shape[-2:]), NEVER)
    return FarField(nodes, groups, candidates.nodes, archive.summaries.node_values.blocks(work))
