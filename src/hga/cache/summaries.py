"""The summaries of one row's archive, kept beside the model and growing with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hga.config import HGAConfig
from hga.ops.closing import Closed
from hga.ops.coding import Codes, decode_differences
from hga.ops.nibbles import Nibbles, decode_either
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
        """All rows as `dtype`, (Hkv, some, D) at a time."""
        return decode_blocks(self.held(), dtype)

    def decode_units(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of units: ids (Hkv, U) -> (Hkv, U * unit, D) as `dtype`."""
        return decode_rows(self.take_units(ids), dtype)

    def take_units(self, ids: Tensor) -> Rows:
        """The encoded rows of units: ids (Hkv, U) -> (Hkv, U * unit, D)."""
        # From the whole buffers, whose capacity is a number of units: cutting the slack off would copy all rows.
        data, scale = self._held().unflatten(1, (-1, self._unit)), self._scale  # (Hkv, capacity / unit, unit, D)
        if scale is not None:
            scale = take_rows(scale.unflatten(1, (-1, self._unit)), ids).flatten(1, 2)
        return Rows(take_rows(data, ids).flatten(1, 2), scale)

    def held(self) -> Rows:
        """The encoded rows in use (Hkv, n, D)."""
        data, scale = self.buffers
        return Rows(data[:, : self.length], None if scale is None else scale[:, : self.length])

    @property
    def heads(self) -> int:
        """KV heads."""
        return self._held().shape[0]

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._held().device

    @property
    def buffers(self) -> Rows:
        """The whole buffers (Hkv, capacity, D), what is not in use included."""
        return Rows(self._held(), self._scale)

    def is_held(self, data: Tensor) -> bool:
        """Whether `data` is the buffer of rows still."""
        return self._data is data

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


def decode_blocks(rows: Rows | Nibbles, dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows (Hkv, n, D) as `dtype`, some at a time: the decoded copy stays small whatever the context."""
    for start in range(0, rows.data.shape[1], DECODED_AT_ONCE):
        yield decode_either(rows, dtype, (slice(None), slice(start, start + DECODED_AT_ONCE)))


class Summaries:
    """Group keys, node keys and (with a far field) node values of one row's closed chunks.

    Coded group keys have channels beside them, one row a chunk.

    With one level (overselection "all") nodes *are* groups, and there are no separate group keys. Values are
    kept a node, not a group: at half the bytes, and at some loss (docs/fidelity.md).
    """

    def __init__(self, config: HGAConfig) -> None:
        self._config = config
        self.node_keys = GrowingRows()
        self.node_values = GrowingRows()
        self.group_keys = GrowingRows(config.node_size // config.group_size)
        self.group_channels = GrowingRows()
        self.chunks = 0

    def append(self, closed: Closed) -> None:
        """Keep the summaries of closed chunks."""
        self.node_keys.append(closed.node_keys)
        if closed.node_values is not None:
            self.node_values.append(Rows(*closed.node_values))
        if closed.group_keys is not None:
            self.group_keys.append(Rows(closed.group_keys.data, closed.group_keys.scale))
        if isinstance(closed.group_keys, Codes):
            self.group_channels.append(Rows(closed.group_keys.channels, None))
        self.chunks += closed.records.shape[0]

    def held_node_values(self) -> Rows | Nibbles:
        """The encoded or coded node values in use, with a far field only."""
        data, scale = self.node_values.held()
        if not self._config.coded:
            return Rows(data, scale)
        assert scale is not None
        return Nibbles(data, scale)

    def node_value_blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """All node values as `dtype`, (Hkv, some, D) at a time."""
        return decode_blocks(self.held_node_values(), dtype)

    def held_group_keys(self) -> Rows | Codes:
        """The encoded or coded group keys in use, two levels only."""
        rows = self.group_keys.held()
        if not self._config.coded:
            return rows
        assert rows.scale is not None
        return Codes(rows.data, rows.scale, self.group_channels.held().data)

    def group_key_blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """All group keys as `dtype`, (Hkv, some, D) at a time."""
        if not self._config.coded:
            yield from self.group_keys.blocks(dtype)
            return
        device, per_node = self.node_keys.device, self._config.node_size // self._config.group_size
        at_once = max(1, DECODED_AT_ONCE // per_node)
        for start in range(0, self.node_keys.length, at_once):
            nodes = torch.arange(start, min(self.node_keys.length, start + at_once), device=device)
            yield self.decode_group_keys(nodes.expand(self.node_keys.heads, -1), dtype)

    def decode_group_keys(self, nodes: Tensor, dtype: torch.dtype) -> Tensor:
        """The keys of the groups of nodes (Hkv, U), as `dtype`: (Hkv, U * groups a node, D)."""
        if not self._config.coded:
            return self.group_keys.decode_units(nodes, dtype)
        data, scale = self.group_keys.take_units(nodes)
        assert scale is not None
        chunk = torch.div(nodes, self._config.chunk_size // self._config.node_size, rounding_mode="floor")
        channels, _ = self.group_channels.take_units(chunk)
        return decode_differences(Codes(data, scale, channels), self.node_keys.decode_units(nodes, dtype))

    def parts(self) -> dict[str, GrowingRows]:
        """What is kept of each chunk under this config, by name."""
        config = self._config
        parts = {"node_keys": self.node_keys}
        parts |= {"node_values": self.node_values} if config.far_field else {}
        parts |= {"group_keys": self.group_keys} if config.two_level else {}
        return parts | ({"group_channels": self.group_channels} if config.coded else {})

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
        self.group_channels.truncate(chunks)
        self.chunks = min(self.chunks, chunks)

    def fork(self) -> Summaries:
        """A twin that goes its own way; what is there already is shared."""
        twin = object.__new__(Summaries)
        twin.__dict__.update(self.__dict__)
        for name, rows in self.parts().items():
            setattr(twin, name, rows.fork())
        return twin

    def held_bytes(self) -> int:
        """Bytes beside the model."""
        return sum(rows.held_bytes() for rows in self.parts().values())
