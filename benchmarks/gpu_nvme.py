"""Decoding on a GPU with the archive on NVMe against host memory: a real model, the document's own next tokens.

    HGA_SCRATCH=/folder/on/the/disk python benchmarks/gpu_nvme.py --model FOLDER --gguf-file FILE --document FILE

Each store reads the document (exact prefill) and is then fed its next tokens one by one, so that all route alike;
their logits are compared bit for bit. The first row is host memory by a CUDA graph, the second without one, as a
disk needs it. One JSON line a store: a step, groups found beside the model and in RAM, reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hga
from hga.integrations.transformers import step

SHARES = (1.0, 0.5, 0.25, 0.1)


@torch.no_grad()
def decode(model: Any, ids: Tensor, cache: Any, steps: int) -> tuple[Tensor, float, list[float]]:
    """Logits of the last tokens, seconds of the prefill, milliseconds of each step."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    first = ids.shape[1] - steps
    model(ids[:, :first], past_key_values=cache, logits_to_keep=1)
    torch.cuda.synchronize()
    prefill_s, logits, ms = time.perf_counter() - started, [], []
    for at in range(first, ids.shape[1]):
        started = time.perf_counter()
        logits.append(model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1])
        torch.cuda.synchronize()
        ms.append((time.perf_counter() - started) * 1e3)
    return torch.cat(logits), prefill_s, ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--document", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--budget", type=int, default=1024)
    options = parser.parse_args()
    gguf = {"gguf_file": options.gguf_file} if options.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(options.model, **gguf)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, **gguf).to("cuda").eval()
    text = options.document.read_text(errors="ignore")[: options.tokens * 8]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.tokens].to("cuda")
    config = hga.HGAConfig.preset(options.preset, budget_tokens=options.budget, prefill="exact")
    decoder = model.config.get_text_config(decoder=True)
    head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    kv_bytes = 4 * ids.shape[1] * decoder.num_key_value_heads * head_dim * decoder.num_hidden_layers
    stores: dict[str, hga.HGAConfig] = {"ram, graph": config, "ram": config}
    for share in SHARES:
        stores[f"nvme {share:.0%}"] = config.replace(store="nvme", ram_cache_bytes=int(share * kv_bytes))
    capturable, expected, base_ms = step._can_capture, None, 0.0
    for name, own in stores.items():
        step._can_capture = capturable if name == "ram, graph" else lambda model: False
        cache = hga.HGACache(config=model.config, hga_config=own)
        with hga.enabled(model, own):
            logits, prefill_s, ms = decode(model, ids, cache, options.steps)
        stats, median = cache.stats(), statistics.median(ms)
        if name == "ram":
            expected, base_ms = logits, median
        row: dict[str, Any] = {
            "store": name,
            "prefill_s": round(prefill_s, 2),
            "step_ms": round(median, 2),
            "step_p99_ms": round(statistics.quantiles(ms, n=100)[98], 2),
            "tokens_per_s": round(1e3 / median, 1),
            "slot_hit_rate": round(stats.hit_rate, 4),
        }
        if expected is not None:
            row |= {"over_ram": round(median / base_ms, 2), "same_bits_as_ram": torch.equal(logits, expected)}
        if stats.storage is not None:
            row |= {
                "ram_hit_rate": round(stats.storage.ram_hit_rate, 4),
                "reads_a_step": round(stats.storage.read_operations / options.steps, 1),
                "read_p50_ms": round(stats.storage.read_p50_ms, 3),
                "read_p99_ms": round(stats.storage.read_p99_ms, 3),
            }
        row |= {
            "model": Path(options.gguf_file or options.model).name,
            "preset": options.preset,
            "tokens": ids.shape[1],
            "budget_tokens": options.budget,
            "steps": options.steps,
            "hardware": torch.cuda.get_device_name(),
            "torch": torch.__version__,
        }
        print(json.dumps(row), flush=True)
        cache.reset()


if __name__ == "__main__":
    main()
