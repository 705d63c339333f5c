"""The summaries of one row's archive, kept beside the model and growing with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hga.config import HGAConfig
from hga.ops.closing import Closed
from hga.ops.precision import Rows, decode_rows
from hga.ops.routing import take_rows

DECODED_AT_ONCE = 2048  # rows a KV head: a block that a CPU's cache holds
_GROWTH = 8  # capacity grows by an eighth: little slack, few copies


class GrowingRows:
    """Encoded rows (Hkv, n, D) that grow at the end and can be cut there."""

    def __init__(self) -> None:
        self._data: Tensor | None = None
        self._scale: Tensor | None = None
        self.length = 0

    def append(self, rows: Rows) -> None:
        """Keep encoded rows (Hkv, n, D); all appended rows are of one type."""
        end = self.length + rows.data.shape[1]
        self._data = _grown(self._data, rows.data, self.length)
        self._data[:, self.length : end] = rows.data
        if rows.scale is not None:
            self._scale = _grown(self._scale, rows.scale, self.length)
            self._scale[:, self.length : end] = rows.scale
        self.length = end

    def truncate(self, length: int) -> None:
        """Forget all rows but the first `length`."""
        self.length = min(self.length, length)

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """All rows as `dtype`, (Hkv, some, D) at a time: the decoded copy stays small whatever the context."""
        data, scale = self._held(), self._scale
        for start in range(0, self.length, DECODED_AT_ONCE):
            here = slice(start, min(self.length, start + DECODED_AT_ONCE))
            yield decode_rows(Rows(data[:, here], None if scale is None else scale[:, here]), dtype)

    def decode_units(self, ids: Tensor, unit: int, dtype: torch.dtype) -> Tensor:
        """The rows of units of `unit` consecutive rows: ids (Hkv, U) -> (Hkv, U * unit, D) as `dtype`."""
        rows = (ids[..., None] * unit + torch.arange(unit, device=ids.device)).flatten(1)  # (Hkv, U * unit)
        # From the whole buffers: cutting the slack off first would copy all rows to reach a few.
        scale = None if self._scale is None else take_rows(self._scale, rows)
        return decode_rows(Rows(take_rows(self._held(), rows), scale), dtype)

    def held(self) -> Rows:
        """The encoded rows in use (Hkv, n, D)."""
        data, scale = self.buffers
        return Rows(data[:, : self.length], None if scale is None else scale[:, : self.length])

    @property
    def buffers(self) -> Rows:
        """The whole buffers (Hkv, capacity, D), what is not in use included."""
        return Rows(self._held(), self._scale)

    def move_to(self, buffers: Rows) -> None:
        """Live in other buffers, which hold the same rows."""
        self._data, self._scale = buffers

    def clone(self) -> GrowingRows:
        """An independent copy."""
        twin = GrowingRows()
        twin.length = self.length
        twin._data = None if self._data is None else self._data[:, : self.length].clone()
        twin._scale = None if self._scale is None else self._scale[:, : self.length].clone()
        return twin

    def held_bytes(self) -> int:
        """Bytes allocated, growth slack included."""
        return sum(x.numel() * x.element_size() for x in (self._data, self._scale) if x is not None)

    def _held(self) -> Tensor:
        if self._data is None:
            raise ValueError("no rows yet: a chunk has to close before its summaries can be read")
        return self._data


def _grown(buffer: Tensor | None, like: Tensor, length: int) -> Tensor:
    """A buffer with room for `like` behind `length` rows; the old one where it is large enough."""
    heads, added, width = like.shape
    need = length + added
    if buffer is not None and buffer.shape[1] >= need:
        return buffer
    grown = like.new_empty(heads, need + need // _GROWTH, width)
    if buffer is not None:
        grown[:, :length] = buffer[:, :length]
    return grown


class Summaries:
    """Group keys, node keys and (with a far field) node values of one row's closed chunks.

    With one level (overselection "all") nodes *are* groups, and there are no separate group keys. Values are
    kept a node, not a group: measured to cost nothing, at half the bytes (docs/fidelity.md).
    """

    def __init__(self, config: HGAConfig) -> None:
        self._config = config
        self.node_keys = GrowingRows()
        self.node_values = GrowingRows()
        self.group_keys = GrowingRows()
        self.chunks = 0

    def append(self, closed: Closed) -> None:
        """Keep the summaries of closed chunks."""
        self.node_keys.append(closed.node_keys)
        if closed.node_values is not None:
            self.node_values.append(closed.node_values)
        if closed.group_keys is not None:
            self.group_keys.append(closed.group_keys)
        self.chunks += closed.records.shape[0]

    def truncate(self, chunks: int) -> None:
        """Forget all chunks but the first `chunks`."""
        tokens = chunks * self._config.chunk_size
        self.node_keys.truncate(tokens // self._config.node_size)
        self.node_values.truncate(tokens // self._config.node_size)
        self.group_keys.truncate(tokens // self._config.group_size)
        self.chunks = min(self.chunks, chunks)

    def clone(self) -> Summaries:
        """An independent copy, for a beam that goes its own way."""
        twin = object.__new__(Summaries)
        twin.__dict__.update(self.__dict__)
        twin.node_keys, twin.node_values, twin.group_keys = (
            rows.clone() for rows in (self.node_keys, self.node_values, self.group_keys)
        )
        return twin

    def held_bytes(self) -> int:
        """Bytes beside the model."""
        return sum(rows.held_bytes() for rows in (self.node_keys, self.node_values, self.group_keys))
