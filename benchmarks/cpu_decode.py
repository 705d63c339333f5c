"""One layer's decode attention on a CPU: routed against dense over the full K/V, in one run.

    python benchmarks/cpu_decode.py --threads 1 --contexts 8192,32768,65536,131072 --rules balanced,lean

Shape of Qwen3-30B-A3B's layer (32 query heads, 4 KV heads, D 128), float32, random K/V and queries. Two dense
baselines: SDPA with enable_gqa, and matrix products grouped by KV head (the best dense form we could write; never
repeat_kv, which is ten times slower). One JSON line a row, medians in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import hga
from hga.cache.routed import Scoring
from hga.cache.row import Counters, Row
from hga.store import MemoryStore

KV_HEADS, REPEATS, HEAD_DIM = 4, 8, 128
SCALE = HEAD_DIM**-0.5


def grouped_dense(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """query (H, R, D), keys and values (H, n, D): the R query heads of a KV head in one product."""
    return torch.softmax(query * SCALE @ keys.mT, -1) @ values


def fill(row: Row, context: int, generator: torch.Generator) -> None:
    """Stream random K/V into a row; one query a block lets its chunks close."""
    for start in range(0, context, 4096):
        tokens = min(4096, context - start)
        keys, values = (torch.randn(KV_HEADS, tokens, HEAD_DIM, generator=generator) for _ in range(2))
        row.append(keys, values)
        row.attend(torch.randn(KV_HEADS, REPEATS, 1, HEAD_DIM, generator=generator), Scoring(SCALE))


def decode_step(row: Row, generator: torch.Generator) -> Callable[[], Tensor]:
    """One decode step of a layer: a token's K/V appended, its query attended, the token cropped again."""
    keys, values = (torch.randn(KV_HEADS, 1, HEAD_DIM, generator=generator) for _ in range(2))
    query = torch.randn(KV_HEADS, REPEATS, 1, HEAD_DIM, generator=generator)

    def step() -> Tensor:
        row.append(keys, values)
        out = row.attend(query, Scoring(SCALE))
        row.crop(row.length - 1)
        return out

    return step


def median_ms(step: Callable[[], Tensor], repeats: int) -> float:
    """Median time of a call after two warm-up calls, milliseconds."""
    times = []
    for index in range(repeats + 2):
        started = time.perf_counter()
        step()
        if index >= 2:
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def time_dense(context: int, repeats: int, generator: torch.Generator) -> tuple[float, float]:
    """Medians in milliseconds of the two dense baselines over random K/V: SDPA, grouped products."""
    query = torch.randn(KV_HEADS, REPEATS, HEAD_DIM, generator=generator)
    keys, values = (torch.randn(KV_HEADS, context, HEAD_DIM, generator=generator) for _ in range(2))
    heads = query.view(1, KV_HEADS * REPEATS, 1, HEAD_DIM)
    sdpa = median_ms(
        lambda: scaled_dot_product_attention(heads, keys[None], values[None], enable_gqa=True), max(5, repeats // 4)
    )
    return sdpa, median_ms(lambda: grouped_dense(query, keys, values), repeats)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contexts", default="8192,32768,65536,131072")
    parser.add_argument("--rules", default="balanced,lean")
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    machine = {"hardware": platform.processor() or platform.machine(), "torch": torch.__version__}
    for context in map(int, options.contexts.split(",")):
        shared = {"context": context, "threads": options.threads, "dtype": "float32", **machine}
        sdpa, grouped = time_dense(context, options.repeats, generator)
        print(json.dumps({"rule": "dense sdpa enable_gqa", "median_ms": round(sdpa, 2), **shared}), flush=True)
        print(json.dumps({"rule": "dense grouped products", "median_ms": round(grouped, 2), **shared}), flush=True)
        for name in options.rules.split(","):
            config = hga.HGAConfig.preset(name, prefill="routed")
            row = Row(config, lambda layout: MemoryStore(layout, torch.device("cpu"), "ram"), Counters(), None)
            fill(row, context, generator)
            routed = median_ms(decode_step(row, generator), options.repeats)
            print(
                json.dumps(
                    {
                        "rule": name,
                        "median_ms": round(routed, 2),
                        "budget_tokens": config.budget_tokens,
                        "times_faster_than_sdpa": round(sdpa / routed, 2),
                        "times_faster_than_grouped": round(grouped / routed, 2),
                        **shared,
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
