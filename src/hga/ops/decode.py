"""One decode step of one layer: append the new token, route its query, attend. The reference of `kernels.decode`.

Everything lives in buffers of fixed capacity, and what is in use is told by numbers on the device, so that a step
needs no host synchronisation and no allocation.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hga.config import HGAConfig
from hga.ops.attention import FarField, Part, attend_once
from hga.ops.coding import Codes, decode_differences
from hga.ops.nibbles import Nibbles, decode_either
from hga.ops.precision import Rows, compute_dtype
from hga.ops.routing import MASS_STEPS, NEVER, choose, score
from hga.ops.summaries import mean_rows
from hga.ops.tiles import pending_capacity, pending_groups

NEAR_SPLITS, CACHED_SPLITS = 8, 32
"""Parts of a step's attention to `near` and to opened groups; the far field has `Scratch.splits`."""

PENDING_BLOCK = 32
"""Pending groups that are scored at once."""

CODED_BLOCK = 64
"""Coded groups that are scored at once."""

Bring = Callable[[Tensor, Tensor], Tensor]
"""Brings archive groups that no address leads to, such as those on a disk. Of counts (B Hkv,) and groups (B Hkv, n),
both on the CPU: the first counts[p] of groups[p], counted from the archive's start, of each row and KV head. Returns
int64 (B Hkv,), beside the model: where those of each lie, one [2, g, D] behind another, until the next call.
"""

SELECTION_BLOCK = 512
"""Columns that a program looks at once while it chooses; both passes over them must cut them alike."""

_PROGRAMS, _SELECTION_SPLITS = 256, 32  # enough to fill a GPU at batch 1
_MANY_UNITS = 1 << 15
_MOST_SPLITS = 128
_NEVER_USED = -(1 << 20)


def padded_width(head_dim: int) -> int:
    """D as kernels compute it: a power of two, 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _selection_splits(columns: int, device: torch.device) -> int:
    """Programs that choose among `columns`: each reads all the others' histograms, so no more than have work."""
    if device.type != "cuda":
        return 2
    most = _SELECTION_SPLITS * (2 if columns > _MANY_UNITS else 1)
    return max(2, min(most, 1 << (columns // SELECTION_BLOCK).bit_length()))


@dataclass(frozen=True)
class Choice:
    """Scratch of one selection for S selectors over `columns` columns, of which at most `keep` are chosen."""

    keep: int
    scores: Tensor  # (B Hq, columns) float32
    peaks: Tensor  # (B Hq, parts) float32
    totals: Tensor  # (B Hq, parts) float32
    mass: Tensor  # (S, columns) int32, in whole steps
    histogram: Tensor  # (S, splits, steps) int32
    chosen: Tensor  # (S, keep) int32, ascending
    limits: Tensor  # (S, 2) int32
    counts: Tensor  # (S,) int32

    @property
    def parts(self) -> int:
        """Parts in which scores are made, each with a log-sum-exp of its own."""
        return self.peaks.shape[1]

    @classmethod
    def allocate(cls, lines: int, selectors: int, columns: int, keep: int, parts: int, device: torch.device) -> Choice:
        """Buffers for `lines` query heads in `selectors` selectors."""

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        return cls(
            keep=keep,
            scores=floats(lines, columns),
            peaks=floats(lines, parts),
            totals=floats(lines, parts),
            mass=ints(selectors, columns),
            histogram=ints(selectors, _selection_splits(columns, device), MASS_STEPS),
            chosen=ints(selectors, max(1, keep)),
            limits=ints(selectors, 2),
            counts=ints(selectors),
        )


@dataclass(frozen=True)
class Scratch:
    """Scratch of a decode step; layers that run one after another share it."""

    chunk_capacity: int
    splits: int
    nodes: Choice | None
    groups: Choice
    places: Tensor  # (S, keep) int32: slot of each chosen group
    sources: Tensor  # (S, keep) int64: where the store has it, if no slot had
    peaks: Tensor  # (B Hq, parts) float32
    totals: Tensor
    sums: Tensor  # (B Hq, parts, D rounded up) float32

    @classmethod
    def allocate(
        cls,
        config: HGAConfig,
        batch: int,
        kv_heads: int,
        repeats: int,
        head_dim: int,
        chunks: int,
        device: torch.device,
    ) -> Scratch:
        """Scratch for contexts of up to `chunks` closed chunks a row."""
        lines = batch * kv_heads * repeats
        selectors = batch * kv_heads * config.selectors(repeats)
        programs = _PROGRAMS if device.type == "cuda" else 8  # the interpreter runs one after another
        if chunks * config.chunk_size // config.node_size > _MANY_UNITS:
            programs *= 2
        splits = max(2, min(_MOST_SPLITS, 1 << int(math.log2(max(1, programs / selectors)))))
        group_splits, first = splits, pending_capacity(config, PENDING_BLOCK)
        nodes, columns = None, first + chunks * config.chunk_size // config.group_size
        if config.two_level:
            count = chunks * config.chunk_size // config.node_size
            nodes = Choice.allocate(lines, selectors, count, config.candidate_nodes, splits, device)
            listed = config.candidate_nodes * (config.node_size // config.group_size)
            columns = first + listed
            if config.coded:
                group_splits = max(2, min(2 * _MOST_SPLITS, -(-listed // CODED_BLOCK)))
        groups = Choice.allocate(lines, selectors, columns, config.routed_groups, group_splits + 1, device)
        total = NEAR_SPLITS + 2 * CACHED_SPLITS + splits
        return cls(
            chunk_capacity=chunks,
            splits=splits,
            nodes=nodes,
            groups=groups,
            places=torch.zeros_like(groups.chosen),
            sources=torch.zeros_like(groups.chosen, dtype=torch.int64),
            peaks=torch.empty(lines, total, device=device),
            totals=torch.empty(lines, total, device=device),
            sums=torch.empty(lines, total, padded_width(head_dim), device=device),
        )

    def held_bytes(self) -> int:
        """Bytes beside the model."""
        choices = [self.groups] if self.nodes is None else [self.groups, self.nodes]
        tensors = [x for choice in choices for x in vars(choice).values() if isinstance(x, Tensor)]
        return sum(x.nbytes for x in (*tensors, self.places, self.sources, self.peaks, self.totals, self.sums))


@dataclass(frozen=True)
class SlotCache:
    """Archive groups of one layer that are cached beside the model, least recently used first to go.

    records (B Hkv, slots, 2, g, D); slot_of (B Hkv, groups), -1 where a group is not cached; owner and used_at
    (B Hkv, slots); traffic int64 (B Hkv, 3): hits, misses, unique groups, summed over steps.
    """

    records: Tensor
    slot_of: Tensor
    owner: Tensor
    used_at: Tensor
    missing_groups: Tensor
    missing_places: Tensor
    missing_slots: Tensor
    missing_counts: Tensor
    traffic: Tensor

    @classmethod
    def allocate(cls, config: HGAConfig, problems: int, repeats: int, chunks: int, like: Tensor) -> SlotCache:
        """Slots for `problems` pairs of row and KV head: twice what a shared choice opens, all that R choices may.

        like: a tensor (..., D) of the K/V's type and device.
        """
        groups = chunks * config.chunk_size // config.group_size
        wanted = config.routed_groups * max(2, config.selectors(repeats))
        slots = max(1, min(wanted, groups))

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=like.device)

        made = cls(
            records=like.new_empty(problems, slots, 2, config.group_size, like.shape[-1]),
            slot_of=ints(problems, groups),
            owner=ints(problems, slots),
            used_at=ints(problems, slots),
            missing_groups=ints(problems, slots),
            missing_places=ints(problems, slots),
            missing_slots=ints(problems, slots),
            missing_counts=ints(problems),
            traffic=torch.zeros(problems, 3, dtype=torch.int64, device=like.device),
        )
        made.forget()
        return made

    def forget(self) -> None:
        """Empty all slots: group numbers are about to mean other groups."""
        self.slot_of.fill_(-1)
        self.owner.fill_(-1)
        self.used_at.fill_(_NEVER_USED)

    def held_bytes(self) -> int:
        """Bytes beside the model."""
        return sum(x.nbytes for x in vars(self).values())


@dataclass(frozen=True)
class DecodeLayer:
    """What a decode step reads and writes of one layer; buffers of B rows, longer than what is in use.

    near_keys, near_values (B, Hkv, P, D); node_keys, node_values, group_keys: encoded rows (B, Hkv, N, D), values only
    with a far field, group keys only with two levels; addresses int64 (B, chunks): where each chunk's record
    [Hkv, G, 2, g, D] lies, in host or device memory.
    """

    near_keys: Tensor
    near_values: Tensor
    node_keys: Rows
    node_values: Rows | Nibbles | None
    group_keys: Rows | Codes | None
    addresses: Tensor
    slots: SlotCache
    scratch: Scratch
    faults: Tensor  # (1,) int32, page-locked host memory beside a GPU: a kernel writes 1 where K/V are not finite


def attend_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: DecodeLayer,
    counts: Tensor,
    config: HGAConfig,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bring: Bring | None = None,
) -> Tensor:
    """Append one token's K/V (B, Hkv, 1, D) to `near` and attend its queries (B, Hq, 1, D): (B, Hq, 1, D).

    counts: int32 (B, 4): tokens in `near`, the new one included, closed chunks, a number that grows. softcap: of the
    scores; sinks: learned logits (Hkv, R). bring: where groups come from, else from `layer.addresses`. Every chunk
    that may be closed is. Plain mean summaries only. This reference reads records in host memory.
    """
    out = torch.empty_like(query)
    for row, (length, chunks) in enumerate(counts[:, :2].tolist()):
        layer.near_keys[row, :, length - 1] = keys[row, :, 0]
        layer.near_values[row, :, length - 1] = values[row, :, 0]
        grouped = query[row].unflatten(0, (keys.shape[1], -1))  # (Hkv, R, 1, D)
        attended = _attend_row(grouped, layer, row, length, chunks, config, scale, softcap, sinks, bring)
        out[row] = attended.flatten(0, 1)
    return out


def _attend_row(
    query: Tensor,
    layer: DecodeLayer,
    row: int,
    length: int,
    chunks: int,
    config: HGAConfig,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    bring: Bring | None,
) -> Tensor:
    size, sink, work = config.group_size, config.sink_tokens, compute_dtype(query.dtype)
    query = query.to(work) * scale
    near_keys, near_values = (x[row, :, :length].to(work) for x in (layer.near_keys, layer.near_values))
    pending = pending_groups(config, length - 1)
    span = slice(sink, sink + pending * size)
    pending_scores = score(query, mean_rows(near_keys[:, span], size), softcap)  # (Hkv, R, 1, pending)
    heads = query.shape[0]
    nodes, per_node = chunks * config.chunk_size // config.node_size, config.node_size // config.group_size

    def rows(summary: Rows | Nibbles, count: int) -> Tensor:
        return decode_either(summary, work, (row, slice(None), slice(count)))

    node_scores = score(query, rows(layer.node_keys, nodes), softcap)  # (Hkv, R, 1, N)
    listed, group_scores = torch.ones_like(node_scores, dtype=torch.bool), node_scores[..., None]
    if config.two_level and layer.group_keys is not None:
        listed = choose(node_scores, config.candidate_nodes, config.selection)
        if isinstance(layer.group_keys, Codes):
            data, scales, channels = (x[row] for x in layer.group_keys)
            codes = Codes(data[:, : nodes * per_node], scales[:, : nodes * per_node], channels[:, :chunks])
            group_keys = decode_differences(codes, rows(layer.node_keys, nodes))
        else:
            group_keys = rows(layer.group_keys, nodes * per_node)
        group_scores = score(query, group_keys, softcap).unflatten(-1, (-1, per_node))
        group_scores = group_scores.masked_fill(~listed[..., None], NEVER)
    joined = torch.cat([pending_scores, group_scores.flatten(-2)], -1)
    opened = choose(joined, config.routed_groups, config.selection)  # (Hkv, R', 1, pending + groups)
    opened_near, opened_far = opened[..., :pending], opened[..., pending:]

    exact = torch.ones(*opened.shape[:2], 1, length, dtype=torch.bool, device=query.device)
    exact[..., span] = opened_near.repeat_interleave(size, -1)
    parts = [Part(score(query, near_keys, softcap).masked_fill(~exact, NEVER), near_values)]
    archived_keys, archived_values = _read_archive(layer, row, chunks, heads, config, query, bring)
    logits = score(query, archived_keys, softcap).masked_fill(~opened_far.repeat_interleave(size, -1), NEVER)
    parts.append(Part(logits, archived_values))
    far = None
    if config.far_field and layer.node_values is not None:
        unopened = (pending_scores + math.log(size)).masked_fill(opened_near, NEVER)
        parts.append(Part(unopened, mean_rows(near_values[:, span], size)))
        of_groups = (group_scores + math.log(size)).masked_fill(opened_far.unflatten(-1, (-1, per_node)), NEVER)
        of_nodes = (node_scores + math.log(config.node_size)).masked_fill(listed, NEVER)
        every = torch.arange(nodes, device=query.device).expand(heads, nodes)
        far = FarField(of_nodes, of_groups, every, rows(layer.node_values, nodes))
    return attend_once(parts, far, sinks).to(layer.near_keys.dtype)


def _read_archive(
    layer: DecodeLayer,
    row: int,
    chunks: int,
    heads: int,
    config: HGAConfig,
    like: Tensor,
    bring: Bring | None,
) -> tuple[Tensor, Tensor]:
    """K/V of a row's archive (Hkv, chunks C, D) in group order, from the addresses of its records or of its groups."""
    per_chunk, group = config.chunk_size // config.group_size, (2, config.group_size, like.shape[-1])
    if bring is None:
        each = [_read_at(a, (heads, per_chunk, *group), layer) for a in layer.addresses[row, :chunks].tolist()]
        records = torch.stack(each, 1).flatten(1, 2)
    else:
        own, count = slice(row * heads, (row + 1) * heads), chunks * per_chunk
        counts = torch.zeros(layer.addresses.shape[0] * heads, dtype=torch.int32)
        counts[own] = count
        found = bring(counts, torch.arange(count, dtype=torch.int32).expand(len(counts), -1))
        records = torch.stack([_read_at(address, (count, *group), layer) for address in found[own].tolist()])
    keys, values = records.to(like).unbind(2)  # (Hkv, chunks G, g, D) each
    return keys.flatten(1, 2), values.flatten(1, 2)


def _read_at(address: int, shape: tuple[int, ...], layer: DecodeLayer) -> Tensor:
    """A copy of K/V that lie at an address of host memory."""
    dtype = layer.near_keys.dtype
    held = bytearray((ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address))
    return torch.frombuffer(held, dtype=dtype).view(shape)
