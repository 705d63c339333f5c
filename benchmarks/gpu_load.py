"""Which ways to load Qwen3-30B-A3B (57 GiB in bfloat16) leave it usable on a card of 32 GB, with HGA beside it?

    python benchmarks/gpu_load.py --card-gib 32 --weights-gib 28 --context 8192

Random weights of its shape, made in host memory; the process may take `--card-gib` of the GPU. Whole: as
`device_map="cuda"` puts it. Offloaded: accelerate keeps `--weights-gib` on the GPU and moves the others through it in
every step, as `device_map="auto"` with that `max_memory` does. JSON lines. Needs accelerate and 64 GB of host memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from gpu_model import make_empty_model

import hga

_PATTERN = 1 << 24  # numbers that are drawn; every parameter repeats them


def make_model() -> Any:
    """The model in host memory, random weights."""
    model = make_empty_model("qwen3-30b-a3b.json", "cpu")
    drawn = torch.randn(_PATTERN, dtype=torch.bfloat16) * 0.02
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), _PATTERN):
            part = flat[start : start + _PATTERN]
            part.fill_(1) if "norm" in name else part.copy_(drawn[: part.numel()])
    return model


def try_whole(model: Any) -> str:
    """What becomes of moving all weights to the GPU; none stays there."""
    try:
        moved = [parameter.to("cuda") for parameter in model.parameters()]
    except torch.cuda.OutOfMemoryError as error:
        return str(error).split(".")[0]
    return f"holds {sum(weight.nbytes for weight in moved)} bytes"


def decode(model: Any, context: int, new_tokens: int) -> dict[str, Any]:
    """Seconds of a prompt's prefill and of a decoded token, through HGA."""
    ids = torch.randint(0, 1000, (1, context), device="cuda")
    config = hga.HGAConfig()
    with hga.enabled(model, config):
        cache = hga.HGACache(config=model.config, hga_config=config)
        started = time.perf_counter()
        token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        prefill_s, started = time.perf_counter() - started, time.perf_counter()
        for _ in range(new_tokens):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
    return {"prefill_s": round(prefill_s, 1), "token_s": round((time.perf_counter() - started) / new_tokens, 2)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card-gib", type=float, default=32)
    parser.add_argument("--weights-gib", type=float, default=28)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--new-tokens", type=int, default=4)
    options = parser.parse_args()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, options.card_gib * 2**30 / total))
    machine = {"hardware": torch.cuda.get_device_name(), "torch": torch.__version__, "card_gib": options.card_gib}
    model = make_model()
    print(json.dumps({"way": "whole, bfloat16", "outcome": try_whole(model)} | machine), flush=True)
    gc.collect()
    torch.cuda.empty_cache()
    places = infer_auto_device_map(
        model,
        max_memory={0: int(options.weights_gib * 2**30), "cpu": 1 << 40},
        no_split_module_classes=["Qwen3MoeDecoderLayer"],
    )
    model = dispatch_model(model, places)
    torch.cuda.reset_peak_memory_stats()
    row = {"way": "offloaded, bfloat16", "layers_in_host_memory": sum(place == "cpu" for place in places.values())}
    row |= decode(model, options.context, options.new_tokens) | {"context": options.context}
    print(json.dumps(row | {"peak_gpu_bytes": torch.cuda.max_memory_allocated()} | machine), flush=True)


if __name__ == "__main__":
    main()
