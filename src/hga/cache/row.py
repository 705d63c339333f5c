"""One row of one layer: sink, window and archive of a single sequence, and its attention.

A row never sees padding: its positions count from its first real token. Rows are independent, so a padded
row equals the same row alone by construction, and beams share closed chunks through the store.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hga.cache.archive import Archive, OpenStore
from hga.cache.block import attend_exact_block, attend_routed_block
from hga.cache.finite import FiniteCheck
from hga.cache.kernels import kernels_serve
from hga.cache.routed import NUMBERS_AT_ONCE, Near, Scoring, Tile, route_tile
from hga.config import TILE_TOKENS, HGAConfig
from hga.ops.precision import Rows, compute_dtype
from hga.ops.tiles import attended_tokens, closed_chunks, pending_groups


@dataclass
class Counters:
    """Sums over query positions since the last reset; shares are tokens over context length at that position."""

    queries: int = 0
    attended: float = 0.0
    fetched: float = 0.0
    working_bytes: int = 0

    def add(self, context: int, attended: int, fetched: float) -> None:
        """Count a query: its context length, the tokens attended and the tokens fetched."""
        self.queries += 1
        self.attended += attended / context
        self.fetched += fetched / context

    def add_all(self, first: int, attended: Tensor, fetched: Tensor) -> None:
        """Count queries from position `first` on: the tokens attended and fetched, (n,) each."""
        context = torch.arange(first + 1, first + 1 + len(attended))
        self.queries += len(attended)
        self.attended += (attended / context.double()).sum().item()
        self.fetched += (fetched / context.double()).sum().item()

    def add_dense(self, queries: int) -> None:
        """Count queries that attended to their whole context."""
        self.queries += queries
        self.attended += queries
        self.fetched += queries

    def reset(self) -> None:
        """Start the averages again."""
        self.queries, self.attended, self.fetched, self.working_bytes = 0, 0.0, 0.0, 0


class Row:
    """K/V of one sequence in one layer.

    `near` holds, in position order, the sink and every token behind the last closed chunk. Chunk c covers
    positions [S + c C, S + (c + 1) C), S = sink_tokens; a position p >= S that is not closed sits at index
    p - chunks * C of `near`.
    """

    def __init__(
        self, config: HGAConfig, open_store: OpenStore, counters: Counters, inverse_frequencies: Tensor | None
    ) -> None:
        self._config = config
        self.open_store = open_store
        self._counters = counters
        self._inverse_frequencies = inverse_frequencies
        self._keys = self._values = torch.empty(0)  # (Hkv, capacity, D), `near_length` rows in use
        self._archive: Archive | None = None
        self._unchecked: FiniteCheck | None = None
        self.length = 0

    @property
    def chunks(self) -> int:
        """Closed chunks."""
        return 0 if self._archive is None else len(self._archive.chunks)

    @property
    def near_length(self) -> int:
        """Tokens that are not in a closed chunk."""
        return self.in_use()[0]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take new tokens' K/V, (Hkv, T, D). ValueError if a number in them is NaN or infinite.

        On a GPU `attend` raises it, when all work is launched: a host that waited here would leave the GPU idle. Zeros
        are kept then, and may be in closed chunks: the cache refuses everything until it is reset.
        """
        finite = FiniteCheck(keys, values, self.length)
        if finite.is_late:
            keys, values, self._unchecked = finite.clear(keys), finite.clear(values), finite
        else:
            finite.wait()
        used, end = self.near_length, self.near_length + keys.shape[1]
        if self._keys.ndim != 3 or self._keys.shape[1] < end:
            room = end + max(TILE_TOKENS, end // 8)
            grown = [keys.new_empty(keys.shape[0], room, keys.shape[2]) for _ in range(2)]
            if used:
                grown[0][:, :used], grown[1][:, :used] = self._keys[:, :used], self._values[:, :used]
            self._keys, self._values = grown
        self._keys[:, used:end], self._values[:, used:end] = keys, values
        self.length += keys.shape[1]

    def restore(self, keys: Tensor, values: Tensor, chunks: list[int], summaries: dict[str, Rows]) -> None:
        """Be, from empty, a row with these near tokens (Hkv, n, D) behind chunks that its store holds already."""
        self._keys, self._values = keys, values
        self.length = keys.shape[1] + len(chunks) * self._config.chunk_size
        if chunks:
            self._archive = Archive(self._config, self.open_store, self._inverse_frequencies, keys)
            self._archive.restore(chunks, summaries)

    # ---- single tokens by kernels --------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the row's window and summaries are."""
        return self._keys.device

    @property
    def archive(self) -> Archive:
        """The closed chunks. ValueError while there are none."""
        if self._archive is None:
            raise ValueError(f"a row of {self.length} tokens has no closed chunk yet")
        return self._archive

    def close_due(self) -> bool:
        """Close what is due before the next token; whether that is routed, with something to route to."""
        if self.length < self._config.dense_positions:
            return False
        self._close(closed_chunks(self._config, self.length))
        return self.chunks > 0

    def is_due(self) -> bool:
        """Whether a chunk closes before the next token."""
        return closed_chunks(self._config, self.length) > self.chunks

    def make_room_for_token(self) -> None:
        """Have room for one more token, whose K/V a kernel writes to the end of `near`. `close_due` comes first."""
        config = self._config
        room = config.sink_tokens + config.window_tokens + config.chunk_size + TILE_TOKENS
        if self._keys.shape[1] != room:
            heads, _, width = self._keys.shape
            moved = [self._keys.new_empty(heads, room, width) for _ in range(2)]
            for buffer, held in zip(moved, self._near(), strict=True):
                buffer[:, : self.near_length] = held
            self._keys, self._values = moved

    def end_token(self) -> None:
        """Count a token and what it attended to. What a union of R choices fetches is counted by the kernels."""
        self._count_one(self._config, self.length, None)
        self.length += 1

    def in_use(self) -> tuple[int, int]:
        """Tokens in `near` and closed chunks."""
        chunks = self.chunks
        return self.length - chunks * self._config.chunk_size, chunks

    def moving_buffers(self) -> tuple[Tensor, Tensor]:
        """What changes whenever its buffers move: `near` and summaries move all together or not at all."""
        return self._keys, self.archive.summaries.node_keys.buffers.data

    def holds(self, near: Tensor, nodes: Tensor) -> bool:
        """Whether these are its `moving_buffers` still; asked at every step, so without making them."""
        return self._archive is not None and self._keys is near and self._archive.summaries.node_keys.is_held(nodes)

    def near_buffers(self) -> tuple[Tensor, Tensor]:
        """The buffers of `near` (Hkv, capacity, D), what is not in use included."""
        return self._keys, self._values

    def move_near(self, keys: Tensor, values: Tensor) -> None:
        """Keep `near` in other buffers, which hold the same tokens."""
        self._keys, self._values = keys, values

    # ---- attention -----------------------------------------------------------------------------------

    def attend(self, query: Tensor, scoring: Scoring) -> Tensor:
        """Attention output (Hkv, R, T, D) of the last T tokens' queries (Hkv, R, T, D).

        Each query sees what lies before it and itself: densely up to `dense_positions`, and everywhere in a block of
        `exact_block_tokens`; routed from there, tile by tile, by whole nodes in a block of `node_block_tokens`.
        ValueError if `append` met a number that is not finite.
        """
        config, tokens = self._config, query.shape[2]
        first = self.length - tokens
        out = torch.empty_like(query)
        routed_from = min(max(first, config.dense_positions), self.length)
        if tokens >= config.exact_block_tokens:
            routed_from = self.length
        if first < routed_from:
            self._counters.add_dense(routed_from - first)
            here, near = slice(0, routed_from - first), self._near()
            place = self._index_of(first)
            out[:, :, here] = attend_exact_block(config, query[:, :, here], near, place, self._archive, scoring)
        if routed_from < self.length:
            rule = config.by_nodes() if tokens >= config.node_block_tokens else config
            query, routed = query[:, :, routed_from - self.length :], out[:, :, routed_from - self.length :]
            if tokens > 1 and kernels_serve(rule, query.dtype, query.device):
                routed[:] = self._attend_block(rule, query, routed_from, scoring)
            else:
                self._attend_by_tiles(rule, query.to(compute_dtype(query.dtype)) * scoring.scale, scoring, routed)
        unchecked, self._unchecked = self._unchecked, None
        if unchecked is not None:
            unchecked.wait()
        if self.length >= config.dense_positions:
            self._close(closed_chunks(config, self.length))
        return out

    def _attend_by_tiles(self, config: HGAConfig, query: Tensor, scoring: Scoring, out: Tensor) -> None:
        """Route scaled queries, the row's last, in PyTorch, tile by tile."""
        first = self.length - query.shape[2]
        start = first
        ahead: list[tuple[Tile, int]] = []  # a tile whose K/V are on their way while the next one is routed

        def attend_ahead() -> None:
            for tile, begin in ahead:
                end = begin + tile.query.shape[2]
                out[:, :, begin - first : end - first] = self._attend_tile(config, tile, begin)
            ahead.clear()

        try:
            while start < self.length:
                stop = min(self.length, (start // TILE_TOKENS + 1) * TILE_TOKENS)
                if closed_chunks(config, start) > self.chunks:
                    attend_ahead()
                self._close(closed_chunks(config, start))
                for begin, end in _blocks(start, stop, self._routed_block(config, query)):
                    tile = self._route(config, query[:, :, begin - first : end - first], begin, scoring)
                    attend_ahead()
                    ahead.append((tile, begin))
                    if end == self.length or not tile.start():
                        attend_ahead()
                start = stop
        finally:
            for tile, _ in ahead:  # after an error
                tile.drop()

    def _attend_block(self, config: HGAConfig, query: Tensor, first: int, scoring: Scoring) -> Tensor:
        """Routed attention by kernels for all tiles of a block that ends with the row, queries not scaled."""
        keys, values = self._near()
        near = (keys.clone(), values.clone())  # closing moves the tokens behind a closed chunk
        self._close(closed_chunks(config, self.length - 1))
        output, unique = attend_routed_block(config, query, near, self._archive, first, scoring)
        self._count(config, first, query.shape[2], unique, 0)
        return output

    def _route(self, config: HGAConfig, query: Tensor, first: int, scoring: Scoring) -> Tile:
        """Route queries of one tile, scaled, whose closed chunks are in the archive."""
        place = self._index_of(first)
        keys, values = (x[:, : place + query.shape[2]].to(query.dtype) for x in self._near())
        archive = self._archive if self.chunks else None
        near = Near(keys, values, place)
        return route_tile(config, query, near, archive, scoring, self._inverse_frequencies)

    def _attend_tile(self, config: HGAConfig, tile: Tile, start: int) -> Tensor:
        """Attend a tile that was routed, before another chunk closes."""
        routed = tile.attend()
        self._count(config, start, tile.query.shape[2], routed.unique_opened, routed.fetched_bytes)
        return routed.output

    def _count(self, config: HGAConfig, first: int, queries: int, unique: Tensor | None, fetched_bytes: int) -> None:
        """Count what queries from position `first` on attended; known beforehand, but for a union of heads."""
        if queries == 1:
            self._count_one(config, first, None if unique is None else unique.item())
        else:
            always, opened = attended_tokens(config, first, first + queries)
            self._counters.add_all(first, always + opened, always + (opened if unique is None else unique.cpu()))
        self._counters.working_bytes = max(self._counters.working_bytes, fetched_bytes)

    def _count_one(self, config: HGAConfig, position: int, unique: float | None) -> None:
        """Count the query at a position without tensors, which a decoded token would wait for in every layer."""
        chunks = self.chunks
        index = position if position < config.sink_tokens else position - chunks * config.chunk_size
        pending = pending_groups(config, index)
        groups = pending + chunks * config.chunk_size // config.group_size
        opened = min(groups, config.routed_groups) * config.group_size
        always = index + 1 - pending * config.group_size
        self._counters.add(position + 1, always + opened, always + (opened if unique is None else unique))

    def _routed_block(self, config: HGAConfig, query: Tensor) -> int:
        """Queries of a tile routed at once, so that their logits stay bounded as the context grows."""
        rows = query.shape[0] * query.shape[1]
        units = self.chunks * config.chunk_size // config.group_size
        return min(TILE_TOKENS, max(1, NUMBERS_AT_ONCE // (rows * (units + self.near_length))))

    # ---- closing, rewinding, sharing -----------------------------------------------------------------

    def _close(self, chunks: int) -> None:
        """Close chunks until `chunks` of them are."""
        if chunks <= self.chunks:
            return
        keys, values = self._near()
        if self._archive is None:
            self._archive = Archive(self._config, self.open_store, self._inverse_frequencies, keys)
        first = self._config.sink_tokens
        last = first + (chunks - self.chunks) * self._config.chunk_size
        # What may run out of memory comes first: a chunk is closed and cut out of `near`, or neither.
        kept = [torch.cat([x[:, :first], x[:, last:]], 1) for x in (keys, values)]
        self._archive.close(keys[:, first:last], values[:, first:last])
        self._keep_near(*kept)

    def _near(self) -> tuple[Tensor, Tensor]:
        return self._keys[:, : self.near_length], self._values[:, : self.near_length]

    def _keep_near(self, keys: Tensor, values: Tensor) -> None:
        """Replace `near`; a buffer that a long block has grown is let go, one that decoding fills again is kept."""
        used = keys.shape[1]
        if self._keys.shape[1] > used + self._config.chunk_size + 2 * TILE_TOKENS:
            self._keys, self._values = keys, values
        else:
            self._keys[:, :used], self._values[:, :used] = keys, values

    def _index_of(self, position: int) -> int:
        """Index in `near` of a position that is in no closed chunk."""
        closed = self.chunks * self._config.chunk_size
        return position if position < self._config.sink_tokens else position - closed

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens; chunks that end after `length` minus the window reopen."""
        length = max(0, length)
        if length >= self.length:
            return
        keep = closed_chunks(self._config, length)
        if self._archive is not None and keep < self.chunks:
            near, sink, size = self._near(), self._config.sink_tokens, self._config.chunk_size
            # Only what is not forgotten comes back: of a book that is left after its first page, one page.
            last = min(self.chunks, max(keep, -(-(length - sink) // size)))
            reopened = self._archive.reopen(keep, last)
            self._keys, self._values = (
                torch.cat([old[:, :sink], back, old[:, sink:]], 1)[:, : length - keep * size].contiguous()
                for old, back in zip(near, reopened, strict=True)
            )
        self.length = length

    def fork(self, counters: Counters | None = None) -> Row:
        """A copy that shares the closed chunks (reference-counted) and owns the rest: a beam, or a forked cache's row.

        counters: of another cache, whose copy has no room for more tokens yet: it may be kept for long and never grow.
        """
        twin = object.__new__(Row)
        twin.__dict__.update(self.__dict__)
        twin._counters = counters or self._counters
        held = (self._keys, self._values) if counters is None or not self.length else self._near()
        twin._keys, twin._values = (x.clone(memory_format=torch.contiguous_format) for x in held)
        twin._archive = None if self._archive is None else self._archive.fork()
        return twin

    def use_store(self, open_store: OpenStore) -> None:
        """Keep the chunks that close from now on in another store; there must be none yet."""
        assert not self.chunks
        self.open_store, self._archive = open_store, None

    def release(self) -> None:
        """Give up chunks and buffers."""
        if self._archive is not None:
            self._archive.release()
        self._archive, self.length = None, 0
        self._keys = self._values = torch.empty(0)

    def summary_bytes(self) -> int:
        """Bytes of this row's summaries, beside the model."""
        return 0 if self._archive is None else self._archive.summaries.held_bytes()

    def window_bytes(self) -> int:
        """Bytes of sink, window and unclosed tokens, buffer slack included."""
        return sum(x.numel() * x.element_size() for x in (self._keys, self._values))


def _blocks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Split [start, stop) into runs of at most `size`."""
    for first in range(start, stop, size):
        yield first, min(stop, first + size)
