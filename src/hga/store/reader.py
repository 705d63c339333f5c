"""Batched reads of one file by offset: O_DIRECT `preadv` in a pool of threads, every batch under a deadline."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from hga.store.traffic import Traffic

PAGE_BYTES = 4096
"""What offsets, lengths and buffers of O_DIRECT are multiples of."""
THREADS = 32
"""That read for one caller at once."""
MOST_THREADS = 256
"""That read for all: more than one caller needs, so that those which a hung device holds do not stop other files."""
DEADLINE_SECONDS = 60.0
"""I/O that makes no progress for this long is given up."""
_END_SECONDS = 5.0  # that a process which ends waits for I/O under way

Preadv = Callable[[int, Sequence[memoryview], int], int]


class OpenFile:
    """A file that is closed with its last user. `direct`: whether reads and writes go past the page cache."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.descriptor = descriptor
        self.name = name
        self.direct = False

    def try_direct(self, prepare: Callable[[memoryview], object]) -> None:
        """Turn O_DIRECT on if a real read works with it; `prepare` gets a page and may write it to the file first."""
        page = mmap.mmap(-1, PAGE_BYTES)
        try:
            self._set_direct(True)
            prepare(memoryview(page))
            os.preadv(self.descriptor, [page], 0)
            self.direct = True
        except (OSError, AttributeError):  # refused by the file system, or a system without it
            with contextlib.suppress(OSError, AttributeError):
                self._set_direct(False)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def _set_direct(self, on: bool) -> None:
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)

    def __del__(self) -> None:
        os.close(self.descriptor)


class Reader:
    """Reads extents of one file, many at once."""

    def __init__(
        self,
        file: OpenFile,
        traffic: Traffic,
        *,
        preadv: Preadv = os.preadv,
        deadline_seconds: float = DEADLINE_SECONDS,
    ) -> None:
        """preadv: what reads; another one stands for a faulty or slow device."""
        self.file = file
        self.traffic = traffic
        self.deadline_seconds = deadline_seconds
        self._preadv = preadv
        self._threads = shared_threads("hga-read", MOST_THREADS)

    def read(self, offsets: Sequence[int], targets: Sequence[Sequence[memoryview]]) -> None:
        """Fill targets[i], consecutive buffers, from offsets[i] on. With O_DIRECT all are multiples of a page.

        OSError that names file, offset and length if the device fails or the file ends early; TimeoutError (an
        OSError) if nothing moves within the deadline: a late read may then still write into the buffers, which must
        not be used again.
        """
        if not offsets:
            return
        if not self.file.direct and hasattr(os, "posix_fadvise"):
            for offset, buffers in zip(offsets, targets, strict=True):
                os.posix_fadvise(self.file.descriptor, offset, sum(map(len, buffers)), os.POSIX_FADV_WILLNEED)
        self.traffic.note_queue(len(offsets))
        batch = _Batch(self, offsets, targets, min(len(offsets), THREADS))
        for _ in range(batch.workers):
            self._threads.submit(batch.work)
        batch.wait(self.deadline_seconds)

    def read_extent(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fill consecutive buffers in the calling thread; returns the bytes read."""
        wanted, done = sum(map(len, buffers)), 0
        while done < wanted:
            try:
                got = self._preadv(self.file.descriptor, _behind(buffers, done), offset + done)
            except OSError as error:
                raise OSError(
                    error.errno, f"reading {wanted} bytes at offset {offset} of {self.file.name}: {error.strerror}"
                ) from error
            reached = done + got
            if self.file.direct and reached < wanted:
                reached -= reached % PAGE_BYTES  # the rest of a short read starts on a page again
            if reached <= done:
                raise OSError(
                    errno.EIO,
                    f"reading {wanted} bytes at offset {offset} of {self.file.name}: only {done + got} came, the "
                    "file is shorter than it was (it was cut off)",
                )
            done = reached
        return wanted


class _Batch:
    """Extents that threads take in turn."""

    def __init__(
        self, reader: Reader, offsets: Sequence[int], targets: Sequence[Sequence[memoryview]], workers: int
    ) -> None:
        self.workers = workers
        self._reader, self._offsets, self._targets = reader, offsets, targets
        self._next = itertools.count()  # its steps are atomic
        self._lock = threading.Lock()
        self._working = workers
        self._done = threading.Event()
        self._moved = time.monotonic()
        self._error: BaseException | None = None
        self._stopped = False

    def work(self) -> None:
        """Read extents until none is left."""
        latencies: list[float] = []
        read_bytes = 0
        try:
            while not self._stopped and (index := next(self._next)) < len(self._offsets):
                started = time.perf_counter()
                read_bytes += self._reader.read_extent(self._offsets[index], self._targets[index])
                latencies.append(time.perf_counter() - started)
                self._moved = time.monotonic()
        except BaseException as error:
            self._error, self._stopped = error, True
        self._reader.traffic.add_reads(latencies, read_bytes)
        with self._lock:
            self._working -= 1
            if not self._working:
                self._done.set()

    def wait(self, deadline_seconds: float) -> None:
        """Wait for all threads, since they own the buffers; raise what went wrong."""
        try:
            while not self._done.wait(max(0.0, self._moved + deadline_seconds - time.monotonic())):
                if time.monotonic() - self._moved >= deadline_seconds:
                    raise TimeoutError(
                        errno.ETIMEDOUT,
                        f"reading from {self._reader.file.name}: nothing came for {deadline_seconds:g} seconds "
                        f"({len(self._offsets)} reads from offset {min(self._offsets)} on); the device hangs",
                    )
        except BaseException:  # also an interrupt: what has not begun is not read any more
            self._stopped = True
            raise
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame: a cycle would keep store and buffers


def _behind(buffers: Sequence[memoryview], done: int) -> Sequence[memoryview]:
    """What is left of consecutive buffers behind their first bytes."""
    left = []
    for buffer in buffers:
        if done < len(buffer):
            left.append(buffer[done:] if done else buffer)
        done = max(0, done - len(buffer))
    return left


class Threads:
    """At most `count` threads that run what is submitted, until the last reference to this object is gone.

    One is started whenever none is idle: jobs that hang delay others only when all threads hang.
    """

    def __init__(self, name: str, count: int) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._name, self._count = name, count
        self._threads: list[threading.Thread] = []
        self._idle = _Idle()
        weakref.finalize(self, _stop, self._jobs, self._threads)

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job, which must not raise, in some thread."""
        with self._idle.lock:
            # Below 0 where jobs wait: the threads that take them do not become idle.
            started = self._idle.count <= 0 and len(self._threads) < self._count
            self._idle.count -= not started
            if started:
                arguments = (self._jobs, self._idle)
                self._threads.append(threading.Thread(target=_serve, args=arguments, name=self._name, daemon=True))
                self._threads[-1].start()
        self._jobs.put(job)

    def end(self, deadline_seconds: float) -> None:
        """Drop what has not begun, and wait for what has."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
        _stop(self._jobs, self._threads)
        until = time.monotonic() + deadline_seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))


_SHARED: weakref.WeakValueDictionary[tuple[str, int, int], Threads] = weakref.WeakValueDictionary()


def shared_threads(name: str, count: int) -> Threads:
    """The process's threads of that name: one set for all files, gone with the last of its holders."""
    key = (name, count, os.getpid())  # threads do not survive a fork
    threads = _SHARED.get(key)
    if threads is None:
        threads = _SHARED[key] = Threads(name, count)
    return threads


@atexit.register
def _end_all() -> None:
    """An interpreter that ends under a running thread may abort the process."""
    for threads in list(_SHARED.values()):
        threads.end(_END_SECONDS)


class _Idle:
    """How many threads are idle, less the jobs that none has taken yet."""

    def __init__(self) -> None:
        self.count, self.lock = 0, threading.Lock()


def _serve(jobs: queue.SimpleQueue[Callable[[], None] | None], idle: _Idle) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # what it holds must not wait for the next one
        with idle.lock:
            idle.count += 1


def _stop(jobs: queue.SimpleQueue[Callable[[], None] | None], threads: list[threading.Thread]) -> None:
    for _ in threads:
        jobs.put(None)
