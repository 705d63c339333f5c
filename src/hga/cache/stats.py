"""What a cache holds where, and what its queries attended and fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hga.cache.decoding import Decoding
from hga.cache.layer import HGALayer
from hga.cache.layout import summary_bytes_per_token
from hga.config import HGAConfig
from hga.store import StoreStats
from hga.store.traffic import add_up


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds where, in bytes, and what its queries attended.

    tokens: tokens seen by a row, padding included. summary_bytes, window_bytes (sink, window, unclosed tokens),
    working_bytes (most K/V fetched at once, groups cached for decoding): beside the model; device_bytes is their
    sum, plus the archive when store="device". store_bytes: the archive. kv_bytes: what dense K/V of the routed
    layers would take. summary_share: summary bytes over K/V bytes of an archived token. attended: mean share of
    the context attended exactly by a query head; fetched: the same for the unique tokens of a KV head. hit_rate:
    share of the groups that decoding kernels found cached beside the model, 0 where none has run. storage: reads,
    writes and RAM hits of an archive on NVMe, all layers added up; None for other stores.
    """

    tokens: int
    summary_bytes: int
    window_bytes: int
    working_bytes: int
    device_bytes: int
    store_bytes: int
    kv_bytes: int
    summary_share: float
    queries: int
    attended: float
    fetched: float
    hit_rate: float
    storage: StoreStats | None = None


def count_layers(config: HGAConfig, layers: Sequence[HGALayer], decoding: Decoding, tokens: int) -> CacheStats:
    """The stats of a cache's routed layers, whose scratch `decoding` holds, after `tokens` tokens."""
    summaries = sum(layer.summary_bytes() for layer in layers)
    windows = sum(layer.window_bytes() for layer in layers)
    # Fetched K/V of one layer at a time; what decoding keeps is there for all layers at once.
    working = max((layer.counters.working_bytes for layer in layers), default=0)
    working += sum(layer.cached_bytes() for layer in layers) + decoding.held_bytes()
    traffic = [layer.traffic() for layer in layers]
    hits, asked = sum(hit for hit, _, _ in traffic), sum(hit + miss for hit, miss, _ in traffic)
    held = [layer.store_bytes() for layer in layers]
    beside = summaries + windows + working + sum(tiers.get("device", 0) for tiers in held)
    queries = sum(layer.counters.queries for layer in layers)
    started = next((layer for layer in layers if layer.is_initialized), None)
    width = 0 if started is None else 2 * started.shape.head_dim * started.dtype.itemsize
    files = [counted for layer in layers if (counted := layer.store_traffic()) is not None]
    share = 0.0
    if started is not None:
        share = summary_bytes_per_token(config, started.shape.head_dim, started.dtype) / width
    return CacheStats(
        tokens=tokens,
        summary_bytes=summaries,
        window_bytes=windows,
        working_bytes=working,
        device_bytes=beside,
        store_bytes=sum(sum(tiers.values()) for tiers in held),
        kv_bytes=sum(row.length * layer.shape.kv_heads * width for layer in layers for row in layer.rows),
        summary_share=share,
        queries=queries // max(1, len(layers)),
        attended=sum(layer.counters.attended for layer in layers) / max(1, queries),
        fetched=sum(layer.counters.fetched for layer in layers) / max(1, queries),
        hit_rate=hits / max(1, asked),
        storage=add_up(files) if files else None,
    )
