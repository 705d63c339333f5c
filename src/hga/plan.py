"""Memory planning: what a model, a context and a routing config need, from the configs alone."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from hga.cache.families import routed_layers
from hga.cache.layout import archive_bytes, archived_chunks, record_layout, summary_bytes_per_token
from hga.cache.routed import NUMBERS_AT_ONCE
from hga.cache.summaries import DECODED_AT_ONCE
from hga.config import TILE_TOKENS, HGAConfig
from hga.models import load_config
from hga.ops.prefill_routed import MASS_DTYPE

GIB = 1 << 30
_PREFILL_SCRATCH_BYTES = 3 << 28  # masses, choices and widened summaries of a routed prefill on a GPU
_RUNTIME_BYTES = GIB // 2  # a CUDA context with its kernels: measured between 0.3 and 0.6 GiB
_LONGEST = 1 << 27  # a search bound far above any model's positions
_QUANTISED_BITS = {"fp8": 8.0, "mxfp4": 4.25, "bitsandbytes_4bit": 4.5, "bitsandbytes_8bit": 8.0}


@dataclass(frozen=True)
class Plan:
    """Bytes that one sequence of `context` tokens needs, by place.

    On the GPU: weight_bytes; summary_bytes and window_bytes (sink, window, unclosed tokens and a block) of
    the routed layers; other_cache_bytes (layers that are not routed); working_bytes (K/V fetched at once);
    buffer_bytes (activations of a block and scores, an estimate); runtime_bytes (the CUDA context, assumed);
    peak_bytes, their sum, or what the densely read beginning needs where that is more. In the store:
    store_bytes: host_bytes in host memory (with store="nvme" or "auto" permutations and a RAM cache of the given
    size) and nvme_bytes in a scratch file. Instead of all that, dense K/V would need dense_kv_bytes (16 bits) on the
    GPU, or dense_kv_8bit_bytes, dense_kv_4bit_bytes (scales not counted). With gpu_bytes given: whether each fits,
    and longest_context, the longest that fits with HGA (0 if none does).
    """

    context: int
    parameters: int
    weight_bytes: int
    layers: int
    routed_layers: tuple[int, ...]
    kv_dtype: str
    store: str
    store_bytes: int
    host_bytes: int
    nvme_bytes: int
    summary_bytes: int
    window_bytes: int
    other_cache_bytes: int
    working_bytes: int
    buffer_bytes: int
    runtime_bytes: int
    peak_bytes: int
    dense_kv_bytes: int
    dense_kv_8bit_bytes: int
    dense_kv_4bit_bytes: int
    gpu_bytes: int | None
    fits: bool | None
    longest_context: int | None
    dense_fits: bool | None
    dense_8bit_fits: bool | None
    dense_4bit_fits: bool | None
    max_position_embeddings: int | None

    def row(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)


def bundled_models() -> list[str]:
    """Names of the models whose config ships with the package."""
    return sorted(entry.name.removesuffix(".json") for entry in (files("hga") / "data" / "configs").iterdir())


def find_config(name: str) -> Any:
    """The transformers config called `name`: a bundled model, a config file, a model folder or a hub id.

    ValueError in one line if there is none, or its JSON is not a model's config.
    """
    if name.lower() in bundled_models():
        entry = files("hga") / "data" / "configs" / f"{name.lower()}.json"
        return _parse_config(name, entry.read_text(encoding="utf-8"))
    path = Path(name).expanduser()
    if path.suffix == ".json":
        if not path.is_file():
            raise ValueError(f"config file {name} does not exist")
        try:
            return _parse_config(name, path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    return load_config(name)


def _parse_config(name: str, text: str) -> Any:
    try:
        fields = json.loads(text)
        return AutoConfig.for_model(**fields)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not a JSON text: {error}") from error
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{name} is not the config of a model that transformers knows; it needs a known model_type "
            f"({' '.join(str(error).split())[:120]})"
        ) from error


def plan(
    model_config: Any,
    hga_config: HGAConfig,
    context: int,
    *,
    gpu_bytes: int | None = None,
    weight_bits: float | None = None,
) -> Plan:
    """Plan one sequence of `context` tokens. No weights are loaded.

    gpu_bytes: memory of the GPU; without it nothing is said to fit. weight_bits: width of the weight matrices
    (embeddings and output head keep the model's type), by default what the config's quantisation says.
    ValueError for a context below 1, or a model or config that HGA cannot route.
    """
    if context < 1:
        raise ValueError(f"context={context} must be at least 1 token")
    if gpu_bytes is not None and gpu_bytes <= 0:
        raise ValueError(f"gpu_bytes={gpu_bytes} must be above 0")
    if weight_bits is not None and not 1 <= weight_bits <= 32:
        raise ValueError(f"weight_bits={weight_bits} must lie between 1 and 32")
    needs = _Needs.of(model_config, hga_config, weight_bits)
    peak = needs.peak(context)
    dense = {bits: needs.dense_kv(context, bits) for bits in (16, 8, 4)}
    fixed = needs.weight_bytes + needs.activation_bytes + _RUNTIME_BYTES
    dense_fits = {bits: None if gpu_bytes is None else fixed + dense[bits] <= gpu_bytes for bits in dense}
    return Plan(
        context=context,
        parameters=needs.parameters,
        weight_bytes=needs.weight_bytes,
        layers=len(needs.cache_layers),
        routed_layers=needs.routed,
        kv_dtype=str(needs.kv_dtype).removeprefix("torch."),
        store=hga_config.store,
        store_bytes=needs.store(context),
        host_bytes=needs.host(context),
        nvme_bytes=needs.nvme(context),
        summary_bytes=needs.summaries(context),
        window_bytes=needs.window(context),
        other_cache_bytes=needs.other_caches(context),
        working_bytes=needs.working(context),
        buffer_bytes=needs.buffers(context),
        runtime_bytes=_RUNTIME_BYTES,
        peak_bytes=peak,
        dense_kv_bytes=dense[16],
        dense_kv_8bit_bytes=dense[8],
        dense_kv_4bit_bytes=dense[4],
        gpu_bytes=gpu_bytes,
        fits=None if gpu_bytes is None else peak <= gpu_bytes,
        longest_context=None if gpu_bytes is None else needs.longest(gpu_bytes),
        dense_fits=dense_fits[16],
        dense_8bit_fits=dense_fits[8],
        dense_4bit_fits=dense_fits[4],
        max_position_embeddings=getattr(needs.decoder, "max_position_embeddings", None),
    )


@dataclass(frozen=True)
class _Needs:
    """The arithmetic of a plan: everything about a model and a config that does not depend on the context."""

    decoder: Any
    config: HGAConfig
    parameters: int
    weight_bytes: int
    kv_dtype: torch.dtype
    head_dim: int
    cache_layers: list[Any]
    routed: tuple[int, ...]

    @classmethod
    def of(cls, model_config: Any, config: HGAConfig, weight_bits: float | None) -> _Needs:
        routed = routed_layers(model_config, config)
        decoder = model_config.get_text_config(decoder=True)
        dtype = decoder.dtype if isinstance(decoder.dtype, torch.dtype) else torch.bfloat16
        parameters, weight_bytes = _weigh(model_config, dtype, weight_bits)
        return cls(
            decoder=decoder,
            config=config,
            parameters=parameters,
            weight_bytes=weight_bytes,
            kv_dtype=dtype,
            head_dim=getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads,
            cache_layers=DynamicCache(config=decoder).layers,
            routed=routed,
        )

    @property
    def row_numbers(self) -> int:
        """Numbers of K and V of one token in one layer."""
        return int(2 * self.decoder.num_key_value_heads * self.head_dim)

    @property
    def row_bytes(self) -> int:
        return self.row_numbers * self.kv_dtype.itemsize

    def archived(self, context: int) -> int:
        """Tokens in closed chunks."""
        return archived_chunks(self.config, context) * self.config.chunk_size

    def store(self, context: int) -> int:
        layout = record_layout(self.config, self.decoder.num_key_value_heads, self.head_dim, self.kv_dtype)
        return archive_bytes(self.config, layout, len(self.routed), context)

    def nvme(self, context: int) -> int:
        """Records in the scratch file; with "auto" only if they outgrow a given RAM cache."""
        records = self.archived(context) * len(self.routed) * self.row_bytes
        cache = self.config.ram_cache_bytes
        spilled = self.config.store == "nvme" or (self.config.store == "auto" and cache and records > cache)
        return records if spilled else 0

    def host(self, context: int) -> int:
        """The store's share of host memory; a RAM cache without a given size is not known beforehand."""
        nvme, stored = self.nvme(context), self.store(context)
        if self.config.store == "device":
            return 0
        return stored - nvme + min(nvme, self.config.ram_cache_bytes or 0)

    def summaries(self, context: int) -> int:
        token = summary_bytes_per_token(self.config, self.head_dim, self.kv_dtype)
        return int(len(self.routed) * self.decoder.num_key_value_heads * self.archived(context) * token)

    def window(self, context: int) -> int:
        """Sink, window and unclosed tokens of all layers, and the block that one layer reads, with slack."""
        config = self.config
        near = config.sink_tokens + config.window_tokens + config.chunk_size + TILE_TOKENS
        block = self._near_bytes(min(context, config.block_tokens))
        return len(self.routed) * self._near_bytes(min(context, near)) + block

    def beginning(self, context: int) -> int:
        """K/V beside the model while queries are still dense: nothing is archived yet."""
        tokens = min(context, self.config.dense_positions)
        return len(self.routed) * self._near_bytes(tokens + min(tokens, self.config.block_tokens))

    def _near_bytes(self, tokens: int) -> int:
        return (tokens + max(TILE_TOKENS, tokens // 8)) * self.row_bytes

    def other_caches(self, context: int) -> int:
        return sum(self._own_cache(layer, context) for i, layer in enumerate(self.cache_layers) if i not in self.routed)

    def _own_cache(self, layer: Any, context: int) -> int:
        window = getattr(layer, "sliding_window", None)
        if isinstance(layer, DynamicLayer):
            return self.row_bytes * min(context, window or context)
        # Linear attention keeps a state instead of K/V: one matrix a value head, in float32.
        heads = getattr(self.decoder, "linear_num_value_heads", 0)
        key, value = (getattr(self.decoder, f"linear_{kind}_head_dim", 0) for kind in ("key", "value"))
        return int(4 * heads * key * value)

    def working(self, context: int) -> int:
        """The larger of what a prefill and what decoding need: one layer's archive, staged, or all layers' slots."""
        archived = self.archived(context)
        return max(archived * self.row_bytes, sum(self.slots(index, archived) for index in self.routed))

    def slots(self, layer: int, archived: int) -> int:
        """Groups that a layer caches beside the model while it decodes, and the tables that say where they are."""
        groups = archived // self.config.group_size
        cached = min(groups, max(2, self.choices(layer)) * self.config.routed_groups)
        tables = 4 * self.decoder.num_key_value_heads * (groups + 5 * cached)
        return int(cached * self.config.group_size * self.row_bytes + tables)

    def choices(self, layer: int) -> int:
        """How many choices the query heads of a KV head make in a layer."""
        repeats: int = self.decoder.num_attention_heads // self.decoder.num_key_value_heads
        return self.config.of_layer(layer, len(self.cache_layers), repeats).selectors(repeats)

    def buffers(self, context: int) -> int:
        """Activations of a block, and what routing one layer computes: scores, and a block of decoded summaries."""
        nodes = self.archived(context) // self.config.node_size
        decoded = 4 * DECODED_AT_ONCE * self.decoder.num_key_value_heads * self.head_dim
        scores = 4 * 4 * max(NUMBERS_AT_ONCE, nodes * self.decoder.num_attention_heads)
        by_kernels = max(min(_PREFILL_SCRATCH_BYTES, scores * TILE_TOKENS), self.strip_masses(context))
        return self.activation_bytes + (decoded + scores + by_kernels if nodes else 0)

    def strip_masses(self, context: int) -> int:
        """What a routed prefill by kernels cannot cut further: the masses of one KV head's choices for a tile."""
        most = self.choices(len(self.cache_layers) - 1)
        return MASS_DTYPE.itemsize * TILE_TOKENS * most * self.archived(context) // self.config.group_size

    @property
    def activation_bytes(self) -> int:
        """What a block of a forward holds in one layer, and the logits of one position."""
        decoder = self.decoder
        active = getattr(decoder, "intermediate_size", 0)
        if experts := getattr(decoder, "num_experts_per_tok", None):
            active = experts * getattr(decoder, "moe_intermediate_size", active)
        queries = decoder.num_attention_heads * self.head_dim
        width = 4 * decoder.hidden_size + 3 * active + 2 * queries + self.row_numbers
        in_model_type = self.config.block_tokens * width * self.kv_dtype.itemsize
        return int(in_model_type + 4 * self.config.block_tokens * queries + 4 * decoder.vocab_size)

    def peak(self, context: int) -> int:
        caches = self.summaries(context) + self.window(context) + self.working(context)
        if self.config.store == "device":
            caches += self.store(context)
        caches = max(caches, self.beginning(context)) + self.other_caches(context)
        return self.weight_bytes + caches + self.buffers(context) + _RUNTIME_BYTES

    def dense_kv(self, context: int, bits: int) -> int:
        """K/V of all layers without HGA, in `bits` a number."""
        layers = sum(self._own_cache(layer, context) for layer in self.cache_layers)
        return layers * bits // (8 * self.kv_dtype.itemsize)

    def longest(self, gpu_bytes: int) -> int:
        """The longest context, in whole chunks, whose peak fits; 0 if not even one chunk does."""
        low, high = 0, _LONGEST // self.config.chunk_size
        while low < high:
            middle = (low + high + 1) // 2
            if self.peak(middle * self.config.chunk_size) <= gpu_bytes:
                low = middle
            else:
                high = middle - 1
        return low * self.config.chunk_size


def _weigh(model_config: Any, dtype: torch.dtype, bits: float | None) -> tuple[int, int]:
    """Parameters and bytes of the model's weights, counted on a model without storage."""
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(model_config)
    bits = bits or _quantised_bits(model_config)
    ends = {id(x.weight) for x in (model.get_input_embeddings(), model.get_output_embeddings()) if x is not None}
    count, total = 0, 0.0
    for parameter in model.parameters():
        count += parameter.numel()
        matrix = parameter.ndim >= 2 and id(parameter) not in ends
        total += parameter.numel() * (bits / 8 if matrix and bits else dtype.itemsize)
    return count, int(total)


def _quantised_bits(model_config: Any) -> float | None:
    quantisation = getattr(model_config, "quantization_config", None)
    if quantisation is None:
        return None
    fields = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    method = str(fields.get("quant_method", "")).rsplit(".", 1)[-1].lower()
    if method == "bitsandbytes":
        method += "_4bit" if fields.get("load_in_4bit") else "_8bit"
    return _QUANTISED_BITS.get(method) or fields.get("bits")
