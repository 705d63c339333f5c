"""A block of queries of one row: exact prefill, and routed prefill by kernels, the archive brought from the store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from hga.cache.archive import Archive
from hga.cache.kernels import kernels_serve
from hga.cache.routed import NUMBERS_AT_ONCE, Scoring
from hga.config import HGAConfig
from hga.ops import fused, prefill
from hga.ops.attention import Output, add_sinks
from hga.ops.prefill_routed import ClosedChunks


def attend_exact_block(
    config: HGAConfig,
    query: Tensor,
    near: tuple[Tensor, Tensor],
    place: int,
    archive: Archive | None,
    scoring: Scoring,
) -> Tensor:
    """Dense attention of queries (Hkv, R, T, D), not scaled, the first at `place` of `near`, to all before them."""
    # A single token, which few programs would read everything for one after another, is left to PyTorch.
    if query.shape[2] > 1 and kernels_serve(config, query.dtype, query.device):
        output = _attend_by_kernels(query, near, place, archive, scoring)
    else:
        output = _attend_in_parts(query, near, place, archive, scoring)
    return add_sinks(output, scoring.sinks)


def _attend_by_kernels(
    query: Tensor, near: tuple[Tensor, Tensor], place: int, archive: Archive | None, scoring: Scoring
) -> Output:
    from hga.ops.kernels.prefill import attend_all, attend_causal  # Triton is optional

    output = attend_causal(query, *near, place, scoring.scale, scoring.softcap)
    for records in () if archive is None else archive.stream_records():
        keys, values = records.unbind(3)
        output = attend_all(query, keys, values, scoring.scale, scoring.softcap, onto=output)
    return output


def _attend_in_parts(
    query: Tensor, near: tuple[Tensor, Tensor], place: int, archive: Archive | None, scoring: Scoring
) -> Output:
    """In parts of the block, so that logits or copies of queries stay bounded; the archive is streamed once for all."""
    heads, repeats, tokens, width = query.shape
    longest = near[0].shape[1] if archive is None else max(near[0].shape[1], archive.streamed_tokens)
    fuses = query.device.type == "cpu" and scoring.softcap is None
    causal, whole = (fused.attend_causal, fused.attend_all) if fuses else (prefill.attend_causal, prefill.attend_all)
    size = max(1, NUMBERS_AT_ONCE // (heads * repeats * (width if fuses else longest)))
    parts = [(query[:, :, start : start + size], place + start) for start in range(0, tokens, size)]
    scale, softcap = scoring.scale, scoring.softcap
    outputs = []
    for part, first in parts:
        keys, values = (x[:, : first + part.shape[2]] for x in near)
        outputs.append(causal(part, keys, values, first, scale, softcap))
    for keys, values in () if archive is None else archive.stream():
        outputs = [
            whole(part, keys, values, scale, softcap, output) for (part, _), output in zip(parts, outputs, strict=True)
        ]
    return Output(*(torch.cat(found, 2) for found in zip(*outputs, strict=True)))


def attend_routed_block(
    config: HGAConfig, query: Tensor, near: tuple[Tensor, Tensor], archive: Archive | None, first: int, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    """Routed attention of queries (Hkv, R, T, D), not scaled, from position `first` to the end of `near`.

    near: as it was before the block's chunks closed; archive: with them. Beside the output, where the R heads choose
    apart, the unique tokens that they opened between them, (T,), a mean over KV heads.
    """
    from hga.ops.kernels.prefill_routed import attend_prefill_routed  # Triton is optional

    heads, repeats, tokens, _ = query.shape
    opened = query.new_empty(heads, tokens, dtype=torch.int32) if config.selectors(repeats) > 1 else None
    with nullcontext() if archive is None else _staged(config, archive) as closed:
        output = attend_prefill_routed(
            config, query, *near, closed, first, scoring.scale, scoring.softcap, opened=opened
        )
    unique = None if opened is None else opened.double().mean(0) * config.group_size
    return add_sinks(output, scoring.sinks), unique


@contextmanager
def _staged(config: HGAConfig, archive: Archive) -> Iterator[ClosedChunks]:
    """The archive's chunks for kernels, K/V on their way."""
    rows = archive.summaries
    node_values = rows.held_node_values() if config.far_field else None
    group_keys = rows.held_group_keys() if config.two_level else None
    with archive.staged() as (records, wait):
        yield ClosedChunks(records, rows.node_keys.held(), node_values, group_keys, wait)
