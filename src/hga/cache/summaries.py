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
    """Encoded rows (Hkv, n, D) that grow at the end, by whole units of `unit` rows, and can be cut there."""

    def __init__(self, unit: int = 1) -> None:
        self._unit = unit
        self._data: Tensor | None = None
        self._scale: Tensor | None = None
        self._shared = False
        self.length = 0

    def append(self, rows: Rows) -> None:
        """Keep encoded rows (Hkv, n, D); all appended rows are of one type."""
        end = self.length + rows.data.shape[1]
        data = self._grown(self._data, rows.data)
        scale = None if rows.scale is None else self._grown(self._scale, rows.scale)
        self._data, self._scale, self._shared = data, scale, False  # all or, without memory for one, none
        data[:, self.length : end] = rows.data
        if rows.scale is not None and scale is not None:
            scale[:, self.length : end] = rows.scale
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

    def decode_units(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of units: ids (Hkv, U) -> (Hkv, U * unit, D) as `dtype`."""
        # From the whole buffers, whose capacity is a number of units: cutting the slack off would copy all rows.
        data, scale = self._held().unflatten(1, (-1, self._unit)), self._scale  # (Hkv, capacity / unit, unit, D)
        if scale is not None:
            scale = take_rows(scale.unflatten(1, (-1, self._unit)), ids)
        return decode_rows(Rows(take_rows(data, ids), scale), dtype).flatten(1, 2)

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
        self._shared = self._shared and buffers.data.data_ptr() == self._held().data_ptr()
        self._data, self._scale = buffers

    def fork(self) -> GrowingRows:
        """A twin. Both use one buffer until they append, which makes them copy it first."""
        self._shared = True
        twin = object.__new__(GrowingRows)
        twin.__dict__.update(self.__dict__)
        return twin

    def held_bytes(self) -> int:
        """Bytes allocated, growth slack included."""
        return sum(x.numel() * x.element_size() for x in (self._data, self._scale) if x is not None)

    def _grown(self, buffer: Tensor | None, like: Tensor) -> Tensor:
        """A buffer with room for `like` behind the rows there are; the old one where it is large enough."""
        heads, added, width = like.shape
        need = self.length + added
        if buffer is not None and buffer.shape[1] >= need and not self._shared:
            return buffer
        slack = need // _GROWTH // self._unit * self._unit
        grown = like.new_empty(heads, need + slack, width)
        if buffer is not None:
            grown[:, : self.length] = buffer[:, : self.length]
        return grown

    def _held(self) -> Tensor:
        if self._data is None:
            raise ValueError("no rows yet: a chunk has to close before its summaries can be read")
        return self._data


class Summaries:
    """Group keys, node keys and (with a far field) node values of one row's closed chunks.

    With one level (overselection "all") nodes *are* groups, and there are no separate group keys. Values are
    kept a node, not a group: measured to cost nothing, at half the bytes (docs/fidelity.md).
    """

    def __init__(self, config: HGAConfig) -> None:
        self._config = config
        self.node_keys = GrowingRows()
        self.node_values = GrowingRows()
        self.group_keys = GrowingRows(config.node_size // config.group_size)
        self.chunks = 0

    def append(self, closed: Closed) -> None:
        """Keep the summaries of closed chunks."""
        self.node_keys.append(closed.node_keys)
        if closed.node_values is not None:
            self.node_values.append(closed.node_values)
        if closed.group_keys is not None:
            self.group_keys.append(closed.group_keys)
        self.chunks += closed.records.shape[0]

    def parts(self) -> dict[str, GrowingRows]:
        """What is kept of each chunk under this config, by name."""
        config = self._config
        parts = {"node_keys": self.node_keys}
        parts |= {"node_values": self.node_values} if config.far_field else {}
        return parts | ({"group_keys": self.group_keys} if config.two_level else {})

    def restore(self, chunks: int, rows: dict[str, Rows]) -> None:
        """Be, from empty, the summaries of `chunks` chunks whose parts were these."""
        for name, part in self.parts().items():
            part.append(rows[name])
        self.chunks = chunks

    def truncate(self, chunks: int) -> None:
        """Forget all chunks but the first `chunks`."""
        tokens = chunks * self._config.chunk_size
        self.node_keys.truncate(tokens // self._config.node_size)
        self.node_values.truncate(tokens // self._config.node_size)
        self.group_keys.truncate(tokens // self._config.group_size)
        self.chunks = min(self.chunks, chunks)

    def fork(self) -> Summaries:
        """A twin that goes its own way; what is there already is shared."""
        twin = object.__new__(Summaries)
        twin.__dict__.update(self.__dict__)
        twin.node_keys, twin.node_values, twin.group_keys = (
            rows.fork() for rows in (self.node_keys, self.node_values, self.group_keys)
        )
        return twin

    def held_bytes(self) -> int:
        """Bytes beside the model."""
        return sum(rows.held_bytes() for rows in (self.node_keys, self.node_values, self.group_keys))
