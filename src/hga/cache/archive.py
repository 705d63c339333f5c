"""The closed chunks of one row: their ids in the store, their summaries, and what can be read of them."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hga.cache.kernels import find_closing
from hga.cache.layout import record_layout
from hga.cache.summaries import Summaries
from hga.config import HGAConfig
from hga.ops.precision import Rows, resolve_summary_dtype
from hga.store import RecordLayout, Store
from hga.store.reader import MOST_THREADS, Threads, shared_threads

_STREAMED_CHUNKS = 8
_STAGED_BYTES = 32 << 20  # of each of the two buffers that records are streamed through

OpenStore = Callable[[RecordLayout], Store]


class Fetch:
    """K/V of groups on their way from a store that several threads may use."""

    def __init__(
        self,
        threads: Threads,
        fetch: Callable[[], tuple[Tensor, Tensor]],
        finish: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]],
    ) -> None:
        """finish: what is left to do with the result, in the caller's thread. RuntimeError without a thread left."""
        self._finish = finish
        self._found: tuple[Tensor, Tensor] | None = None
        self._error: BaseException | None = None
        self._dropped = False
        self._done = threading.Event()
        self._fetch = fetch
        threads.submit(self._run)

    def _run(self) -> None:
        try:
            self._found = self._fetch()
        except BaseException as error:
            if not self._dropped:  # its traceback holds this object
                self._error = error
        self._done.set()

    def drop(self) -> None:
        """Nobody asks for the result. What is under way goes on: an interrupt does not wait for a device."""
        self._dropped, self._error = True, None

    def result(self) -> tuple[Tensor, Tensor]:
        """As `Archive.fetch`, its errors included."""
        self._done.wait()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error
        assert self._found is not None
        return self._finish(self._found)


class Archive:
    """Chunks of one row, immutable and in position order. Beams share them through the store."""

    def __init__(
        self, config: HGAConfig, open_store: OpenStore, inverse_frequencies: Tensor | None, like: Tensor
    ) -> None:
        """like: the row's keys (Hkv, T, D), which fix heads, width, type and device."""
        self.chunks: list[int] = []
        self._threads: Threads | None = None  # that fetch; held here, they are not started anew for each tile
        self._config = config
        self._inverse_frequencies = inverse_frequencies
        self._summary_dtype = resolve_summary_dtype(config.summary_dtype, like.dtype)
        self._close_chunks = find_closing(config, like.dtype, like.device)
        self.summaries = Summaries(config)
        self.reopenings = 0
        self._table: Tensor | None = None  # of the chunks' ids, where they are looked up
        self._device = like.device
        self.store = open_store(record_layout(config, like.shape[0], like.shape[2], like.dtype))

    def close(self, keys: Tensor, values: Tensor) -> None:
        """Close whole chunks, (Hkv, n C, D) in position order: order tokens, summarise, hand K/V to the store."""
        config = self._config
        closed = self._close_chunks(
            keys,
            values,
            chunk_size=config.chunk_size,
            group_size=config.group_size,
            node_size=config.node_size,
            ordering=config.ordering,
            summary_dtype=self._summary_dtype,
            far_field=config.far_field,
            coded=config.coded,
            inverse_frequencies=self._inverse_frequencies,
        )
        try:
            self.summaries.append(closed)
            ids = self.store.append(closed.records, closed.order)
        except BaseException:  # out of memory on either side: the chunks stay open
            self.summaries.truncate(len(self.chunks))
            raise
        self._set_chunks(self.chunks + ids)

    def restore(self, ids: list[int], summaries: dict[str, Rows]) -> None:
        """Be, from empty, an archive of chunks that the store holds, retained for it."""
        self.summaries.restore(len(ids), summaries)
        self._set_chunks(ids)

    def reopen(self, keep: int, last: int) -> tuple[Tensor, Tensor]:
        """Give up all chunks but the first `keep`; K/V (Hkv, n C, D) of those up to `last`, in position order."""
        records, order = self.store.read(self.chunks[keep:last], self._device)
        keys, values = self.store.layout.unpack(records)  # (n, Hkv, C, D) in group order
        if order is not None:
            index = order.argsort(-1)[..., None].expand_as(keys)
            keys, values = keys.gather(2, index), values.gather(2, index)
        self.store.release(self.chunks[keep:])
        self._set_chunks(self.chunks[:keep])
        self.reopenings += 1  # chunk numbers may come to mean other tokens
        self.summaries.truncate(keep)
        keys, values = (x.transpose(0, 1).flatten(1, 2) for x in (keys, values))
        return keys, values

    @property
    def group_size(self) -> int:
        """Tokens of a group as it is stored."""
        return self._config.group_size

    @property
    def streamed_tokens(self) -> int:
        """The most tokens that `stream` yields at once."""
        return min(_STREAMED_CHUNKS, len(self.chunks)) * self._config.chunk_size

    def stream(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All archived K/V, (Hkv, some chunks, D) at a time, in group order."""
        for start in range(0, len(self.chunks), _STREAMED_CHUNKS):
            chunks = self.chunks[start : start + _STREAMED_CHUNKS]
            records = self._records(len(chunks))
            self.store.stage(chunks, records)
            keys, values = self.store.layout.unpack(records)
            yield keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)

    @contextmanager
    def staged(self) -> Iterator[tuple[Tensor, Callable[[], None]]]:
        """All records (n, Hkv, G, 2, g, D) beside the model, in position order of chunks, copied beside other work.

        What is called makes the current stream wait for them, before they are read.
        """
        records = self._records(len(self.chunks))
        current, side = torch.cuda.current_stream(self._device), _staging_stream(self._device)
        side.wait_stream(current)  # the records' memory may still be in use there
        try:
            with torch.cuda.stream(side):
                self.store.stage(self.chunks, records)
                arrived = side.record_event()
            yield records, functools.partial(current.wait_event, arrived)
        finally:
            current.wait_stream(side)  # whatever was begun, nothing is written into memory that is given back

    def stream_records(self) -> Iterator[Tensor]:
        """All records, some chunks (n, Hkv, G, 2, g, D) at a time, on a GPU, the next ones copied meanwhile.

        What is yielded is valid until the next but one is asked for, for work on the current stream.
        """
        per_piece = max(1, _STAGED_BYTES // self.store.layout.chunk_bytes)
        pieces = [self.chunks[start : start + per_piece] for start in range(0, len(self.chunks), per_piece)]
        buffers = [self._records(min(per_piece, len(self.chunks))) for _ in pieces[:2]]
        current, side = torch.cuda.current_stream(self._device), _staging_stream(self._device)
        side.wait_stream(current)  # the buffers' memory may still be in use there
        used: list[torch.cuda.Event] = []
        ready: list[torch.cuda.Event] = []

        def fill(index: int) -> None:
            with torch.cuda.stream(side):
                if index >= 2:
                    side.wait_event(used[index - 2])
                self.store.stage(pieces[index], buffers[index % 2][: len(pieces[index])])
                ready.append(side.record_event())

        try:
            for index, piece in enumerate(pieces):
                if index == 0:
                    fill(0)
                if index + 1 < len(pieces):
                    fill(index + 1)
                current.wait_event(ready[index])
                yield buffers[index % 2][: len(piece)]
                used.append(current.record_event())
        finally:
            current.wait_stream(side)

    def _records(self, chunks: int) -> Tensor:
        layout = self.store.layout
        return torch.empty((chunks, *layout.shape), dtype=layout.dtype, device=self._device)

    def places(self, groups: Tensor) -> Tensor:
        """Where groups, counted from the archive's start, are in the store: (Hkv, U) -> (Hkv, U)."""
        per_chunk = self._config.chunk_size // self._config.group_size
        if self._table is None:
            self._table = torch.tensor(self.chunks, dtype=torch.int64, device=self._device)
        return self._table[groups // per_chunk] * per_chunk + groups % per_chunk

    def fetch(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """K/V of groups at ascending places of the store, (Hkv, U): keys, values (Hkv, U g, D)."""
        return self._place(self.store.fetch(*self._locate(places)))

    def begin_fetch(self, places: Tensor) -> Fetch | None:
        """`fetch` beside the caller's work, where the store waits for a device; else None: it has to be called."""
        if not self.store.waits:
            return None
        located = [x.cpu() for x in self._locate(places)]
        if self._threads is None:
            self._threads = shared_threads("hga-fetch", MOST_THREADS)
        try:
            return Fetch(self._threads, functools.partial(self.store.fetch, *located), self._place)
        except RuntimeError:  # no thread to be had: the caller fetches itself
            return None

    def _locate(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Chunks in the store, and groups in them, of places (Hkv, U)."""
        per_chunk = self._config.chunk_size // self._config.group_size
        return places // per_chunk, places % per_chunk

    def _place(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Bring what a store fetched (Hkv, U, g, D) beside the model: (Hkv, U g, D)."""
        keys, values = found
        return keys.to(self._device).flatten(1, 2), values.to(self._device).flatten(1, 2)

    def addresses(self) -> Tensor:
        """Where the chunks' records lie (n,), for kernels that read them; the current stream may read at once."""
        return self.store.addresses(self.chunks)

    def fork(self) -> Archive:
        """A twin that shares chunks and summaries until it goes its own way: a beam, or a forked cache's row."""
        twin = object.__new__(Archive)
        twin.__dict__.update(self.__dict__, summaries=self.summaries.fork(), chunks=[])
        self.store.retain(self.chunks)
        twin.chunks = self.chunks
        return twin

    def release(self) -> None:
        """Give up all chunks."""
        self.store.release(self.chunks)
        self._set_chunks([])

    def __del__(self) -> None:
        """A cache that is dropped, not reset, must not hold chunks of a store that its forks still use."""
        if vars(self).get("chunks") and not sys.is_finalizing():
            self.store.abandon(self.chunks)

    def _set_chunks(self, chunks: list[int]) -> None:
        self.chunks, self._table = chunks, None


@functools.cache
def _staging_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which records come from host memory, beside the model's work."""
    return torch.cuda.Stream(device)
