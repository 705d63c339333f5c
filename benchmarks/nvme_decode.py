"""Decoding one layer with its archive on NVMe against host memory, on a real model's own queries; and its prefill.

    HGA_SCRATCH=/folder/on/the/disk python benchmarks/nvme_decode.py --document book.txt --tokens 8000

Q, K and V of one layer are recorded from the model as it reads the document, so that what is routed, and how it
drifts from token to token, is real. Each store then holds all but the last tokens, which are decoded one by one;
the stores take turns, token by token, and their outputs are compared bit for bit. The budget is a share of the
context, 1/32 as 2048 tokens are of 64K. One JSON line a store: a step's time in that layer, what the layers of a
whole model would allow (attention alone), RAM hits, read latencies.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import hga
from hga.cache.routed import Scoring
from hga.cache.row import Counters, Row
from hga.models import load_model
from hga.store import MemoryStore, NvmeStore, RecordLayout, Store

SHARES = (1.0, 0.5, 0.25, 0.1)


@dataclass
class Recorded:
    """query (Hkv, R, T, D), key and value (Hkv, T, D) of one layer."""

    query: Tensor
    key: Tensor
    value: Tensor


@torch.no_grad()
def record(model: Any, ids: Tensor, layers: list[int], dtype: torch.dtype) -> list[Recorded]:
    """Q, K and V of some layers while the model reads `ids` (1, T) densely."""
    found: dict[int, Recorded] = {}

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        if module.layer_idx in layers:
            grouped = query[0].unflatten(0, (key.shape[1], -1))
            found[module.layer_idx] = Recorded(grouped.to(dtype), key[0].to(dtype), value[0].to(dtype))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("recording", attend)
    AttentionMaskInterface.register("recording", sdpa_mask)
    model.set_attn_implementation("recording")
    model.model(ids, use_cache=False)
    return [found[layer] for layer in layers]


class Variant:
    """A row over one store."""

    def __init__(self, config: hga.HGAConfig, cache_bytes: int | None) -> None:
        self.stores: list[Store] = []
        self._cache_bytes = cache_bytes
        self.row = Row(config, self._open, Counters(), None)
        self.ms: list[float] = []

    def _open(self, layout: RecordLayout) -> Store:
        if self._cache_bytes is None:
            self.stores.append(MemoryStore(layout, torch.device("cpu"), "ram"))
        else:
            self.stores.append(NvmeStore(layout, self._cache_bytes))
        return self.stores[0]

    def read(self, recorded: Recorded, stop: int, queries: bool) -> float:
        """Feed the first tokens in blocks, attended (a routed prefill), or one query a block; returns seconds."""
        scale, started = recorded.key.shape[-1] ** -0.5, time.perf_counter()
        for start in range(0, stop, 1024):
            end = min(start + 1024, stop)
            self.row.append(recorded.key[:, start:end], recorded.value[:, start:end])
            self.row.attend(recorded.query[:, :, start if queries else end - 1 : end], Scoring(scale))
        self.settle()
        return time.perf_counter() - started

    def settle(self) -> None:
        """Wait until everything is in the file."""
        while any(isinstance(store, NvmeStore) and store.traffic.queued_bytes for store in self.stores):
            time.sleep(1e-3)

    def step(self, recorded: Recorded, position: int) -> Tensor:
        """Decode the token at a position."""
        started = time.perf_counter()
        here = slice(position, position + 1)
        self.row.append(recorded.key[:, here], recorded.value[:, here])
        out = self.row.attend(recorded.query[:, :, here], Scoring(recorded.key.shape[-1] ** -0.5))
        self.ms.append((time.perf_counter() - started) * 1e3)
        return out


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--gguf-file")
    parser.add_argument("--document", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--prefill-tokens", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(options.model, options.gguf_file)
    ids = tokenizer(options.document.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, : options.tokens]
    (recorded,) = record(model, ids, [options.layer], torch.bfloat16)
    layers, tokens = model.config.num_hidden_layers, ids.shape[1]
    del model
    heads, _, width = recorded.key.shape
    common = {
        "model": options.model,
        "layer": options.layer,
        "tokens": tokens,
        "kv_heads": heads,
        "repeats": recorded.query.shape[1],
        "head_dim": width,
        "dtype": "bfloat16",
        "hardware": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    config = hga.HGAConfig(budget_tokens=max(128, tokens // 32), prefill="routed")
    kv_bytes = 4 * tokens * heads * width

    variants = {"ram": Variant(config, None)}
    variants |= {f"nvme {share:.0%}": Variant(config, int(share * kv_bytes)) for share in SHARES}
    first = tokens - options.steps
    for variant in variants.values():
        variant.read(recorded, first, queries=False)
    for position in range(first, tokens):
        outputs = [variant.step(recorded, position) for variant in variants.values()]
        if not all(torch.equal(outputs[0], out) for out in outputs[1:]):
            raise RuntimeError(f"the stores' outputs differ at position {position}")
    median = {name: statistics.median(variant.ms) for name, variant in variants.items()}
    for name, variant in variants.items():
        store = variant.stores[0]
        found: dict[str, Any] = {
            "store": name,
            "median_ms": round(median[name], 3),
            "quartiles_ms": [round(x, 3) for x in statistics.quantiles(variant.ms, n=4)[::2]],
            "over_ram": round(median[name] / median["ram"], 2),
            "tokens_per_s_all_layers": round(1e3 / (median[name] * layers), 2),
            "steps": options.steps,
            "budget_tokens": config.budget_tokens,
        }
        if isinstance(store, NvmeStore):
            stats = store.traffic.stats()
            found |= {
                "ram_hit_rate": round(stats.ram_hit_rate, 4),
                "reads_a_step": round(stats.read_operations / options.steps, 1),
                "read_bytes_a_step": round(stats.read_bytes / options.steps),
                "read_p50_ms": round(stats.read_p50_ms, 3),
                "read_p99_ms": round(stats.read_p99_ms, 3),
            }
        print(json.dumps(found | common), flush=True)
    variants.clear()

    seconds: dict[str, list[float]] = {"ram": [], "nvme 100%": [], "nvme 10%": []}
    prefilled = min(options.prefill_tokens, tokens)
    for _ in range(3):
        for name, taken in seconds.items():
            share = {"ram": None, "nvme 100%": 1.0, "nvme 10%": 0.1}[name]
            fresh = Variant(config, None if share is None else int(share * 4 * prefilled * heads * width))
            taken.append(fresh.read(recorded, prefilled, queries=True))
    for name, taken in seconds.items():
        over = statistics.median(taken) / statistics.median(seconds["ram"])
        found = {"store": name, "prefill_tokens": prefilled, "prefill_s": round(statistics.median(taken), 3)}
        print(json.dumps(found | {"prefill_over_ram": round(over, 3)} | common), flush=True)


if __name__ == "__main__":
    main()
