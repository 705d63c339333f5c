"""Peak memory of a process that streams a long context of one layer's K/V to NVMe.

    HGA_SCRATCH=/folder/on/the/disk python benchmarks/nvme_memory.py --tokens 1048576

Shape of Qwen3-30B-A3B's layer (D 128; 4 KV heads, or fewer to save time), bfloat16, random K/V in blocks of
1024 tokens with one query each. One JSON line: how much resident memory grew at most after the imports, beside the
RAM cache and the summaries (and the permutations, which stay in host memory).
"""

from __future__ import annotations

import argparse
import json
import platform
import time

import torch
from cpu_decode import HEAD_DIM, KV_HEADS, SCALE
from memory import peak_rss_bytes

import hga
from hga.cache.routed import Scoring
from hga.cache.row import Counters, Row
from hga.store import NvmeStore, RecordLayout

_BLOCK_TOKENS = 1024


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--kv-heads", type=int, default=KV_HEADS)
    parser.add_argument("--ram-cache-mib", type=int, default=128)
    parser.add_argument("--rule", default="balanced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stores: list[NvmeStore] = []

    def open_store(layout: RecordLayout) -> NvmeStore:
        stores.append(NvmeStore(layout, options.ram_cache_mib << 20))
        return stores[-1]

    row = Row(hga.HGAConfig.preset(options.rule, prefill="routed"), open_store, Counters(), None)
    generator = torch.Generator().manual_seed(0)
    before, started = peak_rss_bytes(), time.perf_counter()
    for _ in range(0, options.tokens, _BLOCK_TOKENS):
        keys, values = (
            torch.randn(options.kv_heads, _BLOCK_TOKENS, HEAD_DIM, generator=generator).bfloat16() for _ in range(2)
        )
        row.append(keys, values)
        row.attend(torch.randn(options.kv_heads, 1, 1, HEAD_DIM, generator=generator).bfloat16(), Scoring(SCALE))
    grown, seconds = peak_rss_bytes() - before, time.perf_counter() - started
    held = stores[0].held_bytes()
    cache_bytes = options.ram_cache_mib << 20
    found = {
        "rule": options.rule,
        "context": options.tokens,
        "kv_heads": options.kv_heads,
        "head_dim": HEAD_DIM,
        "store": "nvme",
        "nvme_bytes": held["nvme"],
        "ram_cache_bytes": cache_bytes,
        "summary_bytes": row.summary_bytes(),
        "order_bytes": held["ram"],
        "peak_rss_growth_bytes": grown,
        "growth_beside_cache_and_summaries_bytes": grown - cache_bytes - row.summary_bytes(),
        "seconds": round(seconds, 1),
        "hardware": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
