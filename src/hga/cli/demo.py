"""`hga demo`: the default model reads a long text, dense and routed, and says what it lost and saved."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from hga.cli.options import Json, load
from hga.cli.output import console, emit, in_bytes, table, token_progress
from hga.config import HGAConfig
from hga.models import SMOLLM2

if TYPE_CHECKING:
    from torch import Tensor

READ_TOKENS = 6016
NEW_TOKENS = 24
BUDGET_TOKENS = READ_TOKENS // 16


@dataclass(frozen=True)
class Reading:
    """One way of reading the text. Bytes are of K/V and summaries; nll is nats a token, second half."""

    attention: str
    tokens: int
    budget_tokens: int | None
    attended: float
    nll: float
    gap_nats: float
    se_nats: float
    device_bytes: int
    store_bytes: int
    read_seconds: float
    decode_tokens_per_second: float
    continuation: str


def demo(json: Json = False) -> None:
    """Watch SmolLM2-135M read two chapters of a novel with dense and with routed attention. No GPU needed.

    Example: hga demo
    """
    model, tokenizer = load(SMOLLM2.name)
    text = (files("hga") / "data" / "thursday.txt").read_text(encoding="utf-8")
    with token_progress() as progress:
        tasks = {name: progress.add_task(f"{name:5}", total=READ_TOKENS + NEW_TOKENS) for name in ("dense", "hga")}
        readings = measure(model, tokenizer, text, progress=lambda name, tokens: progress.advance(tasks[name], tokens))
    for reading in readings:
        if json:
            emit(asdict(reading))
    if not json:
        _show(readings)


def measure(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    tokens: int = READ_TOKENS,
    new_tokens: int = NEW_TOKENS,
    budget_tokens: int = BUDGET_TOKENS,
    progress: Callable[[str, int], object] = lambda name, tokens: None,
) -> list[Reading]:
    """Read the first `tokens` tokens of `text` with dense, then with routed attention; each continues it.

    The routed reading takes the first half as a prompt, densely; the second half's queries, as if they were being
    written, attend exactly to at most `budget_tokens` each. progress is called with "dense" or "hga" and the tokens
    just read or written. ValueError if the text is shorter.
    """
    from transformers import DynamicCache

    import hga
    from hga.evals.nll import first_tokens

    config = HGAConfig(budget_tokens=budget_tokens, prefill="routed", dense_below=tokens // 2)
    ids = first_tokens(tokenizer, text, tokens).to(model.device)
    dense, dense_losses = _measure_one(
        model, tokenizer, ids, DynamicCache(config=model.config), None, new_tokens, partial(progress, "dense")
    )
    with hga.enabled(model, config):
        cache = hga.HGACache(config=model.config, hga_config=config)
        routed, _ = _measure_one(model, tokenizer, ids, cache, dense_losses, new_tokens, partial(progress, "hga"))
    return [dense, routed]


def _measure_one(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    cache: Any,
    dense_losses: Tensor | None,
    new_tokens: int,
    progress: Callable[[int], object],
) -> tuple[Reading, Tensor]:
    from hga.evals.nll import paired_gap, read
    from hga.evals.rule import held_bytes

    routing = getattr(cache, "hga_config", None)
    started = time.perf_counter()
    losses = read(
        model,
        ids,
        cache,
        score_from=ids.shape[1] // 2,
        at_scoring=getattr(cache, "reset_counters", None),
        progress=progress,
    )
    seconds = time.perf_counter() - started
    gap, error = paired_gap(losses, losses if dense_losses is None else dense_losses)
    held = held_bytes(cache)
    written, rate = _decode(model, ids[:, -1:], cache, new_tokens, progress)
    reading = Reading(
        attention="dense" if routing is None else "hga",
        tokens=ids.shape[1],
        budget_tokens=None if routing is None else routing.budget_tokens,
        attended=held["attended"],
        nll=losses.double().mean().item(),
        gap_nats=gap,
        se_nats=error,
        device_bytes=held["device_bytes"],
        store_bytes=held["store_bytes"],
        read_seconds=seconds,
        decode_tokens_per_second=rate,
        continuation=tokenizer.decode(written),
    )
    return reading, losses


def _decode(
    model: Any, token: Any, cache: Any, count: int, progress: Callable[[int], object]
) -> tuple[list[int], float]:
    """Continue greedily from `token` (1, 1): the tokens, and tokens a second behind the first one."""
    import torch

    from hga.integrations.transformers.forward import forward_with_cache

    written: list[int] = []
    started = 0.0
    with torch.no_grad():
        for _ in range(count):
            logits = forward_with_cache(model, token, cache).logits
            token = logits[:, -1:].argmax(-1)
            written.append(int(token))
            progress(1)
            # The first step warms up what the blocks of reading did not use.
            started = started or time.perf_counter()
    return written, (count - 1) / (time.perf_counter() - started)


def _show(readings: list[Reading]) -> None:
    dense, routed = readings
    title = f"{SMOLLM2.name} reads {dense.tokens:,} tokens of The Man Who Was Thursday"
    console.print(title, style="bold")
    shown = table("", "dense", "HGA")
    rows: list[tuple[str, Callable[[Reading], str]]] = [
        ("loss of the second half, nats a token", lambda r: f"{r.nll:.4f}"),
        ("lost against dense", lambda r: "" if r is dense else f"{r.gap_nats:+.4f} ± {r.se_nats:.4f}"),
        ("tokens attended exactly, of the context", lambda r: f"{r.attended:.1%}"),
        ("K/V and summaries beside the model", lambda r: in_bytes(r.device_bytes)),
        ("K/V in the store (host memory)", lambda r: in_bytes(r.store_bytes)),
        ("seconds to read", lambda r: f"{r.read_seconds:.0f}"),
        ("tokens written a second", lambda r: f"{r.decode_tokens_per_second:.1f}"),
    ]
    for name, value in rows:
        shown.add_row(name, value(dense), value(routed))
    console.print(shown)
    half = dense.tokens // 2
    console.print(
        f"HGA reads {half:,} tokens exactly, as a prompt; the other {half:,} are routed as if they were being written, "
        "which takes longer than reading them."
    )
    console.print("\nWith HGA the text goes on:", style="bold")
    console.print(" ".join(routed.continuation.split()), markup=False)
