"""`hga chat`: talk to a model about documents, in a terminal or through a pipe."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hga.cli.options import (
    Budget,
    Device,
    Dtype,
    GgufFile,
    Model,
    Prefill,
    Preset,
    Rope,
    load,
    read_text,
    routing,
    saved_routing,
)
from hga.cli.output import byte_progress, console, in_bytes, messages, say, token_progress
from hga.models import SMOLLM2

if TYPE_CHECKING:
    from hga.serving.answer import Answer
    from hga.serving.conversation import Conversation
    from hga.serving.sampling import Sampling

HELP = """\
/help       this
/stats      tokens, where the K/V is, what was attended, how fast it went
/save PATH  save the conversation; hga chat --context PATH goes on with it
/reset      begin anew; documents stay
/quit       end (so does the end of input)
Ctrl-C stops an answer. A line that begins with // is sent with one / less."""


def chat(
    document: Annotated[
        list[Path] | None,
        typer.Option("--document", metavar="FILE", help="A UTF-8 text that the talk is about; may be repeated."),
    ] = None,
    context: Annotated[
        Path | None,
        typer.Option("--context", metavar="SAVED", help="Go on with what /save or hga context save --chat wrote."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Tokens of an answer at most.")
    ] = 1024,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", metavar="X", min=0, max=2, help="0 is greedy; by default as the model's maker says."
        ),
    ] = None,
    preset: Preset = "balanced",
    budget: Budget = None,
    prefill: Prefill = "auto",
    model: Model = SMOLLM2.name,
    gguf_file: GgufFile = None,
    rope_scaling: Rope = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Chat. What was read stays read: a turn reads only what is new in it. /help says what else there is.

    Example: hga chat --document book.txt
    """
    if document and context is not None:
        raise ValueError("give --document or --context, not both: a saved context cannot get a document in front")
    texts = [read_text(path) for path in document or []]
    config = routing(preset, budget, prefill=prefill)
    if context is not None:
        config = saved_routing(context, config, "--preset, --budget and --prefill")
    loaded, tokenizer = load(model, gguf_file, rope_scaling, device, dtype)

    import hga
    from hga.serving.conversation import Conversation
    from hga.serving.sampling import Sampling

    sampling = Sampling.default(loaded.generation_config).replace(temperature=temperature)
    with hga.enabled(loaded, config):
        if context is None:
            conversation = Conversation(loaded, tokenizer, config, texts)
        else:
            conversation = Conversation.resume(context, loaded, tokenizer)
        _Chat(conversation, sampling, max_new_tokens).run()


class _Chat:
    """The loop of lines and answers."""

    def __init__(self, conversation: Conversation, sampling: Sampling, max_new_tokens: int) -> None:
        self._conversation = conversation
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._last: Answer | None = None

    def run(self) -> None:
        """Answer lines until there are no more."""
        from hga.store.host import is_out_of_memory

        for line in _lines():
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if line.split()[0] == "/quit":
                        return
                    self._command(*line.split(maxsplit=1))
                elif line.strip():
                    self._answer(line[1:] if line.startswith("//") else line)
            except (KeyboardInterrupt, MemoryError, RuntimeError) as error:
                if not isinstance(error, KeyboardInterrupt) and not is_out_of_memory(error):
                    raise
                self._conversation.forget_cache()  # it may have been cut off in the middle of a change
                say(f"hga: {' '.join(str(error).split()) or 'stopped'}; the next turn reads everything again")
            except (ValueError, OSError) as error:
                say(f"hga: {' '.join(str(error).split())}")

    def _command(self, name: str, argument: str = "") -> None:
        if name == "/help":
            say(HELP)
        elif name == "/stats":
            self._tell_stats()
        elif name == "/reset":
            self._conversation.reset()
            say("forgotten")
        elif name == "/save":
            if not argument:
                raise ValueError("/save needs a path, e.g. /save talk.hga")
            with byte_progress() as progress:
                task = progress.add_task("saving", total=None)
                saved = self._conversation.save(
                    Path(argument.strip()), lambda done, whole: progress.update(task, completed=done, total=whole)
                )
            say(f"saved {saved.tokens:,} tokens, {in_bytes(saved.size_bytes)}, to {saved.path}")
        else:
            raise ValueError(f"{name} is no command; /help lists them, // sends a line that begins with /")

    def _answer(self, question: str) -> None:
        try:
            question.encode()
        except UnicodeEncodeError:
            raise ValueError("the line is no UTF-8 text, and was not sent") from None
        conversation, text = self._conversation, ""
        answer = conversation.begin(question, self._sampling, self._max_new_tokens)
        self._last = answer
        with _interrupted() as stop:
            try:
                text = _read(answer, stop)
                console.print(text, end="", markup=False, soft_wrap=True)
                while answer.finish is None and not stop.is_set():
                    piece = answer.advance()
                    console.print(piece, end="", markup=False, soft_wrap=True)
                    text += piece
            except BaseException:
                conversation.forget_cache()  # it was left in the middle of a forward
                raise
        console.print()
        conversation.end(question, answer, text)
        if stop.is_set():
            say("stopped" if answer.written else "stopped before the answer; the question is forgotten")

    def _tell_stats(self) -> None:
        conversation, answer = self._conversation, self._last
        stats, held = conversation.cache.stats(), conversation.cache.held_bytes(set())
        tiers = ", ".join(f"{in_bytes(count)} {_PLACES.get(tier, tier)}" for tier, count in held.items())
        say(f"{conversation.tokens:,} tokens held; K/V and summaries: {tiers} (dense K/V: {in_bytes(stats.kv_bytes)})")
        if answer is None or not answer.written:
            return
        read = len(answer.request.prompt_ids) - answer.cached_tokens
        say(
            f"last turn: {answer.cached_tokens:,} tokens reused, {read:,} read in {answer.read_seconds:.1f} s, "
            f"{len(answer.written):,} written at {(len(answer.written) - 1) / max(answer.write_seconds, 1e-9):.1f} a "
            f"second; {stats.attended:.1%} of the context attended exactly, hit rate {stats.hit_rate:.1%}"
        )


_PLACES = {"device": "beside the model", "ram": "in the RAM store", "nvme": "in the NVMe store"}


def _lines() -> Iterator[str]:
    """What is typed, or piped in, line by line."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its editing and history)
    say("/help lists the commands")
    while True:
        try:
            yield input("> ")
        except EOFError:
            messages.print()
            return
        except KeyboardInterrupt:
            messages.print()
            say("Ctrl-D or /quit ends the chat")


def _read(answer: Answer, stop: threading.Event) -> str:
    """Read the prompt, with a progress bar; returns the answer's first text."""
    text = ""
    with token_progress() as progress:
        task = progress.add_task("reading", total=len(answer.request.prompt_ids), completed=answer.cached_tokens)
        while answer.is_reading and not stop.is_set():
            text = answer.advance()
            progress.update(task, completed=answer.fed_tokens)
    return text


@contextlib.contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Ctrl-C sets an event, which is looked at between two forwards: one that is cut off would spoil the cache."""
    stop = threading.Event()

    def note(*_: Any) -> None:
        stop.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
