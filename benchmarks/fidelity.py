"""What routing loses on real weights, and whether the real path loses what a direct simulation of the rule loses.

    python benchmarks/fidelity.py --model FOLDER --gguf-file FILE --document FILE --tokens 8192 \\
        --rules balanced,contiguous,paper,balanced+selection=per_head --budget 1/32 --simulate

One JSON line a rule: loss through the cache against dense; with --simulate a second one, the paired difference to
`simulation.py` over the same tokens. A rule is a preset, with changes behind plus signs. Needs no GPU, but wants one.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import transformers
from simulation import simulate
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

import hga
from hga.cache.rope import inverse_frequencies
from hga.evals.nll import evaluate_nll, paired_gap

_SIMULATED: dict[str, Any] = {}


def simulated_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """The attention function "simulated": whole sequences, no cache."""
    layers, repeats = module.config.num_hidden_layers, query.shape[1] // key.shape[1]
    config = _SIMULATED["config"].of_layer(module.layer_idx, layers, repeats)
    frequencies = inverse_frequencies(module.config, module.layer_idx) if config.summary == "mixed_rope" else None
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    out = simulate(config, query[0], key[0], value[0], scale, frequencies)
    return out[None].transpose(1, 2).contiguous(), None


@torch.no_grad()
def simulated_losses(model: Any, ids: Tensor, config: hga.HGAConfig) -> Tensor:
    """Losses of the second half (float32, nats) with every layer simulated."""
    before = model.config._attn_implementation
    _SIMULATED["config"] = config
    model.set_attn_implementation("simulated")
    try:
        hidden = model.model(ids, use_cache=False).last_hidden_state[0]
    finally:
        model.set_attn_implementation(before)
    losses, last = [], ids.shape[1] - 1
    for start in range(ids.shape[1] // 2, last, 512):
        stop = min(last, start + 512)
        logits = model.lm_head(hidden[start:stop]).float()
        losses.append(cross_entropy(logits, ids[0, start + 1 : stop + 1], reduction="none"))
    return torch.cat(losses)


def parse_rule(text: str, fraction: Fraction, tokens: int, store: str) -> hga.HGAConfig:
    """`preset+field=value+...` as a config routed from the first token on."""
    name, *changes = text.split("+")
    fields: dict[str, Any] = {"prefill": "routed", "dense_below": 0, "store": store}
    base = hga.HGAConfig.preset(name)
    fields["budget_tokens"] = base.budget_tokens if name == "paper" else int(fraction * tokens)
    for change in changes:
        field, value = change.split("=")
        fields[field] = json.loads(value) if value[0] in "0123456789tf[" and value != "fp8" else value
        if value in ("true", "false"):
            fields[field] = value == "true"
    return base.replace(**fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--document", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--rules", default="contiguous,balanced,fidelity,lean")
    parser.add_argument("--budget", type=Fraction, default=Fraction(1, 32))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--store", default="device")
    parser.add_argument("--simulate", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    AttentionInterface.register("simulated", simulated_attention)
    gguf = {"gguf_file": options.gguf_file} if options.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(options.model, **gguf)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype), **gguf)
    model = model.to(device).eval()
    text = options.document.read_text(errors="ignore")[: options.tokens * 8]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.tokens].to(device)
    rules = {name: parse_rule(name, options.budget, ids.shape[1], options.store) for name in options.rules.split(",")}
    print(
        json.dumps(
            {
                "model": Path(options.gguf_file or options.model).name,
                "document": options.document.name,
                "tokens": ids.shape[1],
                "hardware": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU",
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        ),
        flush=True,
    )
    for score in evaluate_nll(model, ids, {"dense": None, **rules}):
        row = {name: round(x, 5) if isinstance(x, float) else x for name, x in score.row().items()}
        print(json.dumps(row), flush=True)
        if options.simulate and score.rule in rules:
            started = time.perf_counter()
            oracle = simulated_losses(model, ids, rules[score.rule])
            difference, error = paired_gap(score.losses, oracle)
            simulated = {
                "simulation_of": score.rule,
                "simulated_nll": round(oracle.double().mean().item(), 5),
                "real_less_simulated": round(difference, 5),
                "paired_se": round(error, 5),
                "simulation_seconds": round(time.perf_counter() - started, 1),
            }
            print(json.dumps(simulated), flush=True)


if __name__ == "__main__":
    main()
