"""One layer's attention to a block of a prompt on a CPU: exact and routed prefill against dense SDPA, in one run.

    python benchmarks/cpu_prefill.py --threads 1 --contexts 8192,32768,131072 --rules balanced,lean

Shape of Qwen3-30B-A3B's layer (32 query heads, 4 KV heads, D 128; `--heads`, `--repeats-kv`, `--width` for others),
float32, random K/V. The block is the context's last; its queries drift, each 0.98 of the one before it, so that
neighbours open alike groups, which favours routing. What hga takes includes closing the block's chunks. All steps of a
context take turns. One JSON line a row, milliseconds.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cpu_decode import time_in_turn
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import hga
from hga.cache.routed import Scoring
from hga.cache.row import Counters, Row
from hga.ops.tiles import closed_chunks
from hga.store import MemoryStore


@dataclass(frozen=True)
class Block:
    """Q (H, R, T, D), K and V (H, n, D) of a context whose last T tokens are read."""

    query: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def draw(cls, heads: int, repeats: int, width: int, context: int, tokens: int) -> Block:
        """Random K/V, drifting queries twice unit size: attention peaked enough for choices to differ."""
        generator = torch.Generator().manual_seed(0)
        keys, values = (torch.randn(heads, context, width, generator=generator) for _ in range(2))
        query = 2 * torch.randn(heads, repeats, tokens, width, generator=generator)
        share = 0.98
        for token in range(1, tokens):
            fresh = (1 - share**2) ** 0.5 * query[:, :, token]
            query[:, :, token] = share * query[:, :, token - 1] + fresh
        return cls(query, keys, values)

    def read_densely(self) -> Tensor:
        """SDPA with a mask, which is what a block behind a prefix gets."""
        tokens, count = self.query.shape[2], self.keys.shape[1]
        mask = torch.ones(tokens, count, dtype=torch.bool).tril(count - tokens)
        query = self.query.flatten(0, 1)[None]
        return scaled_dot_product_attention(query, self.keys[None], self.values[None], attn_mask=mask, enable_gqa=True)

    def reader(self, config: hga.HGAConfig) -> Callable[[], Tensor]:
        """What reads the block behind a row that holds the rest."""
        tokens, count = self.query.shape[2], self.keys.shape[1]
        row = Row(config, lambda layout: MemoryStore(layout, torch.device("cpu"), "ram"), Counters(), None)
        for start in range(0, count - tokens, 4096):
            stop = min(start + 4096, count - tokens)
            row.append(self.keys[:, start:stop], self.values[:, start:stop])
            row._close(closed_chunks(config, row.length))

        def read() -> Tensor:
            twin = row.fork()
            twin.append(self.keys[:, -tokens:], self.values[:, -tokens:])
            return twin.attend(self.query, Scoring(self.query.shape[-1] ** -0.5))

        return read


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contexts", default="8192,32768,131072")
    parser.add_argument("--tokens", type=int, default=1024, help="of the block")
    parser.add_argument("--rules", default="balanced,lean")
    parser.add_argument("--prefills", default="exact,nodes,routed")
    parser.add_argument("--node-budget", type=int, help="of nodes, instead of the preset's budget")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats-kv", type=int, default=8, help="query heads a KV head")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = {"kv_heads": options.heads, "query_heads": options.heads * options.repeats_kv, "head_dim": options.width}
    machine = {"hardware": platform.processor() or platform.machine(), "torch": torch.__version__}
    for context in map(int, options.contexts.split(",")):
        block = Block.draw(options.heads, options.repeats_kv, options.width, context, options.tokens)
        steps = {"dense sdpa": block.read_densely}
        for name in options.rules.split(","):
            for prefill in options.prefills.split(","):
                budget = {"node_budget_tokens": options.node_budget} if prefill == "nodes" else {}
                steps[f"{name}, {prefill}"] = block.reader(hga.HGAConfig.preset(name, prefill=prefill, **budget))
        quartiles = time_in_turn(steps, options.repeats)
        dense = quartiles["dense sdpa"][1]
        for name, (low, median, high) in quartiles.items():
            found = {
                "rule": name,
                "median_ms": round(median, 1),
                "quartiles_ms": [round(low, 1), round(high, 1)],
                "over_sdpa": round(median / dense, 2),
                "context": context,
                "block_tokens": options.tokens,
                "threads": options.threads,
                **({"node_budget_tokens": options.node_budget} if "nodes" in name else {}),
                "dtype": "float32",
            }
            print(json.dumps(found | shape | machine), flush=True)


if __name__ == "__main__":
    main()
