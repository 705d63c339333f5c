"""Peak memory of a process that streams a growing context of one layer's K/V, the store's bytes taken off.

    python benchmarks/memory.py --contexts 4096,16384,65536 --rule balanced

Shape of Qwen3-30B-A3B's layer (32 query heads, 4 KV heads, D 128), bfloat16, random K/V. Each context runs in a
process of its own: what it holds beside the store may grow only by the summaries. One JSON line a context, bytes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import torch
from cpu_decode import HEAD_DIM, KV_HEADS, REPEATS, SCALE

import hga
from hga.cache.routed import Scoring
from hga.cache.row import Counters, Row
from hga.store import MemoryStore, RecordLayout

_BLOCK_TOKENS = 1024


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def stream(context: int, rule: str) -> None:
    """Stream one context and print what it took."""
    torch.set_num_threads(1)
    config = hga.HGAConfig.preset(rule, prefill="routed")
    counters, stores = Counters(), []

    def open_store(layout: RecordLayout) -> MemoryStore:
        stores.append(MemoryStore(layout, torch.device("cpu"), "ram"))
        return stores[-1]

    row = Row(config, open_store, counters, None)
    generator = torch.Generator().manual_seed(0)
    before = peak_rss_bytes()
    for _ in range(0, context, _BLOCK_TOKENS):
        keys, values = (
            torch.randn(KV_HEADS, _BLOCK_TOKENS, HEAD_DIM, generator=generator).bfloat16() for _ in range(2)
        )
        row.append(keys, values)
        # One tile's worth of queries: enough to make the working set real, few enough to stream 64K in seconds.
        queries = torch.randn(KV_HEADS, REPEATS, 64, HEAD_DIM, generator=generator).bfloat16()
        row.attend(queries, Scoring(SCALE))
    stored = sum(sum(store.held_bytes().values()) for store in stores)
    grown = peak_rss_bytes() - before
    print(
        json.dumps(
            {
                "rule": rule,
                "context": context,
                "summary_bytes": row.summary_bytes(),
                "summary_bytes_per_token": round(row.summary_bytes() / context, 2),
                "window_bytes": row.window_bytes(),
                "working_bytes": counters.working_bytes,
                "store_bytes": stored,
                "peak_rss_growth_bytes": grown,
                "growth_beside_store_and_summaries_bytes": grown - stored - row.summary_bytes(),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="4096,16384,65536")
    parser.add_argument("--rule", default="balanced")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        stream(options.one, options.rule)
        return
    for context in options.contexts.split(","):
        subprocess.run([sys.executable, __file__, "--one", context, "--rule", options.rule], check=True)


if __name__ == "__main__":
    main()
