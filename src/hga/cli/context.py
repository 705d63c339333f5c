"""`hga context`: read a document once, and ask it questions in later processes."""

from __future__ import annotations

import json as json_text
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hga.cli.generate import read_prompt
from hga.cli.options import (
    Budget,
    Device,
    Dtype,
    GgufFile,
    Json,
    Model,
    Prefill,
    Preset,
    Rope,
    load,
    read_text,
    routing,
)
from hga.cli.output import byte_progress, console, emit, in_bytes, say
from hga.models import SMOLLM2, check_positions

if TYPE_CHECKING:
    from hga.cache.saved import SavedContext

app = typer.Typer(
    help="Saved contexts: a document that the model has read, in a file. `hga generate --context FILE` asks about it.",
    no_args_is_help=True,
)

SavedFile = Annotated[Path, typer.Argument(metavar="PATH", help="A file that `hga context save` wrote.")]

_BETWEEN = "\n\n"  # document and question
_MARK = "\ue000"  # a character for private use, which no template and hardly any document holds


@app.command("save")
def save(
    document: Annotated[Path, typer.Option("--document", metavar="FILE", help="A UTF-8 text to read.")],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="The file to write; an older one is replaced.")],
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Put the document into the model's chat template, as the start of the question."),
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="A system message before it; implies --chat.")
    ] = None,
    preset: Preset = "balanced",
    budget: Budget = None,
    prefill: Prefill = "auto",
    model: Model = SMOLLM2.name,
    gguf_file: GgufFile = None,
    rope_scaling: Rope = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Read a document and save what the model made of it: K/V, summaries and token ids, bound to these weights.

    Example: hga context save --document book.txt --chat --out book.hga
    """
    from hga.cache import HGACache
    from hga.cache.saved import check_place

    text = read_text(document)
    if not text.strip():
        raise ValueError(f"{document} is empty; give a text to read")
    check_place(out)  # before minutes of reading
    config = routing(preset, budget, prefill=prefill)
    loaded, tokenizer = load(model, gguf_file, rope_scaling, device, dtype)
    ids, suffix = encode_document(tokenizer, text, chat or system is not None, system)
    check_positions(loaded.config, len(ids))

    import torch

    import hga

    cache = HGACache(config=loaded.config, hga_config=config)
    cache.check_room(len(ids), dtype=loaded.dtype)
    started = time.perf_counter()
    with hga.enabled(loaded, config):
        read_prompt(loaded, torch.tensor([ids], device=loaded.device), cache, 0, len(ids))
    read_seconds = time.perf_counter() - started
    with byte_progress() as progress:
        task = progress.add_task("saving", total=None)
        saved = cache.save(
            out,
            loaded,
            ids,
            suffix=suffix,
            report=lambda done, whole: progress.update(task, completed=done, total=whole),
        )
    save_seconds = time.perf_counter() - started - read_seconds
    if json:
        emit(_row(saved) | {"read_seconds": read_seconds, "save_seconds": save_seconds})
    else:
        say(
            f"read {saved.tokens:,} tokens in {read_seconds:.1f} s, saved {in_bytes(saved.size_bytes)} in "
            f"{save_seconds:.1f} s. Ask: hga generate --context {out} --prompt ..."
        )


@app.command("info")
def info(path: SavedFile, json: Json = False) -> None:
    """Say what a saved context holds and which model it is for. Only the file's header is read.

    Example: hga context info book.hga
    """
    from hga.cache.saved import read_context

    saved = read_context(path)
    if json:
        emit(_row(saved))
        return
    kind = saved.model.get("model_type")
    rule = ", ".join(f"{name}={value}" for name, value in asdict(saved.config).items())
    for name, value in {
        "tokens": f"{saved.tokens:,}{' in a chat template' if saved.suffix else ''}",
        "size": f"{in_bytes(saved.size_bytes)}, {in_bytes(saved.record_bytes)} of it in {saved.record_count:,} records",
        "model": f"{kind}, {len(saved.layers)} layers, {saved.model.get('dtype')}",
        "weights": f"xxh3 {saved.model.get('weights')}",
        "token ids": f"xxh3 {saved.token_ids_xxh3}",
        "routing": rule,
    }.items():
        shown = "".join(letter if letter.isprintable() else "?" for letter in value)  # a file may hold anything
        console.print(f"{name:>10}  {shown}", markup=False, soft_wrap=True)


@app.command("verify")
def verify(path: SavedFile, json: Json = False) -> None:
    """Read a saved context whole and check every checksum.

    Example: hga context verify book.hga
    """
    from hga.cache.saved import verify_context

    started = time.perf_counter()
    with byte_progress() as progress:
        task = progress.add_task("checking", total=None)
        saved = verify_context(path, lambda done, whole: progress.update(task, completed=done, total=whole))
    seconds = time.perf_counter() - started
    if json:
        emit({"path": str(path), "intact": True, "size_bytes": saved.size_bytes, "seconds": seconds})
    else:
        say(f"{path} is intact: {saved.record_count:,} records, {in_bytes(saved.size_bytes)} in {seconds:.1f} s")


def encode_document(tokenizer: Any, text: str, chat: bool, system: str | None) -> tuple[list[int], str]:
    """Token ids of a document up to where a question begins, and the text that goes behind the question.

    The ids are those that do not depend on the question: where its first letters could merge with the text's last
    ones into one token, that token is left out.
    """
    from hga.cache import common_prefix

    before, suffix = text + _BETWEEN, ""
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the model has no chat template; leave --chat out or load an instruction-tuned model")
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": before + _MARK})
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, mark, suffix = whole.rpartition(_MARK)
        if not mark:
            raise ValueError("the model's chat template changes the message that it is given; leave --chat out")
    one, other = (
        tokenizer(before + start, add_special_tokens=not chat, verbose=False).input_ids for start in ("What", "7")
    )
    return one[: common_prefix(one, other)], suffix


def _row(saved: SavedContext) -> dict[str, Any]:
    return {
        "path": str(saved.path),
        "tokens": saved.tokens,
        "size_bytes": saved.size_bytes,
        "record_bytes": saved.record_bytes,
        "records": saved.record_count,
        "token_ids_xxh3": saved.token_ids_xxh3,
        "suffix": saved.suffix,
        "config": json_text.loads(saved.config.to_json()),
        "model": saved.model,
    }
