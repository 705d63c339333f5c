"""How long clients wait on one long document: 1, 4 and 8 of them, through the real server and OpenAI's client.

Each round serves a new document to new clients at once: one prefill in all. A row a round: tokens/s of all clients;
median of the time to first token of the first questions, which wait for the reading, and median and 95th percentile of
that of the questions that follow. The last answer of the first round is compared with `model.generate`. CPU seconds
stand beside wall-clock ones, since machines are shared.

    python benchmarks/serve_clients.py --tokens 6000 --out benchmarks/results/serve_clients.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from server import Running, serving

import hga
from hga.models import load_model

QUESTIONS = ("Who speaks first?", "Where are they?", "What is the weather?", "Who is Gregory?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, tokenizer = load_model("smollm2-135m")
    config = hga.HGAConfig(budget_tokens=options.budget)
    text = (files("hga.data") / "thursday.txt").read_text(encoding="utf-8")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with serving(model, tokenizer, config, name="smollm2-135m", max_context=8192, limit_bytes=4 << 30) as server:
        for count in options.clients:
            # Another first word: no round finds what an earlier one read.
            document = tokenizer.decode(tokenizer(f"{count}. {text}").input_ids[: options.tokens])
            row = measure(server, document, count, options.new_tokens)
            row |= {"budget_tokens": options.budget, "cpu_threads": torch.get_num_threads(), "commit": commit}
            answer = row.pop("last_answer")
            if count == options.clients[0]:
                row["equal_to_generate"] = answer == generated(server, document, 2 * count - 1, options.new_tokens)
            row |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__}
            print(json.dumps(row), flush=True)
            if options.out is not None:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def measure(server: Running, document: str, count: int, new_tokens: int) -> dict[str, Any]:
    before = server.metrics()
    with ThreadPoolExecutor(count) as pool:
        started, cpu_started = time.perf_counter(), time.process_time()
        first = list(pool.map(lambda n: ask(server, document, n, new_tokens), range(count)))
        seconds, cpu_seconds = time.perf_counter() - started, [time.process_time() - cpu_started]
        started = time.perf_counter()
        later = list(pool.map(lambda n: ask(server, document, n + count, new_tokens), range(count)))
        later_seconds = time.perf_counter() - started
        cpu_seconds.append(time.process_time() - cpu_started - cpu_seconds[0])
    server.wait_until_idle()
    after = server.metrics()
    later_waits = [wait for _, wait in later]
    return {
        "question": "serve_clients",
        "clients": count,
        "prompt_tokens": len(prompt_ids(server, document, 0)),
        "new_tokens": new_tokens,
        "read_tokens": int(after["hga_read_tokens_total"] - before["hga_read_tokens_total"]),
        "first_ttft_median_s": statistics.median(wait for _, wait in first),
        "later_ttft_median_s": statistics.median(later_waits),
        "later_ttft_p95_s": sorted(later_waits)[max(0, -(-95 * count // 100) - 1)],
        "first_round_tokens_per_s": count * new_tokens / seconds,
        "later_round_tokens_per_s": count * new_tokens / later_seconds,
        "first_round_cpu_s": cpu_seconds[0],
        "later_round_cpu_s": cpu_seconds[1],
        "last_answer": later[-1][0],
    }


def ask(server: Running, document: str, number: int, new_tokens: int) -> tuple[str, float]:
    """The answer's text, and seconds to its first token."""
    started = time.perf_counter()
    wait, text = 0.0, ""
    for chunk in server.client(timeout_seconds=1800).chat.completions.create(
        model="smollm2-135m", messages=chat(document, number), max_tokens=new_tokens, temperature=0, stream=True
    ):
        piece = chunk.choices[0].delta.content
        if piece and not text:
            wait = time.perf_counter() - started
        text += piece or ""
    return text, wait


def chat(document: str, number: int) -> list[Any]:
    return [{"role": "user", "content": f"{document}\n\n{number}: {QUESTIONS[number % len(QUESTIONS)]}"}]


def prompt_ids(server: Running, document: str, number: int) -> list[int]:
    text = server.tokenizer.apply_chat_template(chat(document, number), tokenize=False, add_generation_prompt=True)
    return list(server.tokenizer(text, add_special_tokens=False).input_ids)


def generated(server: Running, document: str, number: int, new_tokens: int) -> str:
    prompt = torch.tensor([prompt_ids(server, document, number)])
    written = server.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False, pad_token_id=2
    )
    return str(server.tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
