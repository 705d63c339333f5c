"""What is saved of each layer of a cache: its tensors by name, and how they go back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from hga.cache.layer import HGALayer
from hga.cache.layout import record_layout
from hga.cache.row import Row
from hga.cache.saved.file import DTYPE_NAMES, DTYPES, Spec
from hga.config import HGAConfig
from hga.ops.coding import NUMBERS_PER_BYTE, check_codable
from hga.ops.precision import resolve_summary_dtype
from hga.ops.tiles import closed_chunks
from hga.store import RecordLayout

Tensors = dict[str, Tensor]
"""Tensors of one layer by their short names."""


@dataclass(frozen=True)
class SavedLayer:
    """A layer in a file. kind: "routed" (records, summaries and near tokens), "kept" (the model's own K/V) or
    "linear" (recurrent states). tensors: names, types and shapes of all but the records. chunks: closed ones.
    """

    kind: str
    chunks: int
    records: RecordLayout | None
    tensors: tuple[Spec, ...]

    def to_json(self) -> dict[str, Any]:
        """What `from_json` needs to find the same layer again."""
        if self.kind == "routed":
            near = next(spec for spec in self.tensors if spec.name == "near_keys")
            return {"kind": "routed", "chunks": self.chunks, "near": near.shape, "dtype": DTYPE_NAMES[near.dtype]}
        own = {spec.name: [DTYPE_NAMES[spec.dtype], *spec.shape] for spec in self.tensors}
        return {"kind": self.kind, "tensors": own}

    @classmethod
    def from_json(cls, fields: Any, config: HGAConfig, tokens: int) -> SavedLayer:
        """The layer that `to_json` described. ValueError for anything that a cache of `tokens` cannot hold."""
        if fields["kind"] == "routed":
            (heads, near, width), chunks = map(_count, fields["near"]), _count(fields["chunks"])
            if not heads or not width:
                raise ValueError(f"K/V of {heads} heads and width {width} are none")
            if near + chunks * config.chunk_size != tokens or chunks > closed_chunks(config, tokens):
                raise ValueError(f"{chunks} chunks and {near} other tokens are not the {tokens} tokens of the context")
            return routed_layer(config, chunks, (heads, near, width), DTYPES[fields["dtype"]])
        if fields["kind"] not in ("kept", "linear"):
            raise ValueError(f"a layer of kind {fields['kind']!r} is unknown")
        own = tuple(
            Spec(_plain_name(name), DTYPES[dtype], tuple(map(_count, shape)))
            for name, (dtype, *shape) in fields["tensors"].items()
        )
        return cls(fields["kind"], 0, None, own)


def routed_layer(config: HGAConfig, chunks: int, near: tuple[int, int, int], dtype: torch.dtype) -> SavedLayer:
    """A routed layer whose near tokens are (Hkv, n, D)."""
    heads, _, width = near
    layout = record_layout(config, heads, width, dtype)
    specs = [Spec("near_keys", dtype, near), Spec("near_values", dtype, near)]
    if chunks:
        held = chunks * config.chunk_size
        summary = resolve_summary_dtype(config.summary_dtype, dtype)
        units = {"node_keys": config.node_size}
        if not config.coded:
            units |= {"node_values": config.node_size} if config.far_field else {}
            units |= {"group_keys": config.group_size} if config.two_level else {}
        for name, unit in units.items():
            specs.append(Spec(name, summary, (heads, held // unit, width)))
            if summary == torch.float8_e4m3fn:
                specs.append(Spec(f"{name}_scale", torch.bfloat16, (heads, held // unit, 1)))
        if config.coded:
            check_codable(width)
            nodes, groups = held // config.node_size, held // config.group_size
            if config.far_field:
                specs.append(Spec("node_values", torch.uint8, (heads, nodes, width // 2)))
                specs.append(Spec("node_values_scale", torch.bfloat16, (heads, nodes, 1)))
            specs.append(Spec("group_keys", torch.uint8, (heads, groups, width // NUMBERS_PER_BYTE)))
            specs.append(Spec("group_keys_scale", torch.uint8, (heads, groups, 1)))
            specs.append(Spec("group_channels", torch.float8_e4m3fn, (heads, chunks, width)))
        if layout.ordered:
            specs.append(Spec("order", torch.int16, (chunks, heads, config.chunk_size)))
    return SavedLayer("routed", chunks, layout, tuple(specs))


def describe(layer: Any, config: HGAConfig) -> SavedLayer:
    """What of a cache's layer is saved. ValueError for a layer that cannot be."""
    if isinstance(layer, HGALayer):
        row = _only_row(layer)
        shape = (layer.shape.kv_heads, row.near_length, layer.shape.head_dim)
        return routed_layer(config, row.chunks, shape, layer.dtype)
    tensors = dense_tensors(layer)
    kind = "linear" if type(layer) is LinearAttentionLayer else "kept"
    return SavedLayer(kind, 0, None, tuple(Spec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()))


def dense_tensors(layer: Any) -> Tensors:
    """The tensors of a layer that is not routed."""
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        kept = min(layer.keys.shape[2], getattr(layer, "sliding_window", layer.keys.shape[2] + 1) - 1)
        first = layer.keys.shape[2] - kept  # more than that is there where the past is recorded for a crop
        return {"keys": layer.keys[:, :, first:], "values": layer.values[:, :, first:]}
    if type(layer) is LinearAttentionLayer:
        states = {f"conv_{index}": state for index, state in layer.conv_states.items()}
        states |= {f"recurrent_{index}": state for index, state in layer.recurrent_states.items()}
        return {name: state for name, state in states.items() if state is not None}
    raise ValueError(f"a cache layer of type {type(layer).__name__} cannot be saved")


def routed_tensors(layer: HGALayer) -> Tensors:
    """The tensors of a routed layer's row, permutations and records apart."""
    row = _only_row(layer)
    keys, values = row.near_buffers()
    tensors = {"near_keys": keys[:, : row.near_length], "near_values": values[:, : row.near_length]}
    if row.chunks:
        for name, rows in row.archive.summaries.parts().items():
            data, scale = rows.held()
            tensors[name] = data
            if scale is not None:
                tensors[f"{name}_scale"] = scale
    return tensors


def restore_dense(layer: Any, saved: SavedLayer, tensors: Tensors, tokens: int) -> None:
    """Fill an empty layer of the model's own kind. ValueError if the tensors do not fit it."""
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and saved.kind == "kept":
        kept = min(tokens, getattr(layer, "sliding_window", tokens + 1) - 1)
        if set(tensors) != {"keys", "values"} or any(t.ndim != 4 or t.shape[2] != kept for t in tensors.values()):
            raise ValueError(f"K/V of {kept} tokens are expected, there are {saved.tensors}")
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = tokens
    elif type(layer) is LinearAttentionLayer and saved.kind == "linear":
        names = {f"{kind}_{index}" for kind in ("conv", "recurrent") for index in layer.conv_states}
        if not set(tensors) <= names:
            raise ValueError(f"states {sorted(names)} are expected, there are {sorted(tensors)}")
        for name, state in tensors.items():
            kind, index = name.split("_")
            given: dict[str, Any] = {f"{kind}_states": state, "state_idx": int(index)}
            layer.lazy_initialization(**given)
            getattr(layer, f"{kind}_states")[int(index)].copy_(state)
            layer.has_previous_state[int(index)] = True
    else:
        raise ValueError(f"a layer of kind {saved.kind!r} does not fit the model's {type(layer).__name__}")


def _only_row(layer: HGALayer) -> Row:
    if len(layer.rows) != 1:
        raise ValueError(
            f"only a cache of one sequence can be saved, this one has {len(layer.rows)} rows; take a fork and keep one "
            "by batch_select_indices"
        )
    return layer.rows[0]


def _count(number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{number!r} is no number of anything")
    return number


def _plain_name(name: str) -> str:
    if not name.isidentifier() or len(name) > 32:
        raise ValueError(f"{name[:40]!r} is no name of a tensor")
    return name


def named(layers: tuple[SavedLayer, ...]) -> Iterator[tuple[int, SavedLayer, Spec]]:
    """All tensors but records, with the layer that each belongs to and its name in the file."""
    for index, layer in enumerate(layers):
        for spec in layer.tensors:
            yield index, layer, spec._replace(name=f"layers.{index}.{spec.name}")
