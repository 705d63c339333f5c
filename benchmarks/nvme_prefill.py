"""The first token of a whole model's prompt with the archive on NVMe against host memory, in alternating pairs.

    HGA_SCRATCH=/folder/on/the/disk python benchmarks/nvme_prefill.py --document book.txt --tokens 6000
    HGA_SCRATCH=/folder/on/the/disk python benchmarks/nvme_prefill.py --document book.txt --tokens 2400 --prefill routed

The RAM cache holds a share of the archive's K/V. As prompts are read by default, each block of `--block` tokens reads
the archive once, whole; routed, every tile of 64 queries reads what most of them want from the file. The two stores
take turns, the one that begins changing from pair to pair, after a pair that is not counted; both must write the same
token. One JSON line: the median over pairs of their ratio, all of them, and the same of processor time.
benchmarks/results/nvme_decode.jsonl keeps the rows.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import hga
from hga.models import load_model


def first_token(model: Any, ids: torch.Tensor, config: hga.HGAConfig) -> tuple[float, float, int, hga.HGACache]:
    """Seconds and processor seconds to the first token behind a prompt, the token, and the cache."""
    with hga.enabled(model, config):
        cache = hga.HGACache(config=model.config, hga_config=config)
        started, worked = time.perf_counter(), time.process_time()
        out = model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
        return time.perf_counter() - started, time.process_time() - worked, int(out[0, -1]), cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--gguf-file")
    parser.add_argument("--document", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--prefill", default="auto", choices=["auto", "exact", "routed"])
    parser.add_argument("--block", type=int, default=hga.HGAConfig().block_tokens, help="tokens of a block")
    parser.add_argument("--budget", type=int, default=250)
    parser.add_argument("--share", type=float, default=0.13, help="of the K/V that the RAM cache holds")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(options.model, options.gguf_file)
    ids = tokenizer(options.document.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, : options.tokens]
    ram = hga.HGAConfig(budget_tokens=options.budget, prefill=options.prefill, block_tokens=options.block)
    *_, cache = first_token(model, ids, ram)
    kv_bytes = cache.stats().kv_bytes
    nvme = ram.replace(store="nvme", ram_cache_bytes=int(options.share * kv_bytes))
    first_token(model, ids, nvme)

    seconds: dict[str, list[float]] = {"ram": [], "nvme": []}
    worked: dict[str, list[float]] = {"ram": [], "nvme": []}
    configs = {"ram": ram, "nvme": nvme}
    for pair in range(options.pairs):
        tokens = set()
        for name in sorted(configs, reverse=bool(pair % 2)):
            taken, processor, token, _ = first_token(model, ids, configs[name])
            seconds[name].append(taken)
            worked[name].append(processor)
            tokens.add(token)
        if len(tokens) > 1:
            raise RuntimeError(f"the stores' first tokens differ: {tokens}")
    over = [nvme / ram for nvme, ram in zip(seconds["nvme"], seconds["ram"], strict=True)]
    processor_over = [nvme / ram for nvme, ram in zip(worked["nvme"], worked["ram"], strict=True)]
    found = {
        "whole_model": Path(options.model).name,
        "prefill_tokens": ids.shape[1],
        "prefill": options.prefill,
        "block_tokens": options.block,
        "budget_tokens": options.budget,
        "ram_cache_share": options.share,
        "ram_s": round(statistics.median(seconds["ram"]), 2),
        "nvme_s": round(statistics.median(seconds["nvme"]), 2),
        "prefill_over_ram": round(statistics.median(over), 3),
        "pairs": [round(ratio, 3) for ratio in over],
        "processor_over_ram": round(statistics.median(processor_over), 3),
        "processor_pairs": [round(ratio, 3) for ratio in processor_over],
        "kv_bytes": kv_bytes,
        "hardware": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
