"""Real weights on a GPU: greedy text at full budget, then hit rate, fetched bytes and tokens/s of routed decode.

    python benchmarks/gpu_real.py --model FOLDER --gguf-file FILE --document FILE --tokens 32768 --new-tokens 256

Reads the document's first tokens with exact prefill, dense and through HGA, and decodes greedily. JSON lines. Where
a rule's text leaves dense's, `dense_margin` is dense's logit of its own token less that of the rule's: 0 is a tie.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import hga


@torch.no_grad()
def decode(model: Any, ids: Tensor, cache: Any, new_tokens: int) -> tuple[Tensor, Tensor, float, float]:
    """Greedy tokens (n,), their steps' logits (n, V), seconds of the prefill, median milliseconds of a step."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    logits = [model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]]
    torch.cuda.synchronize()
    prefill_s, times = time.perf_counter() - started, []
    for _ in range(new_tokens - 1):
        started = time.perf_counter()
        logits.append(model(logits[-1].argmax(-1)[:, None], past_key_values=cache).logits[:, -1])
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    seen = torch.cat(logits)
    return seen.argmax(-1), seen, prefill_s, sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--document", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--presets", default="full,balanced,lean,fidelity", help="full: a budget of all tokens")
    parser.add_argument("--budget", type=Fraction, default=Fraction(1, 32))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)  # a step that cannot be captured says why
    gguf = {"gguf_file": options.gguf_file} if options.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(options.model, **gguf)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype), **gguf)
    model = model.to("cuda").eval()
    text = options.document.read_text(errors="ignore")[: options.tokens * 8]
    room = options.tokens - options.new_tokens
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :room].to("cuda")
    shared = {
        "model": Path(options.gguf_file or options.model).name,
        "document": options.document.name,
        "tokens": ids.shape[1],
        "dtype": options.dtype,
        "hardware": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    dense, dense_logits, prefill_s, step_ms = decode(model, ids, DynamicCache(config=model.config), options.new_tokens)
    row = {"rule": "dense", "prefill_s": round(prefill_s, 2), "step_ms": round(step_ms, 2)}
    print(json.dumps(row | {"tokens_per_s": round(1e3 / step_ms, 1)} | shared), flush=True)
    rules = {}
    for name in options.presets.split(","):
        budget = options.tokens + 1024 if name == "full" else int(options.budget * options.tokens)
        rules[name] = hga.HGAConfig.preset(
            "balanced" if name == "full" else name, budget_tokens=budget, prefill="exact"
        )
    for name, config in rules.items():
        cache = hga.HGACache(config=model.config, hga_config=config)
        with hga.enabled(model, config):
            tokens, _, prefill_s, step_ms = decode(model, ids, cache, options.new_tokens)
        stats = cache.stats()
        differing = (tokens != dense).nonzero().flatten().tolist()
        alike, margin = len(dense), None
        if differing:
            alike = differing[0]
            margin = (dense_logits[alike, dense[alike]].float() - dense_logits[alike, tokens[alike]].float()).item()
        asked = sum(sum(layer.traffic()[:2]) for layer in cache.routed)
        missed = sum(layer.traffic()[1] for layer in cache.routed)
        shape = cache.routed[0].shape
        group_bytes = 2 * config.group_size * shape.head_dim * model.dtype.itemsize
        row = {
            "rule": name,
            "budget_tokens": config.budget_tokens,
            "same_as_dense_for": alike,
            "dense_margin": margin,
            "prefill_s": round(prefill_s, 2),
            "step_ms": round(step_ms, 2),
            "tokens_per_s": round(1e3 / step_ms, 1),
            "hit_rate": round(1 - missed / max(1, asked), 3),
            "fetched_bytes_a_step": round(missed * group_bytes / (options.new_tokens - 1)),
            "device_bytes": stats.device_bytes,
            "graph": cache.stepper is not None and cache.stepper._graph is not None,
        }
        print(json.dumps(row | shared), flush=True)
        cache.reset()


if __name__ == "__main__":
    main()
