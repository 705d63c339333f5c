"""Chunks on a scratch file, with a bounded cache in host memory over it."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Any, NoReturn

import torch
from torch import Tensor

from hga.store.cached_pieces import CachedPieces, Deliver
from hga.store.extents import fit_piece, runs
from hga.store.host import allocate_host, check_host_room
from hga.store.locking import alone
from hga.store.piece_files import PieceFiles
from hga.store.pieces import take_rows
from hga.store.reader import DEADLINE_SECONDS, OpenFile, Preadv, Reader
from hga.store.record import RecordLayout, check_records
from hga.store.saved import SavedChunks
from hga.store.scratch import Pwritev, WriteBehind, open_scratch, reserve
from hga.store.staging import STAGED_BYTES, borrow
from hga.store.traffic import Traffic

_FIRST_CHUNKS = 16
_GROWTH = 4  # the file grows by a quarter
_LARGEST_GROWTH_BYTES = 256 << 20


class NvmeStore:
    """A `Store` on a nameless scratch file, which every chunk is written to behind the caller's work.

    ram_cache_bytes bound the cache over it (at least one piece). With `spill` nothing is written until the archive
    outgrows the cache: then all of it is, and from there on every chunk. Permutations stay in host memory. The first
    chunks may be those of a saved file, which are read there, checked each time, and never written.

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
        self._ram_cache_bytes = ram_cache_bytes
        self._abandoned: deque[int] = deque()
        self.lock = threading.RLock()
        check_host_room(ram_cache_bytes, "a layer's RAM cache of its archive (ram_cache_bytes)")
        self._empty()

    def _cut(self, piece_bytes: int, saved: SavedChunks | None = None) -> None:
        """Read and cache pieces of this size, the first ones from a saved file."""
        self._piece_bytes = piece_bytes
        self._per_chunk = -(-self._chunk_bytes // piece_bytes)  # the last may be padded
        slots = max(1, self._ram_cache_bytes // piece_bytes)
        reader = None if saved is None else Reader(saved.file, self.traffic, **self._faults)
        self._files = PieceFiles(piece_bytes, self._per_chunk, saved, reader)
        self._cached = CachedPieces(self._files, piece_bytes, self._per_chunk, slots, self.traffic)

    def _empty(self) -> None:
        """Hold nothing, and no resource but the cache's address space."""
        self._holders: dict[int, int] = {}
        self._free: list[int] = []  # descending
        self._capacity = 0
        self._cut(fit_piece(self._group_bytes, self._chunk_bytes))
        self._order = torch.empty(0, self.layout.kv_heads, self.layout.tokens, dtype=torch.int16)
        self._file_chunks = 0

    @alone
    def adopt(self, saved: SavedChunks, order: Tensor | None) -> list[int]:
        """Be, from empty, a store of a saved file's chunks; returns their ids, each retained once.

        order: their permutations (n, Hkv, C) int16. Nothing is read before it is asked for. What is appended goes to a
        scratch file.
        """
        self.release([])
        if self._holders:
            raise ValueError(f"a store that holds {len(self._holders)} chunks cannot adopt a saved file's")
        self._cut(saved.piece_bytes, saved)
        self._capacity = saved.chunks
        self._cached.grow(self._capacity)
        if order is not None:
            self._order = order.clone()
        ids = list(range(saved.chunks))
        self._holders = dict.fromkeys(ids, 1)
        return ids

    # ---- the protocol --------------------------------------------------------------------------------

    @alone
    def append(self, records: Tensor, order: Tensor | None) -> list[int]:
        """See `Store.append`. OSError when the disk has no room, or an earlier write behind the caller failed."""
        self.release([])
        check_records(self.layout, records, order)
        writer = self._files.writer
        if writer is not None and writer.error is not None:
            error = writer.error
            raise OSError(error.errno, error.strerror)  # a kept one would keep the frames that it passes
        count = len(records)
        grown = self._capacity + max(0, count - len(self._free))
        if writer is not None:
            self._reserve(writer.file, grown)
        elif not self._stays_in_ram(count):
            self._open_file(grown)
        self._grow(grown)
        ids = self._free[len(self._free) - count :][::-1]
        data = records.detach().to("cpu").contiguous()
        try:
            for first, run in runs(ids, self._at_once):
                self._keep(run, data[first : first + len(run)])
        except BaseException:  # a queue that does not move, or no memory: nothing is kept
            self._cached.drop(ids)
            raise
        if order is not None:
            self._order[ids] = order.to("cpu")
        del self._free[len(self._free) - count :]
        self._holders.update(dict.fromkeys(ids, 1))
        return ids

    @alone
    def read(self, ids: list[int], device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Store.read`."""
        target = torch.device("cpu") if device is None else device
        records = torch.empty((len(ids), *self.layout.shape), dtype=self.layout.dtype, device=target)
        self.stage(ids, records)
        return records, self._order[ids].long().to(target) if self.layout.ordered else None

    @alone
    def stage(self, ids: list[int], out: Tensor) -> None:
        """See `Store.stage`. By way of page-aligned memory, page-locked for a GPU; the cache is left as it is."""
        for chunk in ids:
            self._held(chunk)
        if not ids:
            return
        at_once = min(self._at_once, len(ids))
        with borrow(at_once * self._stride, out.device if out.device.type == "cuda" else None) as block:
            staging = block.bytes[: at_once * self._stride].view(-1, self._stride)
            for start in range(0, len(ids), at_once):
                part = ids[start : start + at_once]
                self._cached.gather(part, staging.numpy())
                rows = staging[: len(part), : self._chunk_bytes].contiguous()
                out[start : start + len(part)].copy_(rows.view(self.layout.dtype).view(len(part), *self.layout.shape))

    @alone
    def fetch(self, ids: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """See `Store.fetch`. All heads are one batch, as long as the cache holds it."""
        layout, half = self.layout, self._group_bytes // 2
        shape = (*groups.shape, layout.group_size, layout.head_dim)
        keys, values = (torch.empty(shape, dtype=layout.dtype) for _ in range(2))
        to_keys, to_values = (x.view(-1).view(torch.uint8).view(-1, half).numpy() for x in (keys, values))

        def deliver(part: slice, pieces: Any, piece: Any, row: Any) -> None:
            take_rows(pieces, piece, 2 * row, to_keys[part])  # K and V of a group are neighbours
            take_rows(pieces, piece, 2 * row + 1, to_values[part])

        self._bring(ids.cpu(), torch.arange(layout.kv_heads)[:, None], groups.cpu(), deliver)
        return keys, values

    @alone
    def collect(self, ids: Tensor, heads: Tensor, groups: Tensor, out: Tensor) -> None:
        """See `Store.collect`. One batch, as long as the cache holds it."""
        target: Any = out.view(-1).view(torch.uint8).view(-1, self._group_bytes).numpy()

        def deliver(part: slice, pieces: Any, piece: Any, row: Any) -> None:
            take_rows(pieces, piece, row, target[part])

        self._bring(ids, heads, groups, deliver)

    def addresses(self, ids: list[int]) -> NoReturn:
        """TypeError: records on a file have no address; kernels ask `gpu_readable` first."""
        raise TypeError("chunks on NVMe have no address in memory; read, stage or fetch them")

    def wait(self) -> None:
        """See `Store.wait`. Copies from a GPU are done when `append` returns."""

    @property
    def gpu_readable(self) -> bool:
        """See `Store.gpu_readable`."""
        return False

    @property
    def waits(self) -> bool:
        """See `Store.waits`."""
        return True

    @alone
    def retain(self, ids: list[int]) -> None:
        """See `Store.retain`."""
        for chunk in ids:
            self._holders[self._held(chunk)] += 1

    @alone
    def release(self, ids: list[int]) -> None:
        """See `Store.release`. With the last chunk the file goes."""
        for chunk in (*(self._abandoned.popleft() for _ in range(len(self._abandoned))), *ids):
            self._holders[self._held(chunk)] -= 1
            if not self._holders[chunk]:
                del self._holders[chunk]
                if chunk >= self._files.first_own:  # a saved file's place cannot be written to
                    self._free.append(chunk)
                self._cached.drop([chunk])
        self._free.sort(reverse=True)
        if not self._holders and self._capacity:
            self._files.cancel()
            self._empty()

    def abandon(self, ids: list[int]) -> None:
        """`release` for a finalizer, which may run in the middle of any call: it takes effect at a later one."""
        self._abandoned.extend(ids)

    @alone
    def held_bytes(self) -> dict[str, int]:
        """See `Store.held_bytes`. What the RAM cache holds besides is not counted twice."""
        self.release([])
        held = len(self._holders)
        order_bytes = held * self.layout.order_bytes
        if self._files.writer is None and self._files.saved is None:
            return {"ram": held * self._chunk_bytes + order_bytes}
        return {"nvme": held * self._chunk_bytes, "ram": order_bytes}

    def allocated_bytes(self) -> dict[str, int]:
        """See `Store.allocated_bytes`: the files; the cache, permutations and what waits to be written."""
        ram = self._cached.cache.held_bytes + self._order.nbytes + self.traffic.queued_bytes
        return {"nvme": (self._files.first_own + self._file_chunks) * self._stride, "ram": ram}

    @alone
    def scratch_growth_bytes(self, chunks: int) -> int:
        """Bytes that the scratch file will take for so many chunks more, beyond what it has reserved."""
        self.release([])
        if self._files.writer is None and self._stays_in_ram(chunks):
            return 0
        wanted = self._capacity - self._files.first_own + max(0, chunks - len(self._free))
        return max(0, wanted - self._file_chunks) * self._stride

    def __del__(self) -> None:
        files: PieceFiles | None = getattr(self, "_files", None)  # an error in __init__ leaves none
        if files is not None:
            files.cancel()

    # ---- keeping -------------------------------------------------------------------------------------

    @property
    def _stride(self) -> int:
        """Bytes from one chunk to the next in the file."""
        return self._per_chunk * self._piece_bytes

    @property
    def _at_once(self) -> int:
        """Chunks that are written or staged at once."""
        return max(1, STAGED_BYTES // self._stride)

    def _stays_in_ram(self, chunks: int) -> bool:
        """Whether so many chunks more, without a file yet, need none: reading saved chunks would push them out."""
        return self._spill and self._files.saved is None and chunks * self._per_chunk <= self._cached.cache.free

    def _grow(self, chunks: int) -> None:
        """Make ids below `chunks` known; what can run out of memory comes first."""
        if (added := chunks - self._capacity) <= 0:
            return
        if self.layout.ordered and len(self._order) < chunks:
            room = max(chunks, len(self._order) + len(self._order) // _GROWTH, _FIRST_CHUNKS)
            grown = torch.empty(room, *self._order.shape[1:], dtype=torch.int16)
            grown[: len(self._order)] = self._order
            self._order = grown
        self._cached.grow(chunks)
        self._free[:0] = range(chunks - 1, chunks - 1 - added, -1)
        self._capacity = chunks

    def _open_file(self, chunks: int) -> None:
        """Make the scratch file with room for chunks, and send everything that only the cache holds to it."""
        file = open_scratch()
        self._reserve(file, chunks)
        writer = WriteBehind(file, self.traffic, pwritev=self._pwritev)
        try:
            own = sorted(chunk for chunk in self._holders if chunk >= self._files.first_own)
            for _, run in runs(own, self._at_once):
                block = allocate_host(len(run) * self._stride)
                self._cached.gather(run, block.bytes.view(len(run), self._stride).numpy())
                writer.put(run, block, self._files.place(run[0]))
        except BaseException:  # the cache still holds everything
            writer.cancel()
            self._file_chunks = 0
            raise
        self._files.writer, self._files.reader = writer, Reader(file, self.traffic, **self._faults)

    def _reserve(self, file: OpenFile, chunks: int) -> None:
        """Reserve room on the disk for ids below `chunks`, with some to spare where there is more."""
        held, stride = self._file_chunks, self._stride
        chunks -= self._files.first_own
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
        self._cached.keep(ids, padded)
        if self._files.writer is not None:
            self._files.writer.put(ids, block, self._files.place(ids[0]))

    # ---- bringing ------------------------------------------------------------------------------------

    def _bring(self, ids: Tensor, heads: Tensor, groups: Tensor, deliver: Deliver) -> None:
        """Bring groups, indices that broadcast, and deliver them in parts: the first while others are read."""
        per_piece = self._piece_bytes // self._group_bytes
        index: Any = (heads * self.layout.groups + groups).numpy()  # in the chunk
        wanted = ids.numpy() * self._per_chunk + index // per_piece
        self._cached.bring(wanted.ravel(), (index % per_piece).ravel(), deliver)

    def _held(self, chunk: int) -> int:
        if chunk not in self._holders:
            raise KeyError(f"chunk {chunk} is not held by this store; it was released or never appended")
        return chunk
