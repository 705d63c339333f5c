"""One layer's decode attention on a CPU: routed against dense over the full K/V, in one run.

    python benchmarks/cpu_decode.py --threads 1 --contexts 8192,32768,65536,131072 --rules balanced,lean

Shape of Qwen3-30B-A3B's layer (32 query heads, 4 KV heads, D 128), float32, random K/V and queries. Two dense
baselines: SDPA with enable_gqa, and matrix products grouped by KV head (the best dense form we could write; never
repeat_kv, which is ten times slower). All steps of a context take turns. One JSON line a row, milliseconds.
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


def dense_steps(context: int, generator: torch.Generator) -> dict[str, Callable[[], Tensor]]:
    """The two dense baselines over random K/V of `context` tokens."""
    query = torch.randn(KV_HEADS, REPEATS, HEAD_DIM, generator=generator)
    keys, values = (torch.randn(KV_HEADS, context, HEAD_DIM, generator=generator) for _ in range(2))
    heads = query.view(1, KV_HEADS * REPEATS, 1, HEAD_DIM)
    return {
        "dense sdpa enable_gqa": lambda: scaled_dot_product_attention(heads, keys[None], values[None], enable_gqa=True),
        "dense grouped products": lambda: grouped_dense(query, keys, values),
    }


def time_in_turn(steps: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
    """Quartiles of each step's times in milliseconds. The steps take turns, two warm-up rounds uncounted.

    So all of them meet the same load of a shared machine, and each finds the caches as another layer left them.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.quantiles(taken[2:], n=4) for name, taken in times.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contexts", default="8192,32768,65536,131072")
    parser.add_argument("--rules", default="balanced,lean")
    parser.add_argument("--summary-dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    machine = {"hardware": platform.processor() or platform.machine(), "torch": torch.__version__}
    for context in map(int, options.contexts.split(",")):
        steps = dense_steps(context, generator)
        for name in options.rules.split(","):
            config = hga.HGAConfig.preset(name, prefill="routed", summary_dtype=options.summary_dtype)
            row = Row(config, lambda layout: MemoryStore(layout, torch.device("cpu"), "ram"), Counters(), None)
            fill(row, context, generator)
            steps[name] = decode_step(row, generator)
        quartiles = time_in_turn(steps, options.repeats)
        sdpa, grouped = (median for _, median, _ in list(quartiles.values())[:2])
        for name, (low, median, high) in quartiles.items():
            found = {
                "rule": name,
                "median_ms": round(median, 2),
                "quartiles_ms": [round(low, 2), round(high, 2)],
                "times_faster_than_sdpa": round(sdpa / median, 2),
                "times_faster_than_grouped": round(grouped / median, 2),
                "context": context,
                "threads": options.threads,
                "dtype": "float32",
                "summary_dtype": options.summary_dtype,
            }
            print(json.dumps(found | machine), flush=True)


if __name__ == "__main__":
    main()
