"""Writing a cache to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hga.cache.layer import HGALayer
from hga.cache.saved.context import Report, SavedContext, describe_context, piece_groups, record_checksums, seal
from hga.cache.saved.file import checksum, raw_bytes, replacing, write_at
from hga.cache.saved.fingerprint import model_fingerprint
from hga.cache.saved.layers import dense_tensors, describe, routed_tensors
from hga.store import Store

_STAGED_BYTES = 32 << 20


def save_context(
    cache: Any, path: Path, model: Any, token_ids: Tensor | Sequence[int], suffix: str, report: Report
) -> SavedContext:
    """Save a cache and the ids of its tokens; see `HGACache.save`."""
    ids = torch.as_tensor(token_ids).detach().to("cpu", torch.int64)
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    held = cache.get_seq_length()
    if ids.ndim != 1 or ids.numel() != held:
        raise ValueError(
            f"token_ids of shape {tuple(ids.shape)} are not those of this cache, which holds {held} tokens of one "
            "sequence; give the ids that it has read, in order"
        )
    if not held:
        raise ValueError("an empty cache cannot be saved; let the model read something first")
    cache.check_model(model.config)
    layers = [describe(layer, cache.hga_config) for layer in cache.layers]
    if any(row.length != held for layer in cache.routed for row in layer.rows):
        raise ValueError("a cache whose row holds padding cannot be saved; read the sequence without padding")
    config = cache.hga_config.replace(ram_cache_bytes=None)  # that is this machine's matter
    context = describe_context(path, ids, config, model_fingerprint(model), suffix, layers)
    with replacing(path, context.size_bytes) as descriptor:
        _Writer(descriptor, context, report).write(cache, ids)
    return context


class _Writer:
    """Writes a context's parts to their places, and notes their checksums."""

    def __init__(self, descriptor: int, context: SavedContext, report: Report) -> None:
        self._descriptor = descriptor
        self._context = context
        self._report = report
        self._table = torch.zeros(context.file.specs["checksums"].shape, dtype=torch.int64)
        self._written = 0

    def write(self, cache: Any, ids: Tensor) -> None:
        """Everything, the header last: without it a file is nothing."""
        context, table = self._context, self._table
        checksums = record_checksums(context, table)
        tensors: dict[str, Tensor] = {"token_ids": ids}
        for index, layer in enumerate(cache.layers):
            own = routed_tensors(layer) if isinstance(layer, HGALayer) else dense_tensors(layer)
            if isinstance(layer, HGALayer) and layer.rows[0].chunks:
                archive = layer.rows[0].archive
                place = context.file.offsets[f"layers.{index}.records"]
                order = self._write_records(archive.store, archive.chunks, place, checksums[index])
                own |= {} if order is None else {"order": order}
            tensors |= {f"layers.{index}.{name}": tensor for name, tensor in own.items()}
        for index, spec in enumerate(context.eager):
            raw = raw_bytes(tensors[spec.name].to("cpu").contiguous())
            table[1 + index] = checksum(raw)
            self._put(raw, context.file.offsets[spec.name])
        table[0] = seal(context, table)
        self._put(raw_bytes(table), context.file.offsets["checksums"])
        self._put(memoryview(context.file.header), 0)

    def _write_records(self, store: Store, chunks: list[int], place: int, checksums: Tensor) -> Tensor | None:
        """Records of a layer, some at a time; returns the permutations."""
        layout, orders = store.layout, []
        at_once = max(1, _STAGED_BYTES // layout.chunk_bytes)
        size = piece_groups(layout) * layout.group_bytes
        done = 0
        for first in range(0, len(chunks), at_once):
            records, order = store.read(chunks[first : first + at_once], torch.device("cpu"))
            raw = raw_bytes(records.contiguous())
            found = [checksum(raw[start : start + size]) for start in range(0, len(raw), size)]
            checksums[done : done + len(found)] = torch.tensor(found, dtype=torch.int64)
            done += len(found)
            self._put(raw, place + first * layout.chunk_bytes)
            if order is not None:
                orders.append(order.to(torch.int16))
        return torch.cat(orders) if orders else None

    def _put(self, raw: memoryview, offset: int) -> None:
        write_at(self._descriptor, raw, offset)
        self._written += len(raw)
        self._report(self._written, self._context.size_bytes)
