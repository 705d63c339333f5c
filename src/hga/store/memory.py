"""Chunks in memory: on the model's device, or in host memory."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hga.store.host import allocate_host, check_host_room
from hga.store.record import RecordLayout, check_records

_FIRST_SEGMENT_CHUNKS = 4  # a server keeps many short archives
_DOUBLED_CHUNKS = 16  # up to here a segment doubles what there is: few segments, since each costs a gather a call
_GROWTH = 4  # then it adds a quarter: page-locking costs time a byte, so slack costs twice
_LARGEST_SEGMENT_BYTES = 128 << 20


@dataclass(frozen=True)
class _Run:
    """Neighbours in one segment that are neighbours in a list of chunks: `chunks` of it are `slots` there."""

    segment: int
    slots: slice
    chunks: slice


class MemoryStore:
    """A `Store` in memory. Segments are added as the archive grows, so that nothing is ever copied or moved.

    device: where the chunks live; `tier` is "ram" for host memory and "device" beside the model. Host memory is
    page-locked for the GPU whose records arrive; they come by a stream of their own, beside the model's work.
    """

    def __init__(self, layout: RecordLayout, device: torch.device, tier: str) -> None:
        self.layout = layout
        self.device = device
        self.tier = tier
        self._segments: list[Tensor] = []  # each (n, Hkv, G, 2, g, D)
        self._orders: list[Tensor] = []  # each (n, Hkv, C) int16
        self._first_id: list[int] = []
        self._readable: list[bool] = []  # by a GPU, by address
        self._holders: dict[int, int] = {}
        self._abandoned: deque[int] = deque()
        self._free: list[int] = []  # descending, so that neighbours are taken together from the end
        self._capacity = 0
        self._copied: torch.cuda.Event | None = None  # after the last copy from a GPU
        self._gpu: torch.device | None = None

    def append(self, records: Tensor, order: Tensor | None) -> list[int]:
        """See `Store.append`."""
        self.release([])
        check_records(self.layout, records, order)
        if (missing := len(records) - len(self._free)) > 0:
            self._grow(missing, records.device)
        first = len(self._free) - len(records)
        ids = self._free[first:][::-1]
        if self.device.type == "cpu" and records.is_cuda:
            self._copy_aside(ids, records, order)
        else:
            self._settle()
            self._copy(ids, records, order)
        # Only now: an error on the way leaves the places free.
        del self._free[first:]
        self._holders.update(dict.fromkeys(ids, 1))
        return ids

    def read(self, ids: list[int], device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Store.read`. Neighbours come in one copy."""
        layout, target = self.layout, self.device if device is None else device
        records = torch.empty((len(ids), *layout.shape), dtype=layout.dtype, device=target)
        self.stage(ids, records)
        if not layout.ordered:
            return records, None
        order = torch.empty((len(ids), layout.kv_heads, layout.tokens), dtype=torch.int16, device=target)
        self._gather(ids, self._orders, order)
        return records, order.long()

    def stage(self, ids: list[int], out: Tensor) -> None:
        """See `Store.stage`. Neighbours come in one copy."""
        if out.device == self._gpu:
            self.wait()
        else:
            self._settle()
        self._gather(ids, self._segments, out)

    def fetch(self, ids: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """See `Store.fetch`. Keys and values go straight to their places: one copy, a head and a segment at a time."""
        self._settle()
        layout = self.layout
        ids, groups = ids.to(self.device), groups.to(self.device)
        head = torch.arange(layout.kv_heads, device=self.device)[:, None]
        places = (ids * layout.kv_heads + head) * layout.groups + groups  # (Hkv, U), ascending
        shape = (*places.shape, layout.group_size, layout.head_dim)
        keys, values = (torch.empty(shape, dtype=layout.dtype, device=self.device) for _ in range(2))
        per_chunk = layout.kv_heads * layout.groups
        edges = torch.tensor([*self._first_id, self._capacity], device=self.device) * per_chunk
        cuts = torch.searchsorted(places, edges.expand(layout.kv_heads, -1).contiguous()).tolist()
        row_bytes = layout.group_size * layout.head_dim * layout.dtype.itemsize
        sources = [_byte_rows(segment, row_bytes) for segment in self._segments]
        to_keys, to_values = _byte_rows(keys, row_bytes), _byte_rows(values, row_bytes)
        index = _plain(2 * places.flatten())  # K and V of a group are neighbours
        done = 0
        for cut in cuts:
            for source, first_id, (begin, end) in zip(sources, self._first_id, pairwise(cut), strict=True):
                if begin < end:
                    run = slice(done, done + end - begin)
                    here = index[run] - 2 * per_chunk * first_id
                    _take(source, here, to_keys[run])
                    _take(source, here + 1, to_values[run])
                    done = run.stop
        return keys, values

    def collect(self, ids: Tensor, heads: Tensor, groups: Tensor, out: Tensor) -> None:
        """See `Store.collect`."""
        self._settle()
        layout = self.layout
        index = ((ids * layout.kv_heads + heads) * layout.groups + groups).to(self.device)
        edges = torch.tensor(self._first_id[1:], device=self.device) * layout.kv_heads * layout.groups
        within = torch.bucketize(index, edges, right=True)
        for number, (segment, first_id) in enumerate(zip(self._segments, self._first_id, strict=True)):
            here = (within == number).nonzero().flatten()
            source = segment.view(-1, *layout.shape[2:])[index[here] - first_id * layout.kv_heads * layout.groups]
            out[here.to(out.device)] = source.to(out.device)

    def addresses(self, ids: list[int]) -> Tensor:
        """See `Store.addresses`."""
        self.wait()
        found = []
        for chunk in ids:
            segment, slot = self._locate(self._held(chunk))
            records = self._segments[segment]
            found.append(records.data_ptr() + slot * records.stride(0) * records.element_size())
        return torch.tensor(found, dtype=torch.int64)

    def wait(self) -> None:
        """See `Store.wait`."""
        if self._copied is not None:
            torch.cuda.current_stream(self._gpu).wait_event(self._copied)

    @property
    def gpu_readable(self) -> bool:
        """See `Store.gpu_readable`."""
        return all(self._readable)

    @property
    def waits(self) -> bool:
        """See `Store.waits`."""
        return False

    def retain(self, ids: list[int]) -> None:
        """See `Store.retain`."""
        for chunk in ids:
            self._holders[self._held(chunk)] += 1

    def release(self, ids: list[int]) -> None:
        """See `Store.release`. Memory of released chunks is reused, and given back when none is held."""
        abandoned = [self._abandoned.popleft() for _ in range(len(self._abandoned))]
        for chunk in (*abandoned, *ids):
            self._holders[self._held(chunk)] -= 1
            if not self._holders[chunk]:
                del self._holders[chunk]
                self._free.append(chunk)
        self._free.sort(reverse=True)
        if not self._holders:
            self._give_back()

    def abandon(self, ids: list[int]) -> None:
        """See `Store.abandon`."""
        self._abandoned.extend(ids)

    def held_bytes(self) -> dict[str, int]:
        """See `Store.held_bytes`."""
        self.release([])
        return {self.tier: len(self._holders) * self._one_bytes}

    def allocated_bytes(self) -> dict[str, int]:
        """See `Store.allocated_bytes`."""
        return {self.tier: self._capacity * self._one_bytes}

    # ---- memory --------------------------------------------------------------------------------------

    @property
    def _one_bytes(self) -> int:
        return self.layout.chunk_bytes + self.layout.order_bytes

    def _grow(self, missing: int, source: torch.device) -> None:
        """Add a segment with room for `missing` chunks, and for more where there is memory for it."""
        most = max(1, _LARGEST_SEGMENT_BYTES // self._one_bytes)
        doubled = min(max(_FIRST_SEGMENT_CHUNKS, self._capacity), _DOUBLED_CHUNKS)
        count = max(missing, min(max(doubled, self._capacity // _GROWTH), most))
        try:
            self._add_segment(count, source)
        except MemoryError:
            if count == missing:
                raise
            self._add_segment(missing, source)

    def _add_segment(self, count: int, source: torch.device) -> None:
        """One allocation a segment: all records, then all permutations."""
        layout, readable = self.layout, True
        split = count * layout.chunk_bytes
        size_bytes = split + count * layout.order_bytes
        if self.device.type == "cpu":
            check_host_room(size_bytes, f"a layer's archive, which has {self._capacity * self._one_bytes:,} bytes,")
            block = allocate_host(size_bytes, source if source.type == "cuda" else None)
            raw, readable = block.bytes, block.gpu_readable
        else:
            raw = torch.empty(size_bytes, dtype=torch.uint8, device=self.device)
        self._segments.append(raw[:split].view(layout.dtype).view(count, *layout.shape))
        if layout.ordered:
            self._orders.append(raw[split:].view(torch.int16).view(count, layout.kv_heads, layout.tokens))
        self._readable.append(readable)
        self._first_id.append(self._capacity)
        self._free[:0] = range(self._capacity + count - 1, self._capacity - 1, -1)
        self._capacity += count

    def _give_back(self) -> None:
        """Forget all segments; their memory goes once the copies into it are done."""
        self._settle()
        self._segments, self._orders, self._first_id, self._readable = [], [], [], []
        self._free, self._capacity = [], 0

    # ---- copies --------------------------------------------------------------------------------------

    def _gather(self, ids: list[int], segments: list[Tensor], out: Tensor) -> None:
        """Copy what segments hold of chunks to `out`, in order."""
        for run in self._runs([self._held(chunk) for chunk in ids]):
            out[run.chunks].copy_(segments[run.segment][run.slots], non_blocking=out.device.type != "cpu")

    def _copy(self, ids: list[int], records: Tensor, order: Tensor | None) -> None:
        for run in self._runs(ids):
            self._segments[run.segment][run.slots].copy_(records[run.chunks], non_blocking=True)
            if order is not None:
                self._orders[run.segment][run.slots].copy_(order[run.chunks], non_blocking=True)

    def _copy_aside(self, ids: list[int], records: Tensor, order: Tensor | None) -> None:
        """Copy from a GPU to host memory while the model goes on: after its work so far, on the copies' stream."""
        gpu = records.device
        stream = _copy_stream(gpu)
        stream.wait_stream(torch.cuda.current_stream(gpu))
        if self._copied is not None:
            stream.wait_event(self._copied)  # the new event then speaks for all copies, whatever their GPU
        with torch.cuda.stream(stream):
            self._copy(ids, records, order)
            for source in (records, order):
                if source is not None and source.is_cuda:
                    source.record_stream(stream)  # its memory is not reused before the copy is done
        self._copied, self._gpu = stream.record_event(), gpu

    def _settle(self) -> None:
        """Make the CPU wait for copies that are under way."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def _runs(self, ids: list[int]) -> Iterator[_Run]:
        """Cut a list of chunks into runs of neighbours."""
        start = 0
        while start < len(ids):
            segment, slot = self._locate(ids[start])
            most = min(len(ids) - start, len(self._segments[segment]) - slot)
            count = 1
            while count < most and ids[start + count] == ids[start] + count:
                count += 1
            yield _Run(segment, slice(slot, slot + count), slice(start, start + count))
            start += count

    def _locate(self, chunk: int) -> tuple[int, int]:
        segment = bisect_right(self._first_id, chunk) - 1
        return segment, chunk - self._first_id[segment]

    def _held(self, chunk: int) -> int:
        if chunk not in self._holders:
            raise KeyError(f"chunk {chunk} is not held by this store; it was released or never appended")
        return chunk


def _plain(numbers: Tensor) -> Any:
    """The tensor itself on a device; numpy's view of it in host memory.

    A row's gather takes a call for each head and segment: numpy's costs a third, and no thread waits for another.
    """
    return numbers.numpy() if numbers.device.type == "cpu" else numbers


def _byte_rows(numbers: Tensor, row_bytes: int) -> Any:
    """Contiguous numbers as rows of bytes, (n, row_bytes)."""
    return _plain(numbers.view(-1).view(torch.uint8).view(-1, row_bytes))


def _take(rows: Any, index: Any, out: Any) -> None:
    """Copy rows (n, bytes) at an index (U,) to `out` (U, bytes)."""
    if isinstance(rows, Tensor):
        torch.index_select(rows, 0, index, out=out)
    else:
        rows.take(index, 0, out, "clip")  # the default mode would copy by way of a buffer


@functools.cache
def _copy_stream(gpu: torch.device) -> torch.cuda.Stream:
    """The stream on which all stores copy from a GPU: copies queue behind each other, not behind the model."""
    return torch.cuda.Stream(gpu)
