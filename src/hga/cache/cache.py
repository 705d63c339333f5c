"""`HGACache`: the transformers cache whose full-attention layers route."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from hga.cache.decoding import Decoding
from hga.cache.families import check_model_config, routed_layers
from hga.cache.layer import Handshake, HGALayer, LayerShape
from hga.cache.layout import summary_bytes_per_token
from hga.cache.rope import inverse_frequencies, position_limit
from hga.config import HGAConfig
from hga.store import StoreStats
from hga.store.host import check_host_room
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


class HGACache(DynamicCache):
    """K/V of a sequence (or batch) for a model that runs attention "hga". Pass it as `past_key_values`.

    Layers with a sliding window, linear attention or in `dense_layers` keep transformers' own cache layers.
    """

    hga_config: HGAConfig
    stepper: Any
    """What the integration keeps between decode steps: a captured graph."""

    def __init__(self, config: Any, hga_config: HGAConfig | str = "balanced") -> None:
        """config: the model's; hga_config: a config or a preset's name. ValueError if the model is unsupported."""
        super().__init__(config=config)
        self._route(config, hga_config)

    @classmethod
    def adopt(cls, cache: DynamicCache, config: Any, hga_config: HGAConfig | str) -> HGACache:
        """Turn a still empty DynamicCache into an HGACache in place: `generate` keeps its own reference."""
        if cache.get_seq_length():
            raise ValueError(f"only an empty cache can be adopted; this one holds {cache.get_seq_length()} tokens")
        if cache.layer_class_to_replicate is not None:  # made without a config: layers would come lazily
            cache.layers, cache.layer_class_to_replicate = DynamicCache(config=config).layers, None
        cache.__class__ = cls
        adopted: HGACache = cache  # type: ignore[assignment]
        adopted._route(config, hga_config)
        return adopted

    def stats(self) -> CacheStats:
        """Bytes by place, and the averages over all routed layers since the last `reset_counters`."""
        layers = self.routed
        summaries = sum(layer.summary_bytes() for layer in layers)
        windows = sum(layer.window_bytes() for layer in layers)
        # Fetched K/V of one layer at a time; what decoding keeps is there for all layers at once.
        working = max((layer.counters.working_bytes for layer in layers), default=0)
        working += sum(layer.cached_bytes() for layer in layers) + self.decoding.held_bytes()
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
            share = summary_bytes_per_token(self.hga_config, started.shape.head_dim, started.dtype) / width
        return CacheStats(
            tokens=self.get_seq_length(),
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

    def reset_counters(self) -> None:
        """Start the averages of attended and fetched tokens again."""
        for layer in self.routed:
            layer.counters.reset()

    def check_model(self, config: Any) -> None:
        """ValueError if `config` is of another model than the one that this cache was built for."""
        self.routed[0].check_model(config.get_text_config(decoder=True))

    def check_room(self, tokens: int, rows: int = 1, dtype: torch.dtype | None = None) -> None:
        """Whether a prompt of `tokens` more can be read; rows and dtype (the K/V's) count before the first one.

        ValueError if it ends beyond the model's positions; MemoryError if host memory cannot hold its archive
        (store="ram"). Tokens that are generated later are checked as the archive grows.
        """
        layers = self.routed
        layers[0].check_room(tokens)
        if self.hga_config.store == "ram":
            dtype = dtype or getattr(layers[0].shape.model_config, "dtype", None) or torch.get_default_dtype()
            wanted_bytes = sum(layer.growth_bytes(tokens, rows, dtype) for layer in layers)
            check_host_room(wanted_bytes, f"the archive of this prompt ({tokens:,} tokens)")

    def can_begin_token(self) -> bool:
        """Whether kernels serve the next token in every layer of this cache, so that its step can be captured."""
        routed = self.routed
        return len(routed) == len(self.layers) and all(layer.can_begin_token() for layer in routed)

    def has_padding(self, padding: Any) -> bool:
        """Whether a mask (B, tokens so far + 1) pads the next token of some row. ValueError if it does not fit."""
        return self.routed[0].has_padding(padding)

    @contextmanager
    def begin_token(self) -> Iterator[None]:
        """A step of one token a row: the host's bookkeeping comes first, inside only kernels are launched.

        What goes wrong inside is taken back: the cache is as before the step.
        """
        begun: list[HGALayer] = []
        try:
            for layer in self.routed:
                layer.begin_token(layer.get_seq_length() + 1)
                begun.append(layer)
            self.decoding.active = True
            yield
        except BaseException:
            for layer in begun:
                layer.take_back_token()
            raise
        finally:
            self.decoding.active = False
        for layer in begun:
            layer.end_token()

    def __deepcopy__(self, memo: dict[int, Any]) -> HGACache:
        """TypeError on a GPU, where a copy's archive would not be page-locked."""
        if any(layer.is_initialized and layer.device.type == "cuda" for layer in self.routed):
            raise TypeError(
                "an HGACache on a GPU cannot be deep-copied; crop it back instead, or read the prefix again"
            )
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return copied

    def reset(self) -> None:
        """Forget everything and give all memory back."""
        super().reset()  # type: ignore[no-untyped-call]
        self.decoding.reset()
        self.stepper = None

    @property
    def routed(self) -> list[HGALayer]:
        """The routed layers."""
        return [layer for layer in self.layers if isinstance(layer, HGALayer)]

    def _route(self, config: Any, hga_config: HGAConfig | str) -> None:
        """Put a routed layer in the place of each full-attention layer; the others stay as they are."""
        check_model_config(config)
        decoder = config.get_text_config(decoder=True)
        self.hga_config = HGAConfig.preset(hga_config) if isinstance(hga_config, str) else hga_config
        handshake, limit = Handshake(), position_limit(decoder)
        self.decoding = Decoding()
        self.stepper = None
        head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
        routed = routed_layers(decoder, self.hga_config)
        for index in routed:
            frequencies = inverse_frequencies(decoder, index) if self.hga_config.summary == "mixed_rope" else None
            shape = LayerShape(
                kv_heads=decoder.num_key_value_heads,
                query_heads=decoder.num_attention_heads,
                head_dim=head_dim,
                position_limit=limit,
                inverse_frequencies=frequencies,
                model_config=decoder,
                routed_layers=len(routed),
            )
            self.layers[index] = HGALayer(self.hga_config, index, shape, handshake, self.decoding)
