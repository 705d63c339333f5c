"""The closed chunks of one row: their ids in the store, their summaries, and what can be read of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hga.cache.layout import record_layout
from hga.cache.summaries import Summaries
from hga.config import HGAConfig
from hga.ops.ordering import content_order
from hga.ops.precision import compute_dtype
from hga.store import RecordLayout, Store

_STREAMED_CHUNKS = 8

OpenStore = Callable[[RecordLayout], Store]


class Archive:
    """Chunks of one row, immutable and in position order. Beams share them through the store."""

    def __init__(
        self, config: HGAConfig, open_store: OpenStore, inverse_frequencies: Tensor | None, like: Tensor
    ) -> None:
        """like: the row's keys (Hkv, T, D), which fix heads, width, type and device."""
        self._config = config
        self.summaries = Summaries(config, like.dtype, inverse_frequencies)
        self.chunks: list[int] = []
        self.reopenings = 0
        self._table = torch.empty(0, dtype=torch.int64, device=like.device)
        self._device = like.device
        self._store = open_store(record_layout(config, like.shape[0], like.shape[2], like.dtype))

    def close(self, keys: Tensor, values: Tensor) -> None:
        """Close whole chunks, (Hkv, n C, D) in position order: order tokens, summarise, hand K/V to the store."""
        config = self._config
        # (n, Hkv, C, D): a chunk is a record, so chunks come first.
        keys, values = (x.unflatten(1, (-1, config.chunk_size)).transpose(0, 1) for x in (keys, values))
        order = None
        if config.ordering == "content":
            order = content_order(keys, values, config.group_size)
            index = order[..., None].expand_as(keys)
            keys, values = keys.gather(2, index), values.gather(2, index)
            order = order.to(torch.int16)
        self._set_chunks(self.chunks + self._store.append(self._store.layout.pack(keys, values), order))
        work = compute_dtype(keys.dtype)
        self.summaries.append(*(x.transpose(0, 1).flatten(1, 2).to(work) for x in (keys, values)))

    def reopen(self, keep: int) -> tuple[Tensor, Tensor]:
        """Give up all chunks but the first `keep`; returns their K/V (Hkv, n C, D) in position order."""
        ids = self.chunks[keep:]
        records, order = self._store.read(ids, self._device)
        keys, values = self._store.layout.unpack(records)  # (n, Hkv, C, D) in group order
        if order is not None:
            index = order.argsort(-1)[..., None].expand_as(keys)
            keys, values = keys.gather(2, index), values.gather(2, index)
        self._store.release(ids)
        self._set_chunks(self.chunks[:keep])
        self.reopenings += 1  # chunk numbers may come to mean other tokens
        self.summaries.truncate(keep)
        keys, values = (x.transpose(0, 1).flatten(1, 2) for x in (keys, values))
        return keys, values

    def stream(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All archived K/V, (Hkv, some chunks, D) at a time, in group order."""
        for start in range(0, len(self.chunks), _STREAMED_CHUNKS):
            records, _ = self._store.read(self.chunks[start : start + _STREAMED_CHUNKS], self._device)
            keys, values = self._store.layout.unpack(records)
            yield keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)

    def places(self, groups: Tensor) -> Tensor:
        """Where groups, counted from the archive's start, are in the store: (Hkv, U) -> (Hkv, U)."""
        per_chunk = self._config.chunk_size // self._config.group_size
        return self._table[groups // per_chunk] * per_chunk + groups % per_chunk

    def fetch(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """K/V of groups at ascending places of the store, (Hkv, U): keys, values (Hkv, U g, D)."""
        per_chunk = self._config.chunk_size // self._config.group_size
        keys, values = self._store.fetch(places // per_chunk, places % per_chunk)
        return keys.to(self._device).flatten(1, 2), values.to(self._device).flatten(1, 2)

    def addresses(self) -> Tensor:
        """Where the chunks' records lie (n,), for kernels that read them; the current stream may read at once."""
        return self._store.addresses(self.chunks)

    def fork(self) -> Archive:
        """A twin that shares the chunks and owns its summaries: a beam."""
        twin = object.__new__(Archive)
        twin.__dict__.update(self.__dict__)
        twin.summaries = self.summaries.clone()
        self._store.retain(self.chunks)
        return twin

    def release(self) -> None:
        """Give up all chunks."""
        self._store.release(self.chunks)
        self._set_chunks([])

    def _set_chunks(self, chunks: list[int]) -> None:
        self.chunks = chunks
        self._table = torch.tensor(chunks, dtype=torch.int64, device=self._device)
