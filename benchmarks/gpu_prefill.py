"""Prefill of one layer on a GPU: dense SDPA, the exact path and the routed path, block by block.

    python benchmarks/gpu_prefill.py --contexts 16384,65536,131072 --rules balanced,lean

Shape of Qwen3-30B-A3B's layer (32 query heads, 4 KV heads, D 128), bfloat16, random K/V; the archive's records are on
the device already. Queries are "random" (neighbours open different groups: the worst case) or "drifting" (each is 0.98
of the one before it). One JSON line a case: milliseconds for the whole prompt, median of `--repeats`. `--profile`
prints the kernels' times for the last block of each case on stderr. `--sweep` times launch sizes instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hga
from hga.ops.kernels import flash
from hga.ops.kernels.closing import close_chunks
from hga.ops.kernels.prefill import attend_all, attend_causal
from hga.ops.kernels.prefill_routed import attend_prefill_routed
from hga.ops.precision import resolve_summary_dtype
from hga.ops.prefill_routed import ClosedChunks
from hga.ops.tiles import closed_chunks

KV_HEADS, REPEATS, HEAD_DIM = 4, 8, 128
SCALE = HEAD_DIM**-0.5
DTYPE = torch.bfloat16


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def draw_queries(context: int, kind: str) -> Tensor:
    """Queries (Hkv, R, T, D), twice unit size: attention peaked enough for choices to differ."""
    queries = 2 * draw(KV_HEADS, REPEATS, context, HEAD_DIM)
    if kind == "drifting":
        share = 0.98
        state = queries[:, :, 0]
        for token in range(1, context):
            state = share * state + (1 - share**2) ** 0.5 * queries[:, :, token]
            queries[:, :, token] = state
    return queries


class Prompt:
    """One layer's Q, K and V of a prompt, and what a cache would hold of it."""

    def __init__(self, config: hga.HGAConfig, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        self.config, self.queries, self.keys, self.values = config, queries, keys, values
        chunks = closed_chunks(config, keys.shape[1])
        sink, size = config.sink_tokens, config.chunk_size
        old_keys, old_values = (x[:, sink : sink + chunks * size] for x in (keys, values))
        closed = close_chunks(
            old_keys,
            old_values,
            chunk_size=size,
            group_size=config.group_size,
            node_size=config.node_size,
            ordering=config.ordering,
            summary_dtype=resolve_summary_dtype(config.summary_dtype, DTYPE),
            far_field=config.far_field,
            coded=config.coded,
        )
        self.records = closed.records
        self.closed = ClosedChunks(closed.records, closed.node_keys, closed.node_values, closed.group_keys)

    def near(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Sink and all tokens in no chunk closed before the block [first, last)."""
        sink = self.config.sink_tokens
        skipped = sink + closed_chunks(self.config, first) * self.config.chunk_size
        return tuple(torch.cat([x[:, :sink], x[:, skipped:last]], 1) for x in (self.keys, self.values))

    def attend_exact(self, first: int, last: int) -> None:
        """One block, densely: sink, unclosed tokens and itself causally, then the records of closed chunks."""
        keys, values = self.near(first, last)
        output = attend_causal(self.queries[:, :, first:last], keys, values, keys.shape[1] - (last - first), SCALE)
        chunks = closed_chunks(self.config, first)
        if chunks:
            halves = self.records[:chunks].unbind(3)
            attend_all(self.queries[:, :, first:last], *halves, SCALE, onto=output)

    def attend_routed(self, first: int, last: int, rule: hga.HGAConfig | None = None) -> None:
        """One block, each query routed, by its own rule or by another one of the same chunks."""
        queries = self.queries[:, :, first:last]
        attend_prefill_routed(rule or self.config, queries, *self.near(first, last), self.closed, first, SCALE)


def attend_dense(queries: Tensor, keys: Tensor, values: Tensor) -> None:
    torch.nn.functional.scaled_dot_product_attention(
        queries.flatten(0, 1)[None], keys[None], values[None], is_causal=True, enable_gqa=True
    )


def measure_ms(run: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds of each repetition, after a warm one."""
    times = []
    for repeat in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if repeat:
            times.append(start.elapsed_time(end))
    return times


def report(options: argparse.Namespace, context: int, path: str, run: Callable[[], Any], **more: Any) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = measure_ms(run, options.repeats)
    line = {
        "path": path,
        "context": context,
        **more,
        "ms": round(statistics.median(times), 3),
        "ms_all": [round(x, 3) for x in times],
        "peak_scratch_bytes": torch.cuda.max_memory_allocated() - before,
        "shape": {"kv_heads": KV_HEADS, "repeats": REPEATS, "head_dim": HEAD_DIM, "dtype": "bfloat16"},
        "hardware": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    print(json.dumps(line), flush=True)


def sweep(options: argparse.Namespace) -> None:
    """Times of launch sizes: 8192 queries over 65,536 keys of records, exact, and routed with the first rule."""
    torch.manual_seed(0)
    context = 65536 + options.block
    keys, values = draw(KV_HEADS, context, HEAD_DIM), draw(KV_HEADS, context, HEAD_DIM)
    config = hga.HGAConfig.preset(options.rules.split(",")[0], prefill="routed")
    prompt = Prompt(config, draw_queries(context, "drifting"), keys, values)
    block = (context - options.block, context)
    for rows in (64, 128):
        for columns in (32, 64, 128):
            for warps in (4, 8):
                for stages in (2, 3, 4):
                    launch = flash.Launch(rows, columns, warps, stages)
                    flash._HALF[HEAD_DIM] = (launch,)
                    for path, run in (("exact", prompt.attend_exact), ("routed", prompt.attend_routed)):
                        try:
                            report(options, context, path, lambda run=run: run(*block), launch=launch._asdict())
                        except Exception as error:  # out of shared memory or registers: not a size for this card
                            print(json.dumps({"path": path, "launch": launch._asdict(), "error": str(error)[:120]}))


def profile(run: Callable[[], Any]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=12), file=sys.stderr)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="16384,65536,131072")
    parser.add_argument("--rules", default="balanced,lean")
    parser.add_argument("--queries", default="random,drifting")
    parser.add_argument("--paths", default="nodes,routed", help="by whole nodes, by groups")
    parser.add_argument("--block", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    if options.sweep:
        sweep(options)
        return
    for context in (int(x) for x in options.contexts.split(",")):
        torch.manual_seed(0)
        keys, values = draw(KV_HEADS, context, HEAD_DIM), draw(KV_HEADS, context, HEAD_DIM)
        blocks = [(x, min(context, x + options.block)) for x in range(0, context, options.block)]
        for kind in options.queries.split(","):
            queries = draw_queries(context, kind)
            if kind == options.queries.split(",")[0]:  # dense time does not depend on what is in the queries
                exact = Prompt(hga.HGAConfig.preset("balanced"), queries, keys, values)
                report(options, context, "sdpa", lambda q=queries, k=keys, v=values: attend_dense(q, k, v))
                report(options, context, "exact", lambda p=exact, b=blocks: [p.attend_exact(*x) for x in b])
                if options.profile:
                    profile(lambda p=exact, b=blocks: p.attend_exact(*b[-1]))
                del exact
            for rule in options.rules.split(","):
                prompt = Prompt(hga.HGAConfig.preset(rule, prefill="routed"), queries, keys, values)
                more = {"rule": rule, "queries": kind, "block_tokens": options.block}
                for path, own in (("nodes", prompt.config.by_nodes()), ("routed", None)):
                    if path not in options.paths.split(","):
                        continue
                    report(
                        options,
                        context,
                        path,
                        lambda p=prompt, b=blocks, r=own: [p.attend_routed(*x, r) for x in b],
                        **more,
                    )
                    if options.profile:
                        profile(lambda p=prompt, b=blocks, r=own: p.attend_routed(*b[-1], r))
                del prompt


if __name__ == "__main__":
    main()
