"""Time to first token of a question about a document: read with the question, and from a saved context.

    python benchmarks/context_reuse.py --tokens 8000 --budget 512 --document FILE

The saved context is opened by a process of its own that has loaded the model, from a cold page cache; its time counts
from `HGACache.load` (the hash of all weights included) to the first token. One JSON line: seconds and bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers

import hga
from hga.cache import HGACache
from hga.cache.saved import read_context
from hga.models import load_model
from hga.store import LazyStore

QUESTION = "\n\nIn one sentence, what is the text above about?"
ANSWER_TOKENS = 32


def drop_page_cache(path: Path) -> None:
    """Make the next read of a file come from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def generate(model: Any, ids: torch.Tensor, cache: HGACache, tokens: int) -> list[int]:
    """Greedy tokens behind a prompt of which the cache holds the first part."""
    out = model.generate(ids, past_key_values=cache, max_new_tokens=tokens, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def missing_bytes(cache: HGACache) -> int:
    """Bytes of records that have not been read."""
    return sum(s.missing_bytes for layer in cache.routed for s in layer._stores if isinstance(s, LazyStore))


def ask(path: Path, question: list[int]) -> None:
    """What the second process does; prints a JSON line."""
    model, _ = load_model("smollm2-135m")
    drop_page_cache(path)
    started = time.perf_counter()
    cache = HGACache.load(path, model)
    load_seconds = time.perf_counter() - started
    ids = torch.tensor([[*cache.loaded_ids, *question]])
    with hga.enabled(model, cache.hga_config):
        fork = cache.fork()
        generate(model, ids, fork, 1)
        first_token_seconds = time.perf_counter() - started
        read_bytes = read_context(path).record_bytes - missing_bytes(fork)
        answer = generate(model, ids, cache, ANSWER_TOKENS)
        answer_bytes = read_context(path).record_bytes - missing_bytes(cache)
    row = {"load_seconds": load_seconds, "reused_first_token_seconds": first_token_seconds}
    print(json.dumps(row | {"first_token_read_bytes": read_bytes, "answer_read_bytes": answer_bytes, "answer": answer}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--prefill", default="auto")
    parser.add_argument("--document", type=Path)
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--question", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        ask(options.ask, options.question)
        return
    model, tokenizer = load_model("smollm2-135m")
    text = (options.document or Path(str(files("hga.data") / "thursday.txt"))).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : options.tokens]
    question = tokenizer(QUESTION, add_special_tokens=False).input_ids
    prompt = torch.cat([ids, torch.tensor([question])], 1)
    config = hga.HGAConfig(budget_tokens=options.budget, prefill=options.prefill)
    with tempfile.TemporaryDirectory(dir=".") as folder, hga.enabled(model, config):
        path = Path(folder) / "document.hga"
        cache = HGACache(config=model.config, hga_config=config)
        started = time.perf_counter()
        with torch.no_grad():
            model(ids, past_key_values=cache, logits_to_keep=1)
        read_seconds = time.perf_counter() - started
        saved = cache.save(path, model, ids)
        save_seconds = time.perf_counter() - started - read_seconds
        started = time.perf_counter()
        fresh = HGACache(config=model.config, hga_config=config)
        generate(model, prompt, fresh, 1)
        first_token_seconds = time.perf_counter() - started
        del fresh
        answer = generate(model, prompt, cache, ANSWER_TOKENS)
        command = [sys.executable, __file__, "--ask", str(path), "--question", json.dumps(question)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        print(
            json.dumps(
                {
                    "model": "smollm2-135m",
                    "tokens": ids.shape[1],
                    "question_tokens": len(question),
                    "budget_tokens": options.budget,
                    "prefill": options.prefill,
                    "file_bytes": saved.size_bytes,
                    "record_bytes": saved.record_bytes,
                    "read_seconds": read_seconds,
                    "save_seconds": save_seconds,
                    "prefill_first_token_seconds": first_token_seconds,
                    "ratio": first_token_seconds / row["reused_first_token_seconds"],
                    "same_answer": row.pop("answer") == answer,
                    **row,
                    "threads": torch.get_num_threads(),
                    "cpu": platform.processor() or platform.machine(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                }
            )
        )


if __name__ == "__main__":
    main()
