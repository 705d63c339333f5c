"""How many routed groups of one decode step were routed lately: the hit rate that a GPU's slot cache would have.

    python benchmarks/hit_rate.py --model FOLDER --gguf-file FILE --document FILE --tokens 8192 --new-tokens 128

Reads the document's first tokens densely, goes on with its next ones one by one through the cache in PyTorch, records
which groups each KV head fetches, and replays them through least-recently-used slots of several sizes (in units of what
a step routes; the decode kernels have 2). JSON lines.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hga
from hga.cache.archive import Archive
from hga.integrations.transformers.forward import forward_with_cache

SIZES = (1.0, 1.5, 2.0, 3.0, 4.0)


class Recorder:
    """What every archive's heads fetch, in order."""

    def __init__(self) -> None:
        self.steps: dict[int, list[list[list[int]]]] = {}
        self._fetch = Archive.fetch

    def fetch(self, archive: Archive, places: Tensor) -> tuple[Tensor, Tensor]:
        """See `Archive.fetch`."""
        self.steps.setdefault(id(archive), []).append(places.tolist())
        return self._fetch(archive, places)


def replay(steps: list[list[list[int]]], slots: int) -> tuple[int, int]:
    """Hits and groups asked for, of one layer's heads, each with its own slots; the first step only fills them."""
    hits = asked = 0
    for head in range(len(steps[0])):
        held: OrderedDict[int, None] = OrderedDict()
        for number, step in enumerate(steps):
            wanted = step[head]
            if number:
                hits += sum(group in held for group in wanted)
                asked += len(wanted)
            for group in wanted:
                held[group] = None
                held.move_to_end(group)
            while len(held) > slots:
                held.popitem(last=False)
    return hits, asked


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--document", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--presets", default="balanced,lean")
    parser.add_argument("--budget", type=Fraction, default=Fraction(1, 32))
    options = parser.parse_args()
    gguf = {"gguf_file": options.gguf_file} if options.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(options.model, **gguf)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, **gguf).eval()
    text = options.document.read_text(errors="ignore")[: options.tokens * 8]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.tokens]
    for name in options.presets.split(","):
        config = hga.HGAConfig.preset(name, budget_tokens=int(options.budget * options.tokens), prefill="exact")
        cache = hga.HGACache(config=model.config, hga_config=config)
        recorder = Recorder()
        with hga.enabled(model, config):
            forward_with_cache(model, ids[:, : -options.new_tokens], cache)
            Archive.fetch = lambda self, places, recorder=recorder: recorder.fetch(self, places)
            try:
                for token in ids[:, -options.new_tokens :].split(1, 1):
                    forward_with_cache(model, token, cache)
            finally:
                Archive.fetch = recorder._fetch
        rates = {}
        for size in SIZES:
            counted = [replay(steps, int(size * config.routed_groups)) for steps in recorder.steps.values()]
            rates[size] = round(sum(hits for hits, _ in counted) / max(1, sum(asked for _, asked in counted)), 3)
        row = {
            "rule": name,
            "tokens": ids.shape[1],
            "new_tokens": options.new_tokens,
            "budget_tokens": config.budget_tokens,
            "hit_rate_by_slots": rates,
            "model": Path(options.gguf_file or options.model).name,
            "document": options.document.name,
            "torch": torch.__version__,
        }
        print(json.dumps(row), flush=True)
        cache.reset()


if __name__ == "__main__":
    main()
