"""Routed attention of one tile: choose nodes, choose groups, fetch them, attend, add the far field."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hga.cache.archive import Archive, Fetch
from hga.config import HGAConfig
from hga.ops.attention import FarField, Part, add_sinks, attend, attend_once, merge
from hga.ops.routing import bias, choose, score, score_blocks, unite
from hga.ops.summaries import mean_rows, summarise_keys
from hga.ops.tiles import pending_groups

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
    which sits at place `first` and the last at the end.
    """

    keys: Tensor
    values: Tensor
    first: int


@dataclass(frozen=True)
class Candidates:
    """The archive's scores. scores (H, R, M, K): of groups, -inf where a query did not choose their node.

    Where only the best nodes had their groups scored: nodes (H, U), which, ascending, and node_logits
    (H, R, M, N), what the others are to the far field. Else both are None, and the groups are all, in order.
    """

    scores: Tensor
    nodes: Tensor | None = None
    node_logits: Tensor | None = None


@dataclass(frozen=True)
class Routed:
    """A tile's output (H, R, M, D) and what it cost: unique tokens of a KV head (M,) opened by its R heads, bytes."""

    output: Tensor
    unique_opened: Tensor | None
    fetched_bytes: int


@dataclass(frozen=True)
class Tile:
    """Queries that know what they attend to: the K/V that they open may come while another tile is attended."""

    query: Tensor
    parts: list[Part]
    far: FarField | None
    blocks: list[OpenedBlock]
    scoring: Scoring
    unique_opened: Tensor | None

    def start(self) -> bool:
        """Begin to fetch beside the caller's work, if that saves waiting; returns whether it has begun."""
        return bool(self.blocks) and self.blocks[0].start()

    def drop(self) -> None:
        """Nobody asks for what `start` began."""
        if self.blocks:
            self.blocks[0].drop()

    def attend(self) -> Routed:
        """Fetch what is not there yet and attend."""
        query, softcap, sinks = self.query, self.scoring.softcap, self.scoring.sinks
        fetched_bytes = 0
        if len(self.blocks) <= 1:
            for block in self.blocks:
                part, fetched_bytes = block.fetch(query, softcap)
                self.parts.append(part)
            return Routed(attend_once(self.parts, self.far, sinks), self.unique_opened, fetched_bytes)
        output = attend(self.parts, self.far)
        for block in self.blocks:
            part, block_bytes = block.fetch(query, softcap)
            output, fetched_bytes = merge(output, attend([part])), max(fetched_bytes, block_bytes)
        return Routed(add_sinks(output, sinks), self.unique_opened, fetched_bytes)


def route_tile(
    config: HGAConfig,
    query: Tensor,
    near: Near,
    archive: Archive | None,
    scoring: Scoring,
    inverse_frequencies: Tensor | None,
) -> Tile:
    """Route scaled queries of one tile (H, R, M, D) whose closed chunks are in `archive`.

    A query attends exactly to the sink, its window and the groups that it opens; groups between the archive
    and its window are formed by position and opened like any other.
    """
    size, sink = config.group_size, config.sink_tokens
    work, device, softcap = query.dtype, query.device, scoring.softcap
    length = near.keys.shape[1]
    groups = pending_groups(config, length - 1)
    span = slice(sink, sink + groups * size)
    place = torch.arange(length, device=device)
    index = place[near.first :, None]  # (M, 1)
    too_new = place[: groups * size : size] > index - config.window_tokens - sink  # (M, P)
    exact = score(query, near.keys, softcap).add_(bias(place > index, work))  # (H, R, M, n)
    scores = score(query, summarise_keys(near.keys[:, span], size, inverse_frequencies), softcap)
    scores.add_(bias(too_new, work))  # (H, R, M, P)
    candidates = None if archive is None else score_archive(config, query, archive, softcap)
    if candidates is not None:
        scores = torch.cat([scores, candidates.scores], -1)
    opened = choose(scores, config.routed_groups, config.selection)  # (H, R', M, P + K)
    attended = opened[..., :groups] | too_new
    exact[..., span].add_(bias(~attended, work).repeat_interleave(size, -1))
    parts = [Part(exact, near.values)]
    far, blocks = None, []
    if config.far_field:
        # From here on the scores are needed as far-field logits only: each mean key counts for its tokens.
        scores.add_(bias(opened, work, math.log(size)))
        parts.append(Part(scores[..., :groups], mean_rows(near.values[:, span], size)))
    if archive is not None and candidates is not None:
        blocks = _opened_blocks(config, query, archive, candidates, opened[..., groups:])
        if config.far_field:
            values = archive.summaries.node_value_blocks(work)
            logits, per_node = scores[..., groups:], config.node_size // size
            if candidates.nodes is None or candidates.node_logits is None:
                parts.append(Part(logits, values, per_node))
            else:
                far = FarField(candidates.node_logits, logits.unflatten(-1, (-1, per_node)), candidates.nodes, values)
    unique = opened.any(1).sum(-1).double().mean(0) * size if opened.shape[1] > 1 else None
    return Tile(query, parts, far, blocks, scoring, unique)


def score_archive(config: HGAConfig, query: Tensor, archive: Archive, softcap: float | None) -> Candidates:
    """Score the nodes, keep the best for each query, and score their groups."""
    work, summaries = query.dtype, archive.summaries
    if not config.two_level:
        return Candidates(score_blocks(query, summaries.node_keys.blocks(work), softcap))
    if summaries.node_keys.length <= config.candidate_nodes:
        return Candidates(score_blocks(query, summaries.group_key_blocks(work), softcap))
    node_scores = score_blocks(query, summaries.node_keys.blocks(work), softcap)  # (H, R, M, N)
    chosen = choose(node_scores, config.candidate_nodes, config.selection)
    nodes, member = unite(chosen)
    scores = score(query, summaries.decode_group_keys(nodes, work), softcap)
    if chosen.shape[1] * chosen.shape[2] > 1:  # one choice is its own union
        scores.add_(bias(~member, work).repeat_interleave(config.node_size // config.group_size, -1))
    return Candidates(scores, nodes, node_scores.add_(bias(chosen, work, math.log(config.node_size))))


@dataclass
class OpenedBlock:
    """Opened groups, few enough to be held at once: places in the store (H, V), member bool (H, R', M, V)."""

    archive: Archive
    places: Tensor
    member: Tensor
    started: Fetch | None = None

    def start(self) -> bool:
        """Begin to fetch beside the caller's work, if the store waits for a device; returns whether it has begun."""
        self.started = self.archive.begin_fetch(self.places)
        return self.started is not None

    def drop(self) -> None:
        """Nobody asks for what was begun."""
        if self.started is not None:
            self.started.drop()

    def fetch(self, query: Tensor, softcap: float | None) -> tuple[Part, int]:
        """Fetch the groups, once for all queries of the tile: their part, and the bytes fetched."""
        keys, values = self.archive.fetch(self.places) if self.started is None else self.started.result()
        fetched_bytes = keys.numel() * keys.element_size() * 2
        logits = score(query, keys.to(query.dtype), softcap)
        logits.add_(bias(~self.member, query.dtype).repeat_interleave(self.archive.group_size, -1))
        return Part(logits, values.to(query.dtype)), fetched_bytes


def _opened_blocks(
    config: HGAConfig, query: Tensor, archive: Archive, candidates: Candidates, opened: Tensor
) -> list[OpenedBlock]:
    """The groups that the queries of a tile opened, each once, in blocks whose K/V and logits stay bounded."""
    groups, member = unite(opened)  # (H, V), (H, R', M, V)
    if not groups.shape[-1]:
        return []
    if candidates.nodes is not None:
        per_node = config.node_size // config.group_size
        node = torch.div(groups, per_node, rounding_mode="floor")
        groups += (candidates.nodes.gather(1, node) - node) * per_node  # from among the candidates to among all
    parts = config.group_size // archive.group_size
    if parts > 1:  # whole nodes were opened: all groups of each
        groups = (groups[..., None] * parts + torch.arange(parts, device=groups.device)).flatten(1)
        member = member.repeat_interleave(parts, -1)
    places, order = archive.places(groups).sort(-1)  # a tier reads in its own order
    member = member.gather(-1, order[:, None, None].expand_as(member))
    heads, repeats, queries, width = query.shape
    numbers = heads * archive.group_size * max(2 * width, repeats * queries)
    size = max(1, NUMBERS_AT_ONCE // numbers)
    return [
        OpenedBlock(archive, places[:, start : start + size], member[..., start : start + size])
        for start in range(0, places.shape[1], size)
    ]
