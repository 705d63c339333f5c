"""Decoding one layer of Qwen3-30B-A3B's shape at 64K from NVMe against host memory, with a real model's choices.

    HGA_SCRATCH=/folder/on/the/disk python benchmarks/nvme_replay.py --document book.txt

What a store is asked for, and how it drifts from step to step, is recorded; the numbers in the records are random,
since no store looks at them. SmolLM2 reads 8,192 tokens, its limit, and every KV head of several layers decodes its
last ones, routed. Eight such heads' choices make one head's at 64K: their contexts are interleaved chunk by chunk, so
the eighth part of each step's choice drifts as one real head's does, with its real neighbours inside a chunk. A whole
layer's step is timed (scores, selection, fetch, attention, far field; float32 on a CPU, one thread), with the
recorded groups, as many, in the place of those that the random queries choose; the stores take turns and their
outputs are compared bit for bit. One JSON line a store: a step, what 48 such layers would allow (attention alone),
RAM hits, reads.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from cpu_decode import HEAD_DIM, KV_HEADS, REPEATS
from nvme_decode import SHARES, Recorded, Variant, record
from torch import Tensor

import hga
from hga.models import load_model
from hga.store import MemoryStore, NvmeStore, RecordLayout, Store

STREAMS = 8
LAYERS = 48
_SCATTER = 2654435761  # a hash of places: Knuth's
_SPARE = 2  # a head chooses so many times more at 8K than its part at 64K: recent tokens take a part of each choice
_RECORDED_TOKENS, _TOKENS = 8192, 65536


class Recording(MemoryStore):
    """Host memory that notes what it is asked for: chunk and group (Hkv, U) of each step."""

    asked: list[tuple[Tensor, Tensor]]

    def fetch(self, ids: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """See `Store.fetch`."""
        self.asked.append((ids, groups))
        return super().fetch(ids, groups)


class Replaying:
    """A store that is asked for recorded groups, whatever is chosen."""

    def __init__(self, store: Store, steps: list[Tensor]) -> None:
        self.store, self.steps, self.step = store, steps, -1
        self.ms: list[float] = []  # that fetching takes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def fetch(self, ids: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """As many recorded groups as were asked for, so that the step goes on as ever."""
        if self.step < 0:  # filling
            return self.store.fetch(ids, groups)
        places, per_chunk = self.steps[self.step], self.store.layout.groups
        if places.shape[1] < ids.shape[1]:
            raise RuntimeError(f"{places.shape[1]} groups were recorded, {ids.shape[1]} are asked for")
        # Which are left out depends on the group alone, so that leaving out adds no drift.
        kept = (places * _SCATTER % (1 << 31)).argsort(-1)[:, : ids.shape[1]].sort(-1).values
        places = places.gather(1, kept)
        started = time.perf_counter()
        found = self.store.fetch(places // per_chunk, places % per_chunk)
        self.ms.append((time.perf_counter() - started) * 1e3)
        return found


def read_or_record(path: Path | None, name: str, document: Path) -> list[Recorded]:
    """Q, K and V of as many layers as have the heads that are needed, spread over the model."""
    if path is not None and path.exists():
        return [Recorded(*layer) for layer in torch.load(path)]
    model, tokenizer = load_model(name)
    text = document.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :_RECORDED_TOKENS]
    if ids.shape[1] < _RECORDED_TOKENS:
        raise ValueError(f"{document} has {ids.shape[1]} tokens; give a text of {_RECORDED_TOKENS}")
    count, needed = model.config.num_hidden_layers, -(-KV_HEADS * STREAMS // model.config.num_key_value_heads)
    recorded = record(model, ids, [index * count // needed for index in range(needed)], torch.bfloat16)
    if path is not None:
        torch.save([(layer.query, layer.key, layer.value) for layer in recorded], path)
    return recorded


@torch.no_grad()
def choices(recorded: Recorded, config: hga.HGAConfig, steps: int) -> list[tuple[Tensor, Tensor]]:
    """What a layer's heads ask of the store while they decode the last tokens."""
    variant = Variant(config, None)
    made: list[Recording] = []

    def open_store(layout: RecordLayout) -> Recording:
        if not made:
            made.append(Recording(layout, torch.device("cpu"), "ram"))
            made[0].asked = []
        return made[0]

    variant.row.open_store = open_store
    first = recorded.key.shape[1] - steps
    variant.read(recorded, first, queries=False)
    made[0].asked.clear()
    for position in range(first, first + steps):
        variant.step(recorded, position)
    return made[0].asked


def interleave(streams: list[list[tuple[Tensor, Tensor]]], config: hga.HGAConfig) -> list[Tensor]:
    """Choices of heads (each a step's ids and groups (U,)) as places (KV_HEADS, U) over eight times the chunks."""
    per_chunk, steps = config.chunk_size // config.group_size, []
    for at in range(len(streams[0])):
        heads = []
        for head in range(KV_HEADS):
            own = streams[head * STREAMS : (head + 1) * STREAMS]
            asked = [stream[at] for stream in own]
            heads.append(torch.cat([(i * STREAMS + index) * per_chunk + g for index, (i, g) in enumerate(asked)]))
        least = min(map(len, heads))
        steps.append(torch.stack([places[:least].sort().values for places in heads]))
    return steps


def fill(config: hga.HGAConfig, cache_bytes: int | None, steps: list[Tensor]) -> tuple[Variant, Replaying]:
    """A row of 64K random tokens over one store."""
    variant = Variant(config, cache_bytes)
    opened: list[Replaying] = []
    plain = variant.row.open_store

    def open_store(layout: RecordLayout) -> Any:
        if not opened:
            opened.append(Replaying(plain(layout), steps))
        return opened[0]

    variant.row.open_store = open_store
    generator = torch.Generator().manual_seed(0)
    for _ in range(_TOKENS // 1024):
        keys, values = (torch.randn(KV_HEADS, 1024, HEAD_DIM, generator=generator).bfloat16() for _ in range(2))
        block = Recorded(torch.zeros(KV_HEADS, REPEATS, 1024, HEAD_DIM).bfloat16(), keys, values)
        variant.read(block, 1024, queries=False)
    variant.ms.clear()
    return variant, opened[0]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=192)
    parser.add_argument("--warm-up", type=int, default=64, help="steps before, that fill the caches")
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--recording", type=Path, help="where Q, K and V are kept, or taken from if they are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size, steps = options.group_size, options.steps + options.warm_up
    config = hga.HGAConfig(prefill="routed", ordering="position", group_size=size, node_size=size)
    always = config.sink_tokens + config.window_tokens
    part = _SPARE * config.routed_groups // STREAMS
    recorded_config = config.replace(ordering="content", budget_tokens=always + part * size)
    recorded = read_or_record(options.recording, options.model, options.document)
    streams: list[list[tuple[Tensor, Tensor]]] = []
    for layer in recorded:
        asked = choices(layer, recorded_config, steps)
        streams += [[(i[head], g[head]) for i, g in asked] for head in range(layer.key.shape[0])]
    recorded.clear()
    replayed = interleave(streams[: KV_HEADS * STREAMS], config)

    kv_bytes = 4 * _TOKENS * KV_HEADS * HEAD_DIM
    shares: dict[str, float | None] = {"ram": None} | {f"nvme {share:.0%}": share for share in SHARES}
    variants = {
        name: fill(config, None if share is None else int(share * kv_bytes), replayed) for name, share in shares.items()
    }
    generator = torch.Generator().manual_seed(1)
    before: dict[str, Any] = {}
    for at in range(steps):
        if at == options.warm_up:
            for name, (variant, store) in variants.items():
                variant.ms.clear()
                store.ms.clear()
                if isinstance(store.store, NvmeStore):
                    before[name] = store.store.traffic.stats()
        query = torch.randn(KV_HEADS, REPEATS, 1, HEAD_DIM, generator=generator).bfloat16()
        keys, values = (torch.randn(KV_HEADS, 1, HEAD_DIM, generator=generator).bfloat16() for _ in range(2))
        outputs = []
        for variant, store in variants.values():
            store.step = at
            outputs.append(variant.step(Recorded(query, keys, values), 0))
        if not all(torch.equal(outputs[0], out) for out in outputs[1:]):
            raise RuntimeError(f"the stores' outputs differ at step {at}")
    median = {name: statistics.median(variant.ms) for name, (variant, _) in variants.items()}
    new = [len(set(b[0].tolist()) - set(a[0].tolist())) / b.shape[1] for a, b in pairwise(replayed)]
    for name, (variant, store) in variants.items():
        found: dict[str, Any] = {
            "store": name,
            "median_ms": round(median[name], 3),
            "quartiles_ms": [round(x, 3) for x in statistics.quantiles(variant.ms, n=4)[::2]],
            "over_ram": round(median[name] / median["ram"], 2),
            "fetch_ms": round(statistics.median(store.ms), 3),
            "tokens_per_s_all_layers": round(1e3 / (median[name] * LAYERS), 2),
        }
        if isinstance(store.store, NvmeStore):
            stats, first = store.store.traffic.stats(), before[name]
            hits, misses = stats.ram_hits - first.ram_hits, stats.ram_misses - first.ram_misses
            found |= {
                "ram_hit_rate": round(hits / (hits + misses), 4),
                "reads_a_step": round((stats.read_operations - first.read_operations) / options.steps, 1),
                "read_bytes_a_step": round((stats.read_bytes - first.read_bytes) / options.steps),
                "read_p50_ms": round(stats.read_p50_ms, 3),
                "read_p99_ms": round(stats.read_p99_ms, 3),
            }
        found |= {
            "context": _TOKENS,
            "budget_tokens": config.budget_tokens,
            "group_size": size,
            "groups_a_step": KV_HEADS * config.routed_groups,
            "new_groups_a_step": round(statistics.mean(new), 4),
            "choices_of": options.model,
            "recorded_tokens": _RECORDED_TOKENS,
            "streams": STREAMS,
            "kv_heads": KV_HEADS,
            "query_heads": KV_HEADS * REPEATS,
            "head_dim": HEAD_DIM,
            "dtype": "bfloat16",
            "steps": options.steps,
            "hardware": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
