"""`HGACache`: the transformers cache whose full-attention layers route."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hga.cache.decoding import Decoding
from hga.cache.families import check_model_config, routed_layers
from hga.cache.layer import Handshake, HGALayer
from hga.cache.rope import inverse_frequencies, position_limit
from hga.cache.shape import LayerShape
from hga.cache.stats import CacheStats, count_layers
from hga.config import HGAConfig
from hga.store.host import check_host_room
from hga.store.scratch import check_disk_room

if TYPE_CHECKING:
    from hga.cache.saved import Report, SavedContext


def _no_report(done_bytes: int, all_bytes: int) -> None:
    """Nobody watches."""


class HGACache(DynamicCache):
    """K/V of a sequence (or batch) for a model that runs attention "hga". Pass it as `past_key_values`.

    Layers with a sliding window, linear attention or in `dense_layers` keep transformers' own cache layers.
    """

    hga_config: HGAConfig
    stepper: Any
    """What the integration keeps between decode steps: a captured graph."""
    loaded_ids: tuple[int, ...] = ()
    """Ids of the tokens that a loaded cache began with, without those that it has forgotten since."""
    _checked_config: Any
    """The model's config that `check_model` has found to fit last."""

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
        return count_layers(self.hga_config, self.routed, self.decoding, self.get_seq_length())

    def held_bytes(self, counted: set[int]) -> dict[str, int]:
        """Bytes by tier, "device" being beside the model, of what no other cache was asked for before, slack included.

        counted: identities of the stores that are counted already, which forks share; this cache's are added.
        """
        held = {"device": self.decoding.held_bytes() + sum(map(_unrouted_bytes, self.layers))}
        for layer in self.routed:
            held["device"] += layer.summary_bytes() + layer.window_bytes() + layer.cached_bytes()
            identity = layer.store_identity()
            if identity not in counted:
                counted.add(identity)
                for tier, count in layer.allocated_bytes().items():
                    held[tier] = held.get(tier, 0) + count
        return held

    def shares_store(self, other: HGACache) -> bool:
        """Whether a layer of both keeps its archive in one store, as those of forks do."""
        own = {layer.store_identity() for layer in self.routed}
        return any(layer.store_identity() in own for layer in other.routed)

    def reset_counters(self) -> None:
        """Start the averages of attended and fetched tokens again."""
        for layer in self.routed:
            layer.counters.reset()

    def check_model(self, config: Any) -> None:
        """ValueError if `config` is of another model than the one that this cache was built for."""
        if config is not self._checked_config:  # asked at every step, and `get_text_config` takes its time
            self.routed[0].shape.check_model(config.get_text_config(decoder=True))
            self._checked_config = config

    def check_room(self, tokens: int, rows: int = 1, dtype: torch.dtype | None = None) -> None:
        """Whether `tokens` more can be read, a prompt's and those that will be generated after it.

        rows and dtype (the K/V's) count before the first one. ValueError if they end beyond the model's positions;
        MemoryError if host memory cannot hold their archive (store="ram"), OSError if the scratch folder's disk cannot
        ("nvme", and "auto" beyond its RAM). Tokens that are not asked for here are checked as the archive grows.
        """
        layers = self.routed
        layers[0].check_room(tokens)
        if self.hga_config.store != "device":
            dtype = dtype or getattr(layers[0].shape.model_config, "dtype", None) or torch.get_default_dtype()
            wanted_bytes = sum(layer.growth_bytes(tokens, rows, dtype) for layer in layers)
            check = check_host_room if self.hga_config.store == "ram" else check_disk_room
            check(wanted_bytes, f"the archive of {tokens:,} tokens, prompt and answer,")

    def can_begin_token(self) -> bool:
        """Whether kernels serve the next token in every layer of this cache."""
        routed = self.routed
        if len(routed) != len(self.layers) or self._handshake.awaiting is not None:
            return False
        if self._is_ahead():
            return True
        # Layers that disagree were left so by a forward that was interrupted: a forward of all layers says so.
        return len({layer.get_seq_length() for layer in routed}) == 1 and all(
            layer.can_begin_token() for layer in routed
        )

    def can_capture_token(self) -> bool:
        """Whether the next token's step can be captured: no host reads a disk in the middle of it."""
        return self._is_ahead() or all(layer.can_capture_token() for layer in self.routed)

    def has_padding(self, padding: Any) -> bool:
        """Whether a mask (B, tokens so far + 1) pads the next token of some row. ValueError if it does not fit."""
        return self.routed[0].has_padding(padding)

    @contextmanager
    def begin_token(self) -> Iterator[None]:
        """A step of one token a row: the host's bookkeeping comes first, inside only kernels are launched.

        What goes wrong inside is taken back: the cache is as before the step. Behind it, while the device is busy,
        comes the next step's bookkeeping where that is the same again: a host needs a millisecond for 48 layers.
        ValueError if an earlier step met K/V that are not finite.
        """
        routed = self.routed
        try:
            self.decoding.check_known_faults()
            if not self._is_ahead():
                for layer in routed:
                    layer.begin_token(layer.get_seq_length() + 1)
            capturable = self.can_capture_token()  # a store may become whole within the step: layers do not know yet
            self.decoding.active = True
            yield
            self._handshake.check_closed()
            for layer in routed:
                layer.end_token()
        except BaseException:
            self.abandon_token()
            raise
        finally:
            self.decoding.active = False
        self._work_ahead(routed, capturable)

    def abandon_token(self) -> None:
        """Forget what layers began of a step that has failed, or that is to be run again."""
        self.decoding.forget_ahead()
        for layer in self.routed:
            layer.abandon_token()

    def _work_ahead(self, routed: list[HGALayer], capturable: bool) -> None:
        """Do the next step's bookkeeping where it is more than counts in no layer.

        Layers hold the same tokens and close chunks together, so the first tells for all; each was prepared for its
        buffers and its store before the step, and only closing, and what calls `forget_ahead`, changes those.
        """
        self.decoding.forget_ahead()
        one_device = len({layer.device for layer in routed}) == 1
        if one_device and capturable and routed[0].begin_next_token():
            self.decoding.ahead_of = self.get_seq_length() + 1

    def _is_ahead(self) -> bool:
        """Whether the next step's bookkeeping is done, and nothing has changed since."""
        return self.decoding.ahead_of == self.get_seq_length() + 1

    def fork(self) -> HGACache:
        """An independent cache of the same tokens: another question about one document, without reading it again.

        Closed chunks and their summaries are shared and never copied unless one side changes them, window and
        unclosed tokens are copied, counters start anew. Each may be extended, cropped, reset or dropped; the others
        do not notice, and what nobody holds any more is given back. Forks of one cache share stores: use them from
        one thread at a time. RuntimeError in the middle of a forward.
        """
        self._check_settled()
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._handshake, twin.decoding, twin.stepper = Handshake(), Decoding(), None
        twin.layers = [
            layer.fork(twin._handshake, twin.decoding) if isinstance(layer, HGALayer) else copy.deepcopy(layer)
            for layer in self.layers
        ]
        return twin

    def save(
        self,
        path: str | os.PathLike[str],
        model: Any,
        token_ids: Tensor | Sequence[int],
        *,
        suffix: str = "",
        report: Report = _no_report,
    ) -> SavedContext:
        """Save what was read, for other processes: `token_ids`, those of every token of this cache, and its state.

        The file replaces what is at `path` only when it is whole on the disk; see DESIGN.md for its format. model: the
        one that read them. suffix: text to put between a question and the answer, such as the end of a chat template.
        report: called with the bytes written and all there are. ValueError for ids that do not fit,
        more than one sequence, or padding; OSError, with nothing changed, where the file cannot be written.
        """
        from hga.cache.saved import save_context

        self._check_settled()
        return save_context(self, Path(path), model, token_ids, suffix, report)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Any,
        *,
        store: str | None = None,
        ram_cache_bytes: int | None = None,
        report: Report = _no_report,
    ) -> HGACache:
        """The cache that was saved at `path`, for the same model; `loaded_ids` are the ids of its tokens.

        The archive is read, and checked, where a query opens it, and the file stays open: in host memory once, with
        store="nvme" or "auto" whenever it is not in the RAM cache. `store` is a tier of `HGAConfig.store` that takes
        the saved one's place: with "ram" or "device" all is read and checked now. ram_cache_bytes: as in `HGAConfig`.
        Any number of processes may load one file, and one cache `fork` any number of times: nothing writes to it.
        ValueError for a file that is damaged, of another model or format; OSError if it cannot be read, TimeoutError
        if the disk hangs.
        """
        from hga.cache.saved import load_context

        loaded: HGACache = load_context(cls, Path(path), model, store, ram_cache_bytes, report)
        return loaded

    def keep_common(self, prompt_ids: Sequence[int], held_ids: Sequence[int] | None = None) -> int:
        """Keep what this cache shares with a prompt, so that only the rest has to be read; returns tokens kept.

        held_ids: those of the cache's tokens; `loaded_ids` by default, for a cache that has read nothing else. At
        least one token of the prompt is left to read. Where the cache cannot go back that far it is emptied.
        """
        held = self.loaded_ids if held_ids is None else held_ids
        if len(held) != self.get_seq_length():
            raise ValueError(
                f"{len(held)} ids are not those of the {self.get_seq_length()} tokens that this cache holds"
            )
        kept = min(common_prefix(held, prompt_ids), len(prompt_ids) - 1)
        if kept > 0 and self.can_crop_to(kept):
            self.keep_first(kept)
            return kept
        self.reset()
        return 0

    def __deepcopy__(self, memo: dict[int, Any]) -> HGACache:
        return self.fork()

    def can_crop_to(self, tokens: int) -> bool:
        """Whether `keep_first(tokens)` can forget what comes after; layers with a full sliding window cannot."""
        if tokens >= self.get_seq_length():
            return True
        return all(
            isinstance(layer, HGALayer)
            or type(layer) is DynamicLayer
            or (type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() < layer.sliding_window)
            for layer in self.layers
        )

    def keep_first(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens, as if the others had never been fed.

        ValueError, and nothing is forgotten, where a layer cannot go back: see `can_crop_to`.
        """
        length = self.get_seq_length()
        if not 0 <= tokens <= length:
            raise ValueError(f"keep_first({tokens}): this cache holds {length} tokens; give a number from 0 to that")
        if not self.can_crop_to(tokens):
            raise ValueError(
                f"this cache cannot go back from {length} to {tokens} tokens: sliding windows and linear attention "
                "forget what they have passed. Read the prompt again with a new cache"
            )
        if tokens < length:
            self.crop(tokens - length)

    def reset(self) -> None:
        """Forget everything and give all memory back."""
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # transformers up to 5.23 fills their K/V with zeros, and keeps them
                layer.keys = layer.values = None
                layer.is_initialized = False
        super().reset()  # type: ignore[no-untyped-call]
        self.decoding.reset()
        self.stepper, self.loaded_ids = None, ()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (0 or negative), as if they had never been fed."""
        super().crop(tokens_to_remove)
        self.loaded_ids = self.loaded_ids[: self.get_seq_length()]

    def _check_settled(self) -> None:
        """RuntimeError if layers may disagree about what they have seen, ValueError after K/V that are not finite."""
        lengths = {layer.get_seq_length() for layer in self.routed}
        if self._handshake.awaiting is not None or len(lengths) > 1:
            raise RuntimeError(
                "a cache can be neither forked nor saved in the middle of a forward, nor after an interrupted one; "
                "call cache.reset() first"
            )
        self.decoding.check_all_faults()  # a twin, or a file, would not know of them

    @property
    def routed(self) -> list[HGALayer]:
        """The routed layers."""
        return [layer for layer in self.layers if isinstance(layer, HGALayer)]

    def _route(self, config: Any, hga_config: HGAConfig | str) -> None:
        """Put a routed layer in the place of each full-attention layer; the others stay as they are."""
        check_model_config(config)
        decoder = config.get_text_config(decoder=True)
        self.hga_config = HGAConfig.preset(hga_config) if isinstance(hga_config, str) else hga_config
        limit = position_limit(decoder)
        self._handshake = Handshake()
        self._checked_config = None
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
            of_layer = self.hga_config.of_layer(index, len(self.layers), shape.query_heads // shape.kv_heads)
            self.layers[index] = HGALayer(of_layer, index, shape, self._handshake, self.decoding)


def _unrouted_bytes(layer: Any) -> int:
    """Bytes that a layer of transformers' own holds, what its views hide included; 0 for a routed layer."""
    held = [x for state in vars(layer).values() for x in (state.values() if isinstance(state, dict) else [state])]
    return sum(x.untyped_storage().nbytes() for x in held if isinstance(x, Tensor))


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """Tokens that two sequences of token ids share from the start: a cache of one serves that much of the other."""
    differing = (index for index, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other)
    return next(differing, min(len(ids), len(others)))
