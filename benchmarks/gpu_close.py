"""Closing chunks on a GPU: the PyTorch reference against the Triton kernel.

    python benchmarks/gpu_close.py --chunks 1,32 --rules balanced,lean

A layer of Qwen3-30B-A3B (4 KV heads, D 128), bfloat16, random K/V that fall into kinds, summaries in fp8. One JSON
line a row, medians in milliseconds. `floor_ms`: the time that reading the K/V and writing the records once takes at
the card's measured copy speed. `spread_inside`: mean variance of keys and values inside a group, the tree's aim.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

import hga
from hga.ops import closing
from hga.ops.kernels import closing as kernels
from hga.ops.precision import resolve_summary_dtype

KV_HEADS, HEAD_DIM, KINDS = 4, 128, 64


def draw(tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random K/V (Hkv, tokens, D) in bfloat16, each a kind's centre plus noise."""
    kind = torch.randint(0, KINDS, (tokens,), generator=generator, device="cuda")

    def rows() -> Tensor:
        centres = torch.randn(KV_HEADS, KINDS, HEAD_DIM, generator=generator, device="cuda")
        noise = torch.randn(KV_HEADS, tokens, HEAD_DIM, generator=generator, device="cuda")
        return (2 * centres[:, kind] + noise).bfloat16()

    return rows(), rows()


def copy_gigabytes_per_second() -> float:
    """Measured speed of a large copy, bytes read plus bytes written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / do_bench(lambda: target.copy_(source), return_mode="median") / 1e6


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", default="1,32", help="chunks closed at once")
    parser.add_argument("--rules", default="balanced,lean", help="presets; mixed-RoPE ones have no kernel")
    parser.add_argument("--repeats-ms", type=int, default=300, help="time spent on repeats of each row")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this benchmark needs one")
    generator = torch.Generator("cuda").manual_seed(0)
    machine = {
        "hardware": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_gb_per_s": round(copy_gigabytes_per_second()),
    }
    for name in options.rules.split(","):
        config = hga.HGAConfig.preset(name)
        how = {
            "chunk_size": config.chunk_size,
            "group_size": config.group_size,
            "node_size": config.node_size,
            "ordering": config.ordering,
            "summary_dtype": resolve_summary_dtype(config.summary_dtype, torch.bfloat16),
            "far_field": config.far_field,
            "coded": config.coded,
        }
        for chunks in map(int, options.chunks.split(",")):
            keys, values = draw(chunks * config.chunk_size, generator)
            medians = {}
            for label, close in (("reference", closing.close_chunks), ("kernel", kernels.close_chunks)):
                run = partial(close, keys, values, **how)
                closed = run()
                medians[label] = do_bench(run, rep=options.repeats_ms, return_mode="median")
                floor = 4 * keys.nbytes / machine["copy_gb_per_s"] / 1e6
                row = {
                    "close": label,
                    "rule": name,
                    "median_ms": round(medians[label], 4),
                    "times_faster_than_reference": round(medians["reference"] / medians[label], 1),
                    "floor_ms": round(floor, 4),
                    "spread_inside": round(float(closed.records.float().var(4, correction=0).mean()), 4),
                    "shape": {"kv_heads": KV_HEADS, "chunks": chunks, "head_dim": HEAD_DIM, "dtype": "bfloat16"},
                    "chunk_size": config.chunk_size,
                    "group_size": config.group_size,
                    "node_size": config.node_size,
                    **machine,
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
