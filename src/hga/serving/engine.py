"""Many answers on one model: a thread that gives each a turn, and lets them share what was read.

Turns go round: a block of a prompt, or a token of an answer. Nothing is batched, so each answer is the one that it
would be alone, and who asks a short question does not wait for somebody's long document.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hga.cache import CacheStats, HGACache, common_prefix
from hga.config import HGAConfig
from hga.serving.answer import Answer, Request, usable
from hga.serving.contexts import Contexts
from hga.serving.metrics import Metrics
from hga.store.host import HostRoomError, is_out_of_memory, return_freed_memory

logger = logging.getLogger("hga.serving")

WORTH_WAITING_TOKENS = 64
"""A prompt waits for another's reading if that spares it more tokens than this."""
IDLE_SECONDS = 1.0
"""Freed memory goes back to the system after so long without a request, so that nobody waits for that."""
BUSY_SECONDS = 60.0
"""And so often where requests never cease."""


@dataclass(frozen=True)
class Progress:
    """How far the prompt has been read, cached tokens included."""

    read_tokens: int
    cached_tokens: int
    prompt_tokens: int


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """The answer has ended. held_bytes: of its cache, by place ("gpu", "ram")."""

    finish: str
    new_tokens: int
    cached_tokens: int
    read_seconds: float
    write_seconds: float
    held_bytes: dict[str, int]
    stats: CacheStats


@dataclass(frozen=True)
class Failed:
    """There will be no answer. reason: for whoever asked; status: what it is in HTTP."""

    reason: str
    status: int = 500


Event = Progress | Text | Done | Failed


class Busy(Exception):  # noqa: N818
    """As many requests as the server takes are under way."""


@dataclass(eq=False)
class Job:
    """A request under way. report: called from the engine's thread with each event; the last is Done or Failed."""

    owner: str
    request: Request
    report: Callable[[Event], object]
    accepted: float = field(default_factory=time.perf_counter)
    answer: Answer | None = None
    cancelled: bool = False
    begun_anew: bool = False


class Engine:
    """Answers on one model, which nothing else may use meanwhile. limit_bytes: of contexts that are kept for later."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: HGAConfig,
        contexts: Contexts,
        *,
        max_requests: int,
        metrics: Metrics,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_requests = max_requests
        self._config = config
        self._contexts = contexts
        self._metrics = metrics
        self._jobs: list[Job] = []  # the engine's thread iterates over copies
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="hga engine", daemon=True)
        self._thread.start()

    # ---- called from any thread ----------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Take a job. Busy if there are `max_requests` already."""
        with self._changed:
            if self._closed:
                raise Busy("the server is shutting down")
            if len(self._jobs) >= self.max_requests:
                raise Busy(f"{self.max_requests} requests are under way, as many as this server takes; try again later")
            self._jobs.append(job)
            self._metrics.under_way.set(len(self._jobs))
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more: its memory is given back after the turn that is under way, at most."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """End all jobs and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self._closed

    # ---- the engine's thread -------------------------------------------------------------------------

    def _run(self) -> None:
        untidy_since: float | None = None
        while True:
            with self._changed:
                patience = None if untidy_since is None else IDLE_SECONDS
                self._changed.wait_for(lambda: self._jobs or self._closed, patience)
                jobs = list(self._jobs)
                if self._closed:
                    break
            if untidy_since is not None and (not jobs or time.monotonic() > untidy_since + BUSY_SECONDS):
                return_freed_memory()
                untidy_since = None
            if jobs and untidy_since is None:
                untidy_since = time.monotonic()
            while jobs:
                self._turn(jobs.pop(0))  # not held any longer: the last one's cache must not wait for the next job
        for job in jobs:
            self._end(job, Failed("the server is shutting down", 503))

    def _turn(self, job: Job) -> None:
        """One step of one job; whatever goes wrong ends this job alone."""
        try:
            if job.cancelled:
                self._metrics.cancelled.inc()
                self._end(job, Failed("cancelled", 499))
            elif job.answer is None:
                self._start(job)
            else:
                self._advance(job, job.answer)
        except Exception as error:
            if _is_out_of_room(error):
                logger.warning("a request of %d tokens found no room: %s", len(job.request.prompt_ids), error)
                failure = Failed(
                    "there is not enough memory or disk for this request now; try again, send less or lower max_tokens",
                    503,
                )
            else:
                logger.exception("a request failed")
                failure = Failed("the answer failed; the server's log says why")
            self._recover(job, error, failure)

    def _recover(self, job: Job, error: Exception, failure: Failed) -> None:
        """Begin a job anew, once, if what can be forgotten may help and nobody has seen a token of it; else end it."""
        answer, helps = job.answer, False
        if job.begun_anew:
            pass
        elif _is_out_of_room(error):
            helps = self._contexts.make_room(error.missing_bytes if isinstance(error, HostRoomError) else None)
        elif answer is not None and isinstance(error, ValueError | OSError):  # as of a saved file that was damaged
            helps = self._contexts.distrust(answer.cache)
        if answer is not None:
            answer.cache.reset()  # now: layers that were cut off in a forward know each other in a circle
        return_freed_memory()
        if helps and (answer is None or not answer.written):
            job.answer, job.begun_anew = None, True
        else:
            self._end(job, failure)

    def _start(self, job: Job) -> None:
        """Give a job a cache of what was read before, unless somebody is just reading what it needs."""
        prompt = job.request.prompt_ids
        cache, kept = None, 0
        context, spared = self._contexts.find(job.owner, prompt, self.model)
        if context is not None and spared:
            cache, kept = context.cache, spared
        for other in self._jobs:
            if other.answer is None or other.cancelled or other.owner != job.owner or other is job:
                continue
            common = common_prefix(other.answer.ids, prompt)
            reached = usable(other.answer.cache, min(common, other.answer.fed_tokens), len(prompt))
            if other.answer.is_reading and common > max(kept, other.answer.fed_tokens) + WORTH_WAITING_TOKENS:
                return
            if reached > kept:
                cache, kept = other.answer.cache, reached
        mine = HGACache(config=self.model.config, hga_config=self._config) if cache is None else cache.fork()
        if cache is not None:
            mine.keep_first(kept)
        job.answer = Answer(self.model, self.tokenizer, mine, job.request)
        job.report(Progress(kept, kept, len(prompt)))

    def _advance(self, job: Job, answer: Answer) -> None:
        was_reading = answer.is_reading
        before = answer.fed_tokens
        text = answer.advance()
        if was_reading:
            self._metrics.read_tokens.inc(min(answer.fed_tokens, len(job.request.prompt_ids)) - before)
            job.report(Progress(answer.fed_tokens, answer.cached_tokens, len(job.request.prompt_ids)))
            if not answer.is_reading:
                self._metrics.first_token_seconds.observe(time.perf_counter() - job.accepted)
                if answer.fed_tokens - answer.cached_tokens > WORTH_WAITING_TOKENS:
                    # Kept from here on: whoever stops the answer and asks again has not to wait for the reading.
                    self._contexts.add(job.owner, list(job.request.prompt_ids), answer.cache.fork())
        if text:
            job.report(Text(text))
        if answer.finish is not None:
            self._finish(job, answer, answer.finish)

    def _finish(self, job: Job, answer: Answer, finish: str) -> None:
        stats = answer.cache.stats()
        done = Done(
            finish,
            len(answer.written),
            answer.cached_tokens,
            answer.read_seconds,
            answer.write_seconds,
            self._by_place(answer.cache.held_bytes(set())),
            stats,
        )
        self._metrics.prompt_tokens.inc(len(job.request.prompt_ids))
        self._metrics.cached_tokens.inc(answer.cached_tokens)
        self._metrics.new_tokens.inc(len(answer.written))
        # A twin: what decoding needs (a captured graph, slots and scratch on a GPU) goes with the answer.
        self._contexts.add(job.owner, answer.ids[: answer.fed_tokens], answer.cache.fork())
        self._end(job, done)

    def _by_place(self, held_bytes: dict[str, int]) -> dict[str, int]:
        """Bytes by the memory that they are in: beside a model on a CPU is in RAM, too."""
        placed: dict[str, int] = {}
        for tier, count in held_bytes.items():
            place = tier if tier != "device" else "gpu" if self.model.device.type == "cuda" else "ram"
            placed[place] = placed.get(place, 0) + count
        return placed

    def _end(self, job: Job, event: Event) -> None:
        job.answer = None
        with self._changed:
            if job in self._jobs:  # an error while it ended brings a job here twice
                self._jobs.remove(job)
            self._metrics.under_way.set(len(self._jobs))
        self._metrics.kept(len(self._contexts), self._by_place(self._contexts.held_bytes()), self._contexts.evictions)
        job.report(event)


def _is_out_of_room(error: Exception) -> bool:
    """Whether forgetting old contexts, whose archives lie in memory or in scratch files, may help."""
    return is_out_of_memory(error) or (isinstance(error, OSError) and error.errno == errno.ENOSPC)
