"""Reading a saved context: whole at once, or lazily, its records when a query opens them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hga.cache.layer import HGALayer
from hga.cache.saved.context import (
    Report,
    SavedContext,
    open_context,
    piece_groups,
    read_eager,
    record_checksums,
)
from hga.cache.saved.file import checksum, raw_bytes, read_into
from hga.cache.saved.fingerprint import check_same_model, model_fingerprint
from hga.cache.saved.layers import SavedLayer, Tensors, restore_dense
from hga.ops.precision import Rows
from hga.store import LazyStore, NvmeStore, SavedChunks
from hga.store.reader import PAGE_BYTES, Reader

_READ_BYTES = 16 << 20


class SavedRecords:
    """The records of one layer in an open file, in pieces numbered chunk by chunk, head by head, group by group."""

    def __init__(self, reader: Reader, context: SavedContext, index: int, checksums: Tensor) -> None:
        layout = context.layers[index].records
        assert layout is not None
        self.layout = layout
        self.chunks = context.layers[index].chunks
        self._reader = reader
        self._place = f"{context.path}, layer {index}"
        self._start = context.file.offsets[f"layers.{index}.records"]
        self._checksums = checksums
        self.piece_groups = piece_groups(layout)
        self._piece_bytes = self.piece_groups * layout.group_bytes

    def read(self, firsts: Sequence[int], targets: Sequence[memoryview]) -> None:
        """Fill each target with whole pieces from its number on, all at once. ValueError for a wrong checksum.

        OSError if the file cannot be read; after a TimeoutError drop the targets.
        """
        offsets = [self._start + first * self._piece_bytes for first in firsts]
        self._reader.read(offsets, [[target] for target in targets])
        for first, target in zip(firsts, targets, strict=True):
            self.check(first, target)

    def check(self, first: int, raw: memoryview) -> None:
        """ValueError if whole pieces from number `first` on are not what was saved."""
        size = self._piece_bytes
        expected: list[int] = self._checksums[first : first + len(raw) // size].tolist()
        for index, right in enumerate(expected):
            if checksum(raw[index * size : (index + 1) * size]) != right:
                record = (first + index) * self.piece_groups // self.layout.groups
                chunk, head = divmod(record, self.layout.kv_heads)
                raise ValueError(
                    f"{self._place}: the record of chunk {chunk}, KV head {head} is damaged (its checksum is wrong); "
                    "no token was made of it. Call cache.reset() and read the document again"
                )

    def read_chunks(self) -> Iterator[tuple[int, Tensor]]:
        """All records, some chunks (n, Hkv, G, 2, g, D) at a time, with the number of the first."""
        at_once = max(1, _READ_BYTES // self.layout.chunk_bytes)
        for first in range(0, self.chunks, at_once):
            count = min(at_once, self.chunks - first)
            records = torch.empty((count, *self.layout.shape), dtype=self.layout.dtype)
            raw = raw_bytes(records)
            read_into(self._reader, raw, self._start + first * self.layout.chunk_bytes)
            self.check(first * self.layout.chunk_bytes // self._piece_bytes, raw)
            yield first, records

    def as_chunks(self) -> SavedChunks | None:
        """The records as a store on a disk reads them straight from the file; None if pieces are no whole pages."""
        if self._piece_bytes % PAGE_BYTES:
            return None
        return SavedChunks(self._reader.file, self._start, self.chunks, self._piece_bytes, self.check)


def read_context(path: Path) -> SavedContext:
    """What a saved context is, from its header alone. Errors as `open_context`."""
    return open_context(path)[1]


def verify_context(path: Path, report: Report) -> SavedContext:
    """Read a whole file and check every checksum. ValueError that names the first thing that is damaged."""
    reader, context, table = open_context(path)
    done = len(context.file.header) + len(raw_bytes(table))
    for tensor in read_eager(reader, context, table):
        done += len(raw_bytes(tensor))
        report(done, context.size_bytes)
    for index, checksums in record_checksums(context, table).items():
        for _, records in SavedRecords(reader, context, index, checksums).read_chunks():
            done += len(raw_bytes(records))
            report(done, context.size_bytes)
    for name, spec in context.file.specs.items():
        if name.endswith(".padding"):
            padding = memoryview(bytearray(spec.size_bytes))
            read_into(reader, padding, context.file.offsets[name])
            done += len(padding)
            if any(padding):
                raise ValueError(f"{path} is damaged: {name} is not empty")
    report(done, context.size_bytes)
    return context


def load_context(
    kind: type[Any], path: Path, model: Any, store: str | None, ram_cache_bytes: int | None, report: Report
) -> Any:
    """The cache of a saved context, of class `kind`; see `HGACache.load`."""
    reader, context, table = open_context(path)
    check_same_model(context.model, model_fingerprint(model), str(path))
    config = context.config.replace(store=store or context.config.store, ram_cache_bytes=ram_cache_bytes)
    cache = kind(config=model.config, hga_config=config)
    if len(cache.layers) != len(context.layers):
        raise ValueError(f"{path} holds {len(context.layers)} layers, the model has {len(cache.layers)}")
    names = (spec.name for spec in context.eager)
    tensors = dict(zip(names, read_eager(reader, context, table), strict=True))
    checksums = record_checksums(context, table)
    done = context.size_bytes - context.record_bytes
    for index, (layer, saved) in enumerate(zip(cache.layers, context.layers, strict=True)):
        prefix, device = f"layers.{index}.", _device_of(model, index)
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        try:
            _check_fit(layer, saved)
            order = own.pop("order", None)
            own = {name: tensor.to(device) for name, tensor in own.items()}
            if not isinstance(layer, HGALayer):
                restore_dense(layer, saved, own, context.tokens)
                continue
        except ValueError as error:
            raise ValueError(f"{path}: layer {index} does not fit this model: {error}") from error
        keys, values, chunks = own["near_keys"], own["near_values"], list[int]()
        layer.lazy_initialization(keys[None], values[None])
        if saved.chunks:
            records = SavedRecords(reader, context, index, checksums[index])
            chunks = _fill_store(layer, records, order, device, whole=store is not None)
            done += saved.chunks * records.layout.chunk_bytes
        layer.restore(keys, values, chunks, _summaries(own))
        report(done, context.size_bytes)
    cache.loaded_ids = tuple(tensors["token_ids"].tolist())
    return cache


def _fill_store(
    layer: HGALayer, records: SavedRecords, order: Tensor | None, device: torch.device, whole: bool
) -> list[int]:
    """Give a layer a store that holds its chunks; returns their ids.

    Host memory is filled lazily; a disk's store reads them where they are, if it can.
    """
    ids: list[int] = []
    if layer.hga_config.store == "ram":
        lazy = LazyStore(records.layout, records.chunks, order, records.piece_groups, records.read, device)
        layer.open_store(records.layout, lazy)
        ids += range(records.chunks)
        if whole:
            lazy.fill(ids)
        return ids
    store = layer.open_store(records.layout)
    saved = records.as_chunks() if isinstance(store, NvmeStore) else None
    if isinstance(store, NvmeStore) and saved is not None:
        ids += store.adopt(saved, order)
    else:
        for first, part in records.read_chunks():
            own_order = None if order is None else order[first : first + len(part)].to(device)
            ids += store.append(part.to(device), own_order)
    return ids


def _check_fit(layer: Any, saved: SavedLayer) -> None:
    """ValueError if a layer of the file is not what the model has at its place."""
    if isinstance(layer, HGALayer) != (saved.kind == "routed"):
        raise ValueError(f"the file has one of kind {saved.kind!r}, the model a {type(layer).__name__}")
    if saved.records is not None:
        found, expected = (saved.records.kv_heads, saved.records.head_dim), (layer.shape.kv_heads, layer.shape.head_dim)
        if found != expected:
            raise ValueError(f"(Hkv, D) = {found}, the model has {expected}")


def _summaries(own: Tensors) -> dict[str, Rows]:
    names = ("node_keys", "node_values", "group_keys", "group_channels")
    return {name: Rows(own[name], own.get(f"{name}_scale")) for name in names if name in own}


def _device_of(model: Any, index: int) -> torch.device:
    """Where a layer of the model computes."""
    layers = getattr(model.get_decoder(), "layers", None)
    weight = next(layers[index].parameters(), None) if layers is not None else None
    device: torch.device = model.device if weight is None else weight.device
    return device
