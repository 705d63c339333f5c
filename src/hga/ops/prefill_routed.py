"""Routed prefill of a block of queries: each is given what decoding would give it (design section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hga.config import TILE_TOKENS, HGAConfig
from hga.ops.attention import Output, Part, attend
from hga.ops.coding import Codes, decode_differences
from hga.ops.nibbles import Nibbles, decode_either
from hga.ops.precision import Rows, compute_dtype
from hga.ops.routing import NEVER, choose, score
from hga.ops.summaries import mean_rows, summarise_keys
from hga.ops.tiles import closed_chunks

MASS_DTYPE = torch.int16
"""Of masses in whole steps, which kernels keep for all candidates of a strip while its queries choose."""


def _are_here() -> None:
    """Records that need not be waited for."""


class ClosedChunks(NamedTuple):
    """The chunks that are closed by a block's end, in position order, where the queries are.

    records (N, Hkv, G, 2, g, D); node_keys, node_values (Hkv, N nodes, D) and group_keys (Hkv, N groups, D), as
    `close_chunks` makes them. Values are needed with a far field only, group keys with two levels only. Records may be
    stored by smaller groups than those that are routed (`HGAConfig.by_nodes`): tokens are in the same order. They may
    be on their way while queries choose: `wait` is called before they are read.
    """

    records: Tensor
    node_keys: Rows
    node_values: Rows | Nibbles | None
    group_keys: Rows | Codes | None
    wait: Callable[[], None] = _are_here

    @property
    def summaries(self) -> tuple[Rows | Nibbles | Codes | None, ...]:
        """What is kept of node keys, node values and group keys."""
        return self.node_keys, self.node_values, self.group_keys

    def group_key_rows(self, config: HGAConfig, nodes: int, dtype: torch.dtype) -> Tensor:
        """Decoded keys of the groups of the first `nodes` nodes, (Hkv, groups, D)."""
        count = nodes * config.node_size // config.group_size
        if not isinstance(self.group_keys, Codes):
            assert self.group_keys is not None
            return _decode(self.group_keys, count, dtype)
        data, scale, channels = self.group_keys
        chunks = nodes * config.node_size // config.chunk_size
        codes = Codes(data[:, :count], scale[:, :count], channels[:, :chunks])
        return decode_differences(codes, _decode(self.node_keys, nodes, dtype))


def attend_prefill_routed(
    config: HGAConfig,
    query: Tensor,
    near_keys: Tensor,
    near_values: Tensor,
    closed: ClosedChunks | None,
    first: int,
    scale: float,
    softcap: float | None = None,
    inverse_frequencies: Tensor | None = None,
    opened: Tensor | None = None,
) -> Output:
    """Routed attention of queries (Hkv, R, T, D), not scaled yet, at positions [first, first + T).

    near_keys, near_values (Hkv, n, D): the sink and, behind it, every token up to the block's end that was in no
    closed chunk when the block began. closed: the chunks closed by the block's end, those that closed before it
    began included; a chunk that closes inside the block is read from `near` by the tiles before, from its record
    by the tiles after. inverse_frequencies: for mixed-RoPE summaries. opened, int32 (Hkv, T), is filled with the groups
    that a KV head's query heads opened between them. Returns the value (Hkv, R, T, D) and the log-sum-exp
    (Hkv, R, T, 1) in the compute type. ValueError for lengths that do not fit.
    """
    closed_before = check_block(config, query, near_keys, closed, first)
    tokens, sink = query.shape[2], config.sink_tokens
    query, near_keys, near_values = (x.to(compute_dtype(query.dtype)) for x in (query, near_keys, near_values))
    outputs, start = [], first
    while start < first + tokens:
        stop = min(first + tokens, (start // TILE_TOKENS + 1) * TILE_TOKENS)
        chunks = closed_chunks(config, start)
        skipped = sink + (chunks - closed_before) * config.chunk_size  # closed since the block began
        end = near_keys.shape[1] - (first + tokens - stop)
        keys, values = (torch.cat([x[:, :sink], x[:, skipped:end]], 1) for x in (near_keys, near_values))
        index = torch.arange(start, stop, device=query.device) - chunks * config.chunk_size
        here = query[:, :, start - first : stop - first] * scale
        output, choice = _attend_tile(config, here, keys, values, closed, chunks, index, softcap, inverse_frequencies)
        outputs.append(output)
        if opened is not None:
            opened[:, start - first : stop - first] = choice.any(1).sum(-1)
        start = stop
    return Output(*(torch.cat(parts, 2) for parts in zip(*outputs, strict=True)))


def check_block(config: HGAConfig, query: Tensor, near_keys: Tensor, closed: ClosedChunks | None, first: int) -> int:
    """The number of chunks that were closed when the block began. ValueError for lengths that do not fit."""
    end = first + query.shape[2]
    before, rest = divmod(end - near_keys.shape[1], config.chunk_size)
    if rest or not 0 <= before <= closed_chunks(config, first):
        raise ValueError(
            f"{near_keys.shape[1]} near tokens for the block [{first}, {end}): what is missing must be the chunks of "
            f"{config.chunk_size} that were closed before it, at most {closed_chunks(config, first)} of them"
        )
    held, needed = 0 if closed is None else closed.records.shape[0], closed_chunks(config, end - 1)
    if held < needed:
        raise ValueError(f"{held} closed chunks for the block [{first}, {end}), which needs {needed}; close them first")
    return before


def _attend_tile(
    config: HGAConfig,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    closed: ClosedChunks | None,
    chunks: int,
    index: Tensor,
    softcap: float | None,
    inverse_frequencies: Tensor | None,
) -> tuple[Output, Tensor]:
    """Scaled queries (H, R, M, D) of one tile, `index` (M,) their places among the keys (H, n, D).

    Beside the output, what was opened: bool (H, R', M, groups).
    """
    size, sink, work = config.group_size, config.sink_tokens, query.dtype
    older = (index - config.window_tokens + 1 - sink).clamp(min=0)[:, None]
    pending = (older + size - 1) // size  # (M, 1): groups by position that a query may open
    groups = int(pending.max())
    span = slice(sink, sink + groups * size)
    too_new = torch.arange(groups, device=query.device) >= pending
    pending_scores = score(query, summarise_keys(keys[:, span], size, inverse_frequencies), softcap)
    pending_scores.masked_fill_(too_new, NEVER)

    scores, per_node = pending_scores, config.node_size // size
    if chunks:
        assert closed is not None
        nodes = chunks * config.chunk_size // config.node_size
        node_scores = score(query, _decode(closed.node_keys, nodes, work), softcap)  # (H, R, M, N)
        group_scores, scored = node_scores, torch.ones_like(node_scores, dtype=torch.bool)
        if config.two_level:
            scored = choose(node_scores, config.candidate_nodes, config.selection).expand_as(node_scores)
            group_scores = score(query, closed.group_key_rows(config, nodes, work), softcap)
            group_scores = group_scores.masked_fill(~scored.repeat_interleave(per_node, -1), NEVER)
        scores = torch.cat([pending_scores, group_scores], -1)
    opened = choose(scores, config.routed_groups, config.selection)  # (H, R', M, P + groups)

    place = torch.arange(keys.shape[1], device=query.device)
    always = (place <= index[:, None]) & ((place < sink) | (place >= sink + pending * size))
    exact = always.expand(*opened.shape[:3], -1).clone()
    exact[..., span] |= opened[..., :groups].repeat_interleave(size, -1)
    parts = [Part(score(query, keys, softcap).masked_fill_(~exact, NEVER), values)]
    if config.far_field and groups:
        parts.append(_far(pending_scores, ~opened[..., :groups], size, mean_rows(values[:, span], size)))
    if chunks:
        assert closed is not None
        closed.wait()
        old_keys, old_values = (x.transpose(0, 1).flatten(1, 3).to(work) for x in closed.records[:chunks].unbind(3))
        unopened = ~opened[..., groups:]
        logits = score(query, old_keys, softcap).masked_fill_(unopened.repeat_interleave(size, -1), NEVER)
        parts.append(Part(logits, old_values))
        if config.far_field:
            assert closed.node_values is not None
            means = _decode(closed.node_values, nodes, work)
            # A group counts by its own mean key and its node's mean value; a node whose groups were not scored, whole.
            parts.append(_far(group_scores, unopened, size, means.repeat_interleave(per_node, 1)))
            parts.append(_far(node_scores, ~scored, config.node_size, means))
    return attend(parts), opened


def _far(scores: Tensor, counted: Tensor, tokens: int, means: Tensor) -> Part:
    """Units of `tokens` tokens each, those that are `counted`, by their means (H, K, D)."""
    return Part((scores + math.log(tokens)).masked_fill_(~counted, NEVER), means)


def _decode(rows: Rows | Nibbles, count: int, dtype: torch.dtype) -> Tensor:
    """The first `count` rows (Hkv, count, D) as `dtype`."""
    return decode_either(rows, dtype, (slice(None), slice(count)))
