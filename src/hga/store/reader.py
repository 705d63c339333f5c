"""Batched reads of one file by offset: O_DIRECT `preadv` in a pool of threads, every batch under a deadline."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import mmap
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise

from hga.store.traffic import Traffic

PAGE_BYTES = 4096
"""What offsets, lengths and buffers of O_DIRECT are multiples of."""
THREADS = 32
"""That read for one batch at once."""
MOST_THREADS = 256
"""That read for all: more than one caller needs, so that those which a hung device holds do not stop other files."""
DEADLINE_SECONDS = 60.0
"""I/O that makes no progress for this long is given up."""
_SHARE = 4  # extents that a thread takes at once, where there are enough for all
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
        if offsets:
            self.start(offsets, targets).finish()

    def start(self, offsets: Sequence[int], targets: Sequence[Sequence[memoryview]], ends: Sequence[int] = ()) -> Batch:
        """Begin to read, as `read` does, parts that can be waited for one by one. Threads ask for targets[i].

        ends: where each part ends, in extents; without, all of them are one.
        """
        if not self.file.direct and hasattr(os, "posix_fadvise"):
            for offset, buffers in zip(offsets, targets, strict=True):
                os.posix_fadvise(self.file.descriptor, offset, sum(map(len, buffers)), os.POSIX_FADV_WILLNEED)
        self.traffic.note_queue(len(offsets))
        batch = Batch(self, offsets, targets, ends or (len(offsets),))
        for _ in range(batch.workers):
            self._threads.submit(batch.work)
        return batch

    def read_extent(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fill consecutive buffers in the calling thread; returns the bytes read."""
        wanted, done = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers)), 0
        while done < wanted:
            try:
                left = _behind(buffers, done) if done else buffers
                got = self._preadv(self.file.descriptor, left, offset + done)
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


class Batch:
    """Extents on their way: threads take them in turn, neighbours together, and parts of them arrive in order."""

    def __init__(
        self, reader: Reader, offsets: Sequence[int], targets: Sequence[Sequence[memoryview]], ends: Sequence[int]
    ) -> None:
        self._reader, self._offsets, self._targets = reader, offsets, targets
        size = max(1, min(_SHARE, len(offsets) // (4 * THREADS)))
        shares = [
            (part, range(start, min(start + size, end)))
            for part, (begin, end) in enumerate(pairwise((0, *ends)))
            for start in range(begin, end, size)
        ]
        self._shares = iter(shares)  # its steps are atomic
        self._left = [-(-(end - begin) // size) for begin, end in pairwise((0, *ends))]  # shares of each part
        self.workers = self._working = min(len(shares), THREADS)
        self._changed = threading.Condition()
        self._moved = time.monotonic()
        self._error: BaseException | None = None
        self._stopped = False

    def work(self) -> None:
        """Read extents until none is left."""
        latencies: list[float] = []
        read_bytes = 0
        read, offsets, targets = self._reader.read_extent, self._offsets, self._targets
        try:
            for part, share in self._shares:
                started = time.monotonic()
                for index in share:
                    if self._stopped:
                        return
                    read_bytes += read(offsets[index], targets[index])
                    self._moved = ended = time.monotonic()
                    latencies.append(ended - started)
                    started = ended
                with self._changed:
                    self._left[part] -= 1
                    if not self._left[part]:
                        self._changed.notify()
        except BaseException as error:
            self._error, self._stopped = error, True
        finally:
            self._reader.traffic.add_reads(latencies, read_bytes)
            with self._changed:
                self._working -= 1
                if not self._working:
                    self._changed.notify()

    def wait(self, part: int) -> None:
        """Wait until a part has arrived; once a read failed, until no thread uses the buffers, and raise its error."""
        self._wait(lambda: not self._left[part])

    def finish(self) -> None:
        """Wait until no thread uses the buffers; raise what went wrong."""
        self._wait(lambda: False)

    def stop(self) -> None:
        """Begin no further read."""
        self._stopped = True

    def settle(self) -> None:
        """Wait until no thread uses the buffers, whatever came of it; TimeoutError as ever."""
        self._wait_until(lambda: False)
        self._error = None  # its traceback holds this batch

    def _wait(self, arrived: Callable[[], bool]) -> None:
        self._wait_until(arrived)
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame: a cycle would keep store and buffers

    def _wait_until(self, arrived: Callable[[], bool]) -> None:
        deadline_seconds = self._reader.deadline_seconds
        try:
            with self._changed:
                while self._working and (self._stopped or not arrived()):
                    left = self._moved + deadline_seconds - time.monotonic()
                    if left <= 0:
                        raise TimeoutError(
                            errno.ETIMEDOUT,
                            f"reading from {self._reader.file.name}: nothing came for {deadline_seconds:g} seconds "
                            f"({len(self._offsets)} reads from offset {min(self._offsets)} on); the device hangs",
                        )
                    self._changed.wait(left)
        except BaseException:  # also an interrupt: what has not begun is not read any more
            self._stopped = True
            raise


def is_over(error: BaseException) -> bool:
    """Whether an error leaves no read under way; after a deadline or an interrupt late ones may still write."""
    return isinstance(error, OSError | ValueError) and not isinstance(error, TimeoutError)


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
