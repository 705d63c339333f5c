"""Hundreds of mixed requests to the server, cancelled and malformed ones among them: what grows, what sticks.

    python benchmarks/serve_soak.py --requests 800 --looks 8 --model smollm2-135m

Six clients send chats and completions, whole and streamed, questions on shared documents, streams that are closed after
a few tokens, connections cut while the prompt is read, malformed JSON, unsupported fields, prompts that are too long,
unknown models. A row says memory, kept contexts and open files after each part of the requests, and whether the
counters add up. It fails if something does not, is stuck, or still grows in the last quarter: the first requests of
each kind, and contexts up to their limit, take memory once.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from server import Running, serving

import hga
from hga.models import load_model
from hga.serving.engine import IDLE_SECONDS

CLIENTS = 6
KINDS = ("complete", "complete", "stream", "chat", "document", "close", "cut", "json", "field", "long", "model")


GROWTH_BYTES = 16 << 20
"""Memory that a quarter of the requests may take more: noise of the allocators, a hundredth of the process."""


def soak(server: Running, requests: int, document: str, looks: int = 4) -> dict[str, Any]:
    """Send the requests and report. The server must be idle and nobody else's; looks: an even number."""
    draws = random.Random(0)
    plan = [(draws.choice(KINDS), draws.randrange(1_000_000)) for _ in range(requests)]
    plan[: len(KINDS)] = [(kind, 1) for kind in KINDS]  # each at least once before the middle
    before, tallies = server.metrics(), Counter[str]()
    held: dict[str, list[int]] = {"rss_bytes": [], "contexts_bytes": [], "files": []}
    for look in range(looks):
        with ThreadPoolExecutor(CLIENTS) as clients:
            part = plan[requests * look // looks : requests * (look + 1) // looks]
            for tally in clients.map(lambda one: send(server, document, *one), part):
                tallies.update(tally)
        server.wait_until_idle()
        gc.collect()
        time.sleep(IDLE_SECONDS + 0.5)  # closed connections are taken down, and memory is given back
        held["rss_bytes"].append(resident_bytes())
        held["contexts_bytes"].append(sum(server.contexts.held_bytes().values()))
        held["files"].append(len(os.listdir("/proc/self/fd")))
    after = server.metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    answered = {
        status: sum(
            count
            for name, count in grown.items()
            if name.startswith("hga_requests_total") and f'status="{status}"' in name and "/v1/" in name
        )
        for status in (200, 400, 404, 413, 429, 499)
    }
    return {
        "question": "serve_soak",
        "requests": requests,
        "sent": {name: count for name, count in sorted(tallies.items()) if name.startswith("sent")},
        "answered": {str(status): int(count) for status, count in answered.items()},
        **held,
        "under_way": after["hga_requests_under_way"],
        "add_up": {
            "400": answered[400] == tallies["400"],
            "404": answered[404] == tallies["404"],
            "413": answered[413] == tallies["413"],
            "cancelled": grown["hga_requests_cancelled_total"] == tallies["cancelled"],
            "prompt_tokens": grown["hga_prompt_tokens_total"] == tallies["prompt_tokens"],
            "new_tokens": grown["hga_new_tokens_total"] == tallies["new_tokens"],
            "cached_tokens": grown["hga_cached_tokens_total"] == tallies["cached_tokens"],
        },
    }


def rise(looks: list[int]) -> float:
    """How much higher the last quarter of an even number of looks is than the one before."""
    quarter = max(1, len(looks) // 4)
    return statistics.mean(looks[-quarter:]) - statistics.mean(looks[-2 * quarter : -quarter])


def find_faults(told: dict[str, Any]) -> list[str]:
    """What is wrong with a report of `soak`."""
    faults = [f"the counters of {name} do not add up" for name, right in told["add_up"].items() if not right]
    if told["under_way"]:
        faults.append(f"{told['under_way']} requests are stuck")
    own = [rss - kept for rss, kept in zip(told["rss_bytes"], told["contexts_bytes"], strict=True)]
    if (grown := rise(own)) > GROWTH_BYTES:
        faults.append(f"memory beside contexts still grows, by {grown:,.0f} bytes in the last quarter")
    if (opened := rise(told["files"])) > 2:
        faults.append(f"{opened:,.0f} files more are open than a quarter before")
    return faults


def send(server: Running, document: str, kind: str, number: int) -> dict[str, int]:
    """One request; returns what it should have added to the counters."""
    model = "served"
    body: dict[str, Any] = {"model": model, "prompt": f"{number} is a number", "max_tokens": 4}
    path, content = "/v1/completions", None
    if kind == "chat":
        del body["prompt"]
        body["messages"] = [{"role": "user", "content": f"What is {number}?"}]
        path = "/v1/chat/completions"
    elif kind == "document":
        body["prompt"] = f"{document}\n\nWhat is {number}?"
    elif kind == "json":
        content = b'{"model": "served", "prompt": '
    elif kind == "field":
        body["n"] = 3
    elif kind == "long":
        body["prompt"] = [5] * 9000
    elif kind == "model":
        body["model"] = "another"
    elif kind in ("close", "cut"):
        return give_up(server, document, kind, number)
    if kind == "stream":
        return {f"sent {kind}": 1} | stream(server, body)
    headers = {"content-type": "application/json"}
    response = httpx.post(server.url + path, content=content or json.dumps(body), headers=headers, timeout=300)
    tally = {f"sent {kind}": 1, str(response.status_code): 1}
    expected = {"json": 400, "field": 400, "long": 413, "model": 404}.get(kind, 200)
    assert response.status_code == expected, (kind, response.text)
    return tally | (_usage(response.json()["usage"]) if expected == 200 else {})


def stream(server: Running, body: dict[str, Any]) -> dict[str, int]:
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=300) as response:
        events = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", events
    return {"200": 1} | _usage(json.loads(events[-2])["usage"])


def give_up(server: Running, document: str, kind: str, number: int) -> dict[str, int]:
    """Close a stream after its first tokens, or the connection while the prompt is read."""
    prompt = f"{number}. {document}" if kind == "cut" else f"{number} begins"
    body = json.dumps({"model": "served", "prompt": prompt, "max_tokens": 1000, "stream": kind == "close"})
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=300)
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    if kind == "close":
        response = connection.getresponse()
        while b"data: " not in response.readline():
            pass
        response.close()
    else:
        time.sleep(0.05)
    connection.close()
    return {f"sent {kind}": 1, "cancelled": 1}


def _usage(usage: dict[str, Any]) -> dict[str, int]:
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "new_tokens": usage["completion_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
    }


def resident_bytes() -> int:
    """Memory of this process that is in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--looks", type=int, default=4)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--document-characters", type=int, default=3000)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    from importlib.resources import files

    text = (files("hga.data") / "thursday.txt").read_text(encoding="utf-8")[: options.document_characters]
    config = hga.HGAConfig(budget_tokens=128)
    with serving(model, tokenizer, config, max_context=4096, max_requests=CLIENTS * 3, limit_bytes=256 << 20) as server:
        told = soak(server, options.requests, text, options.looks)
        print(json.dumps(told | {"model": options.model}))
    if faults := find_faults(told):
        raise SystemExit("; ".join(faults))


if __name__ == "__main__":
    main()
