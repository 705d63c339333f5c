"""What it brings to let each query head choose for itself in some layers only, through the real cache.

    python benchmarks/layer_choice.py --document manual.txt --tokens 4096 --layers 0,1/6,1/3,1

`balanced` at 1/32 of the context, every token routed; in the last share of the layers the R query heads of a KV head
choose apart ("per_head"), in the others together. One JSON line a share: distance from dense on the second half, and
what is attended and fetched. --nodes-together: heads that choose groups apart choose nodes together, which would let a
kernel decode a group's code once for all of them. --apart-tokens: their budget, for a comparison at equal fetches.
"""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from hga.cache import HGACache, routed
from hga.config import HGAConfig
from hga.evals.nll import first_tokens, score_rule
from hga.evals.rule import resolve_rules
from hga.models import load_model


def mixed_cache(share: Fraction, apart_tokens: int | None, **arguments: Any) -> HGACache:
    """A cache whose last layers, `share` of all, choose per head, within a budget of their own."""
    cache = HGACache(**arguments)
    first = round(len(cache.layers) * (1 - share))
    for layer in cache.routed:
        if layer.layer_idx >= first:
            budget = apart_tokens or layer.hga_config.budget_tokens
            layer.hga_config = layer.hga_config.replace(selection="per_head", budget_tokens=budget)
    return cache


_score_archive = routed.score_archive


def score_archive_together(config: HGAConfig, *args: Any) -> Any:
    """`hga.cache.routed.score_archive`, whose only choice, that of nodes, all heads make together."""
    return _score_archive(config.replace(selection="shared"), *args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--gguf-file")
    parser.add_argument("--document", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--budget", type=Fraction, default=Fraction(1, 32))
    parser.add_argument("--layers", default="0,1/6,1/3,1", help="shares of the layers, from the last on")
    parser.add_argument("--overselection", type=int, default=8)
    parser.add_argument("--nodes-together", action="store_true")
    parser.add_argument("--apart-tokens", type=int, help="budget of the layers that choose apart")
    options = parser.parse_args()
    if options.nodes_together:
        routed.score_archive = score_archive_together
    model, tokenizer = load_model(options.model, options.gguf_file, dtype=torch.float32)
    ids = first_tokens(tokenizer, options.document.read_text(encoding="utf-8"), options.tokens).to(model.device)
    (rule,) = resolve_rules(["balanced"], options.tokens, float(options.budget)).values()
    rule = rule.replace(overselection=options.overselection)
    _, dense = score_rule(model, ids, "dense", None, None)
    for share in map(Fraction, options.layers.split(",")):
        with patch("hga.HGACache", partial(mixed_cache, share, options.apart_tokens)):
            score, _ = score_rule(model, ids, "balanced", rule, dense)
        found = {name: score.row()[name] for name in ("gap_nats", "se_nats", "kl_mean", "kl_se", "attended", "fetched")}
        about = {"model": Path(options.model).name, "document": options.document.name, "tokens": options.tokens}
        about |= {"budget": str(options.budget), "per_head_layers": str(share)}
        about |= {"overselection": options.overselection, "nodes_together": options.nodes_together}
        about |= {"apart_tokens": options.apart_tokens}
        print(json.dumps(about | found), flush=True)


if __name__ == "__main__":
    main()
