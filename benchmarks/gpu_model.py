"""Decode of a whole model on one GPU: routed, K/V in host RAM, against dense, K/V on the GPU. Random weights.

    python benchmarks/gpu_model.py --contexts 65536,262144,524288 --rules dense,balanced,lean --steps 600

Qwen3-30B-A3B's shape, bfloat16, batch 1, experts by batched_mm. The context is random K/V put into the caches; then
`--steps` tokens are decoded. Random tokens would ask for other groups in each step, as no text does: each layer's query
takes a share `--drift` of the new one (1: all of it), which sets the hit rate; gpu_real.py measures that of text. Dense
comes twice: as transformers gives it (DynamicCache; `--eager`), and under the same CUDA graph with a fixed buffer of
K/V, which is the honest baseline. Each decode row has a process of its own, as its user would have: the graphs that a
process has captured before decide how close the kernels of the next one lie (NOTES.md). JSON lines, milliseconds a
token (p50, p99).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

import hga
from hga.integrations.transformers.attention import hga_attention
from hga.ops.tiles import closed_chunks

_FILLED_AT_ONCE = 8192


class FixedLayer(DynamicLayer):
    """Dense K/V in a buffer that never moves: each step writes the same last place, so that a graph can replay it."""

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Take a context's K/V (1, Hkv, n, D), the last place free."""
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the last place; returns all K/V."""
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens before the last place."""
        return self.keys.shape[2] - 1


def attend_all(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """SDPA over all keys, grouped query heads, no mask: the fastest dense decode that PyTorch has."""
    out = scaled_dot_product_attention(query, key, value, enable_gqa=True, scale=kwargs["scaling"])
    return out.transpose(1, 2), None


class Drifting:
    """An attention function with queries of single tokens that drift from one to the next, as real ones do."""

    def __init__(self, attend: Callable[..., Any], share: float) -> None:
        self._attend = attend
        self.share = share
        self.held: dict[int, Tensor] = {}

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        """See `hga_attention`."""
        if query.shape[2] == 1 and self.share < 1:
            if module.layer_idx not in self.held:
                self.held[module.layer_idx] = query.clone()
            query = self.held[module.layer_idx].lerp_(query, self.share)
            kwargs["scaling"] *= ((2 - self.share) / self.share) ** 0.5  # a mean of independent queries is shorter
        return self._attend(module, query, key, value, mask, **kwargs)


def make_empty_model(name: str, device: str) -> Any:
    """The model of a packaged config, bfloat16, its weights not written yet."""
    config = AutoConfig.for_model(**json.loads((files("hga") / "data" / "configs" / name).read_text()))
    config.max_position_embeddings = 1 << 20
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device=device).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    return model


def make_model(name: str) -> Any:
    """The model of a packaged config with random bfloat16 weights on the GPU."""
    model = make_empty_model(name, "cuda")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in key else parameter.normal_(0, 0.02)
    use_experts(model, "batched_mm")
    torch.mm(*torch.ones(2, 16, 16, device="cuda"))  # cuBLAS's workspace is no rule's memory
    return model


def use_experts(model: Any, implementation: str) -> None:
    """grouped_mm for prefill, batched_mm for decode; nothing where the model is no mixture."""
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation(implementation)


def random_kv(config: Any, tokens: int) -> tuple[Tensor, Tensor]:
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16), torch.randn(
        shape, device="cuda", dtype=torch.bfloat16
    )


def fill_routed(model: Any, cache: hga.HGACache, context: int) -> None:
    """Put random K/V into every layer, closing chunks on the way."""
    for layer in cache.routed:
        for start in range(0, context, _FILLED_AT_ONCE):
            keys, values = random_kv(model.config, min(_FILLED_AT_ONCE, context - start))
            if start == 0:
                layer.lazy_initialization(keys, values)
            row = layer.rows[0]
            row.append(keys[0], values[0])
            row._close(closed_chunks(cache.hga_config, row.length))
        layer._seen = context


def time_steps(step: Callable[[int], Any], steps: int, skipped: int = 5) -> dict[str, float]:
    """p50 and p99 of a step, milliseconds, the GPU waited for as generate does."""
    times = []
    for index in range(steps + skipped):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step(index)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    times = sorted(times[skipped:])
    return {"p50_ms": round(times[len(times) // 2], 2), "p99_ms": round(times[int(len(times) * 0.99)], 2)}


def time_dense(model: Any, context: int, steps: int, eager: bool) -> dict[str, Any]:
    """Dense attention over K/V on the GPU, one CUDA graph or as transformers gives it."""
    tokens = torch.randint(0, 1000, (steps + 5, 1, 1), device="cuda")
    ids, position = tokens[0].clone(), torch.tensor([[context]], device="cuda")
    before = torch.cuda.memory_allocated()
    cache = DynamicCache(config=model.config)
    for index in range(len(cache.layers)):
        if eager:
            cache.update(*random_kv(model.config, context), index)
        else:
            cache.layers[index] = FixedLayer()
            cache.layers[index].hold(*random_kv(model.config, context + 1))

    def forward() -> Any:
        return model(ids, position_ids=position, past_key_values=cache, use_cache=True)

    held = torch.cuda.memory_allocated() - before
    if eager:
        return time_steps(lambda _: forward(), steps) | {"gpu_bytes": held}
    model.set_attn_implementation("attend_all")
    for _ in range(3):
        forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    model.set_attn_implementation("sdpa")

    def step(index: int) -> None:
        ids.copy_(tokens[index])
        graph.replay()

    return time_steps(step, steps) | {"gpu_bytes": held}


def time_routed(model: Any, rule: str, context: int, steps: int) -> dict[str, Any]:
    """Routed decode through `hga.enable`'s own path, K/V in host RAM."""
    config = hga.HGAConfig.preset(rule)
    before = torch.cuda.memory_allocated()
    cache = hga.HGACache(config=model.config, hga_config=config)
    started = time.perf_counter()
    fill_routed(model, cache, context)
    torch.cuda.synchronize()
    filled = time.perf_counter() - started
    ids = torch.randint(0, 1000, (steps + 5, 1, 1), device="cuda")
    with hga.enabled(model, config):
        row = time_steps(lambda index: model(ids[index], past_key_values=cache), steps)
    stats = cache.stats()
    row |= {
        "graph": cache.stepper is not None and cache.stepper._graph is not None,
        "hit_rate": round(stats.hit_rate, 3),
        "gpu_bytes": torch.cuda.memory_allocated() - before,
        "summary_bytes": stats.summary_bytes,
        "fill_s": round(filled, 1),
    }
    cache.reset()
    return row


def time_prefill(model: Any, rule: str | None, context: int, prefill: str) -> dict[str, Any]:
    """Seconds until the first token of a prompt of random tokens, in blocks of 8,192, the second time."""
    ids = torch.randint(0, 1000, (1, context), device="cuda")
    use_experts(model, "grouped_mm")
    seconds, peak = 0.0, 0
    for tokens in (16384, context):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.synchronize()
        started = time.perf_counter()
        if rule is None:
            cache = DynamicCache(config=model.config)
            for start in range(0, tokens, _FILLED_AT_ONCE):
                block = ids[:, start : start + _FILLED_AT_ONCE][:, : tokens - start]
                model(block, past_key_values=cache, logits_to_keep=1)
        else:
            config = hga.HGAConfig.preset(rule, prefill=prefill, block_tokens=_FILLED_AT_ONCE)
            cache = hga.HGACache(config=model.config, hga_config=config)
            with hga.enabled(model, config):
                model(ids[:, :tokens], past_key_values=cache, logits_to_keep=1)
        torch.cuda.synchronize()
        seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated() - before
        cache.reset()
        del cache
        gc.collect()
    use_experts(model, "batched_mm")
    return {"prefill": prefill, "first_token_s": round(seconds, 2), "peak_gpu_bytes": peak}


def run_under_cap(model: Any, rule: str | None, context: int, beside_bytes: int) -> dict[str, Any]:
    """Prefill and 64 decoded tokens with at most `beside_bytes` beside the weights, as on a smaller card."""
    ids = torch.randint(0, 1000, (1, context), device="cuda")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + beside_bytes) / total)
    config = None if rule is None else hga.HGAConfig.preset(rule, prefill="exact")
    cache = DynamicCache(config=model.config) if config is None else hga.HGACache(model.config, config)
    row: dict[str, Any] = {"beside_bytes": beside_bytes, "outcome": "ran"}
    try:
        with contextlib.nullcontext() if config is None else hga.enabled(model, config):
            use_experts(model, "grouped_mm")
            for start in range(0, context, 4096):
                model(ids[:, start : start + 4096], past_key_values=cache, logits_to_keep=1)
            use_experts(model, "batched_mm")
            for index in range(64):
                model(ids[:, index : index + 1], past_key_values=cache)
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        row |= {"outcome": "out of GPU memory", "tokens": cache.get_seq_length()}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        use_experts(model, "batched_mm")
    row["peak_gpu_bytes"] = torch.cuda.max_memory_allocated() - before
    cache.reset()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b.json", help="a config packaged with hga")
    parser.add_argument("--contexts", default="65536,262144,524288", help="none: ''")
    parser.add_argument("--rules", default="dense,balanced,lean", help="dense: under a graph of its own")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--drift", type=float, default=0.02, help="share of a query that is new in each step")
    parser.add_argument(
        "--eager", action="store_true", help="also dense as transformers gives it, at the first context"
    )
    parser.add_argument("--prefill", type=int, default=0, help="also the time to the first token of this many")
    parser.add_argument("--prefills", default="exact,nodes,routed", help="ways to read it")
    parser.add_argument(
        "--capped", default="", help="also prefill and 64 tokens under a cap, e.g. balanced:65536,lean:262144"
    )
    parser.add_argument("--beside-gib", type=float, default=2.5, help="that cap: GPU memory beside the weights")
    options = parser.parse_args()
    AttentionInterface.register("attend_all", Drifting(attend_all, options.drift))  # the same queries for both
    AttentionInterface.register("hga", Drifting(hga_attention, options.drift))
    AttentionMaskInterface.register("attend_all", lambda *args, **kwargs: None)
    decoded = [(int(x), rule) for x in options.contexts.split(",") if x for rule in options.rules.split(",")]
    if options.prefill or options.capped or options.eager:
        measure_others(options)
        gc.collect()
        torch.cuda.empty_cache()  # the rows' processes need the memory
    elif len(decoded) == 1:
        measure_decode(options, *decoded[0])
        return
    for context, rule in decoded:
        row = {"--contexts": context, "--rules": rule}
        same = {f"--{name}": getattr(options, name) for name in ("model", "steps", "drift")}
        arguments = [str(one) for pair in (row | same).items() for one in pair]
        subprocess.run([sys.executable, __file__, *arguments], check=True)


def show(options: argparse.Namespace, rule: str, context: int, row: dict[str, Any]) -> None:
    machine = {"hardware": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bfloat16"}
    print(json.dumps({"rule": rule, "context": context, **row, "model": options.model, **machine}), flush=True)
    gc.collect()
    torch.cuda.empty_cache()


@torch.no_grad()
def measure_decode(options: argparse.Namespace, context: int, rule: str) -> None:
    """One row of decoding."""
    model = make_model(options.model)
    if rule == "dense":
        show(options, "dense, graph", context, time_dense(model, context, options.steps, eager=False))
    else:
        show(options, rule, context, {"drift": options.drift} | time_routed(model, rule, context, options.steps))


@torch.no_grad()
def measure_others(options: argparse.Namespace) -> None:
    """First tokens, runs under a cap, and dense as transformers gives it."""
    model = make_model(options.model)
    if options.prefill:
        show(options, "dense", options.prefill, time_prefill(model, None, options.prefill, "dense"))
        for rule in (rule for rule in options.rules.split(",") if rule != "dense"):
            for prefill in options.prefills.split(","):
                show(options, rule, options.prefill, time_prefill(model, rule, options.prefill, prefill))
    for pair in options.capped.split(",") if options.capped else ():
        rule, context = pair.split(":")
        for name in ("dense", rule):
            cap = int(options.beside_gib * 2**30)
            row = run_under_cap(model, None if name == "dense" else name, int(context), cap)
            show(options, f"{name}, capped", int(context), row)
    if options.eager:
        context = int(options.contexts.split(",")[0])
        show(options, "dense, eager", context, time_dense(model, context, 20, eager=True))


if __name__ == "__main__":
    main()
