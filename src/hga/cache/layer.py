"""One layer of the cache: a transformers cache layer whose rows route."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hga.cache.archive import OpenStore
from hga.cache.decoding import Decoding, LayerDecoder
from hga.cache.kernels import kernels_serve
from hga.cache.layout import archived_chunks, record_layout
from hga.cache.padding import leading_pads
from hga.cache.routed import Scoring
from hga.cache.row import Counters, Row
from hga.cache.shape import LayerShape
from hga.cache.stores import growth_bytes, open_store
from hga.config import HGAConfig
from hga.ops.precision import Rows
from hga.store import NvmeStore, RecordLayout, Store, Traffic

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Handshake:
    """Which layer has taken new K/V that no attention has asked for yet; shared by a cache's layers.

    An `update()` followed by another attention implementation would be wrong without a sign: it would see
    the new tokens alone. The next layer's `update()` finds the open handshake and refuses. first_idx: the layer that
    a forward updates first; seen: its tokens, as many as the others must have seen.
    """

    awaiting: HGALayer | None = None
    first_idx: int | None = None
    seen: int = 0

    def check_closed(self) -> None:
        """RuntimeError if a layer has taken K/V that no hga attention read."""
        if self.awaiting is not None:
            raise RuntimeError(
                f"layer {self.awaiting.layer_idx} of this HGACache took K/V that no hga attention read: "
                "either the model runs another attention implementation (call hga.enable(model) or load it with "
                "attn_implementation='hga'), it changes K/V behind the cache, or an earlier forward was interrupted "
                "(then call cache.reset())"
            )


class HGALayer(CacheLayerMixin):
    """K/V of one layer, batch rows apart. `update` takes new K/V; the attention function then calls `attend`."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(
        self,
        hga_config: HGAConfig,
        layer_idx: int,
        shape: LayerShape,
        handshake: Handshake,
        decoding: Decoding | None = None,
    ) -> None:
        """hga_config: of this layer (`HGAConfig.of_layer`)."""
        super().__init__()  # type: ignore[no-untyped-call]
        hga_config.selectors(1)  # refuses "mixed" before there is anything to lose
        self.hga_config = hga_config
        self.layer_idx = layer_idx
        self.counters = Counters()
        self.shape = shape
        self._handshake = handshake
        self._decoding = Decoding() if decoding is None else decoding
        self._decoder: LayerDecoder | None = None
        self._stores: list[Store] = []  # the rows share one, opened with the first closed chunk
        self._new: tuple[Tensor, Tensor] | None = None
        self._seen = 0
        self.rows: list[Row] = []

    # ---- the transformers protocol -------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Fix dtype, device and batch from the first K/V, (B, Hkv, T, D)."""
        if key_states.dtype not in SUPPORTED_DTYPES:
            raise TypeError(
                f"K/V of {key_states.dtype} are not supported; load the model in one of "
                f"{', '.join(str(dtype) for dtype in SUPPORTED_DTYPES)}"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        frequencies = self.shape.inverse_frequencies if self.hga_config.summary == "mixed_rope" else None
        opening = self._opening()
        self.rows = [Row(self.hga_config, opening, self.counters, frequencies) for _ in range(key_states.shape[0])]
        self.is_initialized = True

    def _opening(self) -> OpenStore:
        """What opens the rows' store, once for all of them."""
        return functools.partial(open_store, self.hga_config, self.device, self.shape.routed_layers, self._stores)

    def open_store(self, layout: RecordLayout, filled: Store | None = None) -> Store:
        """The store that all rows share from now on: `filled`, else an empty one of the config's tier."""
        self._stores[:] = [] if filled is None else [filled]
        return self.rows[0].open_store(layout)

    def restore(self, keys: Tensor, values: Tensor, chunks: list[int], summaries: dict[str, Rows]) -> None:
        """Be a layer of one row, of which the store holds `chunks`; see `Row.restore`. `lazy_initialization` first."""
        self.rows[0].restore(keys, values, chunks, summaries)
        self._seen = self.rows[0].length

    def fork(self, handshake: Handshake, decoding: Decoding) -> HGALayer:
        """A twin for another cache: it shares closed chunks and summaries, and goes its own way from here."""
        twin = HGALayer(self.hga_config, self.layer_idx, self.shape, handshake, decoding)
        twin._stores, twin._seen, twin.is_initialized = self._stores, self._seen, self.is_initialized
        if self.is_initialized:
            twin.dtype, twin.device = self.dtype, self.device
        twin.rows = [row.fork(twin.counters) for row in self.rows]
        return twin

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new K/V (B, Hkv, T, D) and return them, the key tensor linked to this layer.

        RuntimeError if an earlier update was never attended (another attention implementation ran); ValueError
        or TypeError if the K/V do not fit this cache.
        """
        self._handshake.check_closed()
        if not self.is_initialized:
            self.shape.check_kv(self.layer_idx, key_states, value_states)
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        self._new = (key_states.detach(), value_states.detach())
        if not self._decoding.active:
            self._decoding.forget_ahead()
            self._seen += key_states.shape[2]
            self._check_step()
        self._handshake.awaiting = self
        key_states._hga_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """K/V length and offset that a mask has to cover."""
        return self._seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self._seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything and give all memory back."""
        for row in self.rows:
            row.release()
        self.rows, self._new, self._seen, self.is_initialized = [], None, 0, False
        self._stores, self._decoder = [], None
        self._handshake.awaiting = None
        self._decoding.forget_ahead()
        self.counters.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (0 or negative), as if they had never been fed."""
        removed = -int(tokens_to_remove)
        if removed < 0:
            raise ValueError(
                f"crop({-removed}): give the number of tokens to remove as a negative number, e.g. crop({removed})"
            )
        self._decoding.forget_ahead()
        for row in self.rows:
            row.crop(row.length - removed)
        if self._stores and not any(row.chunks for row in self.rows):
            # A fork that shares no chunk any more does not keep the store of others alive by its own chunks.
            self._stores = []
            for row in self.rows:
                row.use_store(self._opening())
        self._seen = max(0, self._seen - removed)
        if self._decoder is not None:
            self._decoder.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i becomes a copy of row beam_idx[i]; closed chunks are shared."""
        self._take_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times; closed chunks are shared."""
        self._take_rows([index for index in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices` (integers, or a mask)."""
        chosen = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._take_rows(chosen.tolist())

    def offload(self) -> None:
        """Nothing to do: the archive already lives in the store."""

    def prefetch(self) -> None:
        """Nothing to do: routing fetches what it needs."""

    # ---- attention -----------------------------------------------------------------------------------

    def attend(self, query: Tensor, value: Tensor, padding: Tensor | None, scoring: Scoring) -> Tensor:
        """Attention of the new tokens: query (B, Hq, T, D) -> (B, Hq, T, D); rows of pad tokens are zero.

        padding: bool (B, seen) with False for left padding, or None. ValueError for padding elsewhere.
        """
        if self._new is None or self._handshake.awaiting is not self:
            raise RuntimeError(f"layer {self.layer_idx}: attention without a preceding update() of this cache layer")
        keys, values = self._new
        if value.data_ptr() != values.data_ptr():
            raise RuntimeError(
                f"layer {self.layer_idx}: the model changes values behind the cache; not supported by hga"
            )
        self._new = None
        with torch.cuda.device_of(query):  # kernels launch on the current device, which need not be the layer's
            return self._attend_new(query, keys, values, padding, scoring)

    def _attend_new(
        self, query: Tensor, keys: Tensor, values: Tensor, padding: Tensor | None, scoring: Scoring
    ) -> Tensor:
        by_kernels = self._decoding.active
        if not by_kernels:
            self._decoding.check_faults(self.device)
            pads = self._pads(padding, query.shape[2], self._seen)
            by_kernels = query.shape[2] == 1 and self.can_begin_token()
            if by_kernels:
                self.begin_token(self._seen)
        if by_kernels:
            assert self._decoder is not None
            out = self._decoder.attend(query, keys, values, scoring)
            if not self._decoding.active:
                self._count_token()
        else:
            out = self._attend_rows(query, keys, values, pads, scoring)
        # Only now: after an error on the way, such as a full host, layers disagree, and the next update refuses.
        self._handshake.awaiting = None
        return out

    def _attend_rows(self, query: Tensor, keys: Tensor, values: Tensor, pads: list[int], scoring: Scoring) -> Tensor:
        tokens, kv_heads = query.shape[2], keys.shape[1]
        out = torch.zeros_like(query)
        for index, (row, pad) in enumerate(zip(self.rows, pads, strict=True)):
            if pad == tokens:
                continue
            row.append(keys[index, :, pad:], values[index, :, pad:])
            grouped = query[index, :, pad:].unflatten(0, (kv_heads, -1))  # (Hkv, R, T', D)
            out[index, :, pad:] = row.attend(grouped, scoring).flatten(0, 1)
        return out

    # ---- single tokens by kernels --------------------------------------------------------------------

    def can_begin_token(self) -> bool:
        """Whether kernels serve the next token of every row. Closes what is due before it."""
        return (
            self.is_initialized
            and kernels_serve(self.hga_config, self.dtype, self.device)
            and all(row.close_due() for row in self.rows)
        )

    def can_capture_token(self) -> bool:
        """Whether kernels find the whole archive by address; else the host brings groups in the middle of a step."""
        return all(store.gpu_readable for store in self._stores)

    def begin_token(self, step: int) -> None:
        """Do a token's bookkeeping on the host, so that `attend` only launches kernels. step: a growing number.

        `can_begin_token` comes first. The rows count the token when it ends.
        """
        for row in self.rows:
            row.make_room_for_token()
        if self._decoder is None:
            self._decoder = LayerDecoder(self.hga_config, self._decoding, self.shape.query_heads)
        self._decoder.prepare(self.rows, step)

    def end_token(self) -> None:
        """The step that `begin_token` began is done, or under way on the device."""
        self._count_token()
        self._seen += 1  # last: layers of which some were interrupted before this disagree, which is refused

    def _count_token(self) -> None:
        for row in self.rows:
            row.end_token()

    def begin_next_token(self) -> bool:
        """Tell the device, which is still busy, of the token after the last, where nothing else is due before it."""
        if any(row.is_due() for row in self.rows):
            return False
        self._decoding.publish(self.rows, self._seen + 1, self.device)
        return True

    def abandon_token(self) -> None:
        """The step that `begin_token` began has failed."""
        self._new, self._handshake.awaiting = None, None
        if self._decoder is not None:
            self._decoder.forget()  # the slots of this step's groups look in use; another token may come instead

    def has_padding(self, padding: Tensor | None) -> bool:
        """Whether a mask (B, seen + 1) pads the next token of some row. ValueError for a mask that does not fit."""
        return any(self._pads(padding, 1, self._seen + 1))

    def _pads(self, padding: Tensor | None, tokens: int, seen: int) -> list[int]:
        """Leading pad tokens of each row among the last `tokens` of `seen`."""
        return leading_pads(padding, [row.length for row in self.rows], tokens, seen)

    # ---- accounting ----------------------------------------------------------------------------------

    def summary_bytes(self) -> int:
        """Bytes of summaries of all rows, beside the model."""
        return sum(row.summary_bytes() for row in self.rows)

    def window_bytes(self) -> int:
        """Bytes of sink, window and unclosed tokens of all rows, beside the model."""
        return sum(row.window_bytes() for row in self.rows)

    def store_bytes(self) -> dict[str, int]:
        """Bytes of the archive by tier; shared chunks once, those that only a fork of this cache holds included."""
        return self._stores[0].held_bytes() if self._stores else {}

    def allocated_bytes(self) -> dict[str, int]:
        """Bytes by tier that the archive takes, what it keeps free for later chunks included."""
        return self._stores[0].allocated_bytes() if self._stores else {}

    def store_traffic(self) -> Traffic | None:
        """What an archive on NVMe has read and written; None for other tiers, and before the first closed chunk."""
        return next((store.traffic for store in self._stores if isinstance(store, NvmeStore)), None)

    def store_identity(self) -> int:
        """A number that forks share as long as they share a store."""
        return id(self._stores)

    def cached_bytes(self) -> int:
        """Bytes of archive groups cached beside the model for decoding."""
        return 0 if self._decoder is None else self._decoder.cached_bytes()

    def traffic(self) -> tuple[int, int, int]:
        """Hits and misses of that cache, and unique groups asked of it. Waits for the device."""
        return (0, 0, 0) if self._decoder is None else self._decoder.traffic()

    # ---- checks that a model's forward makes beforehand ----------------------------------------------

    def check_room(self, tokens: int) -> None:
        """ValueError if a prompt of `tokens` more ends beyond the model's positions."""
        self.shape.check_positions(self._seen, tokens)

    def growth_bytes(self, tokens: int, rows: int, dtype: torch.dtype) -> int:
        """Bytes that this layer's store will take for `tokens` more in each row, beyond what it has allocated.

        Of a disk, where the archive is on one, else of memory. rows and dtype speak for a layer that has not seen K/V.
        """
        if self.is_initialized:
            dtype = self.dtype
        layout = record_layout(self.hga_config, self.shape.kv_heads, self.shape.head_dim, dtype)
        lengths = [row.length for row in self.rows] or [0] * rows
        closed = sum(archived_chunks(self.hga_config, length + tokens) for length in lengths)
        closing = closed - sum(row.chunks for row in self.rows)
        return growth_bytes(self.hga_config, self.shape.routed_layers, self._stores, layout, closing)

    # ---- inside --------------------------------------------------------------------------------------

    def _take_rows(self, indices: list[int]) -> None:
        """Replace the rows by those at `indices`; the first taker of a row keeps it, others fork it."""
        taken: set[int] = set()
        rows = []
        for index in indices:
            rows.append(self.rows[index].fork() if index in taken else self.rows[index])
            taken.add(index)
        for index, row in enumerate(self.rows):
            if index not in taken:
                row.release()
        self.rows, self._decoder = rows, None
        self._decoding.forget_ahead()

    def _check_step(self) -> None:
        """RuntimeError if the cache's layers have not seen the same tokens: a forward ended in the middle."""
        handshake = self._handshake
        if handshake.first_idx in (None, self.layer_idx):
            handshake.first_idx, handshake.seen = self.layer_idx, self._seen
        if self._seen != handshake.seen:
            raise RuntimeError(
                f"layer {self.layer_idx} of this HGACache has seen {self._seen} tokens, layer {handshake.first_idx} "
                f"{handshake.seen}: an earlier forward was interrupted; call cache.reset()"
            )

    def _check(self, keys: Tensor, values: Tensor) -> None:
        self.shape.check_kv(self.layer_idx, keys, values)
        if keys.dtype != self.dtype or values.dtype != self.dtype:
            raise TypeError(f"K/V of {keys.dtype} and {values.dtype} do not fit a cache that holds {self.dtype}")
        if keys.device != self.device or values.device != self.device:
            raise ValueError(
                f"K/V on {keys.device} and {values.device} do not fit a cache on {self.device}; "
                "call cache.reset() first"
            )
        if keys.shape[0] != len(self.rows):
            raise ValueError(
                f"a batch of {keys.shape[0]} does not fit a cache of {len(self.rows)} rows; call cache.reset() first"
            )
        self.check_room(keys.shape[2])
        if torch.is_grad_enabled() and keys.requires_grad:
            raise RuntimeError(
                "an HGACache is for inference: wrap the call in torch.no_grad(), or train without a cache"
            )
