"""`hga generate`: continue a prompt with routed attention, tokens as they come."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hga.cli.options import (
    Budget,
    Device,
    Dtype,
    GgufFile,
    Json,
    Model,
    Prefill,
    Preset,
    RamCache,
    Rope,
    Store,
    load,
    read_text,
    routing,
    saved_routing,
)
from hga.cli.output import emit, in_bytes, say, token_progress
from hga.models import SMOLLM2, check_positions

if TYPE_CHECKING:
    from torch import Tensor

    from hga.config import HGAConfig


def generate(
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="The prompt itself.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="A UTF-8 file that holds the prompt.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="Write at most N tokens.")] = 128,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Wrap the prompt in the model's chat template, as the user's message."),
    ] = False,
    context: Annotated[
        Path | None,
        typer.Option("--context", metavar="PATH", help="A saved context (hga context save) that the prompt is about."),
    ] = None,
    preset: Preset = "balanced",
    budget: Budget = None,
    prefill: Prefill = "auto",
    store: Store = "ram",
    ram_cache_gb: RamCache = None,
    model: Model = SMOLLM2.name,
    gguf_file: GgufFile = None,
    rope_scaling: Rope = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Continue a prompt, however long, greedily. Text goes to stdout, timings to stderr.

    With --context the prompt follows the saved document, which is not read again; a prompt that itself begins with
    half of the document or more is taken as it is, and only what differs is read. The document's own preset goes on.

    Example: hga generate --chat --prompt "Name three colours of the sea." --max-new-tokens 60
    """
    text = _one_prompt(prompt, prompt_file)
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens} must be at least 1")
    config = routing(preset, budget, ram_cache_gb, store=store, prefill=prefill)
    if context is not None:
        config = saved_routing(context, config, "--preset, --budget and --prefill")
        if chat:
            raise ValueError(f"--chat: whether {context} is a chat was decided when it was saved; leave --chat out")
    loaded, tokenizer = load(model, gguf_file, rope_scaling, device, dtype)

    import hga

    started = time.perf_counter()
    if context is None:
        cache, ids, reused = hga.HGACache(config=loaded.config, hga_config=config), _encode(tokenizer, text, chat), 0
    else:
        cache, ids, reused = _continue(context, loaded, tokenizer, text, config)
    load_seconds = time.perf_counter() - started
    ids = ids.to(loaded.device)
    check_positions(loaded.config, ids.shape[1] + max_new_tokens)
    cache.check_room(ids.shape[1] - reused + max_new_tokens, dtype=loaded.dtype)
    started = time.perf_counter()
    with hga.enabled(loaded, config):
        read_prompt(loaded, ids, cache, reused, ids.shape[1] - 1)
        read_seconds = time.perf_counter() - started
        cache.reset_counters()
        written = _write(loaded, tokenizer, ids, cache, max_new_tokens, stream=not json)
    write_seconds = time.perf_counter() - started - read_seconds
    stats = cache.stats()
    if json:
        row = {"model": model, "prompt_tokens": ids.shape[1], "new_tokens": len(written)}
        row |= {"reused_tokens": reused, "load_seconds": load_seconds}
        row |= {"text": tokenizer.decode(written, skip_special_tokens=True)}
        emit(row | {"read_seconds": read_seconds, "write_seconds": write_seconds, "cache": asdict(stats)})
    else:
        say(
            f"{_reuse(context, reused, load_seconds)}read {ids.shape[1] - reused:,} tokens in {read_seconds:.1f} s, "
            f"wrote {len(written):,} at "
            f"{len(written) / write_seconds:.1f} a second; {stats.attended:.1%} of the context attended "
            f"exactly; {in_bytes(stats.device_bytes)} of K/V and summaries beside the model, "
            f"{in_bytes(stats.store_bytes)} in the store"
        )


def _one_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ValueError(f"give {'one of' if prompt is None else 'only one of'} --prompt TEXT and --prompt-file FILE")
    text = prompt if prompt is not None else read_text(prompt_file) if prompt_file is not None else ""
    if not text.strip():
        raise ValueError("the prompt is empty; give at least a word")
    return text


def _encode(tokenizer: Any, text: str, chat: bool) -> Tensor:
    """The prompt's token ids (1, T)."""
    import torch

    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the model has no chat template; leave --chat out or load an instruction-tuned model")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    ids = tokenizer(text, add_special_tokens=not chat, verbose=False).input_ids
    if not ids:
        raise ValueError("the prompt holds no token of the model's vocabulary; give at least a word")
    return torch.tensor([ids])


def _continue(path: Path, model: Any, tokenizer: Any, text: str, config: HGAConfig) -> tuple[Any, Tensor, int]:
    """A saved context's cache, the whole prompt's ids (1, T), and how many of them the cache holds already.

    config: the context's own, in the store that is asked for.
    """
    import torch

    import hga
    from hga.cache.saved import read_context

    saved = read_context(path)
    store = None if config.store == saved.config.store else config.store
    cache = hga.HGACache.load(path, model, store=store, ram_cache_bytes=config.ram_cache_bytes)
    held = list(cache.loaded_ids)
    ids = tokenizer(text, verbose=False).input_ids
    if hga.common_prefix(ids, held) < len(held) / 2:
        ids = held + tokenizer(text + saved.suffix, add_special_tokens=False, verbose=False).input_ids
    reused = cache.keep_common(ids)
    return cache, torch.tensor([ids]), reused


def _reuse(context: Path | None, reused: int, seconds: float) -> str:
    return "" if context is None else f"{reused:,} tokens from {context} in {seconds:.1f} s, "


def read_prompt(model: Any, ids: Tensor, cache: Any, first: int, last: int) -> None:
    """Feed tokens `first` to `last` of a prompt (1, T), with a progress bar; generate takes it from there."""
    import torch

    from hga.integrations.transformers.forward import forward_with_cache, split_evenly

    with torch.no_grad(), token_progress() as progress:
        task = progress.add_task("reading", total=last - first)
        for start, stop in split_evenly(first, last, cache.hga_config.block_tokens):
            forward_with_cache(model, ids[:, start:stop], cache)
            progress.advance(task, stop - start)


def _write(model: Any, tokenizer: Any, ids: Tensor, cache: Any, count: int, *, stream: bool) -> list[int]:
    """Generate greedily behind a read prompt; with `stream`, print the text as it comes."""
    import torch
    from transformers import TextStreamer

    from hga.integrations.transformers.forward import cache_argument

    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{cache_argument(model): cache},
        max_new_tokens=count,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
    )
    sys.stdout.flush()
    return list(written[0, ids.shape[1] :].tolist())
