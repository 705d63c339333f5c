"""One layer's decode attention on a GPU, K/V in page-locked host RAM, against dense SDPA with K/V on the GPU.

    python benchmarks/gpu_decode.py --contexts 65536,262144,1048576 --rules balanced,lean

Shape of Qwen3-30B-A3B's layer (32 query heads, 4 KV heads, D 128), bfloat16, random K/V, one CUDA graph a step.
Queries drift from step to step (`--drift`: share of a query that is new), which sets the hit rate of the slot cache.
JSON lines, medians in microseconds; `cold` empties the slots before each step: every routed group crosses the bus.
Before each step 256 MB are written, so that it finds the GPU's cache as the other layers of a model leave it (`--warm`
leaves this out).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import hga
from hga.cache.layout import record_layout
from hga.cache.summaries import Summaries
from hga.ops.decode import DecodeLayer, Scratch, SlotCache
from hga.ops.kernels.closing import close_chunks
from hga.ops.kernels.decode import attend_decode

KV_HEADS, REPEATS, HEAD_DIM = 4, 8, 128
SCALE = HEAD_DIM**-0.5
BUS_GB_PER_S, BUS_LATENCY_US = 55.0, 39.0


def make_layer(config: hga.HGAConfig, context: int, near: int) -> tuple[DecodeLayer, Tensor, Tensor]:
    """A layer of random K/V: the layer, its counts, and the records in host memory, which must stay alive."""
    chunks = context // config.chunk_size
    layout = record_layout(config, KV_HEADS, HEAD_DIM, torch.bfloat16)
    records = torch.empty((chunks, *layout.shape), dtype=torch.bfloat16, pin_memory=True)
    held = Summaries(config)
    for start in range(0, chunks, 64):
        count = min(64, chunks - start)
        keys, values = (
            torch.randn(KV_HEADS, count * config.chunk_size, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            for _ in range(2)
        )
        closed = close_chunks(
            keys,
            values,
            chunk_size=config.chunk_size,
            group_size=config.group_size,
            node_size=config.node_size,
            ordering=config.ordering,
            summary_dtype=torch.float8_e4m3fn,
            far_field=config.far_field,
            coded=config.coded,
        )
        records[start : start + count].copy_(closed.records)
        held.append(closed)

    def batched(rows: Any) -> Any:
        return type(rows)(*(x[None].contiguous() for x in rows))

    stride = layout.chunk_bytes
    near_kv = [torch.randn(1, KV_HEADS, 512, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    layer = DecodeLayer(
        near_keys=near_kv[0],
        near_values=near_kv[1],
        node_keys=batched(held.node_keys.held()),
        node_values=batched(held.held_node_values()),
        group_keys=batched(held.held_group_keys()) if config.two_level else None,
        addresses=(records.data_ptr() + torch.arange(chunks) * stride)[None].cuda(),
        slots=SlotCache.allocate(config, KV_HEADS, REPEATS, chunks, near_kv[0]),
        scratch=Scratch.allocate(config, 1, KV_HEADS, REPEATS, HEAD_DIM, chunks, torch.device("cuda")),
        faults=torch.zeros(1, dtype=torch.int32, pin_memory=True),
    )
    counts = torch.tensor([[near, chunks, 1, 0]], dtype=torch.int32, device="cuda")
    return layer, counts, records


def capture(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one step."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def median_us(run: Callable[[], Any], before: Callable[[], Any], repeats: int, swept: Tensor) -> float:
    """Median time of `run` between events, `before` and the writing of `swept` left out."""
    times = []
    for _ in range(repeats):
        before()
        swept.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20000)  # the launch is queued behind it: the host's latency stays out
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times)


def time_dense(context: int, repeats: int, swept: Tensor) -> float:
    """Dense SDPA over K/V on the GPU, one graph, microseconds."""
    query = torch.randn(1, KV_HEADS * REPEATS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    keys, values = (torch.randn(1, KV_HEADS, context, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    graph = capture(lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True))
    return median_us(graph.replay, lambda: None, repeats, swept)


def time_routed(config: hga.HGAConfig, context: int, repeats: int, drift: float, swept: Tensor) -> dict[str, float]:
    """Steady state and cold medians in microseconds, hit rate, bytes crossing the bus a step."""
    layer, counts, _records = make_layer(config, context, near=config.sink_tokens + config.window_tokens + 128)
    query = torch.randn(1, KV_HEADS * REPEATS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(1, KV_HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    graph = capture(lambda: attend_decode(query, key, value, layer, counts, config, SCALE))
    moving = query.float()

    def advance() -> None:
        nonlocal moving
        moving = (1 - drift) ** 0.5 * moving + drift**0.5 * torch.randn_like(moving)
        query.copy_(moving)
        counts[:, 2] += 1

    for _ in range(30):
        advance()
        graph.replay()
    layer.slots.traffic.zero_()
    steady = median_us(graph.replay, advance, repeats, swept)
    hits, misses, _ = layer.slots.traffic.sum(0).tolist()

    def cold() -> None:
        advance()
        layer.slots.forget()

    group_bytes = 2 * config.group_size * HEAD_DIM * 2
    cold_us = median_us(graph.replay, cold, repeats, swept)
    routed_bytes = KV_HEADS * config.routed_groups * group_bytes
    floor = routed_bytes / BUS_GB_PER_S / 1e3 + BUS_LATENCY_US
    return {
        "steady_us": round(steady, 1),
        "hit_rate": round(hits / max(1, hits + misses), 3),
        "fetched_bytes": round(misses * group_bytes / repeats),
        "cold_us": round(cold_us, 1),
        "cold_over_floor": round(cold_us / floor, 2),
        "slot_bytes": layer.slots.records.nbytes,
        "scratch_bytes": layer.scratch.held_bytes(),
    }


def profile(config: hga.HGAConfig, context: int, drift: float) -> None:
    """Print the median device time of each kernel of a step."""
    layer, counts, _records = make_layer(config, context, near=config.sink_tokens + config.window_tokens + 128)
    query = torch.randn(1, KV_HEADS * REPEATS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(1, KV_HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    moving = query.float()
    graph = capture(lambda: attend_decode(query, key, value, layer, counts, config, SCALE))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(20):
            moving = (1 - drift) ** 0.5 * moving + drift**0.5 * torch.randn_like(moving)
            query.copy_(moving)
            counts[:, 2] += 1
            graph.replay()
        torch.cuda.synchronize()
    for event in sorted(seen.key_averages(), key=lambda e: -e.device_time_total):
        if "kernel" in event.key and "at::" not in event.key:
            print(json.dumps({"context": context, "kernel": event.key[:40], "us": round(event.device_time, 1)}))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="65536,262144,1048576")
    parser.add_argument("--rules", default="balanced,lean")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--drift", type=float, default=0.02)
    parser.add_argument("--warm", action="store_true", help="leave the GPU's cache as the step before left it")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    swept = torch.empty(0 if options.warm else 256 << 20, dtype=torch.uint8, device="cuda")
    machine = {
        "hardware": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "dtype": "bfloat16",
        "swept": not options.warm,
    }
    for context in map(int, options.contexts.split(",")):
        dense = time_dense(context, options.repeats, swept)
        print(json.dumps({"rule": "dense", "context": context, "median_us": round(dense, 1), **machine}), flush=True)
        for name in options.rules.split(","):
            config = hga.HGAConfig.preset(name).of_layer(2, 3, REPEATS)  # of "mixed", a layer whose heads choose apart
            row = time_routed(config, context, options.repeats, options.drift, swept)
            row = {
                "rule": name,
                "context": context,
                "drift": options.drift,
                "over_dense": round(row["steady_us"] / dense, 2),
                **row,
            }
            print(json.dumps(row | machine), flush=True)
            if options.profile:
                profile(config, context, options.drift)


if __name__ == "__main__":
    main()
