"""A block of queries of one row on a GPU: exact and routed prefill by kernels, the archive brought from the store."""

from __future__ import annotations

from torch import Tensor

from hga.cache.archive import Archive
from hga.cache.routed import Scoring
from hga.config import HGAConfig
from hga.ops.attention import add_sinks
from hga.ops.prefill_routed import ClosedChunks


def attend_exact_block(
    query: Tensor, near: tuple[Tensor, Tensor], place: int, archive: Archive | None, scoring: Scoring
) -> Tensor:
    """Dense attention of queries (Hkv, R, T, D), not scaled, the first at `place` of `near`, to all before them."""
    from hga.ops.kernels.prefill import attend_all, attend_causal  # Triton is optional

    output = attend_causal(query, *near, place, scoring.scale, scoring.softcap)
    for records in () if archive is None else archive.stream_records():
        keys, values = records.unbind(3)
        output = attend_all(query, keys, values, scoring.scale, scoring.softcap, onto=output)
    return add_sinks(output, scoring.sinks)


def attend_routed_block(
    config: HGAConfig, query: Tensor, near: tuple[Tensor, Tensor], archive: Archive | None, first: int, scoring: Scoring
) -> Tensor:
    """Routed attention of queries (Hkv, R, T, D), not scaled, from position `first` to the end of `near`.

    near: as it was before the block's chunks closed; archive: with them.
    """
    from hga.ops.kernels.prefill_routed import attend_prefill_routed  # Triton is optional

    closed = None
    if archive is not None:
        rows = archive.summaries
        node_values = rows.held_node_values() if config.far_field else None
        group_keys = rows.held_group_keys() if config.two_level else None
        closed = ClosedChunks(archive.stage(), rows.node_keys.held(), node_values, group_keys)
    output = attend_prefill_routed(config, query, *near, closed, first, scoring.scale, scoring.softcap)
    return add_sinks(output, scoring.sinks)
