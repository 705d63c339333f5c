"""Single-token steps by kernels: the rows' buffers as one layer, and what the layers of a cache share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hga.cache.routed import Scoring
from hga.cache.row import Row
from hga.cache.summaries import GrowingRows
from hga.config import HGAConfig
from hga.ops.coding import Codes
from hga.ops.decode import DecodeLayer, Scratch, SlotCache
from hga.ops.nibbles import Nibbles
from hga.ops.precision import Rows
from hga.store import Store
from hga.store.host import HostBlock, allocate_host

_COPIES_IN_FLIGHT = 64
_BROUGHT_BYTES = 1 << 20


@dataclass
class _Shared:
    """One device's counts and scratch."""

    counts: Tensor
    staged: Tensor  # (_COPIES_IN_FLIGHT, B, 4) host memory, page-locked beside a GPU
    faults: Tensor
    published: tuple[tuple[int, ...], ...] = ()
    copies: int = 0
    copied: dict[int, torch.cuda.Event] = field(default_factory=dict)
    scratches: dict[tuple[int, ...], Scratch] = field(default_factory=dict)
    brought: HostBlock | None = None


@dataclass
class Decoding:
    """What the routed layers of one cache share while they decode: counts and scratch, by device.

    active: a step is under way whose bookkeeping the cache has done; layers only launch kernels then.
    ahead_of: the step whose bookkeeping was done while the device ran the one before; None as soon as anything changes.
    generation: grows when a buffer moves, which makes captured graphs stale.
    """

    active: bool = False
    ahead_of: int | None = None
    generation: int = 0
    _shared: dict[torch.device, _Shared] = field(default_factory=dict)

    def publish(self, rows: list[Row], step: int, device: torch.device) -> None:
        """Tell the device what the next token finds, unless another layer has already."""
        shared = self._on(device, len(rows))
        numbers = tuple([(near + 1, chunks, step, 0) for near, chunks in (row.in_use() for row in rows)])
        if numbers == shared.published:
            return
        shared.published = ()  # until the copy is on its way, whatever interrupts this
        slot = shared.copies % _COPIES_IN_FLIGHT
        shared.copies += 1
        if slot in shared.copied:
            shared.copied[slot].synchronize()  # a host that runs far ahead must not overwrite what is still to be read
        shared.staged[slot].copy_(torch.tensor(numbers, dtype=torch.int32))
        shared.counts.copy_(shared.staged[slot], non_blocking=True)
        if device.type == "cuda":
            shared.copied[slot] = torch.cuda.current_stream(device).record_event()
        shared.published = numbers

    def forget_ahead(self) -> None:
        """What the next step finds has changed: its bookkeeping is to be done anew, all of it."""
        self.ahead_of = None

    def check_faults(self, device: torch.device) -> None:
        """ValueError if a kernel has met K/V that are not finite; what it found is reported once."""
        shared = self._shared.get(device)
        if shared is not None and int(shared.faults[0]):
            shared.faults.zero_()
            raise ValueError(
                "K/V of a decoded token hold NaN or infinite numbers (found after the step); what was generated "
                "since is not to be trusted. Check the weights and the dtype, then call cache.reset()"
            )

    def check_known_faults(self) -> None:
        """`check_faults` of every device, whatever is still running there."""
        for device in self._shared:
            self.check_faults(device)

    def check_all_faults(self) -> None:
        """`check_faults` of every device, when all steps so far are done there."""
        for device in self._shared:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self.check_known_faults()

    def counts(self, device: torch.device) -> Tensor:
        """The counts (B, 4) that kernels read."""
        return self._shared[device].counts

    def faults(self, device: torch.device) -> Tensor:
        """Where kernels report K/V that are not finite."""
        return self._shared[device].faults

    def scratch(
        self, config: HGAConfig, shape: tuple[int, int, int, int], chunks: int, device: torch.device
    ) -> Scratch:
        """Scratch for rows of up to `chunks` chunks; shape: B, Hkv, R, D. Layers that choose alike share it."""
        scratches, key = self._shared[device].scratches, (*shape, config.selectors(shape[2]))
        held = scratches.get(key)
        if held is None or held.chunk_capacity < chunks:
            held = scratches[key] = Scratch.allocate(config, *shape, chunks, device)
        return held

    def room_for_groups(self, size_bytes: int, device: torch.device) -> HostBlock:
        """Host memory for groups on their way to a device, page-locked for a GPU: of one layer at a time."""
        shared = self._shared[device]
        if shared.brought is None or shared.brought.bytes.numel() < size_bytes:
            # A step that needs more than any before it is seldom the last to: double, and page-lock rarely.
            room = max(_BROUGHT_BYTES, 1 << (size_bytes - 1).bit_length())
            shared.brought = allocate_host(room, device if device.type == "cuda" else None)
        return shared.brought

    def held_bytes(self) -> int:
        """Bytes of scratch beside the model."""
        return sum(scratch.held_bytes() for shared in self._shared.values() for scratch in shared.scratches.values())

    def reset(self) -> None:
        """Give everything back."""
        self._shared.clear()
        self.active = False
        self.forget_ahead()
        self.generation += 1

    def _on(self, device: torch.device, batch: int) -> _Shared:
        shared = self._shared.get(device)
        if shared is None or shared.counts.shape[0] != batch:
            pinned = device.type == "cuda"
            shared = _Shared(
                counts=torch.zeros(batch, 4, dtype=torch.int32, device=device),
                staged=torch.zeros(_COPIES_IN_FLIGHT, batch, 4, dtype=torch.int32, pin_memory=pinned),
                faults=torch.zeros(1, dtype=torch.int32, pin_memory=pinned),
            )
            self._shared[device] = shared
            self.generation += 1
        return shared


class LayerDecoder:
    """One layer's rows as the buffers that kernels read. Rows keep views of them."""

    def __init__(self, config: HGAConfig, decoding: Decoding, query_heads: int) -> None:
        self._config = config
        self._decoding = decoding
        self._query_heads = query_heads
        self._layer: DecodeLayer | None = None
        self._known: list[tuple[int, list[int]]] = []
        self._store: Store | None = None
        self._by_address = True  # kernels read the store's chunks; else groups are brought
        self._ids: list[Tensor] = []  # of the rows' chunks in the store, where they are brought
        self._brought: Tensor | None = None  # their copy, where a GPU cannot read host memory
        self._stacked: list[tuple[Tensor, Tensor]] = []  # what the rows held when they were stacked

    def prepare(self, rows: list[Row], step: int) -> None:
        """Bring counts, buffers and addresses up to date for the token after those that the rows count."""
        device = rows[0].device
        self._decoding.publish(rows, step, device)
        if self._layer is None or not self._holds(rows):
            self._layer = self._stack(rows)
            self._stacked = [row.moving_buffers() for row in rows]
            self._known = [(row.archive.reopenings, []) for row in rows]
            self._ids = [torch.empty(0, dtype=torch.int64)] * len(rows)
            self._decoding.generation += 1
        self._store = rows[0].archive.store
        if self._store.gpu_readable != self._by_address:
            self._by_address = self._store.gpu_readable
            self._known = [(reopenings, []) for reopenings, _ in self._known]  # chunks are to be found again
        for index, row in enumerate(rows):
            archive, (reopenings, chunks) = row.archive, self._known[index]
            if archive.reopenings != reopenings:
                self._layer.slots.forget()
            if self._by_address and archive.chunks is not chunks:
                addresses = archive.addresses()
                self._layer.addresses[index, : len(addresses)] = addresses.to(device, non_blocking=True)
            elif archive.chunks is not chunks:
                self._ids[index] = torch.tensor(archive.chunks, dtype=torch.int64)
            self._known[index] = (archive.reopenings, archive.chunks)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
        """Attention (B, Hq, 1, D) of a prepared token whose K/V are (B, Hkv, 1, D)."""
        from hga.ops.kernels.decode import attend_decode  # Triton is optional

        assert self._layer is not None
        counts = self._decoding.counts(query.device)
        rule = (self._config, scoring.scale, scoring.softcap, scoring.sinks)
        bring = None if self._by_address else self._bring
        try:
            return attend_decode(query, keys, values, self._layer, counts, *rule, bring)
        except BaseException:
            if bring is not None:  # the disk failed, or an interrupt came: nothing was copied to slots assigned before
                self.forget()
            raise

    def _bring(self, counts: Tensor, groups: Tensor) -> Tensor:
        """See `hga.ops.decode.Bring`: the groups of all rows and heads by one request to the store."""
        assert self._layer is not None
        assert self._store is not None
        layout, device = self._store.layout, self._layer.addresses.device
        problem, at = (torch.arange(groups.shape[1]) < counts[:, None]).nonzero(as_tuple=True)
        group, row = groups[problem, at].long(), problem // layout.kv_heads
        ids = torch.empty_like(group)
        for index, chunks in enumerate(self._ids):
            own = row == index
            ids[own] = chunks[group[own] // layout.groups]
        block = self._decoding.room_for_groups(len(group) * layout.group_bytes, device)
        raw = block.bytes[: len(group) * layout.group_bytes]
        out = raw.view(layout.dtype).view(-1, *layout.shape[2:])
        self._store.collect(ids, problem % layout.kv_heads, group % layout.groups, out)
        if device.type == "cuda" and not block.gpu_readable:
            raw = self._brought = raw.to(device)
        return (raw.data_ptr() + (counts.cumsum(0) - counts) * layout.group_bytes).to(device, non_blocking=True)

    def forget(self) -> None:
        """Empty the cache of groups."""
        if self._layer is not None:
            self._layer.slots.forget()

    def cached_bytes(self) -> int:
        """Bytes of cached groups and their tables."""
        return 0 if self._layer is None else self._layer.slots.held_bytes()

    def traffic(self) -> tuple[int, int, int]:
        """Hits, misses and unique groups since the layer was stacked. Waits for the device."""
        if self._layer is None:
            return 0, 0, 0
        hits, misses, unique = self._layer.slots.traffic.sum(0).tolist()
        return hits, misses, unique

    def _holds(self, rows: list[Row]) -> bool:
        """Whether the rows still hold the very views that were stacked."""
        return len(rows) == len(self._stacked) and all(
            row.holds(near, nodes) for row, (near, nodes) in zip(rows, self._stacked, strict=True)
        )

    def _stack(self, rows: list[Row]) -> DecodeLayer:
        near = [_stack_grown([row.near_buffers()[side] for row in rows]) for side in range(2)]
        for index, row in enumerate(rows):
            row.move_near(near[0][index], near[1][index])
        node_values: Rows | Nibbles | None
        group_keys: Rows | Codes | None
        node_keys, node_values, group_keys = (
            _stack_summaries([getattr(row.archive.summaries, name) for row in rows])
            for name in ("node_keys", "node_values", "group_keys")
        )
        assert node_keys is not None
        if self._config.coded:
            channels = _stack_summaries([row.archive.summaries.group_channels for row in rows])
            assert group_keys is not None
            assert group_keys.scale is not None
            assert channels is not None
            group_keys = Codes(group_keys.data, group_keys.scale, channels.data)
            if node_values is not None:
                assert node_values.scale is not None
                node_values = Nibbles(node_values.data, node_values.scale)
        batch, kv_heads, _, width = near[0].shape
        chunks = node_keys.data.shape[2] * self._config.node_size // self._config.chunk_size
        device, repeats = near[0].device, self._query_heads // kv_heads
        return DecodeLayer(
            near_keys=near[0],
            near_values=near[1],
            node_keys=node_keys,
            node_values=node_values,
            group_keys=group_keys,
            addresses=torch.zeros(batch, chunks, dtype=torch.int64, device=device),
            slots=SlotCache.allocate(self._config, batch * kv_heads, repeats, chunks, near[0]),
            scratch=self._decoding.scratch(self._config, (batch, kv_heads, repeats, width), chunks, device),
            faults=self._decoding.faults(device),
        )


def _stack_summaries(rows: list[GrowingRows]) -> Rows | None:
    """One buffer (B, Hkv, capacity, D) that the rows' buffers become views of; None where nothing is kept."""
    if not rows[0].length:
        return None
    held = [row.buffers for row in rows]
    data = _stack_grown([one.data for one in held])
    scales = [one.scale for one in held if one.scale is not None]
    scale = _stack_grown(scales) if scales else None
    for index, row in enumerate(rows):
        row.move_to(Rows(data[index], None if scale is None else scale[index]))
    return Rows(data, scale)


def _stack_grown(buffers: list[Tensor]) -> Tensor:
    """Buffers (Hkv, capacity, ...) of several capacities as one (B, Hkv, largest, ...); no copy for a single row."""
    if len(buffers) == 1:
        return buffers[0][None]
    heads, _, width = buffers[0].shape
    stacked = buffers[0].new_empty(len(buffers), heads, max(x.shape[1] for x in buffers), width)
    for index, buffer in enumerate(buffers):
        stacked[index, :, : buffer.shape[1]] = buffer
    return stacked
