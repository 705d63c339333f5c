"""`hga serve`: an OpenAI-compatible server with a chat page."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from hga.cli.options import Budget, Device, Dtype, GgufFile, Model, Prefill, Preset, Rope, load, routing
from hga.cli.output import in_bytes, say
from hga.models import SMOLLM2

_GIB = 1 << 30
_UNKNOWN_BYTES = 8 * _GIB
"""Taken for free memory where the system does not say."""


def serve(
    model: Model = SMOLLM2.name,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", metavar="F", help="A file of keys, one a line; requests must bring one."),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option("--max-context", metavar="N", min=2, help="Tokens of prompt and answer; by default the model's."),
    ] = None,
    max_requests: Annotated[
        int, typer.Option("--max-requests", metavar="N", min=1, help="Requests that are under way at once.")
    ] = 16,
    max_body_mb: Annotated[int, typer.Option("--max-body-mb", metavar="N", min=1, help="Megabytes of a request.")] = 32,
    cache_gb: Annotated[
        float | None,
        typer.Option(
            "--cache-gb",
            metavar="X",
            min=0,
            help="Memory for contexts that later prompts may begin with; by default a quarter of what is free.",
        ),
    ] = None,
    context_dir: Annotated[
        Path | None,
        typer.Option(
            "--context-dir", metavar="D", help="Saved contexts (*.hga) that prompts of any key may begin with."
        ),
    ] = None,
    preset: Preset = "balanced",
    budget: Budget = None,
    prefill: Prefill = "auto",
    gguf_file: GgufFile = None,
    rope_scaling: Rope = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Serve a model to OpenAI's clients, and a chat page to browsers. What was read once is not read again.

    Example: hga serve --port 8000
    """
    try:
        import uvicorn

        from hga.serving.app import Served, build_app
        from hga.serving.contexts import Contexts, find_saved
        from hga.serving.engine import Engine
        from hga.serving.gate import LOOPBACK, read_keys
        from hga.serving.metrics import Metrics
    except ImportError as error:
        raise ValueError(f"hga serve needs {error.name}; install it: pip install 'hga[serve]'") from error
    keys = [] if api_key_file is None else read_keys(api_key_file)
    if host not in LOOPBACK and not keys:
        raise ValueError(
            f"--host {host} can be reached from other machines; give --api-key-file F, or listen on 127.0.0.1"
        )
    config = routing(preset, budget, prefill=prefill)
    saved = [] if context_dir is None else find_saved(context_dir, config)
    with _listen(host, port) as listening:
        loaded, tokenizer = load(model, gguf_file, rope_scaling, device, dtype)

        import hga
        from hga.store.host import available_host_bytes

        most = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", None)
        tokens = max_context or most
        if tokens is None:
            raise ValueError("the model's config does not say how many positions it has; give --max-context N")
        if most is not None and tokens > most:
            raise ValueError(f"--max-context {tokens} is more than the model's {most} positions; see --rope-scaling")
        limit = (available_host_bytes() or _UNKNOWN_BYTES) // 4 if cache_gb is None else int(cache_gb * _GIB)
        metrics = Metrics()
        name = Path(model).name if Path(model).is_dir() else model
        with hga.enabled(loaded, config):
            engine = Engine(
                loaded, tokenizer, config, Contexts(limit, saved), max_requests=max_requests, metrics=metrics
            )
            served = Served(name, tokens, max_body_mb << 20, keys, () if keys else LOOPBACK)
            app = build_app(engine, metrics, served)
            place = f"[{host}]" if ":" in host else host
            say(f"{name}, up to {tokens:,} tokens; {in_bytes(limit)} for contexts; {len(saved)} saved contexts")
            say(f"listening on http://{place}:{listening.getsockname()[1]}")
            server = uvicorn.Server(
                uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=5)
            )
            try:
                server.run(sockets=[listening])
            finally:
                engine.close()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. OSError that says what cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
        except OSError:
            opened.close()
            raise
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another by --host and --port"
        ) from error
    return opened
