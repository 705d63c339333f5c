"""A saved context as its file describes it: read, checked and measured without a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from hga.cache.saved.file import (
    FileLayout,
    Spec,
    checksum,
    lay_out,
    open_to_read,
    raw_bytes,
    read_header,
    read_into,
)
from hga.cache.saved.layers import SavedLayer, named
from hga.config import HGAConfig
from hga.store import RecordLayout
from hga.store.reader import PAGE_BYTES, Reader

FORMAT = "hga-context"
VERSION = 3

_PIECE_BYTES = 8192  # a group of 4 tokens is 2 KiB, in a record of 128 KiB: a question needs few of them

Report = Callable[[int, int], object]
"""Called with the bytes done so far, and those there are."""


@dataclass(frozen=True)
class SavedContext:
    """What a saved context is. tokens: how many it holds; model: the fingerprint of the model that read them; suffix:
    text that has to stand between a question about it and the answer.

    size_bytes: of the file; record_bytes: of the archive's K/V in it, which are read when they are needed.
    """

    path: Path
    tokens: int
    token_ids_xxh3: str
    config: HGAConfig
    model: dict[str, Any]
    suffix: str
    layers: tuple[SavedLayer, ...] = field(repr=False)
    file: FileLayout = field(repr=False)

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return self.file.size_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of the archive's K/V."""
        return sum(spec.size_bytes for name, spec in self.file.specs.items() if name.endswith(".records"))

    @property
    def record_count(self) -> int:
        """Records: one a routed layer, chunk and KV head."""
        return sum(layer.chunks * layer.records.kv_heads for layer in self.layers if layer.records is not None)

    @property
    def eager(self) -> list[Spec]:
        """The tensors that are read and checked as a whole when a context is loaded."""
        names = ("records", "padding")
        return [s for s in self.file.specs.values() if s.name != "checksums" and s.name.split(".")[-1] not in names]


def describe_context(
    path: Path, ids: Tensor, config: HGAConfig, model: dict[str, Any], suffix: str, layers: Sequence[SavedLayer]
) -> SavedContext:
    """The context that a file of these contents is."""
    return _assemble(path, ids.numel(), hash_ids(ids), config, config.to_json(), model, suffix, tuple(layers))


def open_context(path: Path) -> tuple[Reader, SavedContext, Tensor]:
    """What reads a saved context, what it is, and its checked table of checksums, int64.

    Only the header and the table are read. ValueError, with what is wrong, for a file that is no saved context, of a
    newer format, damaged or cut off; TimeoutError for a disk that hangs.
    """
    reader = open_to_read(path)
    header, metadata = read_header(reader)
    context = _parse(path, metadata)
    found = os.fstat(reader.file.descriptor).st_size
    if context.file.size_bytes != found:
        raise ValueError(
            f"{path} has {found:,} bytes and should have {context.file.size_bytes:,}: it was cut off or damaged"
        )
    if context.file.header != header:
        raise ValueError(f"{path} is damaged: its header does not follow from its metadata")
    table = torch.empty(context.file.specs["checksums"].shape, dtype=torch.int64)
    read_into(reader, raw_bytes(table), context.file.offsets["checksums"])
    if seal(context, table) != int(table[0]):
        raise ValueError(f"{path} is damaged: the checksum of its header and table of checksums is wrong")
    return reader, context, table


def read_eager(reader: Reader, context: SavedContext, table: Tensor) -> Iterator[Tensor]:
    """The tensors of `context.eager`, each checked. ValueError for a wrong checksum."""
    for index, spec in enumerate(context.eager):
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        raw = raw_bytes(tensor)
        read_into(reader, raw, context.file.offsets[spec.name])
        if checksum(raw) != int(table[1 + index]):
            raise ValueError(f"{context.path} is damaged: the checksum of {spec.name} is wrong")
        yield tensor


def record_checksums(context: SavedContext, table: Tensor) -> dict[int, Tensor]:
    """Checksums of the records' pieces, flat, by layer that has records."""
    found, start = {}, 1 + len(context.eager)
    for index, layer in enumerate(context.layers):
        if layer.chunks:
            found[index] = table[start : start + _piece_count(layer)]
            start += len(found[index])
    return found


def piece_groups(layout: RecordLayout) -> int:
    """Groups of a record that are checked, and read, together: as many as divide it and fill 8 KiB."""
    most = max(1, _PIECE_BYTES // layout.group_bytes)
    return next(groups for groups in range(min(most, layout.groups), 0, -1) if layout.groups % groups == 0)


def _piece_count(layer: SavedLayer) -> int:
    """Pieces of a layer's records; each has a checksum."""
    layout = layer.records
    return 0 if layout is None else layer.chunks * layout.kv_heads * layout.groups // piece_groups(layout)


def seal(context: SavedContext, table: Tensor) -> int:
    """The checksum of a file's header and of all other checksums."""
    return checksum(context.file.header, raw_bytes(table[1:]))


def hash_ids(ids: Tensor) -> str:
    """The hash by which two contexts of the same tokens are known."""
    return xxhash.xxh3_128_hexdigest(raw_bytes(ids.contiguous()))


def _assemble(
    path: Path,
    tokens: int,
    ids_hash: str,
    config: HGAConfig,
    config_text: str,
    model: dict[str, Any],
    suffix: str,
    layers: tuple[SavedLayer, ...],
) -> SavedContext:
    """config_text: as the file has it, which lacks the fields that HGAConfig did not have when it was written."""
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "config": config_text,
        "model": json.dumps(model, sort_keys=True),
        "layers": json.dumps([layer.to_json() for layer in layers]),
        "tokens": str(tokens),
        "token_ids_xxh3": ids_hash,
        "suffix": suffix,
    }
    records: list[Spec] = []
    for index, layer in enumerate(layers):
        if layer.records is not None and layer.chunks:
            spec = Spec(f"layers.{index}.records", layer.records.dtype, (layer.chunks, *layer.records.shape))
            records.append(spec)
            if padding := -spec.size_bytes % PAGE_BYTES:
                records.append(Spec(f"layers.{index}.padding", torch.uint8, (padding,)))
    eager = [Spec("token_ids", torch.int64, (tokens,)), *(spec for _, _, spec in named(layers))]
    eager.append(Spec("checksums", torch.int64, (1 + len(eager) + sum(map(_piece_count, layers)),)))
    # Wide numbers first: then each tensor starts at a multiple of its width, as readers of safetensors expect.
    eager.sort(key=lambda spec: -spec.dtype.itemsize)
    return SavedContext(path, tokens, ids_hash, config, model, suffix, layers, lay_out(metadata, [*records, *eager]))


def _parse(path: Path, metadata: dict[str, str]) -> SavedContext:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but no saved context of hga")
    version = metadata.get("format_version", "")
    if version != str(VERSION):
        if version.isdecimal() and len(version) < 10 and int(version) > VERSION:
            raise ValueError(f"{path} has format version {version}, this hga reads {VERSION}; it needs a newer hga")
        raise ValueError(
            f"{path} has format version {version[:20]!r}, this hga reads {VERSION}; an older hga wrote it: read the "
            "document again with `hga context save`"
        )
    try:
        config = HGAConfig.from_json(metadata["config"])
        tokens = int(metadata["tokens"])
        fields = json.loads(metadata["layers"])
        layers = tuple(SavedLayer.from_json(layer, config, tokens) for layer in fields)
        model = json.loads(metadata["model"])
        if not isinstance(model, dict):
            raise ValueError("its model is not described")
        return _assemble(
            path,
            tokens,
            metadata["token_ids_xxh3"],
            config,
            metadata["config"],
            model,
            metadata["suffix"],
            layers,
        )
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        cause = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is damaged: its metadata cannot be read ({cause[:200]})") from error
