"""Chunks on a scratch file, with a bounded cache in host memory over it."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from hga.store.host import allocate_host, check_host_room
from hga.store.pieces import PieceCache
from hga.store.reader import DEADLINE_SECONDS, PAGE_BYTES, OpenFile, Preadv, Reader
from hga.store.record import RecordLayout, check_records
from hga.store.scratch import Pwritev, WriteBehind, open_scratch, reserve
from hga.store.traffic import Traffic

PIECE_BYTES = 4096
"""Read and cached at once, at least: a page, the least that O_DIRECT reads. A routed group of 4 tokens is 2 KiB; larger
pieces hold siblings that are rarely wanted together (benchmarks/NOTES.md has the figures).
"""

_FIRST_CHUNKS = 16
_GROWTH = 4  # the file grows by a quarter
_LARGEST_GROWTH_BYTES = 256 << 20
_BLOCK_BYTES = 8 << 20  # written, or staged, at once
_EXTENT_PIECES = 64  # most that one call reads of scattered pieces
_EXTENT_BYTES = 128 << 10  # and of whole chunks, so that even a few of them keep all threads busy


class NvmeStore:
    """A `Store` on a nameless scratch file, which every chunk is written to behind the caller's work.

    ram_cache_bytes bound the cache over it (at least one piece). With `spill` nothing is written until the archive
    outgrows the cache: then all of it is, and from there on every chunk. Permutations stay in host memory.

    OSError on any call that meets a disk that is full, faulty or hangs; chunks that were kept stay readable where
    the disk can read them. One thread at a time may use a store.
    """

    def __init__(
        self,
        layout: RecordLayout,
        ram_cache_bytes: int,
        *,
        spill: bool = False,
        preadv: Preadv = os.preadv,
        pwritev: Pwritev = os.pwritev,
        deadline_seconds: float = DEADLINE_SECONDS,
    ) -> None:
        """preadv, pwritev: what reads and writes; others stand for faulty devices."""
        self.layout = layout
        self.traffic = Traffic()
        self._faults: dict[str, Any] = {"preadv": preadv, "deadline_seconds": deadline_seconds}
        self._pwritev = pwritev
        self._spill = spill
        self._group_bytes = 2 * layout.group_size * layout.head_dim * layout.dtype.itemsize
        self._chunk_bytes = layout.kv_heads * layout.groups * self._group_bytes
        self._piece_bytes = _piece_bytes(self._group_bytes, self._chunk_bytes)
        self._pieces = -(-self._chunk_bytes // self._piece_bytes)  # of a chunk; the last may be padded
        self._abandoned: deque[int] = deque()
        self._slots = max(1, ram_cache_bytes // self._piece_bytes)
        check_host_room(self._slots * self._piece_bytes, "a layer's RAM cache of its archive (ram_cache_bytes)")
        self._empty()

    def _empty(self) -> None:
        """Hold nothing, and no resource but the cache's address space."""
        self._holders: dict[int, int] = {}
        self._free: list[int] = []  # descending
        self._capacity = 0
        self._cache = PieceCache(self._slots, self._piece_bytes)
        self._order = torch.empty(0, self.layout.kv_heads, self.layout.tokens, dtype=torch.int16)
        self._reader: Reader | None = None  # and the writer: once there is a file
        self._writer: WriteBehind | None = None
        self._file_chunks = 0

    # ---- the protocol --------------------------------------------------------------------------------

    def append(self, records: Tensor, order: Tensor | None) -> list[int]:
        """See `Store.append`. OSError when the disk has no room, or an earlier write behind the caller failed."""
        self.release([])
        check_records(self.layout, records, order)
        if self._writer is not None and self._writer.error is not None:
            error = self._writer.error
            raise OSError(error.errno, error.strerror)  # a kept one would keep the frames that it passes
        count = len(records)
        grown = self._capacity + max(0, count - len(self._free))
        if self._writer is not None:
            self._reserve(self._writer.file, grown)
        elif not (self._spill and count * self._pieces <= self._cache.free):
            self._open_file(grown)
        self._grow(grown)
        ids = self._free[len(self._free) - count :][::-1]
        data = records.detach().to("cpu").contiguous()
        try:
            for first, run in _runs(ids, self._at_once):
                self._keep(run, data[first : first + len(run)])
        except BaseException:  # a queue that does not move, or no memory: nothing is kept
            self._drop(ids)
            raise
        if order is not None:
            self._order[ids] = order.to("cpu")
        del self._free[len(self._free) - count :]
        self._holders.update(dict.fromkeys(ids, 1))
        return ids

    def read(self, ids: list[int], device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Store.read`."""
        target = torch.device("cpu") if device is None else device
        records = torch.empty((len(ids), *self.layout.shape), dtype=self.layout.dtype, device=target)
        self.stage(ids, records)
        return records, self._order[ids].long().to(target) if self.layout.ordered else None

    def stage(self, ids: list[int], out: Tensor) -> None:
        """See `Store.stage`. By way of page-aligned memory, page-locked for a GPU; the cache is left as it is."""
        for chunk in ids:
            self._held(chunk)
        if not ids:
            return
        at_once = self._at_once
        gpu = out.device if out.device.type == "cuda" else None
        block = allocate_host(min(at_once, len(ids)) * self._stride, gpu)
        staging = block.bytes.view(-1, self._stride)
        for start in range(0, len(ids), at_once):
            part = ids[start : start + at_once]
            self._gather(part, staging.numpy())
            rows = staging[: len(part), : self._chunk_bytes].contiguous()
            out[start : start + len(part)].copy_(rows.view(self.layout.dtype).view(len(part), *self.layout.shape))

    def fetch(self, ids: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """See `Store.fetch`. All heads are one batch, as long as the cache holds it."""
        layout, half = self.layout, self._group_bytes // 2
        shape = (*groups.shape, layout.group_size, layout.head_dim)
        keys, values = (torch.empty(shape, dtype=layout.dtype) for _ in range(2))
        to_keys, to_values = (x.view(-1).view(torch.uint8).view(-1, half).numpy() for x in (keys, values))
        heads = torch.arange(layout.kv_heads)[:, None]
        for part, held, slots, rows in self._parts(ids.cpu(), heads, groups.cpu()):
            source = held.reshape(len(held), -1, half)
            to_keys[part] = source[slots, 2 * rows]  # K and V of a group are neighbours
            to_values[part] = source[slots, 2 * rows + 1]
        return keys, values

    def collect(self, ids: Tensor, heads: Tensor, groups: Tensor, out: Tensor) -> None:
        """See `Store.collect`. One batch, as long as the cache holds it."""
        target: Any = out.view(-1).view(torch.uint8).view(-1, self._group_bytes).numpy()
        for part, held, slots, rows in self._parts(ids, heads, groups):
            target[part] = held.reshape(len(held), -1, self._group_bytes)[slots, rows]

    def addresses(self, ids: list[int]) -> NoReturn:
        """TypeError: records on a file have no address; kernels ask `gpu_readable` first."""
        raise TypeError("chunks on NVMe have no address in memory; read, stage or fetch them")

    def wait(self) -> None:
        """See `Store.wait`. Copies from a GPU are done when `append` returns."""

    @property
    def gpu_readable(self) -> bool:
        """See `Store.gpu_readable`."""
        return False

    def retain(self, ids: list[int]) -> None:
        """See `Store.retain`."""
        for chunk in ids:
            self._holders[self._held(chunk)] += 1

    def release(self, ids: list[int]) -> None:
        """See `Store.release`. With the last chunk the file goes."""
        for chunk in (*(self._abandoned.popleft() for _ in range(len(self._abandoned))), *ids):
            self._holders[self._held(chunk)] -= 1
            if not self._holders[chunk]:
                del self._holders[chunk]
                self._free.append(chunk)
                self._drop([chunk])
        self._free.sort(reverse=True)
        if not self._holders and self._capacity:
            if self._writer is not None:
                self._writer.cancel()
            self._empty()

    def abandon(self, ids: list[int]) -> None:
        """`release` for a finalizer, which may run in the middle of any call: it takes effect at a later one."""
        self._abandoned.extend(ids)

    def held_bytes(self) -> dict[str, int]:
        """See `Store.held_bytes`. What the RAM cache holds besides is not counted twice."""
        self.release([])
        held = len(self._holders)
        order_bytes = held * self.layout.order_bytes
        if self._writer is None:
            return {"ram": held * self._chunk_bytes + order_bytes}
        return {"nvme": held * self._chunk_bytes, "ram": order_bytes}

    def allocated_bytes(self) -> dict[str, int]:
        """See `Store.allocated_bytes`: the file; the cache, permutations and what waits to be written."""
        ram = self._cache.held_bytes + self._order.nbytes + self.traffic.queued_bytes
        return {"nvme": self._file_chunks * self._stride, "ram": ram}

    def __del__(self) -> None:
        writer: WriteBehind | None = getattr(self, "_writer", None)  # an error in __init__ leaves none
        if writer is not None:
            writer.cancel()

    # ---- keeping -------------------------------------------------------------------------------------

    @property
    def _stride(self) -> int:
        """Bytes from one chunk to the next in the file."""
        return self._pieces * self._piece_bytes

    @property
    def _at_once(self) -> int:
        """Chunks that are written or staged at once."""
        return max(1, _BLOCK_BYTES // self._stride)

    def _grow(self, chunks: int) -> None:
        """Make ids below `chunks` known; what can run out of memory comes first."""
        if (added := chunks - self._capacity) <= 0:
            return
        if self.layout.ordered and len(self._order) < chunks:
            room = max(chunks, len(self._order) + len(self._order) // _GROWTH, _FIRST_CHUNKS)
            grown = torch.empty(room, *self._order.shape[1:], dtype=torch.int16)
            grown[: len(self._order)] = self._order
            self._order = grown
        self._cache.grow(chunks * self._pieces)
        self._free[:0] = range(chunks - 1, chunks - 1 - added, -1)
        self._capacity = chunks

    def _open_file(self, chunks: int) -> None:
        """Make the scratch file with room for chunks, and send everything that only the cache holds to it."""
        file = open_scratch()
        self._reserve(file, chunks)
        writer = WriteBehind(file, self.traffic, pwritev=self._pwritev)
        try:
            for _, run in _runs(sorted(self._holders), self._at_once):
                block = allocate_host(len(run) * self._stride)
                rows: Any = block.bytes.view(-1, self._piece_bytes).numpy()
                self._cache.memory.take(self._cache.find(self._pieces_of(run).ravel()), 0, rows, "clip")
                writer.put(run, block, run[0] * self._stride)
        except BaseException:  # the cache still holds everything
            writer.cancel()
            self._file_chunks = 0
            raise
        self._writer, self._reader = writer, Reader(file, self.traffic, **self._faults)

    def _reserve(self, file: OpenFile, chunks: int) -> None:
        """Reserve room on the disk for chunks, with some to spare where there is more."""
        held, stride = self._file_chunks, self._stride
        if chunks <= held:
            return
        spare = min(max(_FIRST_CHUNKS, held // _GROWTH), max(1, _LARGEST_GROWTH_BYTES // stride))
        wanted = max(chunks, held + spare)
        try:
            reserve(file, held * stride, wanted * stride)
        except OSError:
            if wanted == chunks:
                raise
            reserve(file, held * stride, chunks * stride)
            wanted = chunks
        self._file_chunks = wanted

    def _keep(self, ids: list[int], records: Tensor) -> None:
        """Keep neighbours: in the cache where it has room, and on their way to the file if there is one."""
        rows = records.reshape(len(ids), -1).view(torch.uint8).numpy()
        block = allocate_host(len(ids) * self._stride)
        padded: Any = block.bytes.view(len(ids), self._stride).numpy()
        padded[:, : self._chunk_bytes] = rows
        pieces = self._pieces_of(ids).ravel()[: self._cache.free]
        slots = self._cache.take(len(pieces))
        self._cache.memory[slots] = padded.reshape(-1, self._piece_bytes)[: len(pieces)]
        self._cache.put(pieces, slots)
        if self._writer is not None:
            self._writer.put(ids, block, ids[0] * self._stride)

    def _drop(self, ids: list[int]) -> None:
        """Forget what RAM holds of chunks."""
        self._cache.forget(self._pieces_of(ids).ravel())
        if self._writer is not None:
            for chunk in ids:
                self._writer.forget(chunk)

    # ---- bringing ------------------------------------------------------------------------------------

    def _parts(self, ids: Tensor, heads: Tensor, groups: Tensor) -> Iterator[tuple[slice, Any, Any, Any]]:
        """Bring groups, indices that broadcast, in parts that the cache holds.

        Yields the part of them, the bytes of groups in the cache's slots, the slot and the row in it of each group.
        """
        per_piece = self._piece_bytes // self._group_bytes
        index: Any = (heads * self.layout.groups + groups).numpy()  # in the chunk
        pieces, rows = (ids.numpy() * self._pieces + index // per_piece).ravel(), (index % per_piece).ravel()
        for start in range(0, len(pieces), self._slots):
            part = slice(start, start + self._slots)
            slots = self._bring(pieces[part])
            yield part, self._cache.memory[:, : per_piece * self._group_bytes], slots, rows[part]

    def _bring(self, pieces: Any) -> Any:
        """Slots of pieces (n,), no more than there are slots, those not cached read into it."""
        slots = self._cache.find(pieces)
        hit = slots >= 0
        self._cache.begin(slots[hit])
        hits = int(hit.sum())
        self.traffic.add_look_ups(hits, len(pieces) - hits)
        if hits < len(pieces):
            missing = np.unique(pieces[~hit])
            taken = self._cache.take(len(missing))
            try:
                self._load(missing, taken)
            except BaseException as error:
                if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                    self._cache.give_back(taken)
                else:  # also after an interrupt, late reads may still write into the old one
                    self._cache = self._fresh_cache()
                raise
            self._cache.put(missing, taken)
            slots = self._cache.find(pieces)
        return slots

    def _load(self, pieces: Any, slots: Any) -> None:
        """Fill slots with ascending pieces: neighbours in the file come by one read."""
        if self._writer is not None and self._writer.busy:
            on_file = np.ones(len(pieces), bool)
            for index, (piece, buffer) in enumerate(zip(pieces.tolist(), self._cache.buffers(slots), strict=True)):
                if (waiting := self._waiting(piece // self._pieces)) is not None:
                    start = piece % self._pieces * self._piece_bytes
                    buffer[:] = memoryview(waiting)[start : start + self._piece_bytes]
                    on_file[index] = False
            pieces, slots = pieces[on_file], slots[on_file]
        begins = np.flatnonzero((np.diff(pieces, prepend=-2) != 1) | (pieces % _EXTENT_PIECES == 0))
        edges = [*begins.tolist(), len(pieces)]
        buffers = self._cache.buffers(slots)
        self._read((pieces[begins] * self._piece_bytes).tolist(), [buffers[a:b] for a, b in pairwise(edges)])

    def _gather(self, ids: list[int], rows: Any) -> None:
        """Copy whole chunks to rows (n, stride) of page-aligned memory: from the cache, the queue or the file."""
        slots = self._cache.find(self._pieces_of(ids))
        offsets, targets = [], []
        for index, chunk in enumerate(ids):
            if (slots[index] >= 0).all():
                rows[index].reshape(self._pieces, -1)[:] = self._cache.memory[slots[index]]
            elif (waiting := self._waiting(chunk)) is not None:
                rows[index] = waiting
            else:
                raw = memoryview(rows[index])
                for start in range(0, self._stride, _EXTENT_BYTES):
                    offsets.append(chunk * self._stride + start)
                    targets.append([raw[start : start + _EXTENT_BYTES]])
        self._read(offsets, targets)

    def _waiting(self, chunk: int) -> Any:
        """The bytes (stride,) of a chunk that is not in the file yet; else None."""
        return None if self._writer is None else self._writer.find(chunk)

    def _read(self, offsets: list[int], targets: list[list[memoryview]]) -> None:
        if offsets:
            assert self._reader is not None
            self._reader.read(offsets, targets)

    def _fresh_cache(self) -> PieceCache:
        cache = PieceCache(self._slots, self._piece_bytes)
        cache.grow(self._capacity * self._pieces)
        return cache

    def _pieces_of(self, ids: list[int]) -> Any:
        """Numbers of the pieces of chunks, (n, pieces)."""
        return np.array(ids, np.int64)[:, None] * self._pieces + np.arange(self._pieces)

    def _held(self, chunk: int) -> int:
        if chunk not in self._holders:
            raise KeyError(f"chunk {chunk} is not held by this store; it was released or never appended")
        return chunk


def _piece_bytes(group_bytes: int, chunk_bytes: int) -> int:
    """Bytes of a piece: whole groups and whole pages, near PIECE_BYTES, at most a chunk."""
    least = math.lcm(group_bytes, PAGE_BYTES)
    whole = -(-chunk_bytes // PAGE_BYTES) * PAGE_BYTES
    return min(max(1, PIECE_BYTES // least) * least, whole)


def _runs(ids: list[int], longest: int) -> Iterator[tuple[int, list[int]]]:
    """Cut a list of chunks into runs of neighbours, each with the index of its first."""
    start = 0
    for index in range(1, len(ids) + 1):
        if index == len(ids) or ids[index] != ids[index - 1] + 1 or index - start == longest:
            yield start, ids[start:index]
            start = index
