"""The rule of an `HGAConfig` on dense K/V: which tokens it opens can be seen, layer by layer (`hga eval recall`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hga.cache.layout import summary_bytes_per_token
from hga.config import HGAConfig
from hga.evals.rules.simulated import SimulatedRule
from hga.evals.rules.tile import Attended, Tile
from hga.ops.coding import decode_differences, encode_differences
from hga.ops.nibbles import decode_nibbles, encode_nibbles
from hga.ops.ordering import content_order
from hga.ops.precision import decode_rows, encode_rows, resolve_summary_dtype
from hga.ops.routing import NEVER, choose, score
from hga.ops.summaries import mean_rows, summarise_keys


@dataclass(frozen=True, kw_only=True)
class RoutedRule(SimulatedRule):
    """What `HGACache` computes under `config` with prefill="routed" (tested against `benchmarks/simulation.py`)."""

    config: HGAConfig

    @classmethod
    def of(cls, config: HGAConfig) -> RoutedRule:
        """The rule of a layer's config."""
        return cls(config=config, budget_tokens=config.budget_tokens)

    def metadata_share(self, width: int, tokens: int) -> float:
        """Summaries beside 16-bit K/V, as `HGAConfig.summary_dtype` keeps them there."""
        return summary_bytes_per_token(self.config, width, torch.bfloat16) / (4 * width)

    def attend(self, tile: Tile) -> Attended:
        """As `hga.cache.routed`, over all tokens with a mask instead of over fetched groups."""
        config = self.config
        size, sink, chunk, window = config.group_size, config.sink_tokens, config.chunk_size, config.window_tokens
        start, length = tile.start, tile.key.shape[1]
        chunks = max(0, (start - window - sink) // chunk)
        closed = chunks * chunk
        order = tile.once("order", chunks, lambda a, b: self._order(tile, a, b)).flatten(1)  # (H, closed)
        starts = sink + ((tile.positions - window + 1 - sink).clamp(min=0) + size - 1) // size * size
        groups = -(-max(0, length - window - sink) // size)
        pending = torch.arange(sink + closed, sink + groups * size, device=tile.key.device)
        rows = torch.cat([order, pending.expand(order.shape[0], -1)], 1)  # (H, groups * size) token ids
        ends = sink + torch.arange(1, groups + 1, device=rows.device) * size
        allowed = ends <= starts[:, None]  # (M, groups)

        group_keys, group_values = self._groups(tile, chunks, pending)
        group_scores = score(tile.query, group_keys)
        candidates = allowed.expand(*group_scores.shape)
        per_node, nodes = config.node_size // size, closed // config.node_size
        node_scores = node_values = None
        if config.two_level:
            node_keys, node_values = self._nodes(tile, chunks)
            node_scores = score(tile.query, node_keys)
            if nodes > config.candidate_nodes:
                best = choose(node_scores, config.candidate_nodes, config.selection).expand_as(node_scores)
                scored = torch.cat(
                    [best.repeat_interleave(per_node, -1), torch.ones_like(candidates[..., nodes * per_node :])], -1
                )
                candidates = candidates & scored
                node_scores = node_scores.masked_fill(best, NEVER)
            else:
                node_scores = torch.full_like(node_scores, NEVER)
        in_archive = nodes * per_node
        possible = group_scores.masked_fill(~candidates, NEVER).roll(-in_archive, -1)  # as in the cache
        opened = choose(possible, config.routed_groups, config.selection).roll(in_archive, -1)

        token = torch.arange(length, device=rows.device)
        near = ((token < sink) | (token >= starts[:, None])) & tile.causal
        exact = torch.zeros(*opened.shape[:3], length, dtype=torch.bool, device=rows.device)
        index = rows[:, None, None].expand(*opened.shape[:3], -1)
        exact.scatter_(-1, index, opened.repeat_interleave(size, -1))
        exact |= near
        if not config.far_field:
            return tile.attend(exact)
        far = (group_scores + math.log(size)).masked_fill(~candidates | opened, NEVER)
        if node_scores is None or node_values is None:
            return tile.attend(exact, far, group_values)
        archived = node_values.repeat_interleave(per_node, 1)
        far = torch.cat([far, node_scores + math.log(config.node_size)], -1)
        values = torch.cat([archived, group_values[:, nodes * per_node :], node_values], 1)
        return tile.attend(exact, far, values)

    def _order(self, tile: Tile, first: int, last: int) -> Tensor:
        """Token ids of chunks first to last - 1 in their order: (H, chunks, C)."""
        chunk = self.config.chunk_size
        starts = self.config.sink_tokens + torch.arange(first, last, device=tile.key.device) * chunk
        if self.config.ordering == "content" and last > first:
            keys, values = self._chunks(tile.key, first, last), self._chunks(tile.value, first, last)
            inside = content_order(keys, values, self.config.group_size)
        else:
            inside = torch.arange(chunk, device=tile.key.device).expand(tile.key.shape[0], last - first, -1)
        return inside + starts[:, None]

    def _chunks(self, x: Tensor, first: int, last: int) -> Tensor:
        sink, chunk = self.config.sink_tokens, self.config.chunk_size
        return x[:, sink + first * chunk : sink + last * chunk].view(x.shape[0], last - first, chunk, x.shape[2])

    def _sorted(self, tile: Tile, x: Tensor, first: int, last: int) -> Tensor:
        """Rows of x in the chunks' order (H, chunks, C, D)."""
        index = tile.notes["order"][:, first:last].flatten(1)[..., None].expand(-1, -1, x.shape[-1])
        return x.gather(1, index).view(x.shape[0], last - first, self.config.chunk_size, x.shape[2])

    def _encoded(self, tile: Tile, rows: Tensor) -> Tensor:
        stored = resolve_summary_dtype(self.config.summary_dtype, torch.bfloat16)
        return decode_rows(encode_rows(rows, stored), tile.key.dtype)

    def _groups(self, tile: Tile, chunks: int, pending: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all groups (H, groups, D): closed ones as they are stored, pending ones as means."""
        size = self.config.group_size
        frequencies = tile.frequencies if self.config.summary == "mixed_rope" else None

        def keys(a: int, b: int) -> Tensor:
            means = summarise_keys(self._sorted(tile, tile.key, a, b), size, frequencies)  # (H, chunks, groups, D)
            if not self.config.coded or a == b:
                return self._encoded(tile, means)
            nodes = self._encoded(tile, mean_rows(means, self.config.node_size // size)).flatten(1, 2)
            coded = encode_differences(means.flatten(1, 2), nodes, b - a)
            return decode_differences(coded, nodes).view_as(means)

        def values(a: int, b: int) -> Tensor:
            return self._encoded(tile, mean_rows(self._sorted(tile, tile.value, a, b), size))

        made = [
            tile.once("group keys", chunks, keys).flatten(1, 2),
            tile.once("group values", chunks, values).flatten(1, 2),
        ]
        young = [
            summarise_keys(tile.key[:, pending], size, frequencies),
            mean_rows(tile.value[:, pending], size),
        ]
        return torch.cat([made[0], young[0]], 1), torch.cat([made[1], young[1]], 1)

    def _nodes(self, tile: Tile, chunks: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the closed chunks' nodes (H, nodes, D)."""
        size = self.config.node_size
        frequencies = tile.frequencies if self.config.summary == "mixed_rope" else None

        def keys(a: int, b: int) -> Tensor:
            return self._encoded(tile, summarise_keys(self._sorted(tile, tile.key, a, b), size, frequencies))

        def values(a: int, b: int) -> Tensor:
            means = mean_rows(self._sorted(tile, tile.value, a, b), size)
            if not self.config.coded:
                return self._encoded(tile, means)
            return decode_nibbles(encode_nibbles(means), means.dtype)

        return (
            tile.once("node keys", chunks, keys).flatten(1, 2),
            tile.once("node values", chunks, values).flatten(1, 2),
        )
