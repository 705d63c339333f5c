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
    Preset,
    RamCache,
    Rope,
    Store,
    load,
    read_text,
    routing,
)
from hga.cli.output import emit, in_bytes, say, token_progress
from hga.models import SMOLLM2, check_positions

if TYPE_CHECKING:
    from torch import Tensor


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
    preset: Preset = "balanced",
    budget: Budget = None,
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

    Example: hga generate --chat --prompt "Name three colours of the sea." --max-new-tokens 60
    """
    text = _one_prompt(prompt, prompt_file)
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens} must be at least 1")
    config = routing(preset, budget, ram_cache_gb, store=store)
    loaded, tokenizer = load(model, gguf_file, rope_scaling, device, dtype)
    ids = _encode(tokenizer, text, chat).to(loaded.device)
    check_positions(loaded.config, ids.shape[1] + max_new_tokens)

    import hga

    cache = hga.HGACache(config=loaded.config, hga_config=config)
    started = time.perf_counter()
    with hga.enabled(loaded, config):
        _read(loaded, ids, cache, config.block_tokens)
        read_seconds = time.perf_counter() - started
        cache.reset_counters()
        written = _write(loaded, tokenizer, ids, cache, max_new_tokens, stream=not json)
    write_seconds = time.perf_counter() - started - read_seconds
    stats = cache.stats()
    if json:
        row = {"model": model, "prompt_tokens": ids.shape[1], "new_tokens": len(written)}
        row |= {"text": tokenizer.decode(written, skip_special_tokens=True)}
        emit(row | {"read_seconds": read_seconds, "write_seconds": write_seconds, "cache": asdict(stats)})
    else:
        say(
            f"read {ids.shape[1]:,} tokens in {read_seconds:.1f} s, wrote {len(written):,} at "
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


def _read(model: Any, ids: Tensor, cache: Any, block: int) -> None:
    """Feed all of the prompt but its last token, with a progress bar; generate takes it from there."""
    import torch

    with torch.no_grad(), token_progress() as progress:
        task = progress.add_task("reading", total=ids.shape[1] - 1)
        for start in range(0, ids.shape[1] - 1, block):
            part = ids[:, start : min(start + block, ids.shape[1] - 1)]
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
            progress.advance(task, part.shape[1])


def _write(model: Any, tokenizer: Any, ids: Tensor, cache: Any, count: int, *, stream: bool) -> list[int]:
    """Generate greedily behind a read prompt; with `stream`, print the text as it comes."""
    import torch
    from transformers import TextStreamer

    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
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
